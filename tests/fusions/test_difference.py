"""The first branch minus a learned share of the others, arXiv:2410.05258, eq. 1."""

import pytest
import torch
from by_hand import caught, count, fused, line, merging, near, normal, place

from attnzoo.errors import RecipeError
from attnzoo.fusions.difference import Difference
from attnzoo.testing import against


@against(Difference)
def test_oracle(component, branches):
    """s₁ − λ Σ_{i>1} sᵢ, λ per channel, however it started."""
    out = branches[0]
    for branch in branches[1:]:
        out = out - component.share * branch
    return out


MUTANTS = {
    "a sum": merging(Difference, lambda self, branches, x: branches[0] + self.share * sum(branches[1:])),
    "the first shared too": merging(
        Difference, lambda self, branches, x: self.share * (branches[0] - sum(branches[1:]))
    ),
    "only the second": merging(Difference, lambda self, branches, x: branches[0] - self.share * branches[1]),
    "one share for all channels": merging(
        Difference, lambda self, branches, x: branches[0] - self.share.mean() * sum(branches[1:])
    ),
    "the whole": merging(Difference, lambda self, branches, x: branches[0] - sum(branches[1:])),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_hand_numbers():
    near(fused(Difference, 3, 7.0, 1.0, 2.0), [4])
    fusion = Difference(place(1), 2).double()
    torch.nn.init.constant_(fusion.share, 0.5)
    near(fusion([line(7.0), line(2.0)], line(0.0)), [6])
    assert count(Difference(place(4), 3)) == 4


@pytest.mark.parametrize("layer,share", [(0, 0.2), (1, 0.3555), (2, 0.4707), (11, 0.7779)])
def test_hand_it_starts_where_the_paper_says(layer, share):
    near(Difference(place(4, layer=layer), 2).share, [share] * 4, 5e-5)


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(3, 2, 4, 6)
    fusion = Difference(place(6, layer=3), 3, start="identity").double()
    assert torch.equal(fusion(list(branches), branches[0]), branches[0])
    assert fusion.no_weight_decay() == {"share"}


def test_identity_equal_branches_leave_what_is_not_shared():
    branch = normal(2, 4, 6)
    fusion = Difference(place(6, layer=3), 2).double()
    near(fusion([branch, branch], branch), branch * (1 - fusion.share))


def test_one_branch_is_refused():
    with pytest.raises(RecipeError, match="AZ312.*2 or more"):
        Difference(place(4), 1)
