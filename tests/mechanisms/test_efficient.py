"""Efficient attention, arXiv:1812.01243, §3, eq. 4-5."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, wrong

from attnzoo.core import Layout, Mask
from attnzoo.errors import UnsupportedMask
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.linear.efficient import Efficient
from attnzoo.testing import against


@against(Efficient, examples=40)
def test_oracle(q, k, v, keys):
    """The map of pairs, row by row: Σ_a ρ_q(q)_ia ρ_k(k)_ja, ρ_k over the keys that exist."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        asks, there = q[b, h, i].exp() / q[b, h, i].exp().sum(), keys[b]
        if there.any():
            maps = k[b, h, there].exp() / k[b, h, there].exp().sum(0)
            out[b, h, i] = (maps @ asks) @ v[b, h, there]
    return out


def with_fault(
    turn=lambda q, k: (q, k), asks=lambda q: q.softmax(-1), maps=lambda k, there: masked_softmax(k.mT, there).mT,
    hide=lambda t: t, join=lambda q, k, v: q @ (k.mT @ v),
):  # fmt: skip
    """Efficient attention with one fault."""

    def attend(self, q, k, v, *, mask, layout):
        q, k = turn(q, k)
        there = None if mask.keys is None else hide(mask.keys[:, None, None])
        return join(asks(q), maps(k, there), v)

    return wrong(Efficient, attend=attend)


def zeroed(k, there):
    """Keys that do not exist are zeros before the softmax, which gives them weights."""
    return (k if there is None else k.masked_fill(~there.mT, 0.0)).softmax(2)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "queries over the tokens": with_fault(asks=lambda q: q.softmax(2)),
    "keys over the channels": with_fault(maps=lambda k, there: k.softmax(-1) if there is None else k.softmax(-1) * there.mT),
    "axes exchanged": with_fault(asks=lambda q: q.softmax(2), maps=lambda k, there: k.softmax(-1)),
    "keys over the batch": with_fault(maps=lambda k, there: k.softmax(0) if there is None else k.softmax(0) * there.mT),
    "keys over the heads": with_fault(maps=lambda k, there: k.softmax(1) if there is None else k.softmax(1) * there.mT),
    "queries over the heads": with_fault(asks=lambda q: q.softmax(1)),
    "one softmax over all": with_fault(maps=lambda k, there: masked_softmax(k.flatten(2), None).view_as(k) if there is None else zeroed(k, there)),
    "scaled": with_fault(turn=lambda q, k: (q * q.shape[-1] ** -0.5, k)),
    "keys scaled": with_fault(turn=lambda q, k: (q, k * k.shape[-1] ** -0.5)),
    "q and k swapped": with_fault(turn=lambda q, k: (k, q) if q.shape == k.shape else (q, k)),
    "queries not normalised": with_fault(asks=lambda q: q),
    "softmax of the pairs": with_fault(join=lambda q, k, v: (q @ k.mT).softmax(-1) @ v),
    "padding as zeros": with_fault(maps=zeroed),
    "the mask inverted": with_fault(hide=torch.logical_not),
    "the mask ignored": with_fault(hide=torch.ones_like),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def give(q, k, v, mask=None):
    """What the head gives."""
    head = Efficient(place(q.shape[1] * q.shape[3], q.shape[1], k.shape[2]))
    return head(q, k, v, mask=mask or Mask(), layout=Layout((k.shape[2],)))


# By hand


def test_hand_one_channel_does_not_know_its_query():
    """A softmax over one channel is 1: keys (0, ln 3) weigh 1/4 and 3/4, whoever asks."""
    near(give(row(5, -7), row(0, math.log(3)), row(4, 8)), [7, 7])


def test_hand_two_channels():
    """ρ_q = (1/4, 3/4); the channels of the keys weigh (1/2, 1/2) and (1/5, 4/5): 1/4 · 1/2 + 3/4 · 1/5 = .275."""
    q = torch.tensor([[[[0, math.log(3)]]]], dtype=torch.float64)
    k = torch.tensor([[[[1, 0], [1, math.log(4)]]]], dtype=torch.float64)
    v = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.float64)
    near(give(q, k, v), [[[[0.275, 0.725]]]])


def test_hand_parameters():
    assert count(Efficient(place(12, 3))) == 0


# Identities


def pairs(q, k, there=None):
    """The map that is never formed, (b h n m): what values that are unit vectors give, d columns at a time."""
    m, d, columns = k.shape[2], k.shape[3], []
    unit = torch.eye(m).double()
    for first in range(0, m, d):
        v = torch.zeros(*k.shape).double()
        v[..., : len(unit[0, first : first + d])] = unit[:, first : first + d]
        columns.append(give(q, k, v, there)[..., : len(unit[0, first : first + d])])
    return torch.cat(columns, -1)


def test_identity_the_map_of_pairs_is_stochastic():
    q, k, _ = normal(3, 2, 3, 5, 4)
    effective = pairs(q, k)
    near(effective.sum(-1), torch.ones(2, 3, 5))
    assert (effective > 0).all() and torch.linalg.matrix_rank(effective).max() <= 4
    near(effective, q.softmax(-1) @ k.softmax(2).mT)
    keys = torch.tensor([[True, False, True, True, False]] * 2)
    effective = pairs(q, k, Mask(keys=keys))
    near(effective.sum(-1), torch.ones(2, 3, 5))
    assert not effective[..., ~keys[0]].any()


def test_identity_constant_values_stay_constant():
    q, k, _ = normal(3, 2, 3, 5, 4)
    near(give(q, k, torch.full_like(q, 3.0)), torch.full_like(q, 3.0))


def test_identity_one_key_gives_its_value():
    q, k, v = normal(2, 3, 5, 4), normal(2, 3, 1, 4), normal(2, 3, 1, 4)
    near(give(q, k, v), v.expand(2, 3, 5, 4))


def test_identity_keys_of_zero_give_the_mean():
    q, v = normal(2, 2, 3, 5, 4)
    near(give(q, torch.zeros_like(v), v), v.mean(2, keepdim=True).expand_as(v))


def test_identity_a_number_added_to_a_query_or_a_channel_of_keys_changes_nothing():
    q, k, v = normal(3, 2, 3, 5, 4)
    near(give(q + normal(2, 3, 5, 1), k + normal(2, 3, 1, 4), v), give(q, k, v))


def test_identity_padding_is_a_shorter_input():
    q, k, v = normal(3, 2, 3, 5, 4)
    padded = give(q, k, v, Mask(keys=torch.arange(5).expand(2, 5) < 3))
    near(padded, give(q, k[:, :, :3], v[:, :, :3]))


def test_rows_of_the_tap_are_over_the_keys():
    head, (q, k, v) = Efficient(place(12, 3, 5)), normal(3, 2, 3, 5, 4)
    maps = seen(head, q, k, v, layout=Layout((5,)))
    assert maps.shape == (2, 3, 4, 5)
    near(maps.sum(-1), torch.ones(2, 3, 4))


@pytest.mark.parametrize("mask", [Mask(causal=True), Mask(pairs=torch.ones(1, 1, 5, 5, dtype=torch.bool))])
def test_no_causal_form(mask):
    with pytest.raises(UnsupportedMask, match="AZ402.*`efficient` honours only keys"):
        give(*normal(3, 2, 3, 5, 4), mask)


def test_narrow_numbers_stay_near():
    narrow(Efficient, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7))
