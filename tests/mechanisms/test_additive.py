"""Bahdanau's attention, arXiv:1409.0473, appendix A.1.2."""

import math

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, place, seen, set_all, wrong
from torch import nn

from attnzoo.core import Layout, Mask
from attnzoo.mechanisms.additive.additive import Additive
from attnzoo.testing import against


@against(Additive)
def test_oracle(component, x, source, allowed):
    """e_ij = v · tanh(W s_i + U h_j), α_i = softmax_j, c_i = Σ_j α_ij h_j; then a projection where widths differ."""
    w, u, v = component.query.weight, component.key.weight, component.score_weight
    out = []
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            see = [j for j in range(source.shape[1]) if allowed[b, 0, i, j]]
            c = torch.zeros_like(source[b, 0])
            if see:
                scores = torch.stack([v @ torch.tanh(w @ x[b, i] + u @ source[b, j]) for j in see])
                c = scores.softmax(0) @ source[b, see]
            if isinstance(component.proj, nn.Linear):
                c = component.proj.weight @ c + component.proj.bias
            out.append(c)
    return torch.stack(out).reshape(x.shape)


def mixing(change):
    """The mechanism with its inputs or parameters changed."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            x, source, mask = change(self, x, source, mask)
        return Additive.mix(self, x, source, mask=mask, layout=layout)

    return wrong(Additive, mix=mix)


def halved(self, x, source, mask):
    self.score_weight.div_(source.shape[-1] ** 0.5)
    return x, source, mask


def swapped(self, x, source, mask):
    if self.query.weight.shape == self.key.weight.shape:
        self.query, self.key = self.key, self.query
    return x, source, mask


def no_query(self, x, source, mask):
    self.query.weight.zero_()
    return x, source, mask


MUTANTS = {
    "scores divided by √d": mixing(halved),
    "W and U swapped": mixing(swapped),
    "blind to the query": mixing(no_query),
    "the mask ignored": mixing(lambda self, x, source, mask: (x, source, Mask())),
    "not causal": mixing(lambda self, x, source, mask: (x, source, Mask(keys=mask.keys, pairs=mask.pairs))),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_scalar_case():
    part = set_all(Additive(place(1, context_dim=1)), 1.0)
    out = part(line(0), line(0, 1), layout=Layout((2,)))
    t = math.exp(math.tanh(1))
    near(out, [t / (1 + t)])
    near(seen(part, line(0), line(0, 1), layout=Layout((2,))), [0.3183, 0.6817], 5e-5)


def test_identity_v_zero_gives_the_mean_of_the_annotations():
    part = Additive(place(4, tokens=6)).double()
    nn.init.zeros_(part.score_weight)
    x = normal(2, 6, 4)
    near(part(x, layout=Layout((6,))), x.mean(dim=1, keepdim=True).expand(-1, 6, -1).tolist())
    near(seen(part, x, layout=Layout((6,))), torch.full((2, 1, 6, 6), 1 / 6, dtype=torch.float64))


def test_identity_minus_v_turns_the_ranking_round_and_weights_are_bounded():
    part = Additive(place(4, tokens=6), hidden=3).double()
    nn.init.normal_(part.score_weight)
    x = normal(1, 6, 4)
    weights = seen(part, x, layout=Layout((6,)))
    bound = math.exp(2 * float(part.score_weight.detach().abs().sum()))
    assert (weights.amax(-1) / weights.amin(-1)).max() <= bound
    with torch.no_grad():
        part.score_weight.neg_()
    turned = seen(part, x, layout=Layout((6,)))
    assert torch.equal(weights.argsort(-1), turned.argsort(-1).flip(-1))


def test_hand_parameters():
    assert count(Additive(place(4), hidden=3)) == 3 * 4 + 3 * 4 + 3
    assert count(Additive(place(4, context_dim=5), hidden=3)) == 3 * 4 + 3 * 5 + 3 + 24


def test_narrow_numbers_stay_near():
    narrow(Additive, [(2, 7, 12)], site=place(12, 3, 7))
