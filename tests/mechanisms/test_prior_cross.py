"""Prior cross-attention, RestoreFormer++, arXiv:2308.07228: its block of multi-head cross-attention."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, spread, wrong
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, Site
from attnzoo.errors import LayoutMismatch, RecipeError, UnsupportedMask
from attnzoo.functional import rearrange
from attnzoo.mechanisms.cross.prior_cross import MapNorm, PriorCross
from attnzoo.testing import against


def normed(norm, tokens, exists):
    """Group by group: what its channels hold in the tokens that exist has mean 0 and variance 1; (n c)."""
    n, c = tokens.shape
    if c == 1:
        return tokens * norm.weight + norm.bias
    size, columns = c // norm.num_groups, [None] * c
    for first in range(0, c, size):
        held = torch.cat(
            [tokens[i, first : first + size] for i in range(n) if exists[i]] or [torch.zeros(1).double()]
        )
        mean = held.sum() / len(held)
        variance = ((held - mean) ** 2).sum() / len(held)
        for j in range(first, first + size):
            columns[j] = (tokens[:, j] - mean) / (variance + 1e-6).sqrt() * norm.weight[j] + norm.bias[j]
    return torch.stack(columns, 1)


def linear(layer, token):
    """W t + b."""
    return layer.weight @ token + (0 if layer.bias is None else layer.bias)


@against(PriorCross)
def test_oracle(component, options, x, source, layout, context_layout, keys):
    """Sample by sample, head by head, query by query."""
    (b, n, c), heads, out = x.shape, component.heads, []
    d, swap = c // heads, options["queries"] == "context"
    for s in range(b):
        z, p, there = x[s], source[s], keys[s].tolist()
        if swap:
            z, p, there = source[s, context_layout.prefix :], x[s], [True] * n
        u = normed(component.kv_norm, p, there)
        w = u if component.q_norm is None else normed(component.q_norm, z, [True] * len(z))
        ks, vs = torch.stack([linear(component.kv, t) for t in u]).split(c, 1)
        rows = [torch.zeros(c).double()] * (layout.prefix if swap else 0)
        for token in w:
            q, merged = linear(component.q, token), []
            for h in range(heads):
                mine = slice(h * d, (h + 1) * d)
                see = [j for j in range(len(u)) if there[j]]
                got = torch.zeros(d).double()
                if see:
                    weights = (ks[see][:, mine] @ q[mine] / math.sqrt(d)).softmax(0)
                    got = weights @ vs[see][:, mine]
                merged.append(got)
            rows.append(linear(component.proj, torch.cat(merged)))
        out.append(torch.stack(rows))
    return torch.stack(out)


def mixing(change):
    """The mechanism with its inputs or parameters changed."""

    def mix(self, x, source, *, mask, layout, context_layout=None):
        with torch.no_grad():
            x, source, mask = change(self, x, source, mask)
        return PriorCross.mix(self, x, source, mask=mask, layout=layout, context_layout=context_layout)

    return wrong(PriorCross, mix=mix)


def scaled(self, x, source, mask):
    self.q.weight.mul_(1.5)
    if self.q.bias is not None:
        self.q.bias.mul_(1.5)
    return x, source, mask


def keys_and_values(self, x, source, mask):
    self.kv.weight.copy_(self.kv.weight.roll(x.shape[-1], 0))
    return x, source, mask


def another_epsilon(self, x, source, mask):
    self.kv_norm.eps = 1e-5
    return x, source, mask


def norms_swapped(self, x, source, mask):
    if self.q_norm is not None and self.q_norm.num_channels == self.kv_norm.num_channels:
        self.q_norm, self.kv_norm = self.kv_norm, self.q_norm
    return x, source, mask


def over_the_batch(self, z, p, mask):
    """Statistics over all samples."""
    b = p.shape[0]
    whole = self.kv_norm(p.flatten(0, 1)[None], None if mask.keys is None else mask.keys.flatten()[None])
    p, self.kv_norm = whole[0].unflatten(0, (b, -1)), lambda p, exists: p
    return PriorCross._ask(self, z, p, mask)


def padding_counts(self, z, p, mask):
    """Statistics of the prior over all its tokens, hidden ones too."""
    p, self.kv_norm = self.kv_norm(p), lambda p, exists: p
    return PriorCross._ask(self, z, p, mask)


def without_norm(self, z, p, mask):
    norm, self.kv_norm = self.kv_norm, lambda p, exists: p * norm.weight + norm.bias
    return PriorCross._ask(self, z, p, mask)


def asked_by_the_prior(self, z, p, mask):
    """The paper's two streams the wrong way round, where that is possible."""
    return PriorCross._ask(self, *((p, z) if z.shape == p.shape and mask.free else (z, p)), mask)


