"""Sum of the branches, HAM B's fusion."""

import pytest
import torch
from by_hand import caught, fused, merging, near, normal, place, wrong

from attnzoo.core import NO_MASK, Fused, MultiHead
from attnzoo.fusions.add import Add
from attnzoo.mechanisms.additive.soft import Soft
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.testing import against


@against(Add)
def test_oracle(component, options, branches):
    """Σ sᵢ; with `start: identity` s₁ + γ Σ_{i>1} sᵢ."""
    total = branches[0]
    for branch in branches[1:]:
        total = total + (branch if options["start"] == "free" else component.gamma * branch)
    return total


MUTANTS = {
    "the last left out": merging(Add, lambda self, branches, x: sum(branches[:-1], 0 * x)),
    "a mean": merging(Add, lambda self, branches, x: sum(branches) / len(branches)),
    "x added": merging(Add, lambda self, branches, x: sum(branches) + x),
    "gamma on all": wrong(Add, merge_from_first=lambda self, branches, x: self.gamma * sum(branches)),
    "gamma left out": wrong(Add, merge_from_first=lambda self, branches, x: sum(branches)),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_hand_numbers():
    near(fused(Add, 3, 1.0, 2.0, 4.0), [7])
    near(fused(Add, 3, 1.0, 2.0, 4.0, start="identity"), [7])  # γ = 1


def test_hand_a_head_of_ham_b():
    near(fused(Add, 2, 2.0, 2.5), [4.5])
    near(fused(Add, 2, 3.0, 2.5), [5.5])


def test_identity_the_order_has_no_say():
    branches = normal(3, 2, 4, 6)
    fusion = Add(place(6), 3).double()
    near(fusion(list(branches), branches[0]), fusion(list(branches.flip(0)), branches[0]))


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(3, 2, 4, 6)
    assert torch.equal(Add(place(6), 3, start="identity").double()(list(branches), branches[0]), branches[0])


def test_identity_on_tokens_it_is_the_sum_of_two_mechanisms():
    site = place(6, 2, 5)
    both = Fused(site, Add, [lambda s: MultiHead(s, Softmax(s)), lambda s: MultiHead(s, Soft(s))]).double()
    x = normal(1, 5, 6)
    parts = [branch(x, mask=NO_MASK, layout=site.layout) for branch in both.branches.values()]
    near(both(x, layout=site.layout), parts[0] + parts[1])
