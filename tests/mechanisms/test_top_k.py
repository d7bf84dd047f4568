"""Top-k attention, arXiv:2106.06899, §3."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, wrong

from attnzoo.core import Layout, Mask, options_of
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.sparse.top_k import TopK, best
from attnzoo.testing import against


@against(TopK, examples=40)
def test_oracle(options, q, k, v, allowed):
    """The best key that is left, `keep` times; then a softmax over those that were taken."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        scores = k[b, h] @ q[b, h, i] / math.sqrt(q.shape[3])
        left, taken = allowed[b, h, i].nonzero()[:, 0].tolist(), []
        while left and len(taken) < options["keep"]:
            taken.append(max(left, key=lambda j: (float(scores[j]), -j)))
            left.remove(taken[-1])
        if taken:
            out[b, h, i] = scores[taken].softmax(0) @ v[b, h, taken]
    return out


def with_fault(
    turn=lambda q, k: (q, k), choose=best, hide=lambda a: a, scale=lambda d: d**-0.5, weigh=masked_softmax
):
    """Top-k attention with one fault."""

    def attend(self, q, k, v, *, mask, layout):
        q, k = turn(q, k)
        scores = q @ k.mT * scale(q.shape[-1])
        allowed = mask.dense(q.shape[2], k.shape[2])
        kept = choose(scores, None if allowed is None else hide(allowed), self.keep)
        return weigh(scores, kept) @ v

    return wrong(TopK, attend=attend)


def before_the_mask(scores, allowed, keep):
    """The best of all keys, of which a mask then hides some."""
    kept = best(scores, None, keep)
    return kept if allowed is None else kept & allowed


def normalised_first(scores, kept):
    """A softmax over all, of which some weights are left out."""
    return masked_softmax(scores, None) * kept


def for_all_queries(scores, allowed, keep):
    """The keys that are best on average."""
    kept = best(scores.mean(2, keepdim=True).expand_as(scores), None, keep)
    return kept if allowed is None else kept & allowed


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "the worst keys": with_fault(choose=lambda s, a, keep: best(-s, a, keep)),
    "one key more": with_fault(choose=lambda s, a, keep: best(s, a, keep + 1)),
    "the largest of either sign": with_fault(choose=lambda s, a, keep: best(s.abs(), a, keep)),
    "chosen before the mask": with_fault(choose=before_the_mask),
    "one choice for all queries": with_fault(choose=for_all_queries),
    "one choice for all heads": with_fault(choose=lambda s, a, keep: best(s.mean(1, keepdim=True).expand_as(s), a, keep)),
    "the best queries of a key": with_fault(choose=lambda s, a, keep: best(s.mT, None, keep).mT if a is None else best(s.mT, None, keep).mT & a),
    "normalised before the choice": with_fault(weigh=normalised_first),
    "all keys": with_fault(choose=lambda s, a, keep: best(s, a, s.shape[-1])),
    "uniform weights": with_fault(weigh=lambda s, kept: masked_softmax(0 * s, kept)),
    "no scale": with_fault(scale=lambda d: 1.0),
    "q and k swapped": with_fault(turn=lambda q, k: (k, q) if q.shape == k.shape else (q, k)),
    "the mask inverted": with_fault(hide=torch.logical_not),
    "the mask ignored": with_fault(hide=torch.ones_like),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


@pytest.mark.parametrize("keep,wanted", [(1, 8), (2, 7), (3, 28 / 5), (4, 28 / 5)])
def test_hand_three_keys(keep, wanted):
    """Scores ln 3, 0 and ln 1, values 8, 4 and 0: of two equal scores the first is kept."""
    head = TopK(place(1, tokens=3), keep=keep)
    near(head(row(1), row(math.log(3), 0, 0), row(8, 4, 0), layout=Layout((3,))), [wanted])


def test_hand_ties_are_broken_by_position():
    """Also where the equal ones are many, and some are hidden."""
    scores = torch.tensor([[[[1.0, 5, 1, 1, 5, 1], [2, 2, 2, 2, 2, 2]]]])
    allowed = torch.tensor([True, True, False, True, True, True])
    wanted = [[1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0]]
    assert best(scores, None, 3).int().tolist() == [[wanted]]
    assert best(scores, allowed, 3).int().tolist() == [[[[1, 1, 0, 0, 1, 0], [1, 1, 0, 1, 0, 0]]]]


def test_hand_fewer_keys_than_are_kept():
    """A query that sees two of five keys keeps two, one that sees none nothing."""
    allowed = torch.tensor([[True, False, False, True, False], [False] * 5])
    assert best(torch.zeros(1, 1, 2, 5), allowed, 3).tolist() == [[allowed.tolist()]]


def test_hand_parameters():
    assert count(TopK(place(12, 3))) == 0 and options_of(TopK)().model_dump() == {"keep": 64}


# Identities


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("keep", [5, 6, 64])
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 5) < 0.6)])
def test_identity_as_many_as_there_are_is_softmax_bit_for_bit(watched, keep, mask):
    head, plain, (q, k, v) = TopK(place(12, 3, 5), keep=keep), Softmax(place(12, 3, 5)), normal(3, 2, 3, 5, 4)
    if watched:
        found, wanted = (seen(part, q, k, v, mask=mask, layout=Layout((5,))) for part in (head, plain))
    else:
        found, wanted = (part(q, k, v, mask=mask, layout=Layout((5,))) for part in (head, plain))
    assert torch.equal(found, wanted)


def test_identity_a_softmax_over_all_that_are_kept_is_bit_for_bit_softmax():
    scores = normal(2, 3, 5, 5)
    assert torch.equal(masked_softmax(scores, best(scores, None, 5)), masked_softmax(scores, None))


def test_identity_one_key_gives_its_value():
    q, k, v = normal(3, 2, 3, 5, 4)
    first = (q @ k.mT).argmax(-1, keepdim=True).expand(-1, -1, -1, 4)
    near(TopK(place(12, 3, 5), keep=1)(q, k, v, layout=Layout((5,))), v.gather(2, first))


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_identity_rows_hold_as_many_weights_as_are_kept(keep):
    q, k, v = normal(3, 2, 3, 5, 4)
    weights = seen(TopK(place(12, 3, 5), keep=keep), q, k, v, layout=Layout((5,)))
    assert ((weights > 0).sum(-1) == keep).all()
    near(weights.sum(-1), torch.ones(2, 3, 5))


def test_identity_gradients_reach_kept_pairs_alone():
    """A key that no query keeps gets none, and its value none; the others do."""
    head, (q, k, v) = TopK(place(4, 1, 6), keep=2), normal(3, 1, 1, 6, 4)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    kept = seen(head, q, k, v, layout=Layout((6,)))[0, 0] > 0
    head(q, k, v, layout=Layout((6,)))[0, 0, 0].sum().backward()
    for tensor in (k, v):
        assert ((tensor.grad[0, 0] != 0).any(-1) == kept[0]).all()


def test_identity_a_hidden_key_is_not_there():
    head, (q, k, v) = TopK(place(12, 3, 7), keep=2), normal(3, 2, 3, 7, 4)
    keys = torch.arange(7).expand(2, 7) < 4
    padded = head(q, k, v, mask=Mask(keys=keys), layout=Layout((7,)))
    near(padded, head(q, k[:, :, :4], v[:, :, :4], layout=Layout((4,))))


def test_narrow_numbers_stay_near():
    """As rounding may choose other keys, all are kept."""
    narrow(TopK, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7), keep=7)
