"""Element-wise maximum."""

import pytest
import torch
from by_hand import caught, from_first, fused, merging, near, normal, place

from attnzoo.fusions.max import Max
from attnzoo.testing import against


@against(Max)
def test_oracle(component, options, branches):
    """Where a branch is larger than what came before, it takes its place."""
    largest = branches[0]
    for branch in branches[1:]:
        largest = torch.where(branch > largest, branch, largest)
    return from_first(component, options, branches, largest)


MUTANTS = {
    "the minimum": merging(Max, lambda self, branches, x: torch.stack(list(branches)).amin(0)),
    "of sizes": merging(Max, lambda self, branches, x: torch.stack(list(branches)).abs().amax(0)),
    "the largest branch": merging(
        Max, lambda self, branches, x: max(branches, key=lambda branch: float(branch.detach().sum()))
    ),
    "never below zero": merging(
        Max, lambda self, branches, x: torch.stack(list(branches)).amax(0).clamp(min=0)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_hand_numbers():
    near(fused(Max, 3, 1.0, -7.0, 4.0), [4])
    near(fused(Max, 2, -3.0, -2.0), [-2])


def test_hand_equal_branches_share_the_gradient():
    one, two = (torch.ones(1, 1, 1).double().requires_grad_() for _ in range(2))
    Max(place(1), 2)([one, two], one).sum().backward()
    near(one.grad, [0.5])
    near(two.grad, [0.5])


def test_identity_minus_the_minimum_of_what_is_turned_round():
    branches = normal(3, 2, 4, 6)
    near(Max(place(6), 3)(list(branches), branches[0]), -(-branches).amin(0))


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(3, 2, 4, 6)
    assert torch.equal(Max(place(6), 3, start="identity").double()(list(branches), branches[0]), branches[0])
