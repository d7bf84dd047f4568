"""Scaled cosine attention, arXiv:2111.09883, §3.2, eq. 2."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, spread, wrong
from torch.nn import functional as F

from attnzoo.core import Layout, Mask
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.dot_product.cosine import Cosine
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.testing import against


@against(Cosine, examples=30)
def test_oracle(component, q, k, v, allowed):
    """exp(cos(q_i, k_j) exp(min(s, ln 100))) over its sum, times v, over the keys that are seen."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        see, one = allowed[b, h, i], q[b, h, i]
        if see.any():
            tau = 1 / torch.minimum(component.log_scale[h].exp(), torch.tensor(100.0))
            lengths = torch.sqrt((k[b, h, see] ** 2).sum(-1)) * torch.sqrt((one**2).sum())
            out[b, h, i] = (k[b, h, see] @ one / lengths / tau).softmax(0) @ v[b, h, see]
    return out


def angles(
    self, q, k, v, mask, norm=lambda t: F.normalize(t, dim=-1), scale=lambda s: s.clamp(max=math.log(100)).exp(),
    dim=-1, hide=lambda a: a, extra=1.0,
):  # fmt: skip
    """The equation with a fault."""
    allowed = mask.dense(q.shape[2], k.shape[2])
    scores = norm(q) @ norm(k).mT * scale(self.log_scale)[:, None, None] * extra
    if dim != -1:
        return scores.softmax(dim) @ v
    return masked_softmax(scores, None if allowed is None else hide(allowed)) @ v


def with_fault(turn=lambda q, k: (q, k), **fault):
    """Cosine attention with one fault."""

    def attend(self, q, k, v, *, mask, layout):
        return angles(self, *turn(q, k), v, mask, **fault)

    return wrong(Cosine, attend=attend)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "no norm": with_fault(norm=lambda t: t),
    "a norm over the tokens": with_fault(norm=lambda t: F.normalize(t, dim=2)),
    "a norm over all channels": with_fault(norm=lambda t: t / t.norm(dim=(1, 3), keepdim=True)),
    "scaled by √d too": wrong(Cosine, attend=lambda self, q, k, v, *, mask, layout: angles(self, q, k, v, mask, extra=q.shape[-1] ** -0.5)),
    "s in the place of its exponential": with_fault(scale=lambda s: s),
    "times τ": with_fault(scale=lambda s: (-s).exp()),
    "τ of the first head": with_fault(scale=lambda s: s[:1].exp().expand_as(s)),
    "q and k swapped": with_fault(turn=lambda q, k: (k, q) if q.shape == k.shape else (q, k)),
    "softmax over the batch": with_fault(dim=0),
    "softmax over the queries": with_fault(dim=-2),
    "the mask inverted": with_fault(hide=torch.logical_not),
    "the mask ignored": with_fault(hide=torch.ones_like),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def head(dim=12, heads=3, tokens=5) -> Cosine:
    """In float64."""
    return Cosine(place(dim, heads, tokens)).double()


# By hand


def test_hand_parameters():
    """One number for each head, which starts at ln 10: τ = 0.1."""
    part = Cosine(place(12, 3))
    assert count(part) == 3 and part.no_weight_decay() == {"log_scale"}
    near(part.double().log_scale, [math.log(10)] * 3, 1e-6)


def test_hand_two_angles():
    """cos 0 and cos 90°, τ = 1 / ln 3: the weights are 3/4 and 1/4."""
    part = head(2, 1, 2)
    with torch.no_grad():
        part.log_scale.fill_(math.log(math.log(3)))
    q, k = (
        torch.tensor([[[[5.0, 0]]]], dtype=torch.float64),
        torch.tensor([[[[0.1, 0], [0, 70]]]], dtype=torch.float64),
    )
    v = torch.tensor([[[[4.0, 1], [8, 1]]]], dtype=torch.float64)
    near(part(q, k, v, layout=Layout((2,))), [5, 1])


def test_hand_one_channel_has_two_angles():
    """cos = ±1: at the start weights of e²⁰ : 1."""
    out = head(1, 1, 2)(row(0.3), row(9, -2), row(1, 0), layout=Layout((2,)))
    near(out, [1 / (1 + math.exp(-20))], 1e-7)


@pytest.mark.parametrize("s", [math.log(100), 5.0, 50.0])
def test_hand_the_temperature_has_a_floor(s):
    """τ ≥ 0.01, also in a gradient: beyond it there is none."""
    part, q, k = head(2, 1, 2), normal(1, 1, 1, 2), normal(1, 1, 2, 2)
    with torch.no_grad():
        part.log_scale.fill_(s)
    cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    near(seen(part, q, k, k, layout=Layout((2,)), tap="scores"), 100 * cosines, 1e-9)
    if s > math.log(100):
        part(q, k, k, layout=Layout((2,))).sum().backward()
        assert not part.log_scale.grad.any()


def test_hand_a_vector_of_zeros_has_no_angle():
    """A query of zeros averages; neither it nor a key of zeros makes gradients infinite."""
    part, k, v = head(4, 1, 3), normal(1, 1, 3, 4).requires_grad_(), normal(1, 1, 3, 4)
    q = torch.zeros_like(v).requires_grad_()
    out = part(q, k, v, layout=Layout((3,)))
    near(out, v.mean(2, keepdim=True).expand_as(v))
    out.sum().backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()


# Identities


def test_identity_lengths_have_no_say():
    part, (q, k, v) = spread(head()), normal(3, 2, 3, 5, 4)
    longer = normal(2, 2, 3, 5, 1).exp() * 100
    near(part(q * longer[0], k * longer[1], v, layout=Layout((5,))), part(q, k, v, layout=Layout((5,))))


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 5) < 0.6)])
def test_identity_unit_vectors_are_softmax_attention(mask):
    """With 1 / τ = 1 / √d it is softmax attention of queries and keys of length 1."""
    part, (q, k, v) = head(), normal(3, 2, 3, 5, 4)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    with torch.no_grad():
        part.log_scale.fill_(-math.log(4) / 2)
    plain = Softmax(place(12, 3, 5))
    near(part(q, k, v, mask=mask, layout=Layout((5,))), plain(q, k, v, mask=mask, layout=Layout((5,))))


def test_identity_scores_are_at_most_one_over_tau():
    part, (q, k, v) = spread(head()), 100 * normal(3, 2, 3, 5, 4)
    scores = seen(part, q, k, v, layout=Layout((5,)), tap="scores")
    assert (scores.abs() <= part.log_scale.exp()[:, None, None] * (1 + 1e-12)).all()


def test_half_precision_does_not_overflow():
    """Squares of 1000 do, in float16."""
    part = Cosine(place(12, 3, 5)).half()
    q, k, v = (1e3 * normal(3, 2, 3, 5, 4)).half()
    wanted = head()(q.double(), k.double(), v.double(), layout=Layout((5,)))
    near(part(q, k, v, layout=Layout((5,))) / 1e3, wanted / 1e3, 2e-2)


def test_narrow_numbers_stay_near():
    narrow(Cosine, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7))
