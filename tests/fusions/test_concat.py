"""Concatenation and a projection back."""

import pytest
import torch
from by_hand import caught, count, from_first, line, merging, near, normal, place

from attnzoo.fusions.add import Add
from attnzoo.fusions.concat import Concat
from attnzoo.testing import against


@against(Concat)
def test_oracle(component, options, branches):
    """Output channel o is Σ_i Σ_c W[o, i c] s_i[c]."""
    weight, width = component.merge_proj.weight, branches[0].shape[-1]
    channels = []
    for o in range(width):
        channels.append(
            sum(weight[o, i * width + c] * s[..., c] for i, s in enumerate(branches) for c in range(width))
        )
    return from_first(component, options, branches, torch.stack(channels, -1))


MUTANTS = {
    "the branches the wrong way round": merging(
        Concat, lambda self, b, x: self.merge_proj(torch.cat(list(b)[::-1], -1))
    ),
    "channel by channel": merging(
        Concat, lambda self, b, x: self.merge_proj(torch.stack(list(b), -1).flatten(-2))
    ),
    "the first for all": merging(Concat, lambda self, b, x: self.merge_proj(torch.cat([b[0]] * len(b), -1))),
    "x added": merging(Concat, lambda self, b, x: self.merge_proj(torch.cat(list(b), -1)) + x),
    "gamma ignored": type("NoGamma", (Concat,), {"merge_from_first": lambda self, b, x: self.merge(b, x)}),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_hand_numbers():
    fusion = Concat(place(1), 3).double()
    with torch.no_grad():
        fusion.merge_proj.weight.copy_(torch.tensor([[2.0, -1, 0.5]]))
    near(fusion([line(1.0), line(3.0), line(8.0)], line(0.0)), [3])


def test_hand_parameters():
    assert count(Concat(place(6), 3)) == 3 * 6 * 6


def test_identity_with_identities_beside_each_other_it_is_the_sum():
    branches = list(normal(3, 2, 4, 6))
    fusion = Concat(place(6), 3).double()
    with torch.no_grad():
        fusion.merge_proj.weight.copy_(torch.eye(6).repeat(1, 3))
    near(fusion(branches, branches[0]), Add(place(6), 3)(branches, branches[0]))


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(3, 2, 4, 6)
    assert torch.equal(
        Concat(place(6), 3, start="identity").double()(list(branches), branches[0]), branches[0]
    )
