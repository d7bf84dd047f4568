"""Deformable attention, arXiv:2201.00520, §3.2."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, seen, spread, wrong
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, Site
from attnzoo.errors import RecipeError
from attnzoo.functional import merge_heads
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.local import deformable as module
from attnzoo.mechanisms.local.deformable import Deformable
from attnzoo.testing import against


def linear(layer, x):
    """x Wᵀ + b."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def tent(at, side):
    """How much each of a row of entries has of a place; places beyond are held at the border."""
    at = torch.clamp(at, 0, side - 1)[..., None]
    return torch.clamp(1 - (at - torch.arange(side)).abs(), min=0)


@against(Deformable, examples=8)
def test_oracle(component, options, x, layout, keys):
    """Point by point: where it lies, what lies there; then query by query."""
    (b, n, c), p, (rows, columns), heads = x.shape, layout.prefix, layout.grid, component.heads
    d, groups, size, step = c // heads, options["groups"], options["kernel"], options["stride"]
    coarse, some = (math.ceil(rows / step), math.ceil(columns / step)), c // groups
    out = []
    for s in range(b):
        q = linear(component.q, x[s])
        points, read, exist = {}, [], []
        for i, j in itertools.product(range(coarse[0]), range(coarse[1])):
            parts, any_there = [], False
            for g in range(groups):
                mine = slice(g * some, (g + 1) * some)
                near_ = []
                for dy, dx in itertools.product(range(size), repeat=2):
                    y, x_ = i * step + dy - (size - 1) // 2, j * step + dx - (size - 1) // 2
                    if 0 <= y < rows and 0 <= x_ < columns and keys[s, p + y * columns + x_]:
                        near_.append((p + y * columns + x_, dy * size + dx))
                kernel = component.around.weight[:, 0].flatten(1).T[[e for _, e in near_]]
                around = component.around.bias + (kernel * q[[t for t, _ in near_], mine]).sum(0)
                shift = (
                    F.gelu(F.layer_norm(around, [some], component.norm.weight, component.norm.bias))
                    @ component.shift.weight.T
                )
                at = []
                for k, of, to in ((i, rows, coarse[0]), (j, columns, coarse[1])):
                    move = shift[len(at)]
                    move = (
                        move * of / 2
                        if options["factor"] is None
                        else options["factor"] / 2 * torch.tanh(move) * of / to
                    )
                    at.append(torch.clamp((k + 0.5) * of / to - 0.5 + move, 0, of - 1))
                points[i, j, g] = at
                shares = torch.outer(tent(at[0], rows), tent(at[1], columns)).flatten() * keys[s, p:]
                share = shares.sum()
                parts.append(shares @ x[s, p:, mine] / (share if share > 0 else 1))
                any_there = any_there or bool(share > 0)
            read.append(torch.cat(parts))
            exist.append(any_there)
        all_ = torch.cat([x[s, :p], torch.stack(read)])
        see = [m for m, there in enumerate([*keys[s, :p].tolist(), *exist]) if there]
        k, v = linear(component.kv, all_).chunk(2, -1)
        received = torch.zeros(n, c).double()
        cells = list(itertools.product(range(coarse[0]), range(coarse[1])))
        for h in range(heads if see else 0):
            mine, bias = slice(h * d, (h + 1) * d), torch.zeros(n, len(see)).double()
            for e, m in enumerate(see):
                if component.bias is not None and m >= p:
                    table, at = component.bias[h], points[(*cells[m - p], h // (heads // groups))]
                    y, x_ = (
                        (torch.arange(of) - there) * (len_ - 1) / max(1, 2 * (of - 1)) + (len_ - 1) / 2
                        for there, len_, of in zip(at, table.shape, layout.grid, strict=True)
                    )
                    bias[p:, e] = (tent(y, table.shape[0]) @ table @ tent(x_, table.shape[1]).T).flatten()
            scores = q[:, mine] @ k[see][:, mine].T / math.sqrt(d) + bias
            received[:, mine] = scores.softmax(1) @ v[see][:, mine]
        out.append(received)
    return linear(component.proj, torch.stack(out))


def before(change):
    """Changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return Deformable.mix(self, x, source, mask=mask, layout=layout)

    return wrong(Deformable, mix=mix)


def masked(change):
    """Under another mask."""

    def mix(self, x, source, *, mask, layout):
        return Deformable.mix(self, x, source, mask=change(mask), layout=layout)

    return wrong(Deformable, mix=mix)


POINTS, SAMPLE, BIAS = module.points, module.sample_tokens, module.sample_bias
MUTANTS = {
    "no shift": patched(Deformable, "points", lambda shift, *more: POINTS(0 * shift, *more)),
    "rows for columns": patched(Deformable, "points", lambda shift, *more: POINTS(shift.flip(-1), *more)),
    "shifts twice as far": patched(Deformable, "points", lambda shift, grid, coarse, f: POINTS(2 * shift if f is None else shift, grid, coarse, f and 2 * f)),
    "a table from token to point": patched(
        Deformable, "sample_bias", lambda table, *more: BIAS(table.flip(1, 2), *more)
    ),
    "no table": before(lambda self: setattr(self, "bias", None)),
    "padding is sampled": patched(
        Deformable, "sample_tokens", lambda t, at, grid: SAMPLE(t, at, grid) if t.shape[-1] > at.shape[1] else SAMPLE(torch.ones_like(t), at, grid)
    ),
    "the mask ignored": masked(lambda mask: Mask()),
    "the mask inverted": masked(lambda mask: replace(mask, keys=None if mask.keys is None else ~mask.keys)),
    "points of other groups": patched(Deformable, "sample_bias", lambda table, at, grid: BIAS(table, at.flip(1), grid)),
    "q from k's projection": before(lambda self: self.q.weight.copy_(self.kv.weight[: len(self.q.weight)])),
    "columns first": wrong(
        Deformable,
        mix=lambda self, x, source, *, mask, layout: Deformable.mix(
            self, x, source, mask=mask, layout=Layout(layout.grid[::-1], layout.prefix)
        ),
    ),
}  # fmt: skip
test_oracle_of_groups = against(
    Deformable, examples=8, options=lambda options: options.get("groups") == 2 and options.get("bias", True)
)(test_oracle.oracle)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name):
    caught(test_oracle_of_groups if "groups" in name else test_oracle, MUTANTS[name])


def deformable(layout, dim=8, heads=2, **options) -> Deformable:
    """In float64, with parameters of a size that matters."""
    return spread(Deformable(Site("hand", dim, heads, layout), **options), 0.5)


def still(part):
    """Points are not shifted."""
    torch.nn.init.zeros_(part.shift.weight)
    return part


# By hand


def test_hand_points_lie_in_the_middle_of_their_squares():
    """Eight rows in steps of two: 0.5, 2.5, 4.5, 6.5; the authors' code would have 8.17 at the end."""
    at = module.points(torch.zeros(1, 1, 16, 2), (8, 8), (4, 4), 2.0)[0, 0]
    near(at[::4, 0], [0.5, 2.5, 4.5, 6.5])
    near(at[:4, 1], [0.5, 2.5, 4.5, 6.5])
    near(module.points(torch.zeros(1, 1, 1, 2), (1, 1), (1, 1), 2.0), [0, 0])
    far = module.points(torch.full((1, 1, 16, 2), 50.0), (8, 8), (4, 4), 2.0)[0, 0]
    near(far[::4, 0], [2.5, 4.5, 6.5, 7])  # one step of the coarse grid, and no farther than the border
    free = module.points(torch.full((1, 1, 16, 2), 0.25), (8, 8), (4, 4), None)[0, 0]
    near(free[::4, 0], [1.5, 3.5, 5.5, 7])


def test_hand_between_tokens_lies_their_mean():
    at = torch.tensor([[0.5, 0.0], [0.0, 0.25], [1.0, 1.0]]).double().reshape(1, 1, 3, 2)
    found = module.sample_tokens(torch.tensor([1.0, 3, 5, 11]).double().reshape(1, 4, 1), at, (2, 2))
    near(found, [3, 1.5, 11])


def test_hand_parameters():
    c, h, g = 16, 4, 2
    part = Deformable(Site("hand", c, h, Layout((5, 7))), groups=g)
    offsets = 25 * c // g + c // g + 2 * c // g + 2 * c // g
    assert count(part) == 4 * c * c + 4 * c + offsets + h * 9 * 13
    with pytest.raises(RecipeError, match="AZ214.*3 groups do not divide 4 heads"):
        Deformable(Site("hand", c, h, Layout((5, 7))), groups=3)


# Identities


@pytest.mark.parametrize("groups", [1, 2])
def test_identity_without_shifts_and_table_it_is_softmax(groups):
    layout, x = Layout((3, 4), 1), normal(2, 13, 8)
    part = still(deformable(layout, groups=groups, bias=False))
    q, (k, v) = part.q(x), part.kv(x).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    for mask in (Mask(), Mask(keys=torch.rand(2, 13) < 0.7)):
        wanted = Softmax(Site("hand", 8, 2, layout))(q, k, v, mask=mask, layout=layout)
        near(part(x, mask=mask, layout=layout), part.proj(merge_heads(wanted)))


def test_identity_a_table_without_shifts_is_the_relative_bias():
    from attnzoo.functional import relative_bias

    layout = Layout((3, 4))
    part = still(deformable(layout))
    at = module.points(torch.zeros(1, 1, 12, 2).double(), (3, 4), (3, 4), 2.0)
    near(module.sample_bias(part.bias, at, (3, 4))[0], relative_bias(part.bias, (3, 4)))


def test_identity_a_stride_without_shifts_reads_means_of_squares():
    layout, x = Layout((4, 6)), normal(2, 24, 8)
    part = still(deformable(layout, stride=2, bias=False))
    squares = x.unflatten(1, (2, 2, 3, 2)).mean((2, 4)).flatten(1, 2)
    q, (k, v) = part.q(x), part.kv(squares).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    near(part(x, layout=layout), part.proj(merge_heads(F.scaled_dot_product_attention(q, k, v))))


def test_identity_constant_tokens_stay_constant():
    layout = Layout((4, 6))
    part, x = deformable(layout, stride=2), normal(1, 1, 8).expand(1, 24, 8)
    keys = torch.ones(1, 24, dtype=torch.bool)
    keys[:, 17:] = False
    near(part(x, mask=Mask(keys=keys), layout=layout), part.proj(part.kv(x)[..., 8:]))


def test_hand_the_table_starts_on_both_sides_of_zero():
    """From N(0, 0.01²), cut at twice that: a standard deviation of 0.0088."""
    table = Deformable(Site("hand", 8, 2, Layout((20, 20)))).bias
    assert table.abs().max() <= 0.02 and abs(table.mean()) < 5e-4 and abs(table.std() - 0.0088) < 2e-4


def test_points_number_a_stride_squareth_of_the_tokens():
    layout, x = Layout((8, 8), 1), normal(1, 65, 8)
    assert seen(deformable(layout, stride=2), x, layout=layout).shape == (1, 2, 65, 1 + 16)


def test_narrow_numbers_stay_near():
    narrow(Deformable, [(2, 13, 12)], site=Site("hand", 12, 3, Layout((3, 4), 1)), kernel=3)
