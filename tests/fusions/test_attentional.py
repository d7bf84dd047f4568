"""A gate between two branches, from each token and from all, arXiv:2009.14082, eq. 1-5."""

import pytest
import torch
from by_hand import caught, count, from_first, near, normal, place, seen, set_all, spread, wrong

from attnzoo.core import Mask
from attnzoo.errors import RecipeError, UnsupportedMask
from attnzoo.functional import mean_token
from attnzoo.fusions.attentional import Attentional
from attnzoo.fusions.mean import Mean
from attnzoo.testing import against


def bottleneck(layers, token):
    """W₂ relu(W₁ u + b₁) + b₂ of one token."""
    inner, _, outer = layers
    hidden = (inner.weight @ token + inner.bias).clamp(min=0)
    return outer.weight @ hidden + outer.bias


def gated(gate, one, two, u, keys):
    """M ⊙ X + (1 − M) ⊙ Y of one sample and head, token by token."""
    there = [token for token, exists in zip(u, keys, strict=True) if exists]
    pooled = bottleneck(gate.all, sum(there) / len(there) if there else torch.zeros_like(u[0]))
    out = []
    for x, y, token in zip(one, two, u, strict=True):
        m = 1 / (1 + torch.exp(-bottleneck(gate.each, token) - pooled))
        out.append(m * x + (1 - m) * y)
    return torch.stack(out)


@against(Attentional)
def test_oracle(component, options, branches, keys):
    """Eq. 2 and 4, eq. 5 where it is iterative, sample by sample, head by head."""
    n, width = branches[0].shape[-2:]
    ones, twos = (branch.reshape(len(keys), -1, n, width) for branch in branches)
    out = []
    for b in range(len(keys)):
        for one, two in zip(ones[b], twos[b], strict=True):
            u = one + two
            if options["iterative"]:
                u = gated(component.first, one, two, u, keys[b])
            out.append(gated(component.second, one, two, u, keys[b]))
    return from_first(component, options, branches, torch.stack(out).reshape(branches[0].shape))


def gating(
    share=lambda gate, u, mask: gate(u, mask),
    mix=lambda m, x, y: m * x + (1 - m) * y,
    first=None,
    twice=False,
):
    """Another gate, another use of it, something else before the first, or one gate for both turns."""

    def merge(self, branches, x, mask):
        one, two = branches
        u = one + two if first is None else first(one, two)
        if self.first is not None:
            u = mix(share(self.second if twice else self.first, u, mask), one, two)
        return mix(share(self.second, u, mask), one, two)

    return wrong(Attentional, merge=merge)


MUTANTS = {
    "padding counts": gating(lambda gate, u, mask: (gate.each(u) + gate.all(u.mean(-2, keepdim=True))).sigmoid()),
    "all alone": gating(lambda gate, u, mask: gate.all(mean_token(u, mask)).sigmoid()),
    "each alone": gating(lambda gate, u, mask: gate.each(u).sigmoid()),
    "each and all the wrong way round": gating(lambda gate, u, mask: (gate.all(u) + gate.each(mean_token(u, mask))).sigmoid()),
    "the mean of what G says": gating(lambda gate, u, mask: (gate.each(u) + mean_token(gate.all(u), mask)).sigmoid()),
    "two gates": gating(lambda gate, u, mask: gate.each(u).sigmoid() * gate.all(mean_token(u, mask)).sigmoid()),
    "the branches the wrong way round": gating(mix=lambda m, x, y: m * y + (1 - m) * x),
    "doubled": gating(mix=lambda m, x, y: 2 * m * x + 2 * (1 - m) * y),
    "one gate for both": gating(mix=lambda m, x, y: m * x + m * y),
    "of the mean of the branches": gating(first=lambda x, y: (x + y) / 2),
    "of the first branch": gating(first=lambda x, y: x),
    "the same gate in both turns": gating(twice=True),
    "gamma ignored": wrong(Attentional, merge_from_first=lambda self, b, x, **m: self.merge(b, x, **m)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_numbers():
    """One channel, all parameters 1, tokens 3 + 1 and −2 + 0: L is relu(u + 1) + 1, 6 and 1; G of their mean 1 is 3."""
    fusion = set_all(Attentional(place(1), 2), 1.0)
    one, two = torch.tensor([[[3.0], [-2]]]).double(), torch.tensor([[[1.0], [0]]]).double()
    m = [1 / (1 + torch.tensor(-power).double().exp().item()) for power in (9.0, 4.0)]
    near(seen(fusion, [one, two], one, tap="gate"), m)
    near(fusion([one, two], one), [1 + 2 * m[0], -2 * m[1]])


def test_hand_parameters():
    """Twice W₁, b₁, W₂, b₂; the middle has a quarter of the channels; as much again where it is iterative."""
    bottleneck = 8 * 2 + 2 + 2 * 8 + 8
    assert count(Attentional(place(8), 2)) == 2 * bottleneck
    assert count(Attentional(place(8), 2, iterative=True)) == 4 * bottleneck
    assert count(Attentional(place(8), 2, ratio=2)) == 2 * (8 * 4 + 4 + 4 * 8 + 8)


@pytest.mark.parametrize("iterative", [False, True])
def test_hand_without_weights_it_is_the_mean(iterative):
    branches = list(normal(2, 2, 4, 6))
    fusion = set_all(Attentional(place(6), 2, iterative=iterative), 0.0)
    near(fusion(branches, branches[0]), Mean(place(6), 2)(branches, branches[0]))


# Identities


@pytest.mark.parametrize("iterative", [False, True])
def test_identity_equal_branches_give_that_value(iterative):
    branch = normal(2, 4, 6)
    near(spread(Attentional(place(6), 2, iterative=iterative))([branch, branch], branch), branch)


def test_identity_swapped_branches_share_the_sum():
    """M sees the sum alone, so Z(X, Y) + Z(Y, X) = X + Y."""
    one, two = normal(2, 2, 4, 6)
    fusion = spread(Attentional(place(6), 2))
    near(fusion([one, two], one) + fusion([two, one], one), one + two)


@pytest.mark.parametrize("iterative", [False, True])
def test_identity_padding_is_as_if_it_were_not_there(iterative):
    fusion, branches = spread(Attentional(place(6), 2, iterative=iterative)), list(normal(2, 1, 5, 6))
    keys = torch.tensor([[True, True, True, False, False]])
    lost = [branch.masked_fill(~keys[..., None], 1e3) for branch in branches]
    short = fusion([branch[:, :3] for branch in branches], branches[0][:, :3])
    near(fusion(lost, lost[0], mask=Mask(keys=keys))[:, :3], short)


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(2, 2, 4, 6)
    fusion = Attentional(place(6), 2, start="identity").double()
    assert torch.equal(
        fusion(list(branches), branches[0], mask=Mask(keys=torch.rand(2, 4) < 0.5)), branches[0]
    )


# What it refuses


def test_where_later_tokens_are_hidden_it_is_refused():
    branches = normal(2, 2, 4, 6)
    with pytest.raises(UnsupportedMask, match="AZ402.*`attentional` honours only keys"):
        Attentional(place(6), 2).double()(list(branches), branches[0], mask=Mask(causal=True))


@pytest.mark.parametrize("arity", [1, 3])
def test_another_number_of_branches_is_refused(arity):
    with pytest.raises(RecipeError, match=f"AZ312.*merges 2 branches; it was given {arity}"):
        Attentional(place(4), arity)
