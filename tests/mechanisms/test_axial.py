"""Axial attention, arXiv:2003.07853, §3."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, seen, set_all, spread, wrong
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, Site
from attnzoo.functional import merge_heads
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.local import axial as module
from attnzoo.mechanisms.local.axial import Axial, by_distance
from attnzoo.testing import against


def projected(layer, x, heads, e):
    """q, k and v of one axis, (b h n .) each."""
    qkv = (
        (x @ layer.weight.T + (0 if layer.bias is None else layer.bias))
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
    )
    return qkv[..., :e], qkv[..., e : 2 * e], qkv[..., 2 * e :]


def along(component, axis, x, options, layout, allowed):
    """Query by query: the tokens of its column (axis 0) or its row, and the special ones; special queries see all."""
    (b, n, c), p, (_, columns), heads, e = (
        x.shape,
        layout.prefix,
        layout.grid,
        component.heads,
        component.narrow,
    )
    layer = (component.columns, component.rows)[axis]
    table = (component.of_columns, component.of_rows)[axis]
    q, k, v = projected(layer, x, heads, e)
    out = torch.zeros(b, heads, n, c // heads).double()
    for s, h, i in itertools.product(range(b), range(heads), range(n)):
        at = divmod(i - p, columns)
        keys = [
            j
            for j in range(n)
            if allowed[s, h, i, j] and (min(i, j) < p or divmod(j - p, columns)[1 - axis] == at[1 - axis])
        ]
        if not keys:
            continue
        if component.gains is not None:
            gains = component.gains[axis, :, h]
        else:
            gains = [1.0 if options["scale"] == "none" else 1 / math.sqrt(e)] * 3
        scores, values = gains[0] * (k[s, h, keys] @ q[s, h, i]), v[s, h, keys]
        if table is not None and i >= p:
            special, middle = sum(j < p for j in keys), len(table) // 2
            ways = [at[axis] - divmod(j - p, columns)[axis] for j in keys[special:]]
            r = table[[middle + max(-middle, min(middle, way)) for way in ways]]
            near = gains[1] * (r[:, :e] @ q[s, h, i]) + gains[2] * (
                r[:, e : 2 * e] * k[s, h, keys[special:]]
            ).sum(1)
            scores = scores + F.pad(near, (special, 0))
            values = values + F.pad(r[:, 2 * e :], (0, 0, special, 0))
        out[s, h, i] = scores.softmax(0) @ values
    return merge_heads(out)


@against(Axial, examples=10)
def test_oracle(component, options, x, layout, allowed):
    """Columns, then rows of what they gave, or both of x and added; then the projection."""
    columns = along(component, 0, x, options, layout, allowed)
    if options["merge"] == "sum":
        out = columns + along(component, 1, x, options, layout, allowed)
    else:
        out = along(component, 1, columns, options, layout, allowed)
    return out @ component.proj.weight.T + (0 if component.proj.bias is None else component.proj.bias)


test_oracle_of_learned_scales = against(
    Axial, examples=8, options=lambda options: not options.keys() - {"merge"}
)(test_oracle.oracle)


def before(change):
    """Axial attention that is changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return Axial.mix(self, x, source, mask=mask, layout=layout)

    return wrong(Axial, mix=mix)


def told(change):
    """Axial attention with what its axes are told changed: axis, x, layer, table, groups, mask."""

    def _along(self, axis, x, layer, table, groups, mask, layout):
        return Axial._along(self, *change(self, axis, x, layer, table, groups, mask), layout)

    return wrong(Axial, _along=_along)


def without_values(self):
    for table in (self.of_columns, self.of_rows):
        if table is not None:
            table[:, 2 * self.narrow :] = 0


def keys_first(self):
    for table in (self.of_columns, self.of_rows):
        if table is not None:
            table[:, : 2 * self.narrow] = table[:, : 2 * self.narrow].roll(self.narrow, 1).clone()


