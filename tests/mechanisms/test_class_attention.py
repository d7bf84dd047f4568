"""Class attention of CaiT, arXiv:2103.17239, §3: timm's layers, with a key mask and taps."""

import math

import pytest
import torch
from by_hand import caught, count, near, normal, place, seen, spread, wrong
from timm.models.cait import LayerScaleBlockClassAttn
from torch import nn

from attnzoo.core import Layout, Mask, options_of
from attnzoo.mechanisms.latent.class_attention import ClassAttention
from attnzoo.testing import against


def normed(layer, y):
    """Layer normalisation of each row, written out."""
    centred = y - y.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + layer.eps) * layer.weight + layer.bias


def linear(layer, y):
    """W y + b of each row."""
    return y @ layer.weight.T + (0 if layer.bias is None else layer.bias)


@against(ClassAttention, examples=20)
def test_oracle(component, x, keys):
    """Layer by layer, head by head: t asks itself and the tokens that exist; t += γ₁ W read; t += γ₂ MLP(norm(t))."""
    heads, out = component.heads, []
    d = x.shape[2] // heads
    for tokens, exist in zip(x, keys, strict=True):
        t = component.token
        for layer in component.layers:
            attn, read = layer.attn, normed(layer.norm1, torch.stack([t, *tokens[exist]]))
            q, k, v, merged = linear(attn.q, read[0]), linear(attn.k, read), linear(attn.v, read), []
            for h in range(heads):
                mine = slice(h * d, (h + 1) * d)
                shares = torch.exp(k[:, mine] @ q[mine] / math.sqrt(d))
                merged.append(shares / shares.sum() @ v[:, mine])
            t = t + layer.gamma_1 * linear(attn.proj, torch.cat(merged))
            hidden = linear(layer.mlp.fc1, normed(layer.norm2, t))
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            t = t + layer.gamma_2 * linear(layer.mlp.fc2, hidden)
        out.append(normed(component.norm, t))
    return torch.stack(out)


def pooled(
    part, x, mask, own=True, scale=-0.5, over=-1, residual=1.0, gamma=True, mlp=True, change=False, norm=True,
    swap=False, last=True, query=True,
):  # fmt: skip
    """The equations with a fault."""
    b, n, _ = x.shape
    keys = torch.ones(b, n, dtype=torch.bool) if mask.keys is None else mask.keys
    there = torch.cat([torch.full((b, 1), own), keys], 1)[:, None, None]
    t = part.token.expand(b, 1, -1)
    for layer in part.layers:
        attn, all_ = layer.attn, torch.cat([t, x], 1)
        u = layer.norm1(all_) if norm else torch.cat([layer.norm1(t), x], 1)
        q, k, v = (f(u).unflatten(2, (part.heads, -1)).transpose(1, 2) for f in (attn.q, attn.k, attn.v))
        q, k = (k, q) if swap else (q, k)
        q = q[:, :, :1] if query else q.mean(2, keepdim=True)
        scores = (q @ k.mT * k.shape[-1] ** scale).masked_fill(~there, -1e9)
        weights = scores.softmax(over).masked_fill(~there, 0.0)
        read = attn.proj((weights @ v).transpose(1, 2).flatten(2))
        t = residual * t + (layer.gamma_1 if gamma else 1) * read
        if mlp:
            t = t + layer.gamma_2 * layer.mlp(layer.norm2(t))
        if change:  # the tokens are read once more
            x = x + t
    return (part.norm(t) if last else t)[:, 0]


