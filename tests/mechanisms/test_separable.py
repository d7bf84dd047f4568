"""Separable attention of MobileViTv2, arXiv:2206.02680, §3.2."""

import math

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, place, seen, set_all, spread, wrong
from timm.models.mobilevit import LinearSelfAttention

from attnzoo.core import Layout, Mask
from attnzoo.mechanisms.linear.separable import Separable
from attnzoo.testing import against


def affine(layer, t):
    """W t + b, of one vector."""
    return layer.weight @ t + (0 if layer.bias is None else layer.bias)


@against(Separable, examples=40)
def test_oracle(component, x, source, keys):
    """e^{s_j} / Σ e^{s_j} of the tokens that exist; their sum of keys; a gate for every query."""
    out = []
    for s in range(x.shape[0]):
        pairs = [affine(component.qk, source[s, j]) for j in range(source.shape[1]) if keys[s, j]]
        context = torch.zeros(x.shape[2]).double()
        if pairs:
            most = max(float(pair[0].detach()) for pair in pairs)
            shares = [torch.exp(pair[0] - most) for pair in pairs]
            context = sum(share * pair[1:] for share, pair in zip(shares, pairs, strict=True)) / sum(shares)
        rows = []
        for token in x[s]:
            value = affine(component.v, token)
            rows.append(affine(component.proj, torch.where(value > 0, value, 0.0) * context))
        out.append(torch.stack(rows))
    return torch.stack(out)


def form(self, x, source, mask, axis=1, act=torch.relu, swap=False, first=0, weigh=True):
    """The equation, with a fault or without."""
    pair = self.qk(source)
    at = first % pair.shape[-1]
    q = pair[..., at : at + 1]
    k = torch.cat([pair[..., :at], pair[..., at + 1 :]], -1)
    if mask.keys is not None:
        q = q.masked_fill(~mask.keys[..., None], -1e30)
    shares = q.softmax(axis) if weigh else torch.ones_like(q) / q.shape[1]
    if mask.keys is not None:
        shares = shares * mask.keys[..., None]
    context, v = (shares * k).sum(1, keepdim=True), self.v(x)
    return self.proj(v * act(context) if swap else act(v) * context)


def with_fault(**fault):
    """The mechanism with one fault."""
    return wrong(Separable, mix=lambda self, x, source, *, mask, layout: form(self, x, source, mask, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "softmax over the batch": with_fault(axis=0),
    "the last row is w": with_fault(first=-1),
    "no relu": with_fault(act=lambda t: t),
    "relu of the context vector": with_fault(swap=True),
    "a mean": with_fault(weigh=False),
    "values of the context": wrong(Separable, mix=lambda self, x, source, *, mask, layout: form(self, source if source.shape == x.shape else x.flip(1), source, mask) if source is not x else form(self, x.flip(1), source, mask)),
    "the mask ignored": wrong(Separable, mix=lambda self, x, source, *, mask, layout: form(self, x, source, Mask())),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((5,))


def separable(dim=6, tokens=5, **fields) -> Separable:
    """In float64, with weights of a size that matters."""
    return spread(Separable(place(dim, 2, tokens, **fields)))


# By hand


def test_hand_two_tokens_of_one_channel():
    """w = 1, W_k = W_v = W_o = 1: shares (1/4, 3/4) of x = (-ln 3, 0) give -ln 3 / 4; relu(x) is 0."""
    part = set_all(Separable(place(1)), 1.0)
    for layer in (part.qk, part.v, part.proj):
        torch.nn.init.zeros_(layer.bias)
    x = line(-math.log(3), 0)
    near(seen(part, x, layout=Layout((2,))), [[0.25, 0.75]])
    near(part(x, layout=Layout((2,))), [0, 0])
    x = line(math.log(3), 0)
    near(part(x, layout=Layout((2,))), [0.75 * math.log(3) ** 2, 0])


def test_hand_parameters():
    """As many as timm's: 64 · 129 + 129, and 64 · 64 + 64."""
    assert count(Separable(place(64))) == count(LinearSelfAttention(64)) == 12545


def test_hand_one_token_is_its_own_context_vector():
    """N = 1: c = k."""
    part, x = separable(), normal(2, 1, 6)
    near(part(x, layout=Layout((1,))), part.proj(part.v(x).relu() * part.qk(x)[..., 1:]))


# Identities


def test_identity_timms():
    part, x = separable(8, 12), normal(3, 12, 8)
    timms = LinearSelfAttention(8).double()
    with torch.no_grad():
        timms.qkv_proj.weight.copy_(torch.cat([part.qk.weight, part.v.weight])[..., None, None])
        timms.qkv_proj.bias.copy_(torch.cat([part.qk.bias, part.v.bias]))
        timms.out_proj.weight.copy_(part.proj.weight[..., None, None])
        timms.out_proj.bias.copy_(part.proj.bias)
    theirs = timms(x.mT[:, :, None])[:, :, 0].mT  # (b c P=1 N)
    near(part(x, layout=Layout((12,))), theirs)


def test_identity_a_context_of_the_tokens_is_self_attention():
    alone, across = separable(), separable(context_dim=6, context_layout=LAYOUT)
    across.load_state_dict(alone.state_dict())
    x = normal(2, 5, 6)
    near(across(x, x, layout=LAYOUT), alone(x, layout=LAYOUT))


def test_identity_copies_of_a_context_change_nothing():
    """A mean: each token twice weighs half; and in another order it is the same."""
    part, x = separable(context_dim=4, context_layout=Layout((3,))), normal(2, 5, 6)
    context = normal(2, 3, 4)
    wanted = part(x, context, layout=LAYOUT)
    near(part(x, context.repeat(1, 2, 1), layout=LAYOUT), wanted)
    near(part(x, context[:, [2, 0, 1]], layout=LAYOUT), wanted)


def test_identity_equal_scores_give_the_mean():
    part, x = separable(), normal(2, 5, 6)
    torch.nn.init.zeros_(part.qk.weight[:1])
    mean = part.qk(x)[..., 1:].mean(1, keepdim=True)
    near(part(x, layout=LAYOUT), part.proj(part.v(x).relu() * mean))


def test_identity_padding_is_a_shorter_line():
    part, x = separable(), normal(2, 5, 6)
    mask = Mask(keys=(torch.arange(5) < 3).expand(2, 5))
    near(part(x, mask=mask, layout=LAYOUT)[:, :3], part(x[:, :3], layout=Layout((3,))))


def test_where_nobody_exists_only_the_bias_is_left():
    part, x = separable(), normal(1, 5, 6)
    out = part(x, mask=Mask(keys=torch.zeros(1, 5, dtype=torch.bool)), layout=LAYOUT)
    near(out, part.proj.bias.expand(1, 5, 6))


def test_narrow_numbers_stay_near():
    narrow(Separable, [(2, 7, 12)], site=place(12, 3, 7))
