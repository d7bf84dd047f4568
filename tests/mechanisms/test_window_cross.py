"""Window cross-attention, arXiv:2305.01486, §3.2."""

import math

import pytest
import torch
from by_hand import caught, count, near, normal, patched, seen, spread, wrong
from torch import nn

from attnzoo.core import Layout, Site
from attnzoo.errors import LayoutMismatch, RecipeError
from attnzoo.functional import rearrange, relative_bias
from attnzoo.mechanisms.cross.window_cross import WindowCross
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.testing import against


@against(WindowCross)
def test_oracle(component, x, source, layout, context_layout):
    """Window by window: token (i, j) of the context asks the tokens of the window; the answer lies at (i, j)."""
    (b, _, c), (rows, columns), (high, wide) = x.shape, layout.grid, context_layout.grid
    heads, p = component.heads, layout.prefix
    d, kv, proj = c // heads, component.kv, component.proj
    inside = [(i, j) for i in range(high) for j in range(wide)]
    out = []
    for s in range(b):
        tokens = [torch.zeros(c).double()] * p + [None] * (rows * columns)
        asked = {place: source[s, context_layout.prefix + t] for t, place in enumerate(inside)}
        for top in range(0, rows, high):
            for left in range(0, columns, wide):
                where = {(i, j): p + (top + i) * columns + left + j for i, j in inside}
                kvs = {a: kv.weight @ x[s, t] + (0 if kv.bias is None else kv.bias) for a, t in where.items()}
                for i, j in inside:
                    merged = []
                    for h in range(heads):
                        mine = slice(h * d, (h + 1) * d)
                        scores = [
                            kvs[y, z][:c][mine] @ asked[i, j][mine] / math.sqrt(d)
                            + component.bias[h, i - y + high - 1, j - z + wide - 1]
                            for y, z in inside
                        ]
                        weights = torch.stack(scores).softmax(0)
                        merged.append(sum(w * kvs[a][c:][mine] for w, a in zip(weights, inside, strict=True)))
                    tokens[where[i, j]] = proj.weight @ torch.cat(merged) + (
                        0 if proj.bias is None else proj.bias
                    )
        out.append(torch.stack(tokens))
    return torch.stack(out)


def mixing(change):
    """The mechanism with its inputs or parameters changed."""

    def mix(self, x, source, *, mask, layout, context_layout=None):
        with torch.no_grad():
            x, source = change(self, x, source, layout)
        return WindowCross.mix(self, x, source, mask=mask, layout=layout, context_layout=context_layout)

    return wrong(WindowCross, mix=mix)


def turn_bias(self, x, source, layout):
    self.bias.copy_(self.bias.flip(1, 2))
    return x, source


def no_bias(self, x, source, layout):
    self.bias.zero_()
    return x, source


def keys_for_values(self, x, source, layout):
    c = x.shape[-1]
    self.kv.weight[c:] = self.kv.weight[:c]
    return x, source


