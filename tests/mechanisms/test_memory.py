"""Persistent memory, arXiv:1907.01470, §3."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, spread, wrong
from torch.nn import functional as F

from attnzoo.core import Layout, Mask
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.latent.memory import Memory
from attnzoo.testing import against


@against(Memory, options=lambda options: "slots" in options)  # the default is 64
def test_oracle(component, options, q, k, v, allowed):
    """Query by query: one softmax over the tokens that are seen and all slots; with a gate, beside one over tokens."""
    (b, h, n, d), slots = q.shape, options["slots"]
    out = torch.zeros_like(q)
    for s, g, i in torch.cartesian_prod(*map(torch.arange, (b, h, n))).tolist():
        see = allowed[s, g, i].nonzero().flatten().tolist()
        if not see:
            continue
        keys, values = [k[s, g, j] for j in see], [v[s, g, j] for j in see]
        keys += [math.sqrt(d) * component.key_slots[g, r] for r in range(slots)]
        values += [math.sqrt(slots) * component.value_slots[g, r] for r in range(slots)]
        shares = [torch.exp(q[s, g, i] @ key / math.sqrt(d)) for key in keys]
        together = sum(a * value for a, value in zip(shares, values, strict=True)) / sum(shares)
        tokens = len(see)
        alone = sum(a * value for a, value in zip(shares[:tokens], values[:tokens], strict=True)) / sum(
            shares[:tokens]
        )
        gate = component.gamma[g] if options["start"] == "identity" else 1.0
        out[s, g, i] = alone + gate * (together - alone)
    return out


def with_fault(
    scale=True,
    keys=None,
    values=None,
    hidden=False,
    apart=False,
    empty=False,
    gate="mix",
    swap=False,
    head=None,
):
    """The equations with a fault; without one they are not caught."""

    def attend(self, q, k, v, *, mask, layout):
        more_k, more_v = self.key_slots, self.value_slots
        if swap:
            more_k, more_v = more_v, more_k
        if head is not None:
            more_k, more_v = (t[:1].expand(t.shape) for t in (more_k, more_v))
        r, d, m = *more_k.shape[1:], k.shape[2]
        more_k, more_v = (
            more_k * (d**0.5 if keys is None else keys),
            more_v * (r**0.5 if values is None else values),
        )
        q = q * d**-0.5 if scale else q
        allowed = mask.dense(q.shape[2], m)
        allowed = torch.ones(1, 1, q.shape[2], m, dtype=torch.bool) if allowed is None else allowed
        tokens, slots = q @ k.mT, q @ more_k.mT
        some, alone = allowed.any(-1, keepdim=True), masked_softmax(tokens, allowed)
        joint = masked_softmax(torch.cat([tokens, slots], -1), F.pad(allowed, (0, r), value=True))
        if apart:
            joint = torch.cat([alone, slots.softmax(-1)], -1)
        joint = joint if empty else joint * some
        if hidden and not mask.free:
            joint = torch.cat([alone, torch.zeros_like(slots)], -1)
        weights, more = joint[..., :m], joint[..., m:]
        if self.gamma is not None and gate != "none":
            gamma = self.gamma[:, None, None]
            weights, more = (weights if gate == "values" else alone + gamma * (weights - alone)), gamma * more
        return weights @ v + more @ more_v

    return wrong(Memory, attend=attend)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=30).ok


MUTANTS = {
    "no scale": with_fault(scale=False),
    "learned keys not scaled": with_fault(keys=1.0),
    "learned values not scaled": with_fault(values=1.0),
    "masks hide the memory": with_fault(hidden=True),
    "a softmax each": with_fault(apart=True),
    "the memory alone where no token is seen": with_fault(empty=True),
    "no gate": with_fault(gate="none"),
    "a gate of the values alone": with_fault(gate="values"),
    "keys and values swapped": with_fault(swap=True),
    "one memory for all heads": with_fault(head=0),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_one_slot_beside_two_tokens():
    """Equal scores: the mean of 1, 3 and the slot's 8."""
    part = Memory(place(1), slots=1).double()
    with torch.no_grad():
        part.key_slots.fill_(2.0)
        part.value_slots.fill_(8.0)
    near(part(row(0, 0), row(5, 6), row(1, 3), layout=Layout((2,))), [4, 4])