MUTANTS = {
    "from query to key": patched(Axial, "by_distance", lambda table, side: by_distance(table, side).transpose(0, 1)),
    "no r of values": before(without_values),
    "r of keys for queries": before(keys_first),
    "rows twice": told(
        lambda self, axis, x, layer, table, groups, mask: (
            axis, x, layer, table, groups._replace(sides=(1, groups.grid[1])), mask)
    ),
    "columns of other columns' projections": told(
        lambda self, axis, x, layer, table, groups, mask: (axis, x, self.rows, table, groups, mask)
    ),
    "the mask ignored": told(
        lambda self, axis, x, layer, table, groups, mask: (axis, x, layer, table, groups, Mask())
    ),
    "the mask of the first axis alone": told(
        lambda self, axis, x, layer, table, groups, mask: (
            axis, x, layer, table, groups, Mask() if axis else mask)
    ),
    "not causal": told(
        lambda self, axis, x, layer, table, groups, mask: (
            axis, x, layer, table, groups, replace(mask, causal=False))
    ),
    "in the other order": before(lambda self: setattr(self, "sequential", not self.sequential)),
    "another scale": before(lambda self: setattr(self, "scale", {"none": "dim", "dim": "none"}.get(self.scale))),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_mutants_of_learned_scales():
    flipped = before(lambda self: self.gains.copy_(self.gains.flip(0)))
    turned = before(lambda self: self.gains.copy_(self.gains.roll(1, 1)))
    for mutant in (flipped, turned):
        caught(test_oracle_of_learned_scales, mutant)


def axial(layout, dim=8, heads=2, **options) -> Axial:
    """In float64, with parameters of a size that matters."""
    return spread(Axial(Site("hand", dim, heads, layout), **options), 0.5)


# By hand


def test_hand_parameters():
    """The authors' 796 of one axis (16 channels, 2 heads, 5 tokens) less 140 of their norms; ours has a, b and c."""
    part = Axial(Site("hand", 16, 2, Layout((5, 5)), qkv_bias=False, proj_bias=False))
    assert count(part.columns) + part.of_columns.numel() == 796 - 2 * 32 - 2 * 6 - 2 * 32 == 656
    assert count(part) == 2 * 656 + part.gains.numel() + 16 * 16 and part.gains.numel() == 2 * 3 * 2


@pytest.mark.parametrize("merge,wanted", [("sequential", [6.0] * 4), ("sum", [8.0, 10, 14, 16])])
def test_hand_means_along_the_axes(merge, wanted):
    """q = 0 and v = x: columns give the mean of two rows, rows of two columns. Of 2, 4, 8, 10: 5, 7 and 3, 9."""
    layout, x = Layout((2, 2)), torch.tensor([2.0, 4, 8, 10]).double().reshape(1, 4, 1)
    part = set_all(Axial(Site("hand", 1, 1, layout), merge=merge), 0.0)
    with torch.no_grad():
        part.columns.weight[-1] = part.rows.weight[-1] = part.proj.weight[:] = 1.0
    near(part(x, layout=layout), wanted)


def test_hand_positions_of_values_queries_and_keys():
    """A row of two; r^v of one to the left is 3, r^q there ln 3 with q = 1: the second token weighs the first thrice."""
    layout, x = Layout((1, 2)), torch.tensor([4.0, 8]).double().reshape(1, 2, 1)
    for which in (0, 1):  # by r^q with q = 1, by r^k with k = 1
        part = set_all(Axial(Site("hand", 1, 1, layout), scale="none"), 0.0)
        with torch.no_grad():
            part.columns.weight[-1] = part.rows.weight[-1] = part.proj.weight[:] = 1.0
            part.rows.bias[which] = 1.0
            part.of_rows[2] = torch.tensor([0.0, 0.0, 3.0])
            part.of_rows[2, which] = math.log(3)
        near(part(x, layout=layout), [6, 3 / 4 * (4 + 3) + 1 / 4 * 8])


def test_hand_it_starts_as_the_authors():
    part = Axial(Site("hand", 64, 4, Layout((14, 14))))
    assert 0.9 / 8 < part.rows.weight.std() < 1.1 / 8 and 0.85 / 4 < part.of_rows.std() < 1.15 / 4
    near(part.gains, torch.full((2, 3, 4), 8**-0.5), 1e-6)


def reads(call, x):
    """How much the output at token 5 depends on each token."""
    x.requires_grad_()
    call(x)[:, 5].sum().backward()
    return x.grad.abs().sum((0, 2))


def test_hand_what_a_token_reads_on_three_by_four():
    layout = Layout((3, 4))  # token 5 is in row 1, column 1
    part, x = axial(layout), normal(1, 12, 8)
    column = reads(
        lambda x: part._along(
            0, x, part.columns, part.of_columns, module.Groups((3, 4), (3, 1)), Mask(), layout
        ),
        x,
    )
    assert (column > 0).nonzero().flatten().tolist() == [1, 5, 9]  # other columns have no say
    both = reads(lambda x: axial(layout, merge="sum")(x, layout=layout), normal(1, 12, 8))
    assert (both > 0).nonzero().flatten().tolist() == [1, 4, 5, 6, 7, 9]
    assert (reads(lambda x: part(x, layout=layout), normal(1, 12, 8)) > 0).all()


# Identities


def softmax_of_line(part, layer, x, mask=None):
    """Plain attention with these projections."""
    q, k, v = projected(layer, x, 2, part.narrow)
    line = Layout((x.shape[1],))
    return merge_heads(Softmax(Site("hand", 8, 2, line))(q, k, v, mask=mask or Mask(), layout=line))


@pytest.mark.parametrize("positions", [False, True])
def test_identity_one_row_is_attention_along_it(positions):
    """A column of one token gives its value, and r^v of no distance."""
    layout, x = Layout((1, 5)), normal(2, 5, 8)
    part = axial(layout, positions=positions, scale="dim")
    if positions:
        with torch.no_grad():
            part.of_rows.zero_()
    value = merge_heads(projected(part.columns, x, 2, 2)[2])
    if positions:
        value = value + part.of_columns[0, 4:].repeat(2)
    for mask in (Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 5) < 0.7)):
        kept = value if mask.keys is None else value * mask.keys[..., None]
        wanted = softmax_of_line(part, part.rows, kept, mask)
        near(part(x, mask=mask, layout=layout), part.proj(wanted))


