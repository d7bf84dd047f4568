"""Mixture of attention heads, arXiv:2210.05144, §3."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask, auxiliary_losses
from attnzoo.errors import RecipeError, UnsupportedMask
from attnzoo.functional import dot_product_attention, merge_heads, split_heads
from attnzoo.mechanisms.projection.grouped_query import GroupedQuery
from attnzoo.mechanisms.routing.mixture_of_attention import MixtureOfAttention
from attnzoo.testing import against


def filled(heads, options):
    """How many experts there are, and are active."""
    experts = 2 * heads if options["experts"] is None else options["experts"]
    return experts, min(heads, experts) if options["active"] is None else options["active"]


@against(MixtureOfAttention, examples=20)
def test_oracle(component, options, x, source, allowed):
    """Token by token: the best experts ask the shared keys, and each has its own output."""
    (b, n, c), d = x.shape, x.shape[2] // component.heads
    experts, active = filled(component.heads, options)
    w_q, w_o = component.q.weight.reshape(experts, d, c), component.proj.weight.reshape(c, experts, d)
    out = torch.zeros_like(x)
    for s in range(b):
        k, v = source[s] @ component.k.weight.T, source[s] @ component.v.weight.T
        for i in range(n):
            see = allowed[s, 0, i]
            p = torch.ones(1).double() if experts == 1 else (component.route.weight @ x[s, i]).softmax(0)
            if see.any():
                for e in sorted(range(experts), key=lambda e: -float(p[e].detach()))[:active]:
                    head = (k[see] @ (w_q[e] @ x[s, i]) / math.sqrt(d)).softmax(0) @ v[see]
                    out[s, i] = out[s, i] + p[e] * (w_o[:, e] @ head)
    return out


def mixed(part, x, source, mask, fewer=0, normed=False, weighed=True, over=-1, scale=False, keys=False):
    """The equations with a fault."""
    ones = torch.ones_like(x[..., :1])
    p = ones if part.route is None else part.route(x).softmax(over)
    best = p.topk(max(1, part.active - fewer), -1).indices
    chosen = torch.zeros_like(p).scatter(-1, best, 1.0)
    gate = chosen * p if weighed else chosen
    if normed:
        gate = gate / gate.sum(-1, keepdim=True)
    q = split_heads(part.q(x), part.experts)
    k, v = (t[:, None].expand(-1, part.experts, -1, -1) for t in (part.k(source), part.v(source)))
    q, gate = q * (q.shape[-1] ** 0.5 if scale else 1.0), gate.mT[..., None]
    if keys and gate.shape[2] == v.shape[2]:
        return part.proj(merge_heads(dot_product_attention(part, q, k, v * gate, mask)))
    return part.proj(merge_heads(dot_product_attention(part, q, k, v, mask) * gate))


def with_fault(**fault):
    """Mixture of attention with one fault."""

    def mix(self, x, source, *, mask, layout):
        return mixed(self, x, source, mask, **fault)

    return wrong(MixtureOfAttention, mix=mix)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=20).ok


MUTANTS = {
    "one expert too few": with_fault(fewer=1),
    "shares that sum to one": with_fault(normed=True),
    "experts not weighed": with_fault(weighed=False),
    "softmax over the tokens": with_fault(over=1),
    "softmax over the batch": with_fault(over=0),
    "no scale": with_fault(scale=True),
    "gates of the keys": with_fault(keys=True),
    "the mask ignored": wrong(
        MixtureOfAttention, mix=lambda self, x, source, *, mask, layout: mixed(self, x, source, Mask())
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def moa(experts=6, active=2, dim=12, heads=3, tokens=5, **fields) -> MixtureOfAttention:
    """In float64, with weights of a size that matters."""
    return spread(
        MixtureOfAttention(place(dim, heads, tokens, **fields), experts=experts, active=active), 0.5
    )


# By hand


def test_hand_the_best_two_of_three():
    """p = (4, 2, 1) / 7, not divided by the sum of the best."""
    part = moa(3, 2, 3, 3)
    with torch.no_grad():
        part.route.weight.copy_(torch.tensor([[math.log(4)], [math.log(2)], [0.0]]).expand(3, 3) / 3)
    near(part.gates(torch.ones(1, 1, 3).double()), [4 / 7, 2 / 7, 0], 1e-7)


def test_hand_one_token():
    """A token alone gets Σ p_e V W_O^e, here (4/7 · 1 + 2/7 · 10) · 5."""
    part = moa(3, 2, 1, 1, 1)
    with torch.no_grad():
        part.route.weight.copy_(torch.tensor([[math.log(4)], [math.log(2)], [0.0]]))
        part.v.weight.fill_(5.0)
        part.proj.weight.copy_(torch.tensor([[1.0, 10, 100]]))
    near(part(torch.ones(1, 1, 1).double(), layout=Layout((1,))), 5 * (4 / 7 + 20 / 7), 1e-6)


@pytest.mark.parametrize("heads,experts,active", [(1, 2, 1), (3, 6, 3), (4, 8, 4)])
def test_hand_defaults(heads, experts, active):
    """Twice the site's heads, of which a token has as many as the site."""
    part = MixtureOfAttention(place(12, heads))
    assert (
        (part.experts, part.active) == (experts, active) == filled(heads, {"experts": None, "active": None})
    )
    assert MixtureOfAttention(place(12, 4), experts=2).active == 2


