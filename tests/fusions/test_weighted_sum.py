"""Sum with one learned weight per branch."""

import pytest
import torch
from by_hand import caught, count, fused, line, merging, near, normal, place

from attnzoo.fusions.add import Add
from attnzoo.fusions.weighted_sum import WeightedSum
from attnzoo.testing import against


@against(WeightedSum)
def test_oracle(component, branches):
    """Σ wᵢ sᵢ, however it started."""
    total = torch.zeros_like(branches[0])
    for weight, branch in zip(component.weight, branches, strict=True):
        total = total + weight * branch
    return total


MUTANTS = {
    "weights ignored": merging(WeightedSum, lambda self, branches, x: sum(branches)),
    "weights the wrong way round": merging(
        WeightedSum,
        lambda self, branches, x: sum(w * s for w, s in zip(self.weight.flip(0), branches, strict=True)),
    ),
    "the first not weighed": merging(
        WeightedSum,
        lambda self, branches, x: (
            branches[0] + sum(w * s for w, s in zip(self.weight[1:], branches[1:], strict=True))
        ),
    ),
    "weights made convex": merging(
        WeightedSum,
        lambda self, branches, x: sum(w * s for w, s in zip(self.weight.softmax(0), branches, strict=True)),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_hand_numbers():
    fusion = WeightedSum(place(1), 3).double()
    with torch.no_grad():
        fusion.weight.copy_(torch.tensor([2.0, -1, 0.5]))
    near(fusion([line(1.0), line(3.0), line(8.0)], line(0.0)), [3])
    assert count(fusion) == 3


@pytest.mark.parametrize("start,weights", [("free", [1, 1, 1]), ("identity", [1, 0, 0])])
def test_hand_weights_at_the_start(start, weights):
    fusion = WeightedSum(place(4), 3, start=start)
    near(fusion.weight, weights)
    torch.nn.init.zeros_(fusion.weight)
    fusion.reset_parameters()
    near(fusion.weight, weights)
    assert fusion.no_weight_decay() == {"weight"}


def test_identity_at_the_start_it_is_the_sum():
    branches = list(normal(3, 2, 4, 6))
    near(WeightedSum(place(6), 3).double()(branches, branches[0]), Add(place(6), 3)(branches, branches[0]))


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(3, 2, 4, 6)
    found = WeightedSum(place(6), 3, start="identity").double()(list(branches), branches[0])
    assert torch.equal(found, branches[0])
    assert fused(WeightedSum, 1, 5.0).item() == 5
