"""Scaled dot-product attention, arXiv:1706.03762, eq. 1."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, wrong
from torch.nn import functional as F

from attnzoo.core import NO_MASK, Layout, Mask, MultiHead, watch
from attnzoo.functional import split_heads
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.testing import against


@against(Softmax)
def test_oracle(q, k, v, allowed):
    """Query by query: softmax(k q / √d) over the keys that are seen, times v."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        see = allowed[b, h, i]
        if see.any():
            weights = (k[b, h, see] @ q[b, h, i] / math.sqrt(q.shape[-1])).softmax(0)
            out[b, h, i] = weights @ v[b, h, see]
    return out


def head(change):
    """softmax with its arguments changed by a function of q, k, v and the mask."""

    def attend(self, q, k, v, *, mask, layout):
        q, k, v, mask = change(q, k, v, mask)
        return Softmax.attend(self, q, k, v, mask=mask, layout=layout)

    return wrong(Softmax, attend=attend)


def over_queries(self, q, k, v, *, mask, layout):
    allowed = mask.dense(q.shape[2], k.shape[2])
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if allowed is None else scores.masked_fill(~allowed, -1e9)
    return scores.softmax(dim=-2) @ v


def inverted(mask):
    return Mask(keys=None if mask.keys is None else ~mask.keys, pairs=mask.pairs, causal=mask.causal)


def first_head(mask):
    return mask if mask.pairs is None else Mask(keys=mask.keys, pairs=mask.pairs[:, :1], causal=mask.causal)


def first_sample(mask):
    return mask if mask.pairs is None else Mask(keys=mask.keys, pairs=mask.pairs[:1], causal=mask.causal)