def test_hand_scales():
    """d = 4 and r = 4: key (½, 0, 0, 0) √4 against q (2 ln 3, 0, 0, 0), over √4: a score of ln 3; value 1 √4."""
    part = Memory(place(4), slots=4).double()
    with torch.no_grad():
        part.key_slots.zero_()[0, 0, 0] = 0.5
        part.value_slots.zero_()[0, 0] = 1.0
    q, k = torch.zeros(1, 1, 1, 4).double(), torch.zeros(1, 1, 1, 4).double()
    q[..., 0] = 2 * math.log(3)
    near(part(q, k, k, layout=Layout((1,))), [6 / 7] * 4)  # 3 · 2 of 3 + 3 + 1


def test_hand_a_gate_of_a_half():
    part = Memory(place(1), slots=1, start="identity").double()
    with torch.no_grad():
        part.value_slots.fill_(8.0)
        part.gamma.fill_(0.5)
    near(part(row(0, 0), row(5, 6), row(1, 3), layout=Layout((2,))), [3, 3])


@pytest.mark.parametrize("options,number", [({}, 2 * 64 * 12), ({"slots": 5, "start": "identity"}, 2 * 5 * 12 + 3), ({"slots": 0, "start": "identity"}, 0)])  # fmt: skip
def test_hand_parameters(options, number):
    assert count(Memory(place(12, 3), **options)) == number


def test_slots_start_from_normal_distributions_of_size_one_once_scaled():
    part = Memory(place(50, 2), slots=400)
    assert abs(part.key_slots.std() * 25**0.5 - 1) < 0.05 and abs(part.value_slots.std() * 20 - 1) < 0.05


# Identities

MASKS = [
    Mask(),
    Mask(causal=True),
    Mask(keys=torch.rand(2, 5) < 0.6),
    Mask(pairs=torch.rand(2, 3, 5, 5) < 0.5),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{"slots": 0}, {"slots": 4, "start": "identity"}])
def test_identity_without_slots_and_at_an_identity_start_it_is_softmax(options, mask):
    site, (q, k, v) = place(12, 3, 5), normal(3, 2, 3, 5, 4)
    out = Memory(site, **options).double()(q, k, v, mask=mask, layout=site.layout)
    near(out, Softmax(site)(q, k, v, mask=mask, layout=site.layout))


def test_identity_start_learns_by_its_gate():
    site, (q, k, v) = place(12, 3, 5), normal(3, 2, 3, 5, 4)
    part = Memory(site, slots=4, start="identity").double()
    part(q, k, v, layout=site.layout).square().sum().backward()
    assert part.gamma.grad.all() and not part.key_slots.grad.any()


@pytest.mark.parametrize("mask", MASKS)
def test_identity_a_gate_of_one_is_the_random_start(mask):
    one, two = (spread(Memory(place(12, 3, 5), slots=4, start=start)) for start in ("random", "identity"))
    two.load_state_dict(one.state_dict() | {"gamma": torch.ones(3)})
    q, k, v = normal(3, 2, 3, 5, 4)
    near(two(q, k, v, mask=mask, layout=Layout((5,))), one(q, k, v, mask=mask, layout=Layout((5,))))


def test_identity_slots_are_tokens_that_all_see():
    part = spread(Memory(place(12, 3, 5), slots=4))
    q, k, v = normal(3, 2, 3, 5, 4)
    keys = torch.tensor([[True, False, True, True, False], [True] * 5])
    more = [t.expand(2, 3, 4, 4) for t in (2 * part.key_slots, 2 * part.value_slots)]
    longer = torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2)
    wanted = Softmax(place(12, 3))(
        q, *longer, mask=Mask(keys=F.pad(keys, (0, 4), value=True)), layout=Layout((9,))
    )
    near(part(q, k, v, mask=Mask(keys=keys), layout=Layout((5,))), wanted)


def test_the_taps_together_sum_to_one():
    part, (q, k, v) = spread(Memory(place(12, 3, 5), slots=4)), normal(3, 2, 3, 5, 4)
    tokens, slots = (
        seen(part, q, k, v, tap=tap, layout=Layout((5,))) for tap in ("weights", "weights_memory")
    )
    assert tokens.shape == (2, 3, 5, 5) and slots.shape == (2, 3, 5, 4)
    near(tokens.sum(-1) + slots.sum(-1), torch.ones(2, 3, 5))


@pytest.mark.parametrize("start", ["random", "identity"])
def test_narrow_numbers_stay_near(start):
    narrow(Memory, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7), slots=5, start=start)
