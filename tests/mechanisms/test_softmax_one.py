"""Softmax off by one, and learned sinks, arXiv:2508.10925."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, spread, wrong

from attnzoo.core import Layout, Mask
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.dot_product.softmax_one import SoftmaxOne
from attnzoo.testing import against


@against(SoftmaxOne, examples=30)
def test_oracle(component, q, k, v, allowed):
    """Σ_j exp(z_j) v_j / (e^s + Σ_j exp(z_j)), z_j = q·k_j / √d, over the keys that are seen; s = 0 unless learned."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        see, sink = (
            allowed[b, h, i],
            torch.zeros(()).double() if component.sink is None else component.sink[h],
        )
        weights = (k[b, h, see] @ q[b, h, i] / math.sqrt(q.shape[3])).exp()
        out[b, h, i] = weights @ v[b, h, see] / (sink.exp() + weights.sum())
    return out


def with_fault(
    turn=lambda q, k: (q, k), one=lambda s: s.exp(), hide=lambda a: a, dim=-1, scale=lambda d: d**-0.5
):
    """The equation, unstable, with one fault."""

    def attend(self, q, k, v, *, mask, layout):
        q, k = turn(q, k)
        allowed = mask.dense(q.shape[2], k.shape[2])
        s = torch.zeros(q.shape[1]).double() if self.sink is None else self.sink
        weights = (q @ k.mT * scale(q.shape[-1])).exp()
        weights = weights if allowed is None else weights.masked_fill(~hide(allowed), 0.0)
        return weights / (one(s)[:, None, None] + weights.sum(dim, keepdim=True)).clamp(min=1e-30) @ v

    return wrong(SoftmaxOne, attend=attend)


def masked_sink(self, q, k, v, *, mask, layout):
    """Rows without a mask are right, others have no sink."""
    if mask.free:
        return SoftmaxOne.attend(self, q, k, v, mask=mask, layout=layout)
    return Softmax.attend(self, q, k, v, mask=mask, layout=layout)


def aligned_first(self, q, k, v, *, mask, layout):
    """The sink in front, and the first query with the first key, which is the sink."""
    scores = torch.cat([torch.zeros_like(q[..., :1]), q @ k.mT * q.shape[-1] ** -0.5], -1)
    allowed = mask.dense(q.shape[2], k.shape[2])
    allowed = None if allowed is None else torch.cat([torch.ones_like(allowed[..., :1]), allowed], -1)
    if mask.causal:
        allowed = allowed & torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return masked_softmax(scores, allowed)[..., 1:] @ v


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "no sink": wrong(SoftmaxOne, attend=Softmax.attend),
    "no sink under masks": wrong(SoftmaxOne, attend=masked_sink),
    "a sink for each key": with_fault(one=lambda s: 2 * s.exp()),
    "s in the place of its exponential": with_fault(one=lambda s: 1 + s.abs()),
    "the learned score is left out": with_fault(one=lambda s: torch.ones_like(s)),
    "the score of the first head": with_fault(one=lambda s: s[:1].exp().expand_as(s)),
    "the score is scaled too": with_fault(one=lambda s: (s / 2).exp()),
    "no scale": with_fault(scale=lambda d: 1.0),
    "q and k swapped": with_fault(turn=lambda q, k: (k, q) if q.shape == k.shape else (q, k)),
    "a sum over the batch": with_fault(dim=0),
    "a sum over the queries": with_fault(dim=-2),
    "the mask inverted": with_fault(hide=torch.logical_not),
    "the mask ignored": with_fault(hide=torch.ones_like),
    "causal off by the sink": wrong(SoftmaxOne, attend=aligned_first),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


@pytest.mark.parametrize(
    "scores,wanted",
    [((0, 0), (1 / 3, 1 / 3)), ((math.log(2), 0), (1 / 2, 1 / 4)), ((math.log(3), -50), (3 / 4, 0))],
)
@pytest.mark.parametrize("watched", [True, False])
def test_hand_two_keys(scores, wanted, watched):
    """x = (0, 0) gives 1/3 each, (ln 2, 0) gives 1/2 and 1/4: what is left is nobody's."""
    head = SoftmaxOne(place(1))
    if watched:
        near(seen(head, row(1), row(*scores), row(0, 0), layout=Layout((2,))), wanted)
    for value in (row(1, 0), row(0, 1)):
        near(head(row(1), row(*scores), value, layout=Layout((2,))), [wanted[int(value[0, 0, 1])]])


@pytest.mark.parametrize(
    "sink,wanted", [(0.0, (1 / 2, 1 / 4)), (math.log(5), (2 / 8, 1 / 8)), (-60.0, (2 / 3, 1 / 3))]
)
def test_hand_a_learned_sink(sink, wanted):
    head = SoftmaxOne(place(1), learned=True).double()
    with torch.no_grad():
        head.sink.fill_(sink)
    near(seen(head, row(1), row(math.log(2), 0), row(0, 0), layout=Layout((2,))), wanted)
    near(head(row(1), row(math.log(2), 0), row(1, 0), layout=Layout((2,))), wanted[:1])