MUTANTS = {
    "no scale": head(lambda q, k, v, mask: (q * q.shape[-1] ** 0.5, k, v, mask)),
    "a scale of 1/d": head(lambda q, k, v, mask: (q * q.shape[-1] ** -0.5, k, v, mask)),
    "over the queries": wrong(Softmax, attend=over_queries),
    "mask ignored": head(lambda q, k, v, mask: (q, k, v, NO_MASK)),
    "keys inverted": head(lambda q, k, v, mask: (q, k, v, inverted(mask))),
    "pairs of the first head": head(lambda q, k, v, mask: (q, k, v, first_head(mask))),
    "pairs of the first sample": head(lambda q, k, v, mask: (q, k, v, first_sample(mask))),
    "keys for values": head(lambda q, k, v, mask: (q, k, k, mask)),
    "no gradient to the keys": head(lambda q, k, v, mask: (q, k.detach(), v, mask)),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_a_unit_query_on_unit_keys():
    q = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
    keys = torch.eye(2, dtype=torch.float64)[None, None]
    out = Softmax(place(2))(q, keys, keys, layout=Layout((2,)))
    e = math.exp(1 / math.sqrt(2))
    near(out, [e / (e + 1), 1 / (e + 1)])
    near(out, [0.6698, 0.3302], 5e-5)


def test_hand_a_zero_query_gives_the_mean_of_the_values():
    k, v = normal(2, 1, 1, 5, 3)
    out = Softmax(place(3, tokens=5))(torch.zeros(1, 1, 1, 3).double(), k, v, layout=Layout((5,)))
    near(out, v.mean(dim=2).reshape(-1))


@pytest.mark.parametrize("bias,number", [(True, 4 * 48 * 48 + 4 * 48), (False, 4 * 48 * 48)])
def test_multi_head_attention_has_4_c_squared_parameters(bias, number):
    site = place(48, 4, qkv_bias=bias, proj_bias=bias)
    assert count(MultiHead(site, Softmax(site))) == number


# Identities


def test_identity_the_same_vector_added_to_every_key_changes_nothing():
    q, k, v = normal(3, 2, 2, 4, 3)
    part, layout = Softmax(place(6, 2, 4)), Layout((4,))
    near(part(q, k + normal(3), v, layout=layout), part(q, k, v, layout=layout))
    assert (part(q, k * 2, v, layout=layout) - part(q, k, v, layout=layout)).abs().max() > 1e-3


def test_the_key_bias_has_no_gradient():
    site = place(6, 2, 4)
    part = MultiHead(site, Softmax(site)).double()
    part(normal(2, 4, 6), layout=site.layout).square().sum().backward()
    gradient = part.qkv.bias.grad
    assert gradient[6:12].abs().max() < 1e-14  # of the keys
    assert gradient[:6].abs().max() > 1e-6 and gradient[12:].abs().max() > 1e-6


def test_identity_one_number_added_to_all_scores_changes_nothing():
    q, k, v = normal(3, 1, 1, 4, 3)
    part = Softmax(place(3, tokens=4))
    plain = part(q, k, v, layout=Layout((4,)))
    with watch(part, "scores", lambda _, s: s + 7.0):
        near(part(q, k, v, layout=Layout((4,))), plain)


@pytest.mark.parametrize("kinds", [(), ("keys",), ("pairs",), ("keys", "pairs", "causal")])
def test_identity_pytorchs_own(kinds):
    q, k, v = normal(2, 3, 4, 5), normal(2, 3, 6, 5), normal(2, 3, 6, 5)
    mask = Mask(
        keys=torch.rand(2, 6) < 0.7 if "keys" in kinds else None,
        pairs=torch.rand(2, 3, 4, 6) < 0.7 if "pairs" in kinds else None,
        causal="causal" in kinds,
    )
    allowed = mask.dense(4, 6)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    if allowed is not None:
        wanted = torch.where(allowed.any(-1, keepdim=True), wanted, 0.0)
    near(Softmax(place(15, 3, 6))(q, k, v, mask=mask, layout=Layout((6,))), wanted)


def test_the_fused_kernel_and_the_explicit_form_agree():
    site = place(24, 3, 17)
    part = MultiHead(site, Softmax(site)).double()
    x = normal(2, 17, 24)
    fast = part(x, layout=site.layout)
    with watch(part, None, lambda *_: None):
        near(part(x, layout=site.layout), fast)
    q, k, v = (split_heads(t, 3) for t in part.qkv(x).chunk(3, dim=-1))
    near(part.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), fast)


# Masks


def test_later_tokens_are_hidden_and_padded_ones_too():
    site = place(6, 2, 5)
    part = MultiHead(site, Softmax(site)).double()
    x = normal(1, 5, 6)
    edited = x.clone()
    edited[:, 3] += 1
    causal = [part(t, mask=Mask(causal=True), layout=site.layout)[:, :3] for t in (x, edited)]
    near(causal[0] - causal[1], torch.zeros(1, 3, 6))
    keys = torch.tensor([[True, True, True, False, True]])
    padded = [part(t, mask=Mask(keys=keys), layout=site.layout)[:, [0, 1, 2, 4]] for t in (x, edited)]
    near(padded[0] - padded[1], torch.zeros(1, 4, 6))
    free = [part(t, layout=site.layout) for t in (x, edited)]
    assert (free[0] - free[1])[:, :3].abs().max() > 1e-4


# Narrow numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_a_thousand_stay_finite_in_half_precision(dtype):
    q = torch.full((1, 1, 3, 4), 22.0, dtype=dtype)
    k = torch.stack([torch.full((4,), s, dtype=dtype) for s in (22.0, -22.0, 0.0)])[None, None]
    mask = Mask(keys=torch.tensor([[True, True, False]]))
    ones = torch.ones(1, 1, 3, 4, dtype=dtype)
    out = Softmax(place(4, tokens=3))(q, k, ones, mask=mask, layout=Layout((3,)))
    assert torch.equal(out, torch.ones_like(out))


def test_narrow_numbers_stay_near():
    narrow(Softmax, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7))