MUTANTS = {
    "a wrong scale": mixing(scaled),
    "keys for values": mixing(keys_and_values),
    "another epsilon": mixing(another_epsilon),
    "the norms swapped": mixing(norms_swapped),
    "the streams swapped": wrong(PriorCross, _ask=asked_by_the_prior),
    "the mask ignored": mixing(lambda self, x, source, mask: (x, source, Mask())),
    "the mask inverted": mixing(
        lambda self, x, source, mask: (
            x, source, Mask(keys=None if mask.keys is None else ~mask.keys))
    ),
    "the first sample's prior for all": mixing(
        lambda self, x, source, mask: (x, source[:1].expand_as(source), mask)
    ),
}  # fmt: skip
NORMS = {
    "statistics over the batch": over_the_batch,
    "padding in the statistics": padding_counts,
    "the prior not normalised": without_norm,
}


def with_norm(ask):
    """The mechanism whose norm of the prior is replaced for one call."""

    def asking(self, z, p, mask):
        norm = self.kv_norm
        del self._modules["kv_norm"]
        self.__dict__["kv_norm"] = norm
        try:
            return ask(self, z, p, mask)
        finally:
            del self.__dict__["kv_norm"]
            self.kv_norm = norm

    return wrong(PriorCross, _ask=asking)


MUTANTS |= {name: with_norm(ask) for name, ask in NORMS.items()}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


GRID = Layout((3, 4))


def paper(width=64, grid=GRID, heads=4, **options) -> PriorCross:
    """The block of the paper's decoder: the context asks, on the same grid."""
    site = Site("hand", width, heads, grid, context_dim=width, context_layout=grid)
    return spread(PriorCross(site, queries="context", **options), 0.3)


def asks(width=64, heads=4, **fields) -> PriorCross:
    """Tokens that ask a context."""
    return spread(PriorCross(place(width, heads, 5, context_dim=width, **fields)), 0.3)


def run(part, x, context, layout=GRID, **arguments):
    """Its output."""
    return part(x, context, layout=layout, context_layout=layout, **arguments)


# By hand


def test_hand_parameters():
    assert count(paper()) == 16896 == 4 * 64**2 + 8 * 64
    assert count(PriorCross(place(64, 4))) == 16896 - 2 * 64  # nobody else asks: one norm
    assert count(PriorCross(place(8, 2, context_dim=6))) == 2 * 6 + 2 * 8 + 8 * 9 + 16 * 7 + 8 * 9


def test_hand_projections_of_zero_leave_the_prior_to_the_residual():
    part = paper()
    nn.init.zeros_(part.proj.weight)
    nn.init.zeros_(part.proj.bias)
    prior = normal(2, 12, 64)
    assert torch.equal(prior + run(part, prior, normal(2, 12, 64)), prior)


def test_hand_one_place_receives_its_value():
    one = Layout((1, 1))
    part, prior = paper(grid=one), normal(2, 1, 64)
    value = part.kv(F.group_norm(prior.mT, 32, part.kv_norm.weight, part.kv_norm.bias, 1e-6).mT)[..., 64:]
    near(run(part, prior, normal(2, 1, 64), one), part.proj(value))


def test_hand_two_channels_and_one_token():
    """GN of (1, 3) is (−1, 1); W_v = 1, so that is what is received."""
    part = PriorCross(place(2, context_dim=2)).double()
    with torch.no_grad():
        part.kv.weight[2:].copy_(torch.eye(2))
        part.kv.bias.zero_()
        part.proj.weight.copy_(torch.eye(2))
        part.proj.bias.zero_()
    x, context = normal(1, 3, 2), torch.tensor([[[1.0, 3.0]]], dtype=torch.float64)
    near(part(x, context, layout=Layout((3,))), [[-1, 1]] * 3, 1e-6)


@pytest.mark.parametrize(
    "width,groups", [(64, 32), (192, 32), (48, 16), (32, 16), (12, 4), (4, 2), (5, 1), (1, 1)]
)
def test_hand_groups(width, groups):
    assert PriorCross(place(width)).kv_norm.num_groups == groups


# Identities


def test_identity_the_norm_is_group_norm_on_a_map():
    norm = spread(MapNorm(4, 12, eps=1e-6))
    x = normal(2, 12, 12)
    near(norm(x), nn.GroupNorm.forward(norm, GRID.to_grid(x)).flatten(2).mT)
    keys = torch.tensor([[True] * 7 + [False] * 5] * 2)
    near(norm(x, keys)[:, :7], nn.GroupNorm.forward(norm, x[:, :7].mT).mT)


def test_identity_torchs_attention_of_normed_streams():
    part = paper()
    prior, degraded = normal(2, 12, 64), normal(2, 12, 64)
    mha = nn.MultiheadAttention(64, 4, batch_first=True).double()
    with torch.no_grad():
        mha.in_proj_weight.copy_(torch.cat([part.q.weight, part.kv.weight]))
        mha.in_proj_bias.copy_(torch.cat([part.q.bias, part.kv.bias]))
    mha.out_proj.load_state_dict(part.proj.state_dict())
    w, u = (
        F.group_norm(t.mT, 32, norm.weight, norm.bias, 1e-6).mT
        for t, norm in ((degraded, part.q_norm), (prior, part.kv_norm))
    )
    near(run(part, prior, degraded), mha(w, u, u)[0])
    near(seen(part, prior, degraded, layout=GRID, context_layout=GRID).mean(1), mha(w, u, u)[1])


