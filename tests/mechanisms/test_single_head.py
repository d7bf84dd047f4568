"""SHViT's single-head attention of some channels, arXiv:2401.16456."""

import copy
import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, set_all, spread, wrong
from timm.models.shvit import SHSA, BasicBlock
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, MultiHead, Site, options_of
from attnzoo.functional import dot_product_attention, masked_group_norm
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.projection.single_head import SingleHead
from attnzoo.testing import against

LAYOUT = Layout((3, 4))


def at(dim=8, layout=LAYOUT, **wishes) -> Site:
    """A site on a plane."""
    return Site("hand", dim, 2, layout, **wishes)


def single_head(dim=8, layout=LAYOUT, **options) -> SingleHead:
    """In float64, with parameters of a size that matters."""
    return spread(SingleHead(at(dim, layout), **options))


def projected(layer, token):
    """γ ⊙ (W t) + β of one token."""
    out = layer.scales[0] * (layer.blocks[0][0] @ token)
    return out if layer.bias is None else out + layer.bias


@against(SingleHead, examples=30)
def test_oracle(component, options, x, keys):
    """μ and σ of all numbers of the tokens that exist, then query by query."""
    (b, n, c), out = x.shape, []
    some = max(1, round(c * options["share"]))
    for s in range(b):
        exist = [i for i in range(n) if keys[s, i]]
        numbers = torch.cat([x[s, i, :some] for i in exist]) if exist else torch.zeros(1).double()
        mean = sum(numbers) / len(numbers)
        deviation = torch.sqrt(((numbers - mean) ** 2).sum() / len(numbers) + 1e-5)
        u = [
            component.norm.weight * (x[s, i, :some] - mean) / deviation + component.norm.bias
            for i in range(n)
        ]
        k, v = ({i: projected(layer, u[i]) for i in exist} for layer in (component.k, component.v))
        for i in range(n):
            q, attended = projected(component.q, u[i]), torch.zeros(some).double()
            shares = [torch.exp(q @ k[j] / math.sqrt(options["qk"])) for j in exist]
            total = sum(shares)
            for j, share in zip(exist, shares, strict=True):
                attended = attended + share / total * v[j]
            held = torch.cat([attended, x[s, i, some:]])
            out.append(projected(component.proj, torch.where(held > 0, held, 0.0)))
    return torch.stack(out).reshape(x.shape)


def joined(attended, rest):
    """relu([Y ; x₂])."""
    return torch.cat([attended, rest], dim=-1).relu()


def faulty(
    norm=masked_group_norm,
    ask=lambda q, k, v: (q, k, v),
    hide=lambda keys: keys,
    part=lambda x, p: (x[..., :p], x[..., p:]),
    join=joined,
    attend=dot_product_attention,
    change=lambda self: None,
):
    """The mechanism with one of its steps replaced."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        first, rest = part(x, self.norm.num_channels)
        keys = None if mask.keys is None else hide(mask.keys)
        u = norm(self.norm, first, keys)
        q, k, v = ask(self.q(u), self.k(u), self.v(u))
        out = attend(self, q[:, None], k[:, None], v[:, None], Mask(keys=keys))[:, 0]
        return self.proj(join(out, rest))

    return wrong(SingleHead, mix=mix)


def over_queries(self, q, k, v, mask):
    """A softmax over the queries."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return self.weights(self.scores(scores).softmax(dim=-2)) @ v


def of_the_batch(norm, x, keys):
    """Statistics of all samples together."""
    keys = torch.ones(x.shape[:2], dtype=torch.bool) if keys is None else keys
    return masked_group_norm(norm, x.flatten(0, 1)[None], keys.flatten(0, 1)[None]).reshape(x.shape)


