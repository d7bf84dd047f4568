"""One branch after the other."""

import pytest
import torch
from by_hand import caught, count, from_first, merging, near, normal, place, wrong

from attnzoo.core import Fused, FusedHeads, KVCache, Layout, Mask, MultiHead
from attnzoo.errors import RecipeError, UnsupportedMask
from attnzoo.fusions.add import Add
from attnzoo.fusions.serial import Serial
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.testing import against


@against(Serial)
def test_oracle(component, options, branches, x):
    """Branch i gives bᵢ + (what it works on − x): one loop."""
    state, given = x, []
    for i, branch in enumerate(branches):
        out = branch + (state - x)
        state = state + out if options["residual"] and i > 0 else out
        given.append(state)
    return from_first(component, options, [given[0], *branches[1:]], state)


MUTANTS = {
    "side by side": wrong(Serial, feed=lambda self, part, done: part),
    "the first feeds all": wrong(Serial, feed=lambda self, part, done: done[0] if done else part),
    "always the sum": merging(Serial, lambda self, b, x: sum(b)),
    "always the last": merging(Serial, lambda self, b, x: b[-1]),
    "the first comes out": merging(Serial, lambda self, b, x: b[0]),
    "x is added": merging(Serial, lambda self, b, x: Serial.merge(self, b, x) + x),
    "x feeds the second too": wrong(
        Serial, feed=lambda self, part, done: self.merge(done, part) + part if done else part
    ),
    "gamma ignored": wrong(Serial, merge_from_first=lambda self, b, x: self.merge(b, x)),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def chain(fusion, functions, x):
    """What comes out of functions in the place of branches."""
    given = []
    for function in functions:
        given.append(function(fusion.feed(x, given)))
    return fusion(given, x)


def test_hand_numbers():
    """x = 1, then + 2, then · 5: 15; with the residual 3 + 15, then − 1 of that, 18 + 17."""
    x = torch.ones(1, 1, 1).double()
    add, times, less = (lambda t: t + 2), (lambda t: 5 * t), (lambda t: t - 1)
    near(chain(Serial(place(1), 2), [add, times], x), [15])
    near(chain(Serial(place(1), 2, residual=True), [add, times], x), [18])
    near(chain(Serial(place(1), 3, residual=True), [add, times, less], x), [35])
    near(chain(Serial(place(1), 2), [times, add], x), [7])  # order matters


def test_hand_nothing_to_learn():
    assert count(Serial(place(6), 3)) == 0 and count(Serial(place(6), 3, start="identity")) == 6


# Identities


def attention(site):
    """Softmax attention on tokens."""
    return MultiHead(site, Softmax(site))


def series(k=2, **options):
    """Attention after attention, in float64."""
    return (
        Fused(place(8, 2, 5), lambda s, arity: Serial(s, arity, **options), [attention] * k).double().eval()
    )


@pytest.mark.parametrize("residual", [False, True])
def test_identity_one_mechanism_called_on_what_the_other_gives(residual):
    fused, x = series(3, residual=residual), normal(2, 5, 8)
    one, two, three = fused.branches.values()
    mask, layout = Mask(keys=torch.tensor([[True] * 5, [True] * 3 + [False] * 2])), Layout((5,))
    s = one(x, mask=mask, layout=layout)
    for branch in (two, three):
        s = branch(s, mask=mask, layout=layout) + (s if residual else 0)
    near(fused(x, mask=mask, layout=layout), s)


def test_identity_step_by_step_it_is_the_full_pass():
    fused, x, cache = series(residual=True), normal(2, 5, 8), KVCache()
    rows, done = [], 0
    for part in x.split([1, 1, 2, 1], dim=1):
        done += part.shape[1]
        rows.append(fused.step(part, cache, mask=Mask(causal=True), layout=Layout((done,))))
    near(torch.cat(rows, dim=1), fused(x, mask=Mask(causal=True), layout=Layout((5,))), 1e-12)


def test_identity_of_branches_that_hand_on_what_they_see_it_is_the_first():
    x = normal(2, 4, 6)
    assert torch.equal(chain(Serial(place(6), 3), [torch.sin, lambda t: t, lambda t: t], x), torch.sin(x))


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    fused, x = series(start="identity"), normal(2, 5, 8)
    first = fused.branches["softmax"](x, layout=Layout((5,)))
    out = fused(x, layout=Layout((5,)))
    assert torch.equal(out, first)
    out.square().sum().backward()
    assert fused.fusion.gamma.grad.abs().max() > 0


# What it refuses


def test_inside_the_heads_it_is_refused():
    with pytest.raises(RecipeError, match="AZ303.*`serial` cannot fuse inside the heads"):
        FusedHeads(place(8, 2), Serial, [Softmax, Softmax])


def test_pairs_are_refused_because_a_third_token_would_hand_them_on():
    """0 may see 1, and 1 may see 2; 0 may not see 2, and would."""
    pairs = torch.eye(3, dtype=torch.bool)
    pairs[0, 1] = pairs[1, 2] = True
    mask, layout = Mask(pairs=pairs[None, None]), Layout((3,))
    with pytest.raises(UnsupportedMask, match="AZ402.*honours only keys, causal"):
        series()(normal(1, 3, 8), mask=mask, layout=layout)
    side = Fused(place(8, 2, 3), Add, [attention] * 2).double()
    one, two = side.branches.values()
    x = normal(1, 3, 8).requires_grad_()
    (seen,) = torch.autograd.grad(
        two(one(x, mask=mask, layout=layout), mask=mask, layout=layout)[0, 0].sum(), x
    )
    assert bool(seen[0, 2].any())
