"""Sigmoid attention, arXiv:2409.04431, §2-3."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, wrong

from attnzoo.core import KVCache, Layout, Mask, MultiHead, options_of
from attnzoo.errors import UnsupportedMask
from attnzoo.mechanisms.dot_product.sigmoid import Sigmoid
from attnzoo.testing import against


@against(Sigmoid, examples=50)
def test_oracle(component, options, q, k, v, allowed, keys):
    """Σ_j v_j / (1 + N exp(-q_i·k_j / √d)), over the keys that are seen."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        number = {
            "keys": sum(keys[b].tolist()),
            "seen": sum(allowed[b, h, i].tolist()),
            "site": component.length,
        }[options["count"]]
        scores = k[b, h, allowed[b, h, i]] @ q[b, h, i] / math.sqrt(q.shape[3])
        out[b, h, i] = (1 / (1 + number * torch.exp(-scores))) @ v[b, h, allowed[b, h, i]]
    return out


def number(self, mask, allowed, k):
    """N, by another way."""
    rows = torch.ones(k.shape[0], 1, 1, k.shape[2], dtype=torch.bool)
    rows = {"keys": rows if mask.keys is None else mask.keys[:, None, None], "seen": rows if allowed is None else rows & allowed,
            "site": torch.ones(self.length, dtype=torch.bool)}[self.count]  # fmt: skip
    return rows.sum(-1, keepdim=True).double()


def with_fault(
    turn=lambda q, k: (q, k), form=torch.sigmoid, bias=lambda n: -n.log(), hide=lambda a: a, count=number, extra=1.0
):  # fmt: skip
    """Sigmoid attention with one fault."""

    def attend(self, q, k, v, *, mask, layout):
        q, k = turn(q, k)
        allowed = mask.dense(q.shape[2], k.shape[2])
        scores = q @ k.mT * q.shape[-1] ** -0.5 * extra
        weights = form(scores + bias(count(self, mask, allowed, k).clamp(min=1)))
        return (weights if allowed is None else weights.masked_fill(~hide(allowed), 0.0)) @ v

    return wrong(Sigmoid, attend=attend)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "no bias": with_fault(bias=torch.zeros_like),
    "the bias turned round": with_fault(bias=lambda n: n.log()),
    "the bias scaled too": with_fault(bias=lambda n: -n.log() / 2),
    "no scale": wrong(Sigmoid, attend=lambda self, q, k, v, *, mask, layout: Sigmoid.attend(self, q * q.shape[-1] ** 0.5, k, v, mask=mask, layout=layout)),
    "q and k swapped": with_fault(turn=lambda q, k: (k, q) if q.shape == k.shape else (q, k)),
    "a softmax": with_fault(form=lambda t: t.softmax(-1)),
    "rows that sum to 1": with_fault(form=lambda t: t.sigmoid() / t.sigmoid().sum(-1, keepdim=True)),
    "padding is counted": with_fault(count=lambda self, mask, allowed, k: number(self, Mask(), allowed, k)),
    "hidden pairs are counted": with_fault(count=lambda self, mask, allowed, k: number(self, mask, None, k)),
    "queries are counted": wrong(Sigmoid, _number=lambda self, mask, allowed, k: torch.tensor(self.length + 1)),
    "the mask inverted": with_fault(hide=torch.logical_not),
    "the mask ignored": with_fault(hide=torch.ones_like),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


@pytest.mark.parametrize("n", [1, 4, 9])
def test_hand_scores_of_zero(n):
    """Each weight is 1 / (n + 1), .2 for 4 keys; a row sums to n / (n + 1)."""
    head, k = Sigmoid(place(1, tokens=n)).double(), normal(1, 1, n, 1)
    weights = seen(head, torch.zeros_like(k), k, k, layout=Layout((n,)))
    near(weights, [[1 / (n + 1)] * n] * n)
    near(weights.sum(-1), [n / (n + 1)] * n)


def test_hand_two_keys():
    """q k = (0, ln 6), N = 2: weights 1/3 and 6/8."""
    out = Sigmoid(place(1))(row(1), row(0, math.log(6)), row(3, 4), layout=Layout((2,)))
    near(out, [1 + 3])


@pytest.mark.parametrize(
    "count,wanted", [("seen", [[1 / 2, 0], [1 / 3, 1 / 3]]), ("site", [[1 / 6, 0], [1 / 6, 1 / 6]])]
)
def test_hand_what_is_counted_under_a_causal_mask(count, wanted):
    """Scores of zero, two tokens where five were expected: 1 / (N + 1)."""
    head, zero = Sigmoid(place(1, tokens=5), count=count).double(), row(0, 0)
    near(seen(head, zero, zero, zero, mask=Mask(causal=True), layout=Layout((2,))), wanted)