def with_fault(**fault):
    """The pool with one fault."""
    return wrong(ClassAttention, pool=lambda self, x, *, mask, layout: pooled(self, x, mask, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=8).ok


MUTANTS = {
    "the class token does not read itself": with_fault(own=False),
    "no scale": with_fault(scale=0.0),
    "the scale of all channels": with_fault(scale=-1.0),
    "q and k swapped": with_fault(swap=True),
    "softmax over the heads": with_fault(over=1),
    "softmax over the batch": with_fault(over=0),
    "no residual": with_fault(residual=0.0),
    "no γ₁": with_fault(gamma=False),
    "no MLP": with_fault(mlp=False),
    "tokens change between layers": with_fault(change=True),
    "only the class token is normalised, as in XCiT": with_fault(norm=False),
    "no last norm": with_fault(last=False),
    "all tokens ask": with_fault(query=False),
    "the mask ignored": wrong(ClassAttention, pool=lambda self, x, *, mask, layout: pooled(self, x, Mask())),
    "the mask inverted": wrong(
        ClassAttention,
        pool=lambda self, x, *, mask, layout: pooled(
            self, x, mask if mask.keys is None else Mask(keys=~mask.keys)
        ),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def pool(dim=8, heads=2, tokens=5, **options) -> ClassAttention:
    """In float64, with weights of a size that matters."""
    return spread(ClassAttention(place(dim, heads, tokens), **options), 0.5)


# By hand


def test_hand_two_channels_one_token():
    """norm(t) = (-1, 1) and norm(x) = (1, -1), q = k = v: scores ±√2, so it reads (1 - 2p) (1, -1), p its own share."""
    part = pool(2, 1, 1, depth=1)
    (layer,) = part.layers
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()
        for linear_ in (layer.attn.q, layer.attn.k, layer.attn.v, layer.attn.proj):
            linear_.weight.copy_(torch.eye(2))
        for norm in (layer.norm1, part.norm):
            norm.weight.fill_(1)
        part.token.copy_(torch.tensor([-1.0, 1]))
        layer.gamma_1.fill_(10)
    for norm in (layer.norm1, part.norm):
        norm.eps = 0.0
    x = torch.tensor([[[5.0, 1]]]).double()
    own = 1 / (1 + math.exp(-2 * math.sqrt(2)))
    near(seen(part, x, tap="weights_own_1", layout=Layout((1,))), [[[[own]]]])
    near(seen(part, x, tap="weights_1", layout=Layout((1,))), [[[[1 - own]]]])
    near(part(x, layout=Layout((1,))), [[-1, 1]])
    part.norm = nn.Identity()
    near(part(x, layout=Layout((1,))), [[-1 - 10 * (2 * own - 1), 1 + 10 * (2 * own - 1)]])


def test_hand_parameters():
    """Of a layer: q, k, v, proj, MLP, two norms, two γ; of timm's, less the bias of keys."""
    c = 8
    layer = 3 * c * c + 2 * c + (c * c + c) + (8 * c * c + 5 * c) + 2 * 2 * c + 2 * c
    assert count(pool()) == c + 2 * layer + 2 * c
    assert count(LayerScaleBlockClassAttn(c, 2, qkv_bias=True)) == layer + c
    assert count(pool(depth=3)) - count(pool(depth=1)) == 2 * layer
    assert count(pool(mlp_ratio=2.0, depth=1)) == c + layer - (4 * c * c + 2 * c) + 2 * c
    assert count(ClassAttention(place(c, 2, qkv_bias=False))) == count(pool()) - 2 * 2 * c


def test_hand_the_start():
    """A host that initialises once more gets the class token and γ anew."""
    part = ClassAttention(place(64, 2, 4), layer_scale=0.1)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.fill_(7.0)
    part.init_weights()
    assert 0.01 < part.token.detach().std() < 0.03 and part.token.detach().abs().max() <= 0.04
    for layer in part.layers:
        near(torch.stack([layer.gamma_1, layer.gamma_2]), torch.full((2, 64), 0.1), 1e-7)


def test_defaults():
    assert options_of(ClassAttention)().model_dump() == {"depth": 2, "mlp_ratio": 4.0, "layer_scale": 1e-4}


# Identities


@pytest.mark.parametrize("heads,ratio,depth", [(1, 4.0, 1), (2, 4.0, 2), (4, 2.0, 3)])
def test_identity_timms_layers(heads, ratio, depth):
    """The bias of timm's keys changes nothing; patches come out as they went in."""
    theirs = [
        spread(LayerScaleBlockClassAttn(8, heads, ratio, qkv_bias=True, norm_layer=nn.LayerNorm))
        for _ in range(depth)
    ]
    part, x = pool(8, heads, 7, mlp_ratio=ratio, depth=depth), normal(3, 7, 8)
    token = part.token.expand(3, 1, 8)
    for own, layer in zip(part.layers, theirs, strict=True):
        own.load_state_dict({k: t for k, t in layer.state_dict().items() if k != "attn.k.bias"})
        token = layer(x, token)
    near(part(x, layout=Layout((7,))), part.norm(token)[:, 0])


def test_identity_tokens_in_another_order_give_the_same():
    part, x = pool(), normal(2, 5, 8)
    near(part(x[:, [3, 0, 4, 1, 2]], layout=Layout((5,))), part(x, layout=Layout((5,))))


def test_identity_padding_is_a_shorter_input():
    part, x = pool(), normal(2, 5, 8)
    keys = torch.tensor([[True, False, True, True, False]]).expand(2, 5)
    near(part(x, mask=Mask(keys=keys), layout=Layout((5,))), part(x[:, keys[0]], layout=Layout((3,))))


def test_identity_where_no_token_exists_it_reads_itself():
    part, nobody = pool(depth=1), Mask(keys=torch.zeros(2, 5, dtype=torch.bool))
    x = normal(2, 5, 8).requires_grad_()
    out = part(x, mask=nobody, layout=Layout((5,)))
    (layer,) = part.layers
    t = part.token + layer.gamma_1 * layer.attn.proj(layer.attn.v(layer.norm1(part.token)))
    near(out, part.norm(t + layer.gamma_2 * layer.mlp(layer.norm2(t))).expand(2, 8))
    out.sum().backward()
    assert not x.grad.any() and all(p.grad.isfinite().all() for p in part.parameters() if p.grad is not None)


def test_identity_without_gammas_the_picture_has_no_say():
    part, x = pool(), normal(2, 5, 8)
    with torch.no_grad():
        for layer in part.layers:
            layer.gamma_1.zero_(), layer.gamma_2.zero_()
    near(part(x, layout=Layout((5,))), part.norm(part.token).expand(2, 8))


def test_the_shares_of_token_and_tokens_sum_to_one():
    part, x, keys = (
        pool(depth=3),
        normal(2, 5, 8),
        torch.tensor([[True] * 5, [True, False, False, True, False]]),
    )
    for i in (1, 2, 3):
        shares = [
            seen(part, x, tap=f"weights{own}_{i}", mask=Mask(keys=keys), layout=Layout((5,)))
            for own in ("", "_own")
        ]
        assert shares[0].shape == (2, 2, 1, 5) and shares[1].shape == (2, 2, 1, 1)
        near(shares[0].sum(-1) + shares[1].sum(-1), torch.ones(2, 2, 1))
        assert not shares[0][1, :, :, ~keys[1]].any()


def test_narrow_numbers_stay_near():
    keys = torch.arange(7) < torch.tensor([[7], [4], [1]])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        part = spread(ClassAttention(place(8, 2, 7)), 0.3).to(dtype).double()
        x = normal(3, 7, 8).to(dtype).double()
        for mask in (Mask(), Mask(keys=keys)):
            wanted = part.double()(x, mask=mask, layout=Layout((7,))).detach()
            found = part.to(dtype)(x.to(dtype), mask=mask, layout=Layout((7,)))
            assert found.dtype == dtype
            near(found, wanted, tolerance * max(1.0, float(wanted.abs().max())))
