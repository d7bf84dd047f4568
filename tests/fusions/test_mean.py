"""Arithmetic mean."""

import pytest
import torch
from by_hand import caught, from_first, fused, merging, near, normal, place, wrong

from attnzoo.fusions.mean import Mean
from attnzoo.testing import against


@against(Mean)
def test_oracle(component, options, branches):
    """Σ sᵢ / k."""
    total = torch.zeros_like(branches[0])
    for branch in branches:
        total = total + branch / len(branches)
    return from_first(component, options, branches, total)


MUTANTS = {
    "a sum": merging(Mean, lambda self, branches, x: sum(branches)),
    "of one fewer": merging(Mean, lambda self, branches, x: sum(branches) / max(1, len(branches) - 1)),
    "always of two": merging(Mean, lambda self, branches, x: sum(branches) / 2),
    "gamma left out": wrong(Mean, merge_from_first=lambda self, branches, x: self.merge(branches, x)),
    "gamma of the merge alone": wrong(
        Mean, merge_from_first=lambda self, branches, x: branches[0] + self.gamma * self.merge(branches, x)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_hand_numbers():
    near(fused(Mean, 3, 1.0, 2.0, 6.0), [3])
    near(fused(Mean, 1, 5.0), [5])


def test_hand_halfway_from_the_first():
    """γ = 1/2: halfway from 1 to the mean 3."""
    fusion = Mean(place(1), 3, start="identity").double()
    torch.nn.init.constant_(fusion.gamma, 0.5)
    near(
        fusion([torch.full((1, 1, 1), v).double() for v in (1.0, 2.0, 6.0)], torch.zeros(1, 1, 1).double()),
        [2],
    )


def test_identity_equal_branches_give_that_value():
    branch = normal(2, 4, 6)
    near(Mean(place(6), 3)([branch] * 3, branch), branch)


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(3, 2, 4, 6)
    assert torch.equal(Mean(place(6), 3, start="identity").double()(list(branches), branches[0]), branches[0])