def test_identity_plain_axes_are_attention_of_each_line():
    layout, x = Layout((3, 4)), normal(2, 12, 8)
    part = axial(layout, positions=False, merge="sum")
    grid = x.unflatten(1, (3, 4))
    wanted = torch.zeros_like(grid)
    for i in range(4):
        wanted[:, :, i] += softmax_of_line(part, part.columns, grid[:, :, i])
    for i in range(3):
        wanted[:, i] += softmax_of_line(part, part.rows, grid[:, i])
    near(part(x, layout=layout), part.proj(wanted.flatten(1, 2)))


@pytest.mark.parametrize("merge", ["sequential", "sum"])
def test_identity_tables_of_zero_are_no_positions(merge):
    layout, x = Layout((3, 4), 1), normal(2, 13, 8)
    part, plain = axial(layout, merge=merge, scale="dim"), axial(layout, merge=merge, positions=False)
    with torch.no_grad():
        part.of_columns.zero_(), part.of_rows.zero_()
    plain.load_state_dict(part.state_dict(), strict=False)
    for mask in (Mask(), Mask(causal=True, keys=torch.rand(2, 13) < 0.7)):
        near(part(x, mask=mask, layout=layout), plain(x, mask=mask, layout=layout))


def test_identity_a_transposed_grid_swaps_the_axes_of_the_sum():
    layout, x = Layout((3, 4)), normal(1, 12, 8)
    part, other = axial(layout, merge="sum"), axial(Layout((4, 3)), merge="sum")
    state = part.state_dict()
    swapped = {
        **state, "of_rows": state["of_columns"], "of_columns": state["of_rows"], "gains": state["gains"].flip(0),
        **{f"rows.{t}": state[f"columns.{t}"] for t in ("weight", "bias")},
        **{f"columns.{t}": state[f"rows.{t}"] for t in ("weight", "bias")},
    }  # fmt: skip
    other.load_state_dict(swapped)
    turned = x.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
    out = other(turned, layout=Layout((4, 3))).unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)
    near(out, part(x, layout=layout))


def test_identity_constant_values_stay_constant_without_r_of_values():
    layout, part = Layout((3, 4)), axial(Layout((3, 4)))
    with torch.no_grad():
        part.of_rows[:, 4:] = 0
        part.rows.weight.unflatten(0, (2, -1))[:, 4:] = 0
    value = part.rows.bias.unflatten(0, (2, -1))[:, 4:].flatten()
    near(part(normal(2, 12, 8), layout=layout), part.proj(value).expand(2, 12, 8))


def test_a_larger_grid_uses_the_farthest_distances():
    part, layout = axial(Layout((2, 3))), Layout((4, 5), 1)
    assert part(normal(1, 21, 8), layout=layout).isfinite().all()
    table = by_distance(part.of_rows, 5)
    near(table[4, 0], part.of_rows[-1])
    near(table[1, 2], part.of_rows[1])


def test_no_pairs_are_formed():
    layout = Layout((9, 12), 1)
    part, x = axial(layout), normal(1, 109, 8)
    assert seen(part, x, layout=layout).shape == (1, 2, 108, 1 + 12)
    assert seen(part, x, layout=layout, tap="weights_columns").shape == (1, 2, 108, 1 + 9)


def test_dropout_drops_weights_of_special_tokens_too():
    layout, x = Layout((2, 3), 1), normal(1, 7, 8)
    part = Axial(Site("hand", 8, 2, layout, attn_drop=0.5), merge="sum").double()
    assert (part.train()(x, layout=layout) - part.eval()(x, layout=layout))[:, 0].abs().max() > 1e-3


def test_narrow_numbers_stay_near():
    narrow(Axial, [(2, 13, 12)], site=Site("hand", 12, 3, Layout((3, 4), 1)))
