"""Linear attention, arXiv:2006.16236, eq. 4-12 and 16-20."""

import math

import pytest
import torch
from by_hand import caught, narrow, near, normal, place, row, wrong
from torch.nn import functional as F

from attnzoo.core import Layout, Mask
from attnzoo.mechanisms.linear.elu_linear import EluLinear
from attnzoo.testing import against


def phi(x):
    """elu(x) + 1, entry by entry."""
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


@against(EluLinear)
def test_oracle(options, q, k, v, allowed):
    """Σ_j φ(q_i)·φ(k_j) v_j / (Σ_j φ(q_i)·φ(k_j) + ε), over the keys that are seen."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        see = allowed[b, h, i]
        if see.any():
            weights = phi(k[b, h, see]) @ phi(q[b, h, i])
            out[b, h, i] = weights @ v[b, h, see] / (weights.sum() + options["eps"])
    return out


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_oracle_recurrent_network(eps):
    """The causal form is a recurrent network: a state (d e) and a normaliser (d), one token after the other."""
    q, k, v = normal(3, 2, 3, 6, 4)
    state, norm, out = torch.zeros(2, 3, 4, 4).double(), torch.zeros(2, 3, 4).double(), []
    for i in range(6):
        for b, h, a, c in torch.cartesian_prod(*map(torch.arange, (2, 3, 4, 4))).tolist():
            state[b, h, a, c] += phi(k[b, h, i, a]) * v[b, h, i, c]
        norm += phi(k[:, :, i])
        asks = phi(q[:, :, i])
        out.append((asks[..., None] * state).sum(2) / ((asks * norm).sum(-1, keepdim=True) + eps))
    found = EluLinear(place(12, 3, 6), eps=eps)(q, k, v, mask=Mask(causal=True), layout=Layout((6,)))
    near(found, torch.stack(out, 2))


def attending(change):
    """The head with its inputs changed."""

    def attend(self, q, k, v, *, mask, layout):
        q, k, v, mask = change(q, k, v, mask)
        return EluLinear.attend(self, q, k, v, mask=mask, layout=layout)

    return wrong(EluLinear, attend=attend)


def not_normalised(self, q, k, v, *, mask, layout):
    return (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v)


def aligned_first(self, q, k, v, *, mask, layout):
    """The first query with the first key, where lengths differ."""
    n = min(q.shape[2], k.shape[2])
    if not mask.causal or q.shape[2] >= k.shape[2]:
        return EluLinear.attend(self, q, k, v, mask=mask, layout=layout)
    keys = None if mask.keys is None else mask.keys[:, :n]
    return EluLinear.attend(
        self, q, k[:, :, :n], v[:, :, :n], mask=Mask(keys=keys, causal=True), layout=layout
    )


MUTANTS = {
    "scaled": attending(lambda q, k, v, mask: (q * q.shape[-1] ** -0.5, k, v, mask)),
    "relu in the place of elu": attending(lambda q, k, v, mask: (q.clamp(min=0), k.clamp(min=0), v, mask)),
    "not normalised": wrong(EluLinear, attend=not_normalised),
    "keys ignored": attending(lambda q, k, v, mask: (q, k, v, Mask(causal=mask.causal))),
    "not causal": attending(lambda q, k, v, mask: (q, k, v, Mask(keys=mask.keys))),
    "causal by one too few": attending(lambda q, k, v, mask: (q, k.roll(1, 2), v.roll(1, 2), mask) if mask.causal else (q, k, v, mask)),
    "aligned with the first key": wrong(EluLinear, attend=aligned_first),
    "values masked, keys not": attending(
        lambda q, k, v, mask: (q, k, v if mask.keys is None else v * mask.keys[:, None, :, None], Mask(causal=mask.causal))
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_one_third():
    out = EluLinear(place(1), eps=1e-12)(row(0), row(0, 1), row(1, 0), layout=Layout((2,)))
    near(out, [1 / 3], 1e-11)


def test_hand_feature_of_minus_one():
    out = EluLinear(place(1), eps=1e-12)(row(0), row(-1, 0), row(1, 0), layout=Layout((2,)))
    near(out, [math.exp(-1) / (math.exp(-1) + 1)], 1e-11)
    near(out / (1 - out), [0.3679], 5e-5)


def test_hand_rows_sum_to_a_little_less_than_one():
    out = EluLinear(place(1), eps=0.5)(row(0), row(0, 1), row(1, 1), layout=Layout((2,)))
    near(out, [3 / 3.5])


def test_it_depends_on_the_size_of_the_query():
    q, k, v = normal(3, 1, 1, 4, 3)
    head = EluLinear(place(3, tokens=4))
    assert (head(2 * q, k, v, layout=Layout((4,))) - head(q, k, v, layout=Layout((4,)))).abs().max() > 1e-3


def test_identity_constant_values_stay_but_for_eps():
    q, k, _ = normal(3, 2, 3, 5, 4)
    out = EluLinear(place(12, 3, 5), eps=1e-15)(q, k, torch.full_like(q, 3.0), layout=Layout((5,)))
    near(out, torch.full_like(q, 3.0))


def test_narrow_numbers_stay_near():
    narrow(EluLinear, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7))
