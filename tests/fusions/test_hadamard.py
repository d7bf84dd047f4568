"""Element-wise product, HAM A's fusion."""

import pytest
import torch
from by_hand import caught, fused, merging, near, normal, place, wrong

from attnzoo.fusions.hadamard import Hadamard
from attnzoo.testing import against


@against(Hadamard)
def test_oracle(component, options, branches):
    """Π sᵢ; with `start: identity` s₁ (1 + γ Π_{i>1} sᵢ), and s₁ where it is alone."""
    first, others = branches[0], torch.ones_like(branches[0])
    for branch in branches[1:]:
        others = others * branch
    if options["start"] == "free":
        return first * others
    return first if len(branches) == 1 else first * (1 + component.gamma * others)


MUTANTS = {
    "a sum": merging(Hadamard, lambda self, branches, x: sum(branches)),
    "the last left out": merging(
        Hadamard, lambda self, branches, x: torch.stack([*branches[:-1], x * 0 + 1]).prod(0)
    ),
    "x a factor": merging(Hadamard, lambda self, branches, x: torch.stack([*branches, x]).prod(0)),
    "gamma left out": wrong(
        Hadamard,
        merge_from_first=lambda self, branches, x: branches[0] * (1 + torch.stack(branches[1:]).prod(0)),
    ),
    "gamma on a difference": wrong(
        Hadamard,
        merge_from_first=lambda self, branches, x: (
            branches[0] + self.gamma * (torch.stack(branches).prod(0) - branches[0])
        ),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_hand_numbers():
    near(fused(Hadamard, 3, 2.0, 3.0, -4.0), [-24])
    near(fused(Hadamard, 2, 2.0, 3.0, start="identity"), [8])  # 2 (1 + 3), γ = 1


def test_hand_a_head_of_ham_a():
    near(fused(Hadamard, 2, 2.0, 2.5), [5])
    near(fused(Hadamard, 2, 3.0, 2.5), [7.5])


def test_identity_a_branch_of_ones_changes_nothing_and_one_of_zeros_silences():
    one, two = normal(2, 2, 4, 6)
    fusion = Hadamard(place(6), 2)
    assert torch.equal(fusion([one, torch.ones_like(one)], two), one)
    assert not fusion([one, torch.zeros_like(one)], two).any()


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(3, 2, 4, 6)
    assert torch.equal(
        Hadamard(place(6), 3, start="identity").double()(list(branches), branches[0]), branches[0]
    )