def test_hand_parameters():
    """A number for each head, which starts at 0; none by default."""
    assert count(SoftmaxOne(place(12, 3))) == 0 and not SoftmaxOne(place(12, 3)).no_weight_decay()
    learned = SoftmaxOne(place(12, 3), learned=True)
    assert learned.sink.tolist() == [0, 0, 0] and learned.no_weight_decay() == {"sink"}


@pytest.mark.parametrize("scores", [(1e4, 0), (-1e4, -1e4)])
def test_hand_large_scores_neither_overflow_nor_vanish(scores):
    """The larger of 0 and the scores is taken out: (1, 0) and (0, 0), by both forms."""
    head = SoftmaxOne(place(1))
    wanted = [float(scores[0] > 0), 0.0]
    near(seen(head, row(1), row(*scores), row(1, 0), layout=Layout((2,))), wanted)
    near(head(row(1), row(*scores), row(1, 0), layout=Layout((2,))), wanted[:1])


# Identities

MASKS = [
    Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 5) < 0.6), Mask(pairs=torch.rand(2, 3, 5, 5) < 0.5),
    Mask(keys=torch.rand(2, 5) < 0.6, causal=True),
]  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
def test_identity_a_key_of_zeros_beside_the_others(mask):
    """Softmax attention with one more key, whose score and value are zero and which nothing hides."""
    q, k, v = normal(3, 2, 3, 5, 4)
    allowed = mask.dense(5, 5)
    allowed = torch.ones(1, 1, 5, 5, dtype=torch.bool) if allowed is None else allowed.expand(-1, -1, 5, 5)
    pairs = torch.cat([allowed, torch.ones_like(allowed[..., :1])], -1)
    zero = torch.zeros(2, 3, 1, 4).double()
    k_, v_ = torch.cat([k, zero], 2), torch.cat([v, zero], 2)
    wanted = Softmax(place(12, 3, 6))(q, k_, v_, mask=Mask(pairs=pairs), layout=Layout((6,)))
    near(SoftmaxOne(place(12, 3, 5))(q, k, v, mask=mask, layout=Layout((5,))), wanted)


@pytest.mark.parametrize("mask", MASKS)
def test_identity_a_sink_of_minus_infinity_is_softmax(mask):
    head, (q, k, v) = SoftmaxOne(place(12, 3, 5), learned=True).double(), normal(3, 2, 3, 5, 4)
    with torch.no_grad():
        head.sink.fill_(-100.0)
    near(
        head(q, k, v, mask=mask, layout=Layout((5,))),
        Softmax(place(12, 3, 5))(q, k, v, mask=mask, layout=Layout((5,))),
    )


@pytest.mark.parametrize("mask", MASKS)
def test_identity_a_sink_of_zero_is_off_by_one(mask):
    one, learned = SoftmaxOne(place(12, 3, 5)), SoftmaxOne(place(12, 3, 5), learned=True).double()
    q, k, v = normal(3, 2, 3, 5, 4)
    near(learned(q, k, v, mask=mask, layout=Layout((5,))), one(q, k, v, mask=mask, layout=Layout((5,))))


def test_identity_it_is_softmax_times_the_share_of_the_keys():
    """softmax(z) v σ(ln Σ exp(z) - s)."""
    head, (q, k, v) = spread(SoftmaxOne(place(12, 3, 5), learned=True)), normal(3, 2, 3, 5, 4)
    share = ((q @ k.mT / 2).logsumexp(-1, keepdim=True) - head.sink[:, None, None]).sigmoid()
    near(head(q, k, v, layout=Layout((5,))), Softmax(place(12, 3, 5))(q, k, v, layout=Layout((5,))) * share)


def test_rows_sum_to_less_than_one():
    head, (q, k, v) = spread(SoftmaxOne(place(12, 3, 5), learned=True)), normal(3, 2, 3, 5, 4)
    sums = seen(head, q, k, v, layout=Layout((5,))).sum(-1)
    assert ((sums > 0) & (sums < 1)).all()


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("n,m", [(3, 5), (5, 3), (1, 4), (4, 1), (5, 5)])
def test_causal_with_other_numbers_of_queries(learned, n, m):
    """The last query sees all keys; the fused form is the explicit one."""
    head = spread(SoftmaxOne(place(12, 3, 5), learned=learned))
    q, (k, v) = normal(2, 3, n, 4), normal(2, 2, 3, m, 4)
    out = head(q, k, v, mask=Mask(causal=True), layout=Layout((m,)))
    near(seen(head, q, k, v, mask=Mask(causal=True), layout=Layout((m,))) @ v, out)
    near(out[:, :, -1:], head(q[:, :, -1:], k, v, layout=Layout((m,))))


@pytest.mark.parametrize("learned", [True, False])
def test_narrow_numbers_stay_near(learned):
    narrow(SoftmaxOne, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7), learned=learned)
