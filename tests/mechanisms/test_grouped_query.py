"""Grouped-query attention, arXiv:2305.13245, §2.2."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, spread, wrong
from torch.nn import functional as F

from attnzoo.core import KVCache, Layout, Mask, MultiHead, Site
from attnzoo.errors import RecipeError
from attnzoo.functional import split_heads
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.projection.grouped_query import GroupedQuery
from attnzoo.testing import against


def linear(layer, x):
    """W x + b for every token."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


@against(GroupedQuery, examples=40)
def test_oracle(component, options, x, source, allowed):
    """Query head h reads keys and values of group ⌊h g / heads⌋; then heads side by side, projected."""
    (b, n, c), heads, groups = x.shape, component.heads, options["groups"]
    d = c // heads
    q, kv = linear(component.q, x), linear(component.kv, source)
    merged = torch.zeros_like(x)
    for s in range(b):
        for h in range(heads):
            g = h * groups // heads
            k, v = kv[s, :, g * d : (g + 1) * d], kv[s, :, (groups + g) * d : (groups + g + 1) * d]
            for i in range(n):
                see = allowed[s, h, i]
                if see.any():
                    weights = (k[see] @ q[s, i, h * d : (h + 1) * d] / math.sqrt(d)).softmax(0)
                    merged[s, i, h * d : (h + 1) * d] = weights @ v[see]
    return linear(component.proj, merged)


def mixing(change):
    """The mechanism with its parameters or mask changed."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            mask = change(self, mask)
        return GroupedQuery.mix(self, x, source, mask=mask, layout=layout)

    return wrong(GroupedQuery, mix=mix)


def turned(self, mask):
    """Values first, then keys."""
    half = self.kv.weight.shape[0] // 2
    self.kv.weight.copy_(self.kv.weight.roll(half, 0))
    return mask


def dealt(self, x, source, *, mask, layout):
    """Group h mod g in the place of ⌊h g / heads⌋."""
    k, v = self.kv(source).chunk(2, dim=-1)
    q, k, v = split_heads(self.q(x), self.heads), split_heads(k, self.groups), split_heads(v, self.groups)
    k, v = (t.repeat(1, self.heads // self.groups, 1, 1) for t in (k, v))
    out = Softmax.attend(self, q, k, v, mask=mask, layout=layout)
    return self.proj(out.transpose(1, 2).flatten(2))


def scaled(self, mask):
    for parameter in self.q.parameters():
        parameter.mul_((parameter.shape[0] / self.heads) ** 0.5)
    return mask


MUTANTS = {
    "values first": mixing(turned),
    "groups dealt in turn": wrong(GroupedQuery, mix=dealt),
    "no scale": mixing(scaled),
    "the mask ignored": mixing(lambda self, mask: Mask()),
    "pairs of the first head": mixing(
        lambda self, mask: mask if mask.pairs is None else Mask(mask.keys, mask.pairs[:, :1], mask.causal)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def groups(number: int, heads: int = 4, dim: int = 8) -> GroupedQuery:
    """Grouped-query attention in float64."""
    return GroupedQuery(place(dim, heads, 5), groups=number).double()


@pytest.mark.parametrize("number", [1, 2, 4])
def test_hand_parameters(number):
    part = GroupedQuery(place(8, 4, qkv_bias=False, proj_bias=False), groups=number)
    assert count(part) == 8 * 8 * (2 + 2 * number / 4)


def test_hand_groups_go_to_neighbouring_heads():
    part = groups(2)
    with torch.no_grad():
        part.kv.weight.zero_()
        part.kv.bias.copy_(
            torch.tensor([0.0] * 4 + [1.0, 1, 2, 2])
        )  # values of group 0 are 1, of group 1 are 2
        part.proj.weight.copy_(torch.eye(8))
        part.proj.bias.zero_()
    out = part(normal(1, 5, 8), layout=Layout((5,)))
    near(out[0, 0], [1, 1, 1, 1, 2, 2, 2, 2])  # heads 0, 0, 1, 1, 2, 2, 3, 3


def test_hand_a_step_caches_keys_and_values_of_the_groups():
    part, cache = groups(2), KVCache()
    part.step(normal(3, 4, 8), cache, mask=Mask(causal=True), layout=Layout((4,)))
    k, v = cache.extend(normal(3, 2, 0, 2), normal(3, 2, 0, 2))
    assert k.shape == v.shape == (3, 2, 4, 2)  # (b g n d)


# Identities


def test_identity_as_many_groups_as_heads_is_multi_head_attention():
    site = place(8, 4, 5)
    part, multi = groups(4), MultiHead(site, Softmax(site)).double()
    with torch.no_grad():
        multi.qkv.weight.copy_(torch.cat([part.q.weight, part.kv.weight]))
        multi.qkv.bias.copy_(torch.cat([part.q.bias, part.kv.bias]))
        multi.proj.load_state_dict(part.proj.state_dict())
    x = normal(2, 5, 8)
    near(part(x, layout=site.layout), multi(x, layout=site.layout).tolist())


@pytest.mark.parametrize("number", [1, 2])
def test_identity_multi_head_attention_with_repeated_weights(number):
    part, wide = groups(number), groups(4)
    wide.q.load_state_dict(part.q.state_dict())
    wide.proj.load_state_dict(part.proj.state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            narrow = getattr(part.kv, name).unflatten(0, (2, number, 2))
            getattr(wide.kv, name).copy_(narrow.repeat_interleave(4 // number, dim=1).flatten(0, 2))
    x = normal(2, 5, 8)
    near(part(x, layout=Layout((5,))), wide(x, layout=Layout((5,))).tolist())


def test_identity_pytorchs_with_enable_gqa():
    site = Site("oracle", 24, 6, Layout((5,)))
    part = spread(GroupedQuery(site, groups=3))
    x = normal(2, 5, 24)
    q = split_heads(part.q(x), 6)
    k, v = (split_heads(t, 3) for t in part.kv(x).chunk(2, dim=-1))
    wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    near(part(x, layout=site.layout), part.proj(wanted.transpose(1, 2).flatten(2)).detach())
    tiled = F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
    assert (tiled - wanted).abs().max() > 1e-3


# Refusals


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(
        RecipeError, match=r"AZ214.*3 groups do not divide 4 heads(.|\n)*choose one of 1, 2, 4"
    ):
        groups(3)


def test_narrow_numbers_stay_near():
    narrow(GroupedQuery, [(2, 7, 12)], site=place(12, 3, 7), groups=1)