def test_identity_the_two_wirings_are_one_with_the_streams_exchanged():
    one, two = paper(), asks()
    two.load_state_dict(one.state_dict())
    prior, degraded = normal(2, 12, 64), normal(2, 12, 64)
    near(run(one, prior, degraded), two(degraded, prior, layout=GRID))


def test_identity_the_order_of_the_prior_has_no_say():
    part, order = paper(), torch.randperm(12)
    prior, degraded = normal(1, 12, 64), normal(1, 12, 64)
    near(run(part, prior[:, order], degraded), run(part, prior, degraded))


@pytest.mark.parametrize("factor", [0.5, 30.0])
def test_identity_the_scale_of_the_degraded_features_has_no_say(factor):
    part = paper()
    prior, degraded = normal(1, 12, 64), normal(1, 12, 64)
    near(run(part, prior, factor * degraded), run(part, prior, degraded), 1e-4)


def test_identity_without_a_context_the_prior_asks_itself():
    part, alone = asks(), spread(PriorCross(place(64, 4, 5)), 0.3)
    part.load_state_dict(alone.state_dict(), strict=False)
    part.q_norm.load_state_dict(alone.kv_norm.state_dict())
    x = normal(2, 5, 64)
    near(alone(x, layout=Layout((5,))), part(x, x, layout=Layout((5,))))


def test_identity_padding_is_as_good_as_cut_off():
    part, x, context = asks(), normal(2, 5, 64), normal(2, 9, 64)
    keys = torch.tensor([[True] * 6 + [False] * 3] * 2)
    near(
        part(x, context, mask=Mask(keys=keys), layout=Layout((5,))),
        part(x, context[:, :6], layout=Layout((5,))),
    )


def test_special_tokens_receive_nothing_from_a_context_that_asks():
    layout = Layout((3, 4), 1)
    part = paper()
    out = run(part, normal(1, 13, 64), normal(1, 13, 64), layout)
    assert not out[:, 0].any() and out[:, 1:].all()


# Refusals


def test_who_asks_must_lie_where_the_tokens_do():
    with pytest.raises(LayoutMismatch, match="AZ401"):
        paper()(normal(1, 12, 64), normal(1, 6, 64), layout=GRID, context_layout=Layout((3, 2)))
    for fields in {}, {"context_dim": 64, "context_layout": Layout((3, 2))}:
        with pytest.raises(RecipeError, match="AZ214.*on the grid of the tokens that could ask"):
            PriorCross(Site("hand", 64, 4, GRID, **fields), queries="context")


@pytest.mark.parametrize("groups", [5, 8])
def test_groups_that_do_not_divide_the_width_are_refused(groups):
    with pytest.raises(RecipeError, match=f"AZ214.*{groups} groups"):
        PriorCross(place(8), groups=groups)


def test_masks_that_statistics_would_betray_are_refused():
    with pytest.raises(UnsupportedMask, match="AZ402"):
        PriorCross(place(8))(torch.randn(1, 2, 8), mask=Mask(causal=True), layout=Layout((2,)))
    with pytest.raises(UnsupportedMask, match="AZ402"):
        run(paper(), normal(1, 12, 64), normal(1, 12, 64), mask=Mask(keys=torch.ones(1, 12, dtype=bool)))


@pytest.mark.parametrize("queries", ["tokens", "context"])
def test_a_decoder_whose_later_tokens_would_be_seen_is_no_place_for_it(queries):
    """Statistics of the tokens that ask run over all of them; a grid is what a sequence that goes on has not."""
    assert PriorCross.card_for(queries=queries).grid == "any"
    part, x, context = asks(), normal(1, 5, 64), normal(1, 3, 64)
    other = x.clone()
    other[:, -1] += 1.0
    moved = part(other, context, layout=Layout((5,))) - part(x, context, layout=Layout((5,)))
    assert moved[:, 0].any()


def test_narrow_numbers_stay_near():
    narrow(PriorCross, [(2, 7, 12)], site=place(12, 3, 7))


def test_heads_are_contiguous():
    part = paper(8, heads=2, groups=2)
    prior, degraded = normal(1, 12, 8), normal(1, 12, 8)
    u, w = part.kv_norm(prior), part.q_norm(degraded)
    k, _ = rearrange(part.kv(u), "b n (two h d) -> two b h n d", two=2, h=2)
    q = rearrange(part.q(w), "b n (h d) -> b h n d", h=2)
    found = seen(part, prior, degraded, tap="scores", layout=GRID, context_layout=GRID)
    near(found, q @ k.mT / 2)