MUTANTS = {
    "no scale": faulty(ask=lambda q, k, v: (q * q.shape[-1] ** 0.5, k, v)),
    "the scale of the attended channels": faulty(ask=lambda q, k, v: (q * (q.shape[-1] / v.shape[-1]) ** 0.5, k, v)),
    "q and k swapped": faulty(ask=lambda q, k, v: (k, q, v)),
    "softmax over queries": faulty(attend=over_queries),
    "no norm": faulty(norm=lambda norm, x, keys: x * norm.weight + norm.bias),
    "a norm of each token": faulty(norm=lambda norm, x, keys: F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)),
    "a norm of the batch": faulty(norm=of_the_batch),
    "padding in the norm": faulty(norm=lambda norm, x, keys: masked_group_norm(norm, x)),
    "the mask inverted": faulty(hide=torch.logical_not),
    "the mask ignored": faulty(hide=torch.ones_like),
    "the last channels attend": faulty(part=lambda x, p: (x[..., -p:], x[..., : x.shape[-1] - p])),
    "no relu": faulty(join=lambda y, rest: torch.cat([y, rest], dim=-1)),
    "a relu of what attended alone": faulty(join=lambda y, rest: torch.cat([y.relu(), rest], dim=-1)),
    "a relu of the others alone": faulty(join=lambda y, rest: torch.cat([y, rest.relu()], dim=-1)),
    "the others first": faulty(join=lambda y, rest: joined(rest, y)),
    "the others left out": faulty(join=lambda y, rest: joined(y, torch.zeros_like(rest))),
    "γ of the projection left out": faulty(change=lambda self: self.proj.scales[0].fill_(1.0)),
    "no β of values": faulty(change=lambda self: self.v.bias is not None and self.v.bias.zero_()),
    "no β of queries": faulty(change=lambda self: self.q.bias is not None and self.q.bias.zero_()),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


@pytest.mark.parametrize(
    "dim,qk,share,some", [(128, 16, 0.25, 32), (224, 16, 48 / 224, 48), (320, 16, 68 / 320, 68)]
)
def test_hand_parameters(dim, qk, share, some):
    """Of the paper's 18 880, for 128 channels, the 16 of a β of keys are left out."""
    wanted = dim**2 + 2 * dim + some * (2 * qk + some) + 2 * (2 * qk + some) + 2 * some
    part = SingleHead(at(dim), share=share, qk=qk)
    assert count(part) == wanted - qk and part.norm.num_channels == some
    assert count(SHSA(dim, qk, some)) == wanted and (dim > 128 or wanted == 18_880)
    bare = SingleHead(at(dim, qkv_bias=False, proj_bias=False), share=share, qk=qk)
    assert count(part) - count(bare) == qk + some + dim


@pytest.mark.parametrize(
    "dim,share,some", [(8, 0.25, 2), (8, 0.3, 2), (8, 0.9, 7), (4, 0.1, 1), (4, 0.0, 1), (6, 1.0, 6)]
)
def test_hand_how_many_channels_attend(dim, share, some):
    assert SingleHead(at(dim), share=share).norm.num_channels == some


def test_hand_two_tokens():
    """x₁ is 1 and 3, so u = ∓1; with q = k = v = u a token's score is 1 with itself and -1 with the other."""
    part = set_all(SingleHead(at(2, Layout((2,))), share=0.5, qk=1), 1.0)
    with torch.no_grad():
        part.norm.bias.zero_(), part.q.bias.zero_(), part.v.bias.zero_(), part.proj.bias.fill_(10.0)
        part.proj.blocks[0].copy_(torch.tensor([[[1.0, 0], [0, 1]]]))
        part.proj.scales[0].copy_(torch.tensor([2.0, 3]))
    x = torch.tensor([[[1.0, 5], [3, -5]]]).double()
    u = 1 / math.sqrt(1 + 1e-5)
    share = 1 / (1 + math.exp(-2 * u**2))  # of itself
    y = (2 * share - 1) * u  # ∓, of which the first does not pass the relu
    near(part(x, layout=Layout((2,))), [[[10.0, 25], [10 + 2 * y, 10]]], 1e-12)
    near(seen(part, x, layout=Layout((2,))), [[[[share, 1 - share], [1 - share, share]]]])


def test_hand_it_starts_with_zero():
    x = normal(2, 12, 8)
    assert not SingleHead(at()).double()(x, layout=LAYOUT).any()
    assert not BasicBlock(8, 16, 2, "s").double().eval().mixer.m(x.mT.unflatten(2, (3, 4))).any()
    opened = SingleHead(at(), start="one").double()
    assert opened(x, layout=LAYOUT).abs().max() > 1e-2
    near(opened.proj.scales[0], torch.ones(8))
    for layer, fan in ((opened.q, 2), (opened.proj, 8)):
        assert 0.5 < layer.blocks[0].abs().max() * math.sqrt(fan) <= 1


def test_defaults():
    assert options_of(SingleHead)().model_dump() == {"share": 0.25, "qk": 16, "start": "zero"}


# Identities


