"""Each branch works on its own heads."""

import pytest
import torch
from by_hand import caught, merging, near, normal, place

from attnzoo.core import FusedHeads, Layout
from attnzoo.errors import RecipeError
from attnzoo.fusions.head_split import HeadSplit
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.testing import against


@against(HeadSplit)
def test_oracle(branches, x):
    """On tokens channel by channel, inside the heads head by head: those of the first branch, of the second, …"""
    parts = [part for branch in branches for part in branch.unbind(1 if x.ndim == 4 else -1)]
    return torch.stack(parts, 1 if x.ndim == 4 else -1)


MUTANTS = {
    "the branches the wrong way round": merging(
        HeadSplit, lambda self, b, x: torch.cat(list(b)[::-1], self.head_axis)
    ),
    "a sum": merging(HeadSplit, lambda self, b, x: torch.cat([sum(b)] * len(b), self.head_axis)),
    "the first for all": merging(HeadSplit, lambda self, b, x: torch.cat([b[0]] * len(b), self.head_axis)),
    "dealt in turn": merging(
        HeadSplit,
        lambda self, b, x: torch.stack(list(b), self.head_axis % x.ndim + 1).flatten(
            self.head_axis % x.ndim, self.head_axis % x.ndim + 1
        ),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_hand_numbers():
    one, two = torch.tensor([[[1.0, 2]]]), torch.tensor([[[3.0, 4]]])
    near(HeadSplit(place(4, 2), 2)([one, two], torch.zeros(1, 1, 4)), [1, 2, 3, 4])
    parts = HeadSplit(place(4, 2), 2).split(torch.tensor([[[1.0, 2, 3, 4]]]), -1)
    near(torch.cat(parts, 0), [[[1, 2]], [[3, 4]]])


def test_hand_sites_of_the_branches():
    sites = HeadSplit.sites(place(12, 6), 3)
    assert [(site.dim, site.heads) for site in sites] == [(4, 2)] * 3


def test_identity_what_is_dealt_and_merged_is_as_it_was():
    x = normal(2, 4, 12)
    fusion = HeadSplit(place(12, 6), 3)
    assert torch.equal(fusion(fusion.split(x, -1), x), x)


def test_identity_the_same_head_in_every_branch_is_that_head():
    site = place(12, 4, 5)
    q, k, v = normal(3, 2, 4, 5, 3)
    both = FusedHeads(site, HeadSplit, [Softmax, Softmax])
    near(both(q, k, v, layout=Layout((5,))), Softmax(site)(q, k, v, layout=Layout((5,))))


def test_branches_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(RecipeError, match="AZ312.*cannot deal 4 heads to 3 branches"):
        HeadSplit.sites(place(12, 4), 3)
