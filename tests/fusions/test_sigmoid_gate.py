"""The second branch is a gate for the first, arXiv:1612.08083, eq. 1."""

import math

import pytest
import torch
from by_hand import caught, count, from_first, line, merging, near, normal, place, seen, wrong

from attnzoo.errors import RecipeError
from attnzoo.fusions.sigmoid_gate import SigmoidGate
from attnzoo.testing import against


@against(SigmoidGate)
def test_oracle(component, options, branches):
    """s₁ / (1 + e^−s₂)."""
    one, two = branches
    return from_first(component, options, branches, one / (1 + torch.exp(-two)))


MUTANTS = {
    "the first is the gate": merging(SigmoidGate, lambda self, b, x: b[1] * b[0].sigmoid()),
    "the wrong way round": merging(SigmoidGate, lambda self, b, x: b[0] * (-b[1]).sigmoid()),
    "tanh": merging(SigmoidGate, lambda self, b, x: b[0] * b[1].tanh()),
    "swish": merging(SigmoidGate, lambda self, b, x: b[0] * b[1] * b[1].sigmoid()),
    "twice": merging(SigmoidGate, lambda self, b, x: 2 * b[0] * b[1].sigmoid()),
    "one gate for all channels": merging(
        SigmoidGate, lambda self, b, x: b[0] * b[1].mean(-1, keepdim=True).sigmoid()
    ),
    "gamma ignored": wrong(SigmoidGate, merge_from_first=lambda self, b, x: self.merge(b, x)),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def merged(one, two):
    """Of two branches with a token for each number, of one channel."""
    return SigmoidGate(place(1), 2)([line(*one), line(*two)], line(*one))


def test_hand_numbers():
    """σ(0) = 1/2, σ(ln 3) = 3/4; a large number opens the gate, a small one closes it."""
    near(merged([6, 8, 5, 5], [0, math.log(3), 800, -800]), [3, 6, 5, 0])


def test_hand_the_gate_is_seen_and_there_is_nothing_to_learn():
    one, two = line(3, 3), line(0, math.log(3))
    near(seen(SigmoidGate(place(1), 2), [one, two], one, tap="gate"), [0.5, 0.75])
    assert count(SigmoidGate(place(4), 2)) == 0 and count(SigmoidGate(place(4), 2, start="identity")) == 4


def test_identity_a_gate_and_its_opposite_share_out_the_branch():
    one, two = normal(2, 2, 4, 6)
    fusion = SigmoidGate(place(6), 2)
    near(fusion([one, two], one) + fusion([one, -two], one), one)


def test_identity_open_and_half_open():
    branch = normal(2, 4, 6)
    fusion = SigmoidGate(place(6), 2)
    near(fusion([branch, torch.full_like(branch, 800)], branch), branch)
    near(fusion([branch, torch.zeros_like(branch)], branch), branch / 2)


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(2, 2, 4, 6)
    fusion = SigmoidGate(place(6), 2, start="identity").double()
    assert torch.equal(fusion(list(branches), branches[0]), branches[0])


@pytest.mark.parametrize("arity", [1, 3])
def test_another_number_of_branches_is_refused(arity):
    with pytest.raises(RecipeError, match=f"AZ312.*merges 2 branches; it was given {arity}"):
        SigmoidGate(place(4), arity)
