"""Criss-cross attention, arXiv:1811.11721, §3.2-3.3."""

from dataclasses import replace

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, seen, set_all, spread, wrong
from torch import fx

import attnzoo
from attnzoo.core import Layout, Mask, Site
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.local.criss_cross import CrissCross
from attnzoo.testing import against


def linear(layer, x):
    """x Wᵀ + b."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


@against(CrissCross, examples=15)
def test_oracle(component, options, x, layout, allowed):
    """Round by round, query by query: special tokens, then those of the same column or row, each once."""
    (b, n, _), p, columns = x.shape, layout.prefix, layout.grid[1]
    added = torch.zeros_like(x)
    for _ in range(options["rounds"]):
        received = torch.zeros_like(x)
        q, k, v = (linear(layer, x + added) for layer in (component.q, component.k, component.v))
        if options["scale"] == "dim":
            q = q / q.shape[-1] ** 0.5
        for s in range(b):
            for i in range(n):
                keys = []
                for j in range(n):
                    (y, x_), (y_, x__) = divmod(i - p, columns), divmod(j - p, columns)
                    if allowed[s, 0, i, j] and (min(i, j) < p or y == y_ or x_ == x__):
                        keys.append(j)
                if keys:
                    received[s, i] = (k[s, keys] @ q[s, i]).softmax(0) @ v[s, keys]
        added = added + component.gamma * received
    return added


def before(change):
    """Criss-cross attention that is changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        change(self)
        return CrissCross.mix(self, x, source, mask=mask, layout=layout)

    return wrong(CrissCross, mix=mix)


def reading(change):
    """Criss-cross attention with what a round is told changed: x, lines, allowed, mask."""

    def _read(self, x, lines, allowed, mask, p, end):
        return CrissCross._read(self, *change(x, lines, allowed, mask), p, end)

    return wrong(CrissCross, _read=_read)


def masked(change):
    """Criss-cross attention under another mask."""

    def mix(self, x, source, *, mask, layout):
        return CrissCross.mix(self, x, source, mask=change(mask), layout=layout)

    return wrong(CrissCross, mix=mix)


def from_x(self, x, source, *, mask, layout):
    """Each round reads x itself."""
    once = CrissCross._read
    self._read = lambda _, *more: once(self, x, *more)
    try:
        return CrissCross.mix(self, x, source, mask=mask, layout=layout)
    finally:
        del self._read


MUTANTS = {
    "oneself twice": reading(lambda x, lines, allowed, mask: (x, lines, torch.ones_like(allowed), mask)),
    "oneself never": reading(
        lambda x, lines, allowed, mask: (x, lines, allowed & ~oneself(lines, allowed), mask)
    ),
    "the mask ignored": masked(lambda mask: Mask()),
    "not causal": masked(lambda mask: replace(mask, causal=False)),
    "the mask inverted": masked(lambda mask: replace(mask, keys=None if mask.keys is None else ~mask.keys)),
    "a scale too many": before(lambda self: setattr(self, "factor", self.k.out_features**-0.5 if self.factor == 1 else 1.0)),
    "q for k": before(lambda self: self.__dict__["_modules"].update(q=self.k, k=self.q)),
    "x is added here too": wrong(
        CrissCross, mix=lambda self, x, source, **where: x + CrissCross.mix(self, x, source, **where)
    ),
    "a round too few": before(lambda self: setattr(self, "rounds", max(1, self.rounds - 1))),
    "rounds do not see each other": wrong(CrissCross, mix=from_x),
}  # fmt: skip


def oneself(lines, allowed):
    """Where a row of the taps holds the token itself, in its row: (x p+y+x)."""
    rows, columns = lines[0].grid
    found = torch.zeros(rows * columns, allowed.shape[-1], dtype=torch.bool)
    for i in range(rows * columns):
        found[i, allowed.shape[-1] - columns + i % columns] = True
    return found


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def cross(layout, dim=8, **options) -> CrissCross:
    """In float64, with parameters of a size that matters."""
    return spread(CrissCross(Site("hand", dim, 1, layout), **options), 0.5)


# By hand


def test_hand_parameters():
    part = CrissCross(Site("hand", 64, 4, Layout((5, 5))))
    assert count(part) == 2 * (64 * 8 + 8) + 64 * 64 + 64 + 1 == 5201
    assert (
        count(CrissCross(Site("hand", 4, 1, Layout((5, 5))), rounds=5)) == 2 * 5 + 20 + 1
    )  # one channel at least


def test_hand_the_mean_of_a_cross():
    """q = 0, v = x, γ = 1: the first of 1, 2, 3 over 4, 5, 6 receives (1 + 2 + 3 + 4) / 4, itself once."""
    layout, x = Layout((2, 3)), line(1, 2, 3, 4, 5, 6)
    part = set_all(CrissCross(Site("hand", 1, 1, layout), rounds=1), 0.0)
    with torch.no_grad():
        part.v.weight.fill_(1.0), part.gamma.fill_(1.0)
    wanted = torch.tensor([10, 11, 12, 16, 17, 18]).double() / 4
    near(part(x, layout=layout), wanted)
    weights = seen(part, x, layout=layout)[0, 0]
    near(weights[0], [0, 1 / 4, 1 / 4, 1 / 4, 1 / 4])  # column, of which itself has no say, then row
    twice = set_all(CrissCross(Site("hand", 1, 1, layout), rounds=2), 0.0)
    twice.load_state_dict(part.state_dict())
    state = x[0, :, 0] + wanted
    again = torch.stack(
        [
            state[[0, 1, 2, 3]],
            state[[0, 1, 2, 4]],
            state[[0, 1, 2, 5]],
            *(state[[j, 3, 4, 5]] for j in range(3)),
        ]
    )
    near(twice(x, layout=layout), wanted + again.mean(1))  # fmt: skip


