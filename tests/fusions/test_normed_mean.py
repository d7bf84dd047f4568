"""Mean of the branches, each normalised and scaled, arXiv:2411.13676, §2.1."""

import pytest
import torch
from by_hand import caught, count, from_first, merging, near, normal, place, spread, wrong
from torch.nn import functional as F

from attnzoo.fusions.mean import Mean
from attnzoo.fusions.normed_mean import NormedMean
from attnzoo.testing import against


@against(NormedMean)
def test_oracle(component, options, branches):
    """Σ βᵢ ⊙ sᵢ / √(mean sᵢ² + ε) / k, token by token."""
    width = branches[0].shape[-1]
    out = []
    for tokens in zip(*(branch.reshape(-1, width) for branch in branches), strict=True):
        total = torch.zeros(width).double()
        for token, beta in zip(tokens, component.beta, strict=True):
            size = sum(number**2 for number in token) / width
            total = total + beta * token / torch.sqrt(size + 1e-6)
        out.append(total / len(branches))
    return from_first(component, options, branches, torch.stack(out).reshape(branches[0].shape))


def normed(norm, scale=lambda self, i, t: self.beta[i] * t):
    """Another norm, or another place of β."""

    def merge(self, branches, x):
        return sum(scale(self, i, norm(branch)) for i, branch in enumerate(branches)) / self.arity

    return wrong(NormedMean, merge=merge)


def rms(t):
    """RMSNorm over the channels."""
    return F.rms_norm(t, t.shape[-1:], None, 1e-6)


MUTANTS = {
    "not normalised": normed(lambda t: t),
    "the length": normed(lambda t: F.normalize(t, dim=-1)),
    "a layer norm": normed(lambda t: F.layer_norm(t, t.shape[-1:], None, None, 1e-6)),
    "over the tokens": normed(lambda t: rms(t.mT).mT),
    "no beta": normed(rms, lambda self, i, t: t),
    "one beta for all branches": normed(rms, lambda self, i, t: self.beta[0] * t),
    "one beta for all channels": normed(rms, lambda self, i, t: self.beta[i, 0] * t),
    "beta inside the norm": wrong(
        NormedMean,
        merge=lambda self, b, x: sum(rms(w * s) for w, s in zip(self.beta, b, strict=True)) / self.arity,
    ),
    "the sum": merging(NormedMean, lambda self, b, x: self.arity * NormedMean.merge(self, b, x)),
    "the norm of the mean": merging(NormedMean, lambda self, b, x: self.beta[0] * rms(sum(b))),
    "gamma ignored": wrong(NormedMean, merge_from_first=lambda self, b, x: self.merge(b, x)),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def test_hand_numbers():
    """(3, 4) has a mean square of 25/2, (0, 2) one of 2; the mean of (3, 4) √2 / 5 and (0, √2)."""
    one, two = torch.tensor([[[3.0, 4]]]).double(), torch.tensor([[[0.0, 2]]]).double()
    fusion = NormedMean(place(2), 2).double()
    near(fusion([one, two], one), [0.3 * 2**0.5, 0.9 * 2**0.5], 1e-6)
    with torch.no_grad():
        fusion.beta.copy_(torch.tensor([[1.0, 0], [5, 2]]))
    near(fusion([one, two], one), [0.3 * 2**0.5, 2**0.5], 1e-6)


def test_hand_parameters():
    assert count(NormedMean(place(6), 3)) == 3 * 6
    fusion = spread(NormedMean(place(6), 3))
    fusion.reset_parameters()
    assert bool((fusion.beta == 1).all()) and fusion.no_weight_decay() == {"beta"}
    assert NormedMean(place(6), 3, start="identity").no_weight_decay() == {"beta", "gamma"}


def test_hand_nothing_stays_nothing():
    zero = torch.zeros(1, 2, 4).double().requires_grad_()
    out = NormedMean(place(4), 2).double()([zero, zero], zero)
    out.sum().backward()
    assert not out.any() and bool(zero.grad.isfinite().all())


@pytest.mark.parametrize("t", [0.5, 3.0, 1e4])
def test_identity_the_size_of_a_branch_has_no_say(t):
    one, two = 10 * normal(2, 2, 4, 6)
    fusion = spread(NormedMean(place(6), 2))
    near(fusion([t * one, two], one), fusion([one, two], one), 1e-6)


def test_identity_of_what_is_normalised_it_is_the_mean():
    branches = [rms(10 * branch) for branch in normal(3, 2, 4, 6)]
    near(
        NormedMean(place(6), 3).double()(branches, branches[0]),
        Mean(place(6), 3)(branches, branches[0]),
        1e-5,
    )


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(3, 2, 4, 6)
    fusion = NormedMean(place(6), 3, start="identity").double()
    assert torch.equal(fusion(list(branches), branches[0]), branches[0])
