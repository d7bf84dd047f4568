"""Talking heads, arXiv:2003.02436, §3."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, row, seen, spread, wrong

from attnzoo.core import Layout, Mask
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.dot_product.talking_heads import TalkingHeads
from attnzoo.testing import against


@against(TalkingHeads)
def test_oracle(component, q, k, v, allowed):
    """L'_g = Σ_h L_h P_l[h, g]; A = softmax(L') over what is seen; A'_g = Σ_h A_h P_w[h, g], of what g sees; A' v."""
    (b, heads, n, d), m = q.shape, k.shape[2]
    talk_logits, talk_weights = component.logit_mix, component.weight_mix
    out = torch.zeros_like(q)
    for s in range(b):
        for i in range(n):
            logits = [k[s, h] @ q[s, h, i] / math.sqrt(d) for h in range(heads)]
            weights = []
            for g in range(heads):
                mixed, see = sum(logits[h] * talk_logits[h, g] for h in range(heads)), allowed[s, g, i]
                weights.append(torch.zeros(m).double().masked_scatter(see, mixed[see].softmax(0)))
            for g in range(heads):
                mixed = sum(weights[h] * talk_weights[h, g] for h in range(heads))
                out[s, g, i] = sum(mixed[j] * v[s, g, j] for j in range(m) if allowed[s, g, i, j])
    return out


def mixed(component, q, k, v, mask, logits="b", weights="b", hide=True, before=False):
    """The equations with a fault: `T` for a transposed matrix, `I` for none."""
    forms = {"b": lambda p: p, "T": lambda p: p.T, "I": lambda p: torch.eye(p.shape[0]).to(p)}
    p, w = forms[logits](component.logit_mix), forms[weights](component.weight_mix)
    allowed = mask.dense(q.shape[2], k.shape[2])
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if before and allowed is not None:
        scores = scores.masked_fill(~allowed, -1e4)
    scores = torch.einsum("bhnm,hg->bgnm", scores, p)
    maps = masked_softmax(scores, None if before else allowed)
    maps = torch.einsum("bhnm,hg->bgnm", maps, w)
    return (maps.masked_fill(~allowed, 0.0) if hide and allowed is not None else maps) @ v


def with_fault(**fault):
    """Talking heads with one fault."""
    return wrong(
        TalkingHeads, attend=lambda self, q, k, v, *, mask, layout: mixed(self, q, k, v, mask, **fault)
    )


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "P_l transposed": with_fault(logits="T"),
    "P_w transposed": with_fault(weights="T"),
    "no P_l": with_fault(logits="I"),
    "no P_w": with_fault(weights="I"),
    "what others may see is seen": with_fault(hide=False),
    "the mask before P_l": with_fault(before=True),
    "no scale": wrong(
        TalkingHeads,
        attend=lambda self, q, k, v, *, mask, layout: mixed(self, q * q.shape[-1] ** 0.5, k, v, mask),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_two_heads_that_swap():
    """P_l turns the heads' logits round and P_w leaves them: head 0 weighs by head 1's logits (0, ln 3)."""
    part = TalkingHeads(place(2, 2)).double()
    with torch.no_grad():
        part.logit_mix.copy_(torch.tensor([[0.0, 1], [1, 0]]))
    q = torch.ones(1, 2, 1, 1).double()
    k = torch.cat([row(0, 0), row(0, math.log(3))], dim=1)
    v = row(4, 8).expand(1, 2, 2, 1)
    near(part(q, k, v, layout=Layout((2,))), [7, 6])  # (1/4) 4 + (3/4) 8, and the mean


def test_hand_parameters():
    assert count(TalkingHeads(place(12, 3))) == 3 * 3 + 3 * 3


# Identities


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 5) < 0.6)])
def test_identity_heads_that_talk_to_themselves_are_softmax(mask):
    site = place(12, 3, 5)
    q, k, v = normal(3, 2, 3, 5, 4)
    out = TalkingHeads(site).double()(q, k, v, mask=mask, layout=site.layout)  # as it starts
    near(out, Softmax(site)(q, k, v, mask=mask, layout=site.layout))


def test_rows_sum_to_one_when_the_columns_of_p_w_do():
    part = spread(TalkingHeads(place(12, 3, 5)))
    q, k, v = normal(3, 2, 3, 5, 4)
    assert (seen(part, q, k, v, layout=Layout((5,))).sum(-1) - 1).abs().max() > 0.1
    with torch.no_grad():
        part.weight_mix.copy_(part.weight_mix.exp() / part.weight_mix.exp().sum(0))
    near(seen(part, q, k, v, layout=Layout((5,))).sum(-1), torch.ones(2, 3, 5))


def test_identity_heads_in_another_order_give_the_same_in_that_order():
    part, turned = (spread(TalkingHeads(place(12, 3, 5))) for _ in range(2))
    order = [2, 0, 1]
    with torch.no_grad():
        for name in ("logit_mix", "weight_mix"):
            getattr(turned, name).copy_(getattr(part, name)[order][:, order])
    q, k, v = normal(3, 2, 3, 5, 4)
    wanted = part(q, k, v, layout=Layout((5,)))[:, order]
    near(turned(q[:, order], k[:, order], v[:, order], layout=Layout((5,))), wanted)


def test_identity_p_l_of_zero_weighs_alike():
    part = spread(TalkingHeads(place(12, 3, 5)))
    with torch.no_grad():
        part.logit_mix.zero_()
        part.weight_mix.copy_(torch.eye(3))
    q, k, v = normal(3, 2, 3, 5, 4)
    near(part(q, k, v, layout=Layout((5,))), v.mean(2, keepdim=True).expand_as(v))


def test_heads_with_other_masks_learn_nothing_of_what_is_hidden():
    """What head 0 may not see does not reach it through head 1, in values or in weights."""
    part = spread(TalkingHeads(place(4, 2, 3)))
    pairs = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    pairs[0, 0, :, 2] = False
    q, k, v = normal(3, 1, 2, 3, 2)
    other = v.clone()
    other[:, 0, 2] += 5
    before, after = (part(q, k, t, mask=Mask(pairs=pairs), layout=Layout((3,))) for t in (v, other))
    near(after, before)


def test_narrow_numbers_stay_near():
    narrow(TalkingHeads, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7))