MUTANTS = {
    "the table turned": mixing(turn_bias),
    "no table": mixing(no_bias),
    "rows and columns of the table": patched(
        WindowCross, "relative_bias", lambda *how: relative_bias(*how).mT
    ),
    "keys for values": mixing(keys_for_values),
    "a wrong scale": mixing(lambda self, x, source, layout: (x, 2 * source)),
    "the first sample asks for all": mixing(
        lambda self, x, source, layout: (x, source[:1].expand_as(source))
    ),
    "special tokens of the context": mixing(lambda self, x, source, layout: (x, source.flip(1))),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def cross(window=(2, 3), grid=(4, 6), prefix=1, **fields) -> tuple[WindowCross, Layout, Layout]:
    """Two heads of four channels, and how tokens and context lie."""
    layout, context = Layout(grid, prefix), Layout(window)
    site = Site("hand", 8, 2, layout, context_dim=8, context_layout=context, **fields)
    return spread(WindowCross(site), 0.5), layout, context


def run(part, x, context, layout, context_layout):
    """Its output."""
    return part(x, context, layout=layout, context_layout=context_layout)


# By hand


def test_hand_windows_of_one_token_give_the_values():
    part, layout, context = cross((1, 1), (2, 3), 0)
    x = normal(2, 6, 8)
    near(run(part, x, normal(2, 1, 8), layout, context), part.proj(part.kv(x)[..., 8:]))


def test_hand_the_table_decides_where_the_context_is_silent():
    """A window of 1 × 2, q = 0: the first token weighs itself and its right neighbour by B(0), B(−1)."""
    layout, context = Layout((1, 2)), Layout((1, 2))
    part = WindowCross(Site("hand", 1, 1, layout, context_dim=1, context_layout=context)).double()
    with torch.no_grad():
        part.bias.copy_(
            torch.tensor([[[math.log(3), 0.0, math.log(7)]]], dtype=torch.float64)
        )  # B(−1), B(0), B(1)
        part.kv.weight.copy_(torch.tensor([[0.0], [1.0]]))
        part.kv.bias.zero_()
        part.proj.weight.fill_(1)
        part.proj.bias.zero_()
    x = torch.tensor([[[4.0], [8.0]]], dtype=torch.float64)
    near(run(part, x, torch.zeros(1, 2, 1).double(), layout, context), [7.0, 4.5])  # (4 + 3·8)/4, (7·4 + 8)/8


def test_hand_parameters():
    part, _, _ = cross()
    assert count(part) == 2 * 8 * 8 + 2 * 8 + 8 * 8 + 8 + 2 * 3 * 5


def test_special_tokens_give_and_receive_nothing():
    part, layout, context = cross()
    x, source = normal(2, 25, 8), normal(2, 6, 8)
    out = run(part, x, source, layout, context)
    assert torch.equal(out[:, :1], torch.zeros(2, 1, 8).double())
    other = x.clone()
    other[:, 0] += 9
    assert torch.equal(run(part, other, source, layout, context), out)


# Identities


def test_identity_one_window_and_a_table_of_zero_is_plain_cross_attention():
    part, layout, context = cross((2, 3), (2, 3), 0)
    nn.init.zeros_(part.bias)
    x, source = normal(2, 6, 8), normal(2, 6, 8)
    q = rearrange(source, "b n (h d) -> b h n d", h=2)
    k, v = rearrange(part.kv(x), "b n (two h d) -> two b h n d", two=2, h=2)
    plain = Softmax(Site("hand", 8, 2, layout))(q, k, v, layout=layout)
    near(run(part, x, source, layout, context), part.proj(rearrange(plain, "b h n d -> b n (h d)")))


def test_windows_know_nothing_of_each_other():
    part, layout, context = cross(prefix=0)
    x, source = normal(1, 24, 8), normal(1, 6, 8)
    other = layout.to_grid(x).clone()
    other[:, :, :2, :3] += 5  # the first window
    moved = run(part, other.flatten(2).mT, source, layout, context)
    change = layout.to_grid(moved - run(part, x, source, layout, context)).abs().amax((0, 1))
    assert (change[:2, :3] > 0).all()
    assert not change[2:].any() and not change[:2, 3:].any()


def test_identity_each_window_alone_gives_the_same():
    part, layout, context = cross(prefix=0)
    x, source = normal(1, 24, 8), normal(1, 6, 8)
    whole = layout.to_grid(run(part, x, source, layout, context))
    corner = layout.to_grid(x)[:, :, 2:, 3:].flatten(2).mT
    alone = run(part, corner, source, Layout((2, 3)), context)
    near(whole[:, :, 2:, 3:].flatten(2).mT, alone)


def test_the_map_is_stochastic_in_each_window():
    part, layout, context = cross()
    weights = seen(part, normal(2, 25, 8), normal(2, 6, 8), layout=layout, context_layout=context)
    assert weights.shape == (2, 4, 2, 6, 6)
    near(weights.sum(-1), torch.ones(2, 4, 2, 6))


# Refusals


def test_windows_that_do_not_tile_the_grid_are_refused():
    part, _, context = cross()
    with pytest.raises(LayoutMismatch, match="AZ401.*do not tile"):
        run(part, normal(1, 20, 8), normal(1, 6, 8), Layout((4, 5)), context)
    with pytest.raises(LayoutMismatch, match="AZ401.*for \\(2, 3\\)"):
        run(part, normal(1, 24, 8), normal(1, 6, 8), Layout((4, 6)), Layout((3, 2)))


@pytest.mark.parametrize("fields,says", [
    ({}, "needs a context"),
    ({"context_dim": 8}, "lies on a grid"),
    ({"context_dim": 7, "context_layout": Layout((2, 2))}, "7 channels are not 8"),
])  # fmt: skip
def test_a_site_without_a_fitting_context_is_refused(fields, says):
    with pytest.raises(RecipeError, match=f"AZ214.*{says}"):
        WindowCross(Site("hand", 8, 2, Layout((4, 4)), **fields))


def test_the_table_starts_small():
    """N(0, 0.02²) cut at two deviations has one of 0.88 × 0.02."""
    site = Site("hand", 8, 2, Layout((32, 32)), context_dim=8, context_layout=Layout((16, 16)))
    bias = WindowCross(site).bias.detach()
    assert bias.abs().max() <= 0.04 and 0.0164 < bias.std() < 0.0188
