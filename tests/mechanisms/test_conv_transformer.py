"""Window attention over joined convolutional features and tokens, CSformer, arXiv:2112.15299."""

import math

import pytest
import torch
from by_hand import caught, count, near, normal, patched, seen, spread, wrong
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, Site
from attnzoo.errors import LayoutMismatch, RecipeError
from attnzoo.functional import relative_bias
from attnzoo.mechanisms.cross.conv_transformer import ConvTransformer
from attnzoo.testing import against


def linear(layer, token):
    """W t + b."""
    return layer.weight @ token + (0 if layer.bias is None else layer.bias)


@against(ConvTransformer)
def test_oracle(component, options, x, source, layout, context_layout, keys):
    """Place by place: who lies in the same window, at which distance, and what it holds in both streams."""
    (rows, columns), p, q, out = layout.grid, layout.prefix, context_layout.prefix, []
    high, wide = min(options["window"], rows), min(options["window"], columns)
    places = [(i, j) for i in range(rows) for j in range(columns)]
    width, heads = component.proj.weight.shape[1], component.heads
    d = width // heads
    for s in range(x.shape[0]):
        there = {place: bool(keys[s, q + t]) for t, place in enumerate(places)}
        held = {}
        for t, place in enumerate(places):
            context = source[s, q + t] if there[place] else torch.zeros_like(source[s, q + t])
            held[place] = linear(component.qkv, torch.cat([context, x[s, p + t]])).split(width)
        tokens = [torch.zeros(x.shape[2]).double()] * p
        for i, j in places:
            mates = [
                (y, z) for y, z in places if there[y, z] and (y // high, z // wide) == (i // high, j // wide)
            ]
            ks, vs = (
                torch.stack([held[mate][part] for mate in mates] or [x.new_zeros(width)]) for part in (1, 2)
            )
            at = [(i - y + options["window"] - 1, j - z + options["window"] - 1) for y, z in mates]
            merged = []
            for h in range(heads):
                mine, got = slice(h * d, (h + 1) * d), torch.zeros(d).double()
                if mates:
                    near_by = torch.stack([component.bias[h, dy, dx] for dy, dx in at])
                    got = (ks[:, mine] @ held[i, j][0][mine] / math.sqrt(d) + near_by).softmax(0) @ vs[
                        :, mine
                    ]
                merged.append(got)
            tokens.append(linear(component.proj, torch.cat(merged)))
        out.append(torch.stack(tokens))
    return torch.stack(out)


def mixing(change):
    """The mechanism with its inputs or parameters changed."""

    def mix(self, x, source, *, mask, layout, context_layout=None):
        with torch.no_grad():
            x, source, mask = change(self, x, source, mask)
        return ConvTransformer.mix(self, x, source, mask=mask, layout=layout, context_layout=context_layout)

    return wrong(ConvTransformer, mix=mix)


def scaled(self, x, source, mask):
    width = self.proj.weight.shape[1]
    self.qkv.weight[:width] *= 1.5
    if self.qkv.bias is not None:
        self.qkv.bias[:width] *= 1.5
    return x, source, mask


def keys_and_values(self, x, source, mask):
    width = self.proj.weight.shape[1]
    self.qkv.weight[width:] = self.qkv.weight[width:].roll(width, 0)
    return x, source, mask


def tokens_first(self, x, source, mask):
    self.qkv.weight.copy_(self.qkv.weight.roll(source.shape[-1], 1))
    return x, source, mask


def no_bias(self, x, source, mask):
    self.bias.zero_()
    return x, source, mask


def whole(self, x, source, *, mask, layout, context_layout=None):
    """One window as large as the grid, where the table reaches."""
    window, self.window = self.window, max(layout.grid)
    reach = window - 1

    def clamped(table, sides):
        at = Layout(tuple(sides)).coords()
        dy, dx = (at[:, None] - at[None]).clamp(-reach, reach).unbind(-1)
        return table[:, dy + reach, dx + reach]

    other = patched(ConvTransformer, "relative_bias", clamped)
    try:
        return other.mix(self, x, source, mask=mask, layout=layout, context_layout=context_layout)
    finally:
        self.window = window


MUTANTS = {
    "a wrong scale": mixing(scaled),
    "keys for values": mixing(keys_and_values),
    "tokens before the context": mixing(tokens_first),
    "no table": mixing(no_bias),
    "rows and columns of the table": patched(
        ConvTransformer, "relative_bias", lambda *how: relative_bias(*how).mT
    ),
    "the mask ignored": mixing(lambda self, x, source, mask: (x, source, Mask())),
    "hidden contexts are read by their own place": mixing(
        lambda self, x, source, mask: (
            x,
            source * (1.0 if mask.keys is None else mask.keys[..., None]),
            Mask(),
        )
    ),
    "the first sample's context for all": mixing(
        lambda self, x, source, mask: (x, source[:1].expand_as(source), mask)
    ),
    "one window": wrong(ConvTransformer, mix=whole),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


GRID, SPECIAL = Layout((4, 6)), Layout((4, 6), 1)


def joined(layout=GRID, context=GRID, dim=8, width=8, window=2, **fields) -> ConvTransformer:
    """Two heads."""
    site = Site("hand", dim, 2, layout, context_dim=width, context_layout=context, **fields)
    return spread(ConvTransformer(site, window=window), 0.3)


def run(part, x, source, layout=GRID, context=GRID, **arguments):
    """Its output."""
    return part(x, source, layout=layout, context_layout=context, **arguments)


# By hand


def test_hand_windows_of_one_place_give_the_values():
    part, x, source = joined(window=1), normal(2, 24, 8), normal(2, 24, 8)
    near(run(part, x, source), part.proj(part.qkv(torch.cat([source, x], -1))[..., 32:]))


def test_hand_the_table_decides_where_queries_are_zero():
    """A window of 1 × 2 tokens (4, 8) with contexts (0, 2), v = context + token: values 4 and 10."""
    layout = Layout((1, 2))
    part = ConvTransformer(
        Site("hand", 1, 1, layout, context_dim=1, context_layout=layout), window=2
    ).double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()
        part.qkv.weight[4:] = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        part.proj.weight.copy_(torch.tensor([[1.0, 0.0]]))
        part.bias[0, 1] = torch.tensor(
            [math.log(3), 0.0, math.log(5)], dtype=torch.float64
        )  # at distances −1, 0, 1
    x, source = torch.tensor([[[[4.0], [8.0]]], [[[0.0], [2.0]]]], dtype=torch.float64)
    near(run(part, x, source, layout, layout), [34 / 4, 30 / 6])  # (4 + 3·10) / 4, (5·4 + 10) / 6


def test_hand_parameters():
    u = 8 + 6
    assert count(joined(width=6)) == 3 * u * u + 3 * u + u * 8 + 8 + 2 * 3 * 3
    assert count(joined(window=8, qkv_bias=False)) == 3 * 16 * 16 + 16 * 8 + 8 + 2 * 15 * 15


# Identities


def test_identity_one_window_and_a_table_of_zero_is_torchs_attention_of_both_streams():
    layout = Layout((4, 4))
    part, x, source = joined(layout, layout, window=4), normal(2, 16, 8), normal(2, 16, 8)
    nn.init.zeros_(part.bias)
    mha = nn.MultiheadAttention(16, 2, batch_first=True).double()
    with torch.no_grad():
        mha.in_proj_weight.copy_(part.qkv.weight)
        mha.in_proj_bias.copy_(part.qkv.bias)
        # of the paper's projection of both streams, the rows of the tokens: they come second
        mha.out_proj.weight[8:] = part.proj.weight
        mha.out_proj.bias[8:] = part.proj.bias
    u = torch.cat([source, x], -1)
    near(run(part, x, source, layout, layout), mha(u, u, u)[0][..., 8:])


def test_identity_a_window_wider_than_the_grid_is_one_window():
    """Of a larger table the middle is read."""
    small, large = joined(Layout((4, 4)), Layout((4, 4)), window=4), joined(window=8)
    state = small.state_dict()
    large.load_state_dict(state | {"bias": F.pad(state["bias"], (4, 4, 4, 4), value=9.0)})
    x, source, layout = normal(1, 16, 8), normal(1, 16, 8), Layout((4, 4))
    near(run(large, x, source, layout, layout), run(small, x, source, layout, layout))


def test_identity_inside_a_window_order_has_no_say_where_the_table_is_zero():
    layout, order = Layout((2, 3)), torch.tensor([4, 0, 5, 2, 1, 3])
    part, x, source = joined(layout, layout, window=3), normal(1, 6, 8), normal(1, 6, 8)
    nn.init.zeros_(part.bias)
    out = run(part, x, source, layout, layout)
    near(run(part, x[:, order], source[:, order], layout, layout), out[:, order])


def test_identity_each_window_alone_gives_the_same():
    part, x, source = joined(), normal(1, 24, 8), normal(1, 24, 8)
    whole_ = GRID.to_grid(run(part, x, source))
    corner = [GRID.to_grid(t)[:, :, 2:, 2:4].flatten(2).mT for t in (x, source)]
    near(whole_[:, :, 2:, 2:4].flatten(2).mT, run(part, *corner, Layout((2, 2)), Layout((2, 2))))


def test_windows_know_nothing_of_each_other():
    part, x, source = joined(), normal(1, 24, 8), normal(1, 24, 8)
    other = source.clone()
    other[:, 0] += 5.0
    change = GRID.to_grid(run(part, x, other) - run(part, x, source)).abs().amax((0, 1))
    assert (change[:2, :2] > 0).all() and not change[2:].any() and not change[:, 2:].any()


def test_special_tokens_of_either_stream_give_and_receive_nothing():
    part, x, source = joined(), normal(1, 25, 8), normal(1, 26, 8)
    context = Layout((4, 6), 2)
    out = run(part, x, source, SPECIAL, context)
    assert not out[:, 0].any()
    x[:, 0] += 9
    source[:, :2] += 9
    assert torch.equal(run(part, x, source, SPECIAL, context), out)


def test_hidden_contexts_are_not_read_and_their_places_not_asked():
    part, x, source = joined(), normal(1, 24, 8), normal(1, 24, 8)
    keys = torch.ones(1, 24, dtype=torch.bool)
    keys[:, 0] = False
    weights = seen(part, x, source, layout=GRID, context_layout=GRID, mask=Mask(keys=keys))
    assert not weights[:, 0, :, :, 0].any() and weights[:, 1:].all()
    near(weights.sum(-1), torch.ones(1, 6, 2, 4))
    out = run(part, x, source, mask=Mask(keys=keys))
    source[:, 0] += 5.0
    assert torch.equal(run(part, x, source, mask=Mask(keys=keys)), out)


def test_the_table_starts_small():
    """N(0, 0.02²) cut at two deviations has one of 0.88 × 0.02."""
    site = Site("hand", 8, 8, GRID, context_dim=8, context_layout=GRID)
    bias = ConvTransformer(site).bias.detach()
    assert bias.abs().max() <= 0.04 and 0.0164 < bias.std() < 0.0188


# Refusals


def test_streams_on_other_grids_and_windows_that_do_not_tile_are_refused():
    with pytest.raises(LayoutMismatch, match="AZ401"):
        run(joined(), normal(1, 24, 8), normal(1, 24, 8), GRID, Layout((6, 4)))
    with pytest.raises(LayoutMismatch, match="AZ401.*windows of 2"):
        run(joined(), normal(1, 15, 8), normal(1, 15, 8), Layout((3, 5)), Layout((3, 5)))


@pytest.mark.parametrize("fields,says", [
    ({}, "no context"),
    ({"context_dim": 8, "context_layout": Layout((2, 3))}, "no context on the grid"),
    ({"context_dim": 7, "context_layout": Layout((14, 14))}, "tile"),
    ({"context_dim": 7, "context_layout": GRID}, r"2 heads do not divide 7 \+ 8"),
])  # fmt: skip
def test_sites_that_do_not_fit_are_refused(fields, says):
    layout = Layout((14, 14)) if says == "tile" else GRID
    with pytest.raises(RecipeError, match=f"AZ214.*{says}"):
        ConvTransformer(Site("hand", 8, 2, layout, **fields))


def test_a_window_that_would_do_is_named():
    layout = Layout((14, 14))
    with pytest.raises(RecipeError, match="choose a `window` of 2 or 7 or 14"):
        ConvTransformer(Site("hand", 8, 2, layout, context_dim=8, context_layout=layout))
