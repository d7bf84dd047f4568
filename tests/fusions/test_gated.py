"""A gate per token chooses how much of each branch goes through."""

import math

import pytest
import torch
from by_hand import caught, count, from_first, line, merging, near, normal, place, seen, spread, wrong

from attnzoo.fusions.gated import Gated
from attnzoo.fusions.mean import Mean
from attnzoo.testing import against


@against(Gated)
def test_oracle(component, options, branches, x):
    """Σ gᵢ sᵢ, g = softmax(W x + b) over the branches, token by token."""
    width = x.shape[-1]
    rows, out = [branch.reshape(-1, width) for branch in branches], []
    for i, token in enumerate(x.reshape(-1, width)):
        powers = torch.exp(component.gate.weight @ token + component.gate.bias)
        out.append(sum(p / powers.sum() * row[i] for p, row in zip(powers, rows, strict=True)))
    return from_first(component, options, branches, torch.stack(out).reshape(x.shape))


def with_shares(change):
    """Another gate, from the logits (... n k)."""

    def merge(self, branches, x):
        shares = change(self.gate(x))
        return sum(branch * shares[..., i : i + 1] for i, branch in enumerate(branches))

    return wrong(Gated, merge=merge)


MUTANTS = {
    "a sigmoid": with_shares(torch.sigmoid),
    "over the tokens": with_shares(lambda logits: logits.softmax(-2)),
    "the largest alone": with_shares(
        lambda logits: torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    ),
    "shares the wrong way round": with_shares(lambda logits: logits.softmax(-1).flip(-1)),
    "the gate asks the first branch": merging(
        Gated, lambda self, branches, x: Gated.merge(self, branches, branches[0])
    ),
    "one gate for all tokens": with_shares(
        lambda logits: logits.mean(-2, keepdim=True).softmax(-1).expand_as(logits)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_hand_numbers():
    """Logits (0, x ln 3): at x = 1 a quarter and three quarters, at x = 0 halves."""
    fusion = Gated(place(1), 2).double()
    with torch.no_grad():
        fusion.gate.weight.copy_(torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64))
    near(fusion([line(4, 4), line(8, 8)], line(1, 0)), [7, 6])
    assert count(Gated(place(6), 3)) == 3 * 6 + 3


def test_hand_shares_of_each_token_sum_to_one():
    fusion = spread(Gated(place(6), 3))
    branches = list(normal(3, 2, 4, 6))
    shares = seen(fusion, branches, branches[0], tap="shares")
    assert shares.shape == (2, 4, 3)
    near(shares.sum(-1), torch.ones(2, 4))


def test_identity_at_the_start_it_is_the_mean():
    branches = list(normal(3, 2, 4, 6))
    fusion = Gated(place(6), 3).double()
    near(fusion(branches, branches[0]), Mean(place(6), 3)(branches, branches[0]))
    spread(fusion).reset_parameters()
    near(fusion(branches, branches[0]), Mean(place(6), 3)(branches, branches[0]))


def test_identity_equal_branches_give_that_value():
    branch = normal(2, 4, 6)
    near(spread(Gated(place(6), 3))([branch] * 3, branch), branch)


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(3, 2, 4, 6)
    assert torch.equal(
        Gated(place(6), 3, start="identity").double()(list(branches), branches[0]), branches[0]
    )