@pytest.mark.parametrize("experts,routers", [(6, 12 * 6), (1, 0)])
def test_hand_parameters(experts, routers):
    """Queries and outputs c d for each expert, keys and values c d once, a router c E without a bias."""
    part = MixtureOfAttention(place(12, 3), experts=experts, active=1)
    assert count(part) == 2 * 12 * 4 * experts + 2 * 12 * 4 + routers


def test_hand_where_it_starts():
    """W_g = 0, and Glorot's bound √(6 / (c + d)) / √2 for keys and values."""
    part, bound = MixtureOfAttention(place(64, 2)), math.sqrt(6 / 96) / math.sqrt(2)
    assert not part.route.weight.any()
    for layer in (part.k, part.v):
        assert 0.95 * bound < layer.weight.abs().max() <= bound


def test_what_cannot_be_is_refused():
    with pytest.raises(RecipeError, match="AZ214.*3 of 2 experts"):
        MixtureOfAttention(place(8, 4), experts=2, active=3)


def test_pairs_by_head_are_refused():
    """Its heads are experts, whose number is not the site's."""
    pairs = torch.ones(1, 3, 5, 5, dtype=torch.bool)
    with pytest.raises(UnsupportedMask, match="AZ402|AZ405"):
        moa()(normal(1, 5, 12), mask=Mask(pairs=pairs), layout=Layout((5,)))


# Identities


def test_identity_one_expert_is_single_head_attention():
    """E = a = 1: a gate of 1."""
    part, x = moa(1, 1, 12, 1), normal(2, 5, 12)
    site = place(12, 1, 5, qkv_bias=False, proj_bias=False)
    single = GroupedQuery(site, groups=1).double()
    state = {
        "q.weight": part.q.weight,
        "kv.weight": torch.cat([part.k.weight, part.v.weight]),
        "proj.weight": part.proj.weight,
    }
    single.load_state_dict(state)
    for mask in (Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 5) < 0.6)):
        near(part(x, mask=mask, layout=site.layout), single(x, mask=mask, layout=site.layout))


def test_identity_a_router_of_zero_is_multi_query_attention():
    """W_g = 0 and all experts: a gate of 1 / E each."""
    part, x = moa(3, 3), normal(2, 5, 12)
    nn.init.zeros_(part.route.weight)
    near(part.gates(x), torch.full((2, 5, 3), 1 / 3).double(), 1e-7)
    multi = GroupedQuery(place(12, 3, 5, qkv_bias=False, proj_bias=False), groups=1).double()
    multi.load_state_dict(
        {
            "q.weight": part.q.weight,
            "kv.weight": torch.cat([part.k.weight, part.v.weight]),
            "proj.weight": part.proj.weight / 3,
        }
    )
    near(part(x, layout=Layout((5,))), multi(x, layout=Layout((5,))))


def test_identity_gates_are_shares_or_zero():
    part, x = moa(), normal(2, 5, 12)
    shares, gates = part.route(x).softmax(-1), part.gates(x)
    near(gates, shares * (gates > 0))
    assert ((gates > 0).sum(-1) == 2).all()
    near(seen(part, x, tap="shares", layout=Layout((5,))), shares)
    near(seen(part, x, layout=Layout((5,))).sum(-1), gates.mT)


def losses(part, x):
    """What a training loop collects."""
    with auxiliary_losses(part) as extra:
        part(x, layout=Layout((x.shape[1],)))
    return extra.mean()


def test_identity_of_the_loss_with_loops():
    part, x = moa(4, 2), normal(2, 5, 12)
    share, chosen, z = [0.0] * 4, [0] * 4, 0.0
    for token in x.flatten(0, 1):
        logits = part.route(token)
        p = logits.softmax(-1).tolist()
        z += math.log(sum(math.exp(v) for v in logits.tolist())) ** 2
        for e in range(4):
            share[e] += p[e]
        for e in sorted(range(4), key=lambda e: -p[e])[:2]:
            chosen[e] += 1
    switch = 4 * sum(p / sum(share) * f / sum(chosen) for p, f in zip(share, chosen, strict=True))
    near(losses(part, x), switch + 0.1 * z / 10)
    assert losses(moa(1, 1), x) == 0.0  # there is no router


def test_identity_of_the_loss_at_the_start():
    """W_g = 0: 1, and log² E of the logits, a tenth of it."""
    part, x = moa(8, 3), normal(2, 5, 12)
    nn.init.zeros_(part.route.weight)
    near(losses(part, x), 1 + 0.1 * math.log(8) ** 2)


def test_identity_routers_learn_through_all_shares():
    """The softmax is over all experts, so the others' logits have a say in the shares of the best."""
    part, x = moa(), normal(1, 1, 12)
    part(x, layout=Layout((1,))).square().sum().backward()
    assert (part.route.weight.grad.abs().amax(1) > 1e-12).all()
    learns = part.proj.weight.grad.unflatten(1, (6, 4)).abs().sum((0, 2)) > 0
    assert learns.tolist() == (part.gates(x)[0, 0] > 0).tolist()


def test_narrow_numbers_stay_near():
    narrow(
        MixtureOfAttention, [(2, 7, 12)], site=place(12, 3, 7), experts=3, active=3
    )  # no choice hangs on rounding


def test_of_ties_the_first_have_it():
    """At the start all experts are alike."""
    part = MixtureOfAttention(place(12, 3, 5))
    near(part.gates(torch.randn(2, 5, 12)), torch.tensor([1 / 6] * 3 + [0.0] * 3).expand(2, 5, 6), 1e-6)
