"""Linformer, arXiv:2006.04768, §4, eq. 7."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask
from attnzoo.errors import LayoutMismatch
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.linear.linformer import Linformer
from attnzoo.testing import against

SMALL = {"examples": 25, "options": lambda options: "rank" in options}  # the default rank is 256


@against(Linformer, **SMALL)
def test_oracle(component, q, k, v, keys):
    """Slot s holds Σ_j E[s, j] k_j and Σ_j F[s, j] v_j of the keys that exist; softmax over the slots."""
    e = component.key_slots
    f = e if component.value_slots is None else component.value_slots
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        there = [j for j in range(k.shape[2]) if keys[b, j]]
        for h in range(q.shape[1]):
            zero = torch.zeros(k.shape[-1]).double()
            slots = [
                (
                    sum((e[s, j] * k[b, h, j] for j in there), zero),
                    sum((f[s, j] * v[b, h, j] for j in there), zero),
                )
                for s in range(e.shape[0])
            ]
            for i in range(q.shape[2]):
                scores = torch.stack([slot @ q[b, h, i] / math.sqrt(q.shape[-1]) for slot, _ in slots])
                weights = scores.softmax(0)
                out[b, h, i] = sum(w * value for w, (_, value) in zip(weights, slots, strict=True))
    return out


def attending(change):
    """Linformer whose inputs or slots are changed."""

    def attend(self, q, k, v, *, mask, layout):
        e = self.key_slots[:, : k.shape[2]]
        f = e if self.value_slots is None else self.value_slots[:, : k.shape[2]]
        keep = torch.ones_like(k[..., :1]) if mask.keys is None else mask.keys[:, None, :, None]
        return change(q, k, v, e, f, keep, self)

    return wrong(Linformer, attend=attend)


def plain(q, k, v, e, f, keep, self):
    """The equation."""
    return (q @ (e @ (k * keep)).mT / math.sqrt(q.shape[-1])).softmax(-1) @ (f @ (v * keep))


def last_columns(q, k, v, e, f, keep, self):
    m = k.shape[2]
    e = self.key_slots[:, -m:]
    f = e if self.value_slots is None else self.value_slots[:, -m:]
    return plain(q, k, v, e, f, keep, self)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(attending(plain)).ok


MUTANTS = {
    "E and F swapped": attending(lambda q, k, v, e, f, keep, self: plain(q, k, v, f, e, keep, self)),
    "E for F": attending(lambda q, k, v, e, f, keep, self: plain(q, k, v, e, e, keep, self)),
    "no scale": attending(
        lambda q, k, v, e, f, keep, self: plain(q * q.shape[-1] ** 0.5, k, v, e, f, keep, self)
    ),
    "the mask ignored": attending(lambda q, k, v, e, f, keep, self: plain(q, k, v, e, f, 1, self)),
    "only keys masked": attending(
        lambda q, k, v, e, f, keep, self: (
            (q @ (e @ (k * keep)).mT / math.sqrt(q.shape[-1])).softmax(-1) @ (f @ v)
        )
    ),
    "the last columns": attending(last_columns),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_default_rank():
    """256 slots when nothing is said: E and F are 256 × 9."""
    assert count(Linformer(place(1, tokens=9))) == 2 * 256 * 9


def test_hand_one_slot_gives_its_value_to_all():
    part = Linformer(place(1), rank=1).double()
    with torch.no_grad():
        part.key_slots.copy_(torch.tensor([[1.0, 5]]))
        part.value_slots.copy_(torch.tensor([[2.0, 3]]))
    near(part(row(7, -1), row(0, 1), row(1, 10), layout=Layout((2,))), [32, 32])


def test_hand_two_slots():
    """E = I, k = (0, ln 3), F swaps: weights (1/4, 3/4) on values (8, 4)."""
    part = Linformer(place(1), rank=2).double()
    with torch.no_grad():
        part.key_slots.copy_(torch.eye(2))
        part.value_slots.copy_(torch.eye(2).flip(0))
    near(part(row(1), row(0, math.log(3)), row(4, 8), layout=Layout((2,))), [5])


@pytest.mark.parametrize("share,number", [("headwise", 2 * 3 * 10), ("kv", 3 * 10)])
def test_hand_parameters(share, number):
    assert count(Linformer(place(8, 2, 10), rank=3, share=share)) == number


def test_starts_from_a_normal_distribution_of_the_right_size():
    part = Linformer(place(8, 2, 400), rank=25)
    assert abs(part.key_slots.std() * 5 - 1) < 0.05 and abs(part.value_slots.std() * 5 - 1) < 0.05


# Identities


def identity(site, share="headwise") -> Linformer:
    """r = n, E = F = I."""
    part = Linformer(site, rank=site.layout.length, share=share).double()
    for slots in part.parameters():
        nn.init.eye_(slots)
    return part


@pytest.mark.parametrize("share", ["headwise", "kv"])
def test_identity_with_a_slot_for_each_token_is_softmax(share):
    site = place(6, 2, 5)
    q, k, v = normal(3, 2, 2, 5, 3)
    near(identity(site, share)(q, k, v, layout=site.layout), Softmax(site)(q, k, v, layout=site.layout))


def test_identity_kv_is_headwise_with_equal_matrices():
    one, two = (
        Linformer(place(6, 2, 5), rank=3, share="kv").double(),
        Linformer(place(6, 2, 5), rank=3).double(),
    )
    with torch.no_grad():
        for slots in two.parameters():
            slots.copy_(one.key_slots)
    q, k, v = normal(3, 2, 2, 5, 3)
    near(one(q, k, v, layout=Layout((5,))), two(q, k, v, layout=Layout((5,))))


def test_the_map_has_the_rank_of_the_slots():
    part = spread(Linformer(place(12, 1, 9), rank=3))
    q, k = normal(2, 1, 1, 9, 12)
    weights = seen(part, q, k, k, layout=Layout((9,)))
    assert weights.shape == (1, 1, 9, 3)
    near(weights.sum(-1), torch.ones(1, 1, 9))
    effective = torch.stack([part(q, k, e.expand(1, 1, 9, 9)[..., :], layout=Layout((9,))) for e in [torch.eye(9).double()]])  # fmt: skip
    assert torch.linalg.matrix_rank(effective[0, 0, 0]) == 3


def test_tokens_in_another_order_give_another_output():
    part = spread(Linformer(place(6, 2, 5), rank=3))
    q, k, v = normal(3, 1, 2, 5, 3)
    order = [4, 2, 0, 1, 3]
    turned = part(q[:, :, order], k[:, :, order], v[:, :, order], layout=Layout((5,)))
    assert (turned - part(q, k, v, layout=Layout((5,)))[:, :, order]).abs().max() > 1e-2


def test_identity_padding_is_a_shorter_input():
    """Padded rows are zero before E and F, and so do not enter the slots."""
    part = spread(Linformer(place(6, 2, 5), rank=3))
    q, k, v = normal(3, 2, 2, 5, 3)
    keys = torch.tensor([[True, True, True, False, False]]).expand(2, 5)
    padded = part(q, k, v, mask=Mask(keys=keys), layout=Layout((5,)))
    near(padded, part(q, k[:, :, :3], v[:, :, :3], layout=Layout((3,))))
    zeroed = part(q, k * keys[:, None, :, None], v * keys[:, None, :, None], layout=Layout((5,)))
    near(padded, zeroed)


def test_more_tokens_than_it_was_built_for_are_refused():
    q, k, v = normal(3, 1, 2, 6, 3)
    with pytest.raises(LayoutMismatch, match="AZ403.*at most 5 tokens; it was given 6"):
        Linformer(place(6, 2, 5), rank=3).double()(q, k, v, layout=Layout((6,)))


def test_narrow_numbers_stay_near():
    narrow(Linformer, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7), rank=4)
