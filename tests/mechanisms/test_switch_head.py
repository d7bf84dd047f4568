"""SwitchHead, arXiv:2312.07987, §2.2."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask, MultiHead
from attnzoo.errors import RecipeError
from attnzoo.functional import dot_product_attention, merge_heads, split_heads
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.routing.switch_head import SwitchHead
from attnzoo.testing import against


def best_of(logits, active):
    """σ of the greatest, by expert."""
    by = torch.sigmoid(logits)
    return {e: by[e] for e in sorted(range(len(by)), key=lambda e: -float(by[e].detach()))[:active]}


@against(SwitchHead, examples=16)
def test_oracle(component, options, x, source, allowed):
    """Head by head and token by token: values of the source's experts, outputs of the asking token's."""
    (b, n, c), h, experts = x.shape, component.heads, options["experts"]
    d, active = c // h, min(options["active"], experts)
    w_v = component.v.weight.reshape(h, experts, d, -1)
    w_o = component.proj.weight.reshape(c, h, experts, d)
    out = torch.zeros_like(x)
    for s in range(b):
        for g in range(h):
            rows = slice(g * d, (g + 1) * d)
            q, k = x[s] @ component.q.weight[rows].T, source[s] @ component.k.weight[rows].T
            v = []
            for token in source[s]:
                if experts == 1:
                    v.append(w_v[g, 0] @ token)
                else:
                    logits = component.choose_source.weight.reshape(h, experts, -1)[g] @ token
                    v.append(sum(by * (w_v[g, e] @ token) for e, by in best_of(logits, active).items()))
            v = torch.stack(v)
            for i in range(n):
                see = allowed[s, g, i]
                if see.any():
                    head = (k[see] @ q[i] / math.sqrt(d)).softmax(0) @ v[see]
                    logits = component.choose.weight.reshape(h, experts, c)[g] @ x[s, i]
                    for e, by in best_of(logits, active).items():
                        out[s, i] = out[s, i] + by * (w_o[:, g, e] @ head)
    return out


def mixed(
    part, x, source, mask, fewer=0, normed=False, one_router=False, gates=True, values=True,
    over=-1, scale=False, swapped=False, by_expert=False,
):  # fmt: skip
    """The equations with a fault."""
    h, e = part.heads, part.experts
    q, k = split_heads(part.q(x), h), split_heads(part.k(source), h)
    v = part.v(source)
    v = v.unflatten(-1, (e, h, -1)).transpose(2, 3) if by_expert else v.unflatten(-1, (h, e, -1))

    def best(logits):
        by = logits.unflatten(-1, (h, e))
        by = by.softmax(-1) if normed else by.sigmoid()
        most = min(by.shape[over], max(1, part.active - fewer))
        return torch.zeros_like(by).scatter(over, by.topk(most, over).indices, 1.0) * by

    if part.choose_source is None:
        v = v[..., 0, :]
    else:
        router = part.choose if one_router and part.context_dim is None else part.choose_source
        v = (best(router(source))[..., None] ** (1 if values else 0) * v).sum(-2)
    heads = dot_product_attention(part, q * (q.shape[-1] ** 0.5 if scale else 1), k, v.transpose(1, 2), mask)
    outer = best(part.choose(x)) ** (1 if gates else 0)
    if swapped and x.shape == source.shape and part.choose_source is not None:
        outer = best(part.choose_source(x))
    out = outer.transpose(1, 2)[..., None] * heads[..., None, :]
    return part.proj(merge_heads(out.flatten(-2)))


def with_fault(**fault):
    """SwitchHead with one fault."""
    return wrong(
        SwitchHead, mix=lambda self, x, source, *, mask, layout: mixed(self, x, source, mask, **fault)
    )


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=20).ok


MUTANTS = {
    "one expert too few": with_fault(fewer=1),
    "experts that compete": with_fault(normed=True),
    "one router for both sides": with_fault(one_router=True),
    "outputs chosen by the router of values": with_fault(swapped=True),
    "outputs not weighed": with_fault(gates=False),
    "values not weighed": with_fault(values=False),
    "the best of the heads": with_fault(over=-2),
    "experts before heads": with_fault(by_expert=True),
    "no scale": with_fault(scale=True),
    "the mask ignored": wrong(
        SwitchHead, mix=lambda self, x, source, *, mask, layout: mixed(self, x, source, Mask())
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_values_of_two_experts():
    """One channel: experts that multiply by 1, 10, 100 and σ = 1/2, 3/4, 4/5: the best two give 7.5 + 80."""
    part = SwitchHead(place(1, 1, 1), experts=3, active=2).double()
    with torch.no_grad():
        part.v.weight.copy_(torch.tensor([[1.0], [10], [100]]))
        part.choose_source.weight.copy_(torch.tensor([[0.0], [math.log(3)], [math.log(4)]]))
        part.choose.weight.copy_(torch.tensor([[math.log(3)], [0.0], [-1.0]]))  # 3/4 and 1/2
        part.proj.weight.copy_(torch.tensor([[1.0, 2, 1000]]))
    out = part(torch.ones(1, 1, 1).double(), layout=Layout((1,)))
    near(out, (7.5 + 80) * (3 / 4 * 1 + 1 / 2 * 2), 1e-5)


@pytest.mark.parametrize("experts,number", [(4, 2 * 144 + 2 * 4 * 144 + 2 * 12 * 12), (1, 4 * 144 + 3 * 12)])
def test_hand_parameters(experts, number):
    """Q and K c² each, V and the output E c² each, routers c h E each; with one expert one router alone."""
    assert count(SwitchHead(place(12, 3), experts=experts)) == number
    assert count(SwitchHead(place(12, 3))) == 2 * 144 + 2 * 4 * 144 + 2 * 12 * 12


def test_hand_where_it_starts():
    part = SwitchHead(place(64, 4), experts=5)
    for layer in (part.v, part.proj, part.choose, part.choose_source):
        assert abs(layer.weight.std() * 8 - 1) < 0.1


@pytest.mark.parametrize("experts,active", [(2, 3), (4, 5)])
def test_what_cannot_be_is_refused(experts, active):
    with pytest.raises(RecipeError, match=f"AZ214.*{active} of {experts} experts"):
        SwitchHead(place(8, 4), experts=experts, active=active)


# Identities


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 5) < 0.6)])
def test_identity_one_expert_is_multi_head_attention_with_a_gate(mask):
    """W_O (σ(W_D x) ⊙ heads)."""
    site = place(24, 6, 5, qkv_bias=False, proj_bias=False)
    part, x = spread(SwitchHead(site, experts=1), 0.3), normal(2, 5, 24)
    q, k, v = (split_heads(layer(x), 6) for layer in (part.q, part.k, part.v))
    heads = Softmax(site)(q, k, v, mask=mask, layout=site.layout)
    gated = heads * part.choose(x).sigmoid().mT[..., None]
    near(part(x, mask=mask, layout=site.layout), part.proj(merge_heads(gated)))


def test_identity_equal_experts_that_are_all_open_are_multi_head_attention():
    """σ = 1 of one expert of two that are alike."""
    site = place(24, 6, 5, qkv_bias=False, proj_bias=False)
    part, multi, x = (
        spread(SwitchHead(site, experts=2, active=1), 0.3),
        MultiHead(site, Softmax(site)).double(),
        normal(2, 5, 24),
    )
    v, o = normal(6, 1, 4, 24), normal(24, 6, 1, 4)
    with torch.no_grad():
        part.v.weight.copy_(v.expand(6, 2, 4, 24).reshape(48, 24))
        part.proj.weight.copy_(o.expand(24, 6, 2, 4).reshape(24, 48))
        multi.qkv.weight.copy_(torch.cat([part.q.weight, part.k.weight, v.reshape(24, 24)]))
        multi.proj.weight.copy_(o.reshape(24, 24))
    x[..., 0] = 1
    for router in (part.choose, part.choose_source):
        nn.init.zeros_(router.weight)
        nn.init.constant_(router.weight[:, 0], 60.0)
    near(part(x, layout=site.layout), multi(x, layout=site.layout))


def test_identity_all_experts_are_soft():
    """With all experts active nothing is chosen: Σ_e σ_e W_e."""
    part, x = spread(SwitchHead(place(12, 3, 5), experts=3, active=3), 0.4), normal(2, 5, 12)
    by = part.choose_source(x).sigmoid().unflatten(-1, (3, 3))
    v = (by[..., None] * part.v(x).unflatten(-1, (3, 3, 4))).sum(3).transpose(1, 2)
    heads = seen(part, x, layout=Layout((5,))) @ v
    out = part.choose(x).sigmoid().unflatten(-1, (3, 3)).transpose(1, 2)[..., None] * heads[..., None, :]
    near(part(x, layout=Layout((5,))), part.proj(merge_heads(out.flatten(-2))))


def test_identity_experts_that_are_not_chosen_have_no_say():
    part, x = spread(SwitchHead(place(12, 3, 1), experts=4, active=2)), normal(1, 1, 12)
    part(x, layout=Layout((1,))).square().sum().backward()
    chosen = part.choose_source(x).unflatten(-1, (3, 4)).topk(2).indices[0, 0]
    learns = part.v.weight.grad.unflatten(0, (3, 4, 4)).abs().sum((2, 3)) > 0
    assert [row.nonzero().flatten().tolist() for row in learns] == chosen.sort(-1).values.tolist()


def test_the_map_is_of_softmax_and_sums_to_one():
    part, x = spread(SwitchHead(place(12, 3, 5))), normal(2, 5, 12)
    near(seen(part, x, layout=Layout((5,))).sum(-1), torch.ones(2, 3, 5))
    assert seen(part, x, tap="shares_source", layout=Layout((5,))).shape == (2, 5, 3, 4)


def test_narrow_numbers_stay_near():
    narrow(SwitchHead, [(2, 7, 12)], site=place(12, 3, 7), active=4)  # no choice hangs on rounding