def test_hand_it_starts_with_nothing_or_one():
    layout, x = Layout((3, 4), 1), normal(2, 13, 8)
    part = CrissCross(Site("hand", 8, 1, layout)).double()
    assert not part(x, layout=layout).any() and part.gamma.item() == 0
    assert CrissCross(Site("hand", 8, 1, layout), start="one").gamma.item() == 1


@pytest.mark.parametrize("rounds", [1, 2])
def test_hand_one_round_reads_the_cross_and_two_read_all(rounds):
    layout, x = Layout((3, 4)), normal(1, 12, 8).requires_grad_()
    cross(layout, rounds=rounds)(x, layout=layout)[:, 5].sum().backward()  # of row 1 and column 1
    felt = (x.grad.abs().sum((0, 2)) > 0).nonzero().flatten().tolist()
    assert felt == ([1, 4, 5, 6, 7, 9] if rounds == 1 else list(range(12)))


# Identities


@pytest.mark.parametrize("grid", [(1, 5), (5, 1)])
def test_identity_one_line_is_attention_along_it(grid):
    """One row or one column without a scale is softmax attention of q √d."""
    layout, x = Layout(grid, 1), normal(2, 6, 8)
    part = cross(layout, rounds=1, reduction=2)
    soft = Softmax(Site("hand", 4, 1, layout))
    for mask in (
        Mask(),
        Mask(causal=True),
        Mask(keys=torch.rand(2, 6) < 0.7, pairs=torch.rand(2, 1, 6, 6) < 0.7),
    ):
        wanted = soft(
            2 * part.q(x)[:, None], part.k(x)[:, None], part.v(x)[:, None], mask=mask, layout=layout
        )
        near(part(x, mask=mask, layout=layout), part.gamma * wanted[:, 0])


def test_identity_a_cross_is_softmax_under_a_mask_of_pairs():
    layout, x = Layout((3, 4), 2), normal(2, 14, 8)
    part, at = cross(layout, rounds=1, reduction=2, scale="dim"), layout.coords()
    pairs = torch.ones(1, 1, 14, 14, dtype=torch.bool)
    pairs[..., 2:, 2:] = (at[:, None] == at[None]).any(-1)
    q, k, v = part.q(x)[:, None], part.k(x)[:, None], part.v(x)[:, None]
    wanted = Softmax(Site("hand", 4, 1, layout))(q, k, v, mask=Mask(pairs=pairs), layout=layout)
    near(part(x, layout=layout), part.gamma * wanted[:, 0])


def test_identity_two_rounds_are_one_twice():
    layout, x = Layout((3, 4)), normal(2, 12, 8)
    one, two = cross(layout, rounds=1), cross(layout)
    one.load_state_dict(two.state_dict())
    first = x + one(x, layout=layout)
    near(x + two(x, layout=layout), first + one(first, layout=layout))


def test_identity_a_transposed_grid_gives_the_transposed_output():
    layout, x = Layout((3, 4)), normal(1, 12, 8)
    part = cross(layout)
    turned = x.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
    out = part(turned, layout=Layout((4, 3))).unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)
    near(out, part(x, layout=layout))


def test_identity_rows_and_columns_may_be_permuted():
    layout, x = Layout((3, 4)), normal(1, 3, 4, 8)
    part, rows, columns = cross(layout), torch.randperm(3), torch.randperm(4)
    out = part(x.flatten(1, 2), layout=layout).unflatten(1, (3, 4))[:, rows][:, :, columns]
    near(part(x[:, rows][:, :, columns].flatten(1, 2), layout=layout).unflatten(1, (3, 4)), out)


def test_no_pairs_are_formed_and_each_round_has_its_taps():
    layout = Layout((9, 12), 1)
    part, x = cross(layout, rounds=3), normal(1, 109, 8)
    for tap in ("weights_1", "weights_2", "weights"):
        assert seen(part, x, layout=layout, tap=tap).shape == (1, 1, 108, 1 + 9 + 12)
    assert set(part.card.masks) == {"keys", "causal"} and "pairs" in cross(layout, rounds=1).card.masks


def test_symbolic_tracing_follows_it():
    layout, x = Layout((2, 3), 1), normal(2, 7, 8)
    part = spread(attnzoo.create("criss_cross", dim=8, heads=1, grid=layout.grid, prefix=1, rounds=1)).eval()
    near(fx.symbolic_trace(part)(x), part(x))


def test_dropout_drops_weights_of_special_tokens_too():
    layout, x = Layout((2, 3), 1), normal(1, 7, 8)
    part = spread(CrissCross(Site("hand", 8, 1, layout, attn_drop=0.5), rounds=1))
    assert (part.train()(x, layout=layout) - part.eval()(x, layout=layout))[:, 0].abs().max() > 1e-3


def test_narrow_numbers_stay_near():
    narrow(CrissCross, [(2, 13, 12)], site=Site("hand", 12, 3, Layout((3, 4), 1)))