def test_hand_the_authors_constant():
    """N = 2048 is a bias of -7.62."""
    head = Sigmoid(place(1, tokens=2048), count="site").double()
    near(seen(head, row(0), row(0), row(0), layout=Layout((1,))), [1 / (1 + math.exp(7.62))], 1e-5)


def test_hand_parameters():
    assert count(Sigmoid(place(12, 3))) == 0 and options_of(Sigmoid)().model_dump() == {"count": "seen"}


# Identities


def test_identity_a_key_moves_its_own_term_alone():
    """Another key and value: the output moves by what they give less what the old ones gave, no weight beside."""
    head, (q, k, v), (other, value) = Sigmoid(place(12, 3, 5)), normal(3, 2, 3, 5, 4), normal(2, 2, 3, 4)
    moved, worth = k.clone(), v.clone()
    moved[:, :, 2], worth[:, :, 2] = other, value
    before, after = (seen(head, q, t, v, layout=Layout((5,))) for t in (k, moved))
    rest = [0, 1, 3, 4]
    assert torch.equal(before[..., rest], after[..., rest]) and (before - after)[..., 2].abs().min() > 0
    out, there = head(q, k, v, layout=Layout((5,))), head(q, moved, worth, layout=Layout((5,)))
    own = after[..., 2, None] * value[:, :, None] - before[..., 2, None] * v[:, :, 2, None]
    near(there - out, own)


def test_identity_keys_add_up():
    """With one N for all, what two halves of the keys give is what all give."""
    head, (q, k, v) = Sigmoid(place(12, 3, 6), count="site"), normal(3, 2, 3, 6, 4)
    halves = [head(q, k[:, :, s], v[:, :, s], layout=Layout((3,))) for s in (slice(3), slice(3, 6))]
    near(sum(halves), head(q, k, v, layout=Layout((6,))))


def test_identity_weights_lie_between_zero_and_one():
    head, (q, k, v) = Sigmoid(place(12, 3, 5)), 3 * normal(3, 2, 3, 5, 4)
    weights = seen(head, q, k, v, layout=Layout((5,)))
    assert ((weights > 0) & (weights < 1)).all() and not torch.allclose(
        weights.sum(-1), torch.ones(2, 3, 5).double()
    )


def test_identity_without_its_bias_it_is_half_the_sum_at_zero():
    """b = 0 (N = 1) and scores of zero: weights of 1/2, rows that sum to n / 2."""
    head, k = Sigmoid(place(1, tokens=1), count="site").double(), normal(1, 1, 8, 1)
    near(seen(head, 0 * k, k, k, layout=Layout((8,))).sum(-1), torch.full((1, 1, 8), 4.0))


@pytest.mark.parametrize("count", ["keys", "seen"])
def test_identity_padding_is_a_shorter_input(count):
    head, (q, k, v) = Sigmoid(place(12, 3, 5), count=count), normal(3, 2, 3, 5, 4)
    keys = torch.tensor([True, True, True, False, False]).expand(2, 5)
    padded = head(q, k, v, mask=Mask(keys=keys), layout=Layout((5,)))
    near(padded, head(q, k[:, :, :3], v[:, :, :3], layout=Layout((3,))))


@pytest.mark.parametrize("count", ["seen", "site"])
def test_identity_a_causal_pass_does_not_know_how_many_follow(count):
    head, (q, k, v) = Sigmoid(place(12, 3, 7), count=count), normal(3, 2, 3, 7, 4)
    whole = head(q, k, v, mask=Mask(causal=True), layout=Layout((7,)))
    near(
        head(q[:, :, :4], k[:, :, :4], v[:, :, :4], mask=Mask(causal=True), layout=Layout((4,))),
        whole[:, :, :4],
    )


def test_identity_token_by_token():
    site = place(12, 3, 7)
    part, x, cache = MultiHead(site, Sigmoid(site)).double(), normal(1, 5, 12), KVCache()
    rows = [
        part.step(x[:, i : i + 1], cache, mask=Mask(causal=True), layout=Layout((i + 1,))) for i in range(5)
    ]
    near(torch.cat(rows, 1), part(x, mask=Mask(causal=True), layout=Layout((5,))))


def test_a_count_of_all_keys_knows_how_many_follow():
    """And so refuses causal masks."""
    with pytest.raises(UnsupportedMask, match="AZ402"):
        Sigmoid(place(12, 3, 5), count="keys")(
            *normal(3, 1, 3, 5, 4), mask=Mask(causal=True), layout=Layout((5,))
        )


def test_narrow_numbers_stay_near():
    narrow(Sigmoid, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7))