def copied(theirs, dim, some, qk, layout=LAYOUT) -> SingleHead:
    """Ours with the weights of timm's: batch norms in eval mode are a γ and a β."""
    part = SingleHead(at(dim, layout), share=some / dim, qk=qk).double().eval()

    def fill(conv, norm, layers):
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        rows = 0
        for layer in layers:
            own = slice(rows, rows := rows + len(layer.scales[0]))
            layer.blocks[0].copy_(conv.weight[None, own, :, 0, 0])
            layer.scales[0].copy_(scale[own])
            if layer.bias is not None:  # of keys a softmax would not see it
                layer.bias.copy_(shift[own])

    with torch.no_grad():
        fill(theirs.qkv.c, theirs.qkv.bn, (part.q, part.k, part.v))
        fill(theirs.proj[1].c, theirs.proj[1].bn, (part.proj,))
    part.norm.load_state_dict(theirs.pre_norm.state_dict())
    return part


@pytest.mark.parametrize("dim,some,qk", [(8, 2, 16), (9, 4, 3), (6, 6, 2), (5, 1, 1)])
def test_identity_timms_layer_in_eval_mode(dim, some, qk):
    theirs, x = spread(SHSA(dim, qk, some)), normal(3, dim, 3, 4)
    for norm in (theirs.qkv.bn, theirs.proj[1].bn):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    part, tokens = copied(theirs, dim, some, qk), x.flatten(2).mT
    near(part(tokens, layout=LAYOUT), theirs(x).flatten(2).mT, 1e-10)
    theirs.qkv, theirs.proj[1] = theirs.qkv.fuse(), theirs.proj[1].fuse()
    near(part.fold()(tokens, layout=LAYOUT), theirs(x).flatten(2).mT, 1e-10)


def test_identity_all_channels_are_one_head_of_softmax_attention():
    """Then relu and the projection; queries and keys as wide as the tokens."""
    part, x = single_head(share=1.0, qk=8), normal(2, 12, 8)
    plain = MultiHead(Site("hand", 8, 1, LAYOUT), Softmax(Site("hand", 8, 1, LAYOUT))).double()
    folded = copy.deepcopy(part).fold()
    u = F.group_norm(x.mT, 1, part.norm.weight, part.norm.bias).mT
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([folded.q.weight, folded.k.weight, folded.v.weight]))
        plain.qkv.bias.copy_(torch.cat([folded.q.bias, torch.zeros(8), folded.v.bias]))
        plain.proj.weight.copy_(torch.eye(8)), plain.proj.bias.zero_()
    near(part(x, layout=LAYOUT), folded.proj(plain(u, layout=LAYOUT).relu()))


def test_identity_the_other_channels_act_on_their_token_alone():
    part, x = single_head(), normal(1, 12, 8)
    jacobian = torch.autograd.functional.jacobian(lambda t: part(t, layout=LAYOUT)[0], x)[
        :, :, 0
    ]  # (n c n c)
    other = ~torch.eye(12, dtype=torch.bool)
    moved = jacobian.abs().amax(dim=1)  # (n n c)
    assert not moved[other][:, 2:].any() and (moved[other][:, :2] > 0).any()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [True, False])
def test_identity_folded_it_is_the_same(dtype, tolerance, bias):
    part = spread(SingleHead(at(qkv_bias=bias, proj_bias=bias))).to(dtype)
    x, mask = normal(2, 12, 8).to(dtype), Mask(keys=torch.rand(2, 12) < 0.7)
    wanted = [part(x, mask=m, layout=LAYOUT).detach() for m in (Mask(), mask)]
    assert part.fold() is part and all(type(getattr(part, n)) is nn.Linear for n in ("q", "k", "v", "proj"))
    part.init_weights()  # has nothing to start anew
    for m, out in zip((Mask(), mask), wanted, strict=True):
        near(part(x, mask=m, layout=LAYOUT), out, tolerance)


def test_identity_padding_is_fewer_tokens():
    part, x = single_head(), normal(2, 12, 8)
    keys = torch.arange(12) < torch.tensor([[12], [5]])
    x[~keys] *= 100
    out = part(x, mask=Mask(keys=keys), layout=LAYOUT)
    near(out[0], part(x[:1], layout=LAYOUT)[0])
    near(out[1, :5], part(x[1:, :5], layout=Layout((5,)))[0])


def test_identity_special_tokens_are_tokens():
    part, x = single_head(layout=Layout((3, 4), 2)), normal(2, 14, 8)
    near(part(x, layout=Layout((3, 4), 2)), part(x, layout=Layout((14,))))


def test_identity_the_size_of_what_attends_has_no_say():
    part, x = single_head(), normal(2, 12, 8)
    near(part(torch.cat([1e3 * x[..., :2] + 7, x[..., 2:]], -1), layout=LAYOUT), part(x, layout=LAYOUT), 1e-4)


def test_narrow_numbers_stay_near():
    narrow(SingleHead, [(2, 12, 12)], site=Site("hand", 12, 3, LAYOUT))
