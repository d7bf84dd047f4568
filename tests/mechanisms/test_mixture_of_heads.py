"""Mixture of heads, arXiv:2410.11842, §3.2."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, set_all, spread, wrong
from timm.layers import Attention
from torch import nn

from attnzoo.core import Layout, Mask, MultiHead, auxiliary_losses
from attnzoo.errors import RecipeError
from attnzoo.functional import dot_product_attention, merge_heads, split_heads
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.routing.mixture_of_heads import MixtureOfHeads
from attnzoo.testing import against


def linear(layer, x):
    """W x + b for every token."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def split_of(heads, shared, active, router="linear"):
    """How many heads are shared and how many routed ones are active; options that are left out are filled in."""
    quarter, least = (heads // 4, 2) if router == "linear" else (heads // 2, 1)
    if shared is None:
        shared = heads if active == 0 else quarter
    if active is None:
        active = min(heads - shared, max(least, 3 * heads // 4 - shared))
    return (0, heads) if active == 0 else (shared, active)


def gates_of(component, options, x, q):
    """The gates of one token, head by head, whose query is q."""
    heads, code = component.heads, options["scaling"] == "code"
    shared, active = split_of(heads, options["shared"], options["active"], options["router"])
    if options["router"] == "query_norm":
        length = torch.stack([(part**2).sum().sqrt() for part in q.chunk(heads)[shared:]])
        best = sorted(range(heads - shared), key=lambda e: -float(length[e].detach()))[:active]
        return [1] * shared + [int(e in best) for e in range(heads - shared)]
    one, routed = torch.ones(1).double(), heads - shared
    p = one if routed == 1 else linear(component.route, x).softmax(0)
    best = sorted(range(routed), key=lambda e: -float(p[e].detach()))[:active]
    gates = [p[e] if e in best else 0 * p[e] for e in range(routed)]
    if code:
        gates = [active * g / sum(p[e] for e in best) for g in gates]
    if shared == 0:
        return gates
    alpha = linear(component.divide, x).softmax(0) * (2 if code else 1)
    always = one if shared == 1 else linear(component.weigh, x).softmax(0) * (shared if code else 1)
    return [alpha[0] * g for g in always] + [alpha[1] * g for g in gates]


@against(MixtureOfHeads, examples=24)
def test_oracle(component, options, x, source, allowed):
    """Head by head, token by token: the gate of the token that asks times what the head gives it; then projected."""
    (b, n, c), heads = x.shape, component.heads
    d = c // heads
    if component.context_dim is None:
        q, k, v = linear(component.qkv, x).split(c, -1)
    else:
        q, (k, v) = linear(component.q, x), linear(component.kv, source).split(c, -1)
    merged = torch.zeros_like(x)
    for s in range(b):
        for i in range(n):
            gates = gates_of(component, options, x[s, i], q[s, i])
            for h in range(heads):
                see, mine = allowed[s, h, i], slice(h * d, (h + 1) * d)
                if see.any():
                    weights = (k[s, see, mine] @ q[s, i, mine] / math.sqrt(d)).softmax(0)
                    merged[s, i, mine] = gates[h] * (weights @ v[s, see, mine])
    return linear(component.proj, merged)


def mixed(
    part,
    x,
    source,
    mask,
    fewer=0,
    renormed=True,
    times=True,
    alphas=2,
    swapped=False,
    last=False,
    over=-1,
    keys=False,
    scale=False,
    least=False,
    whole=False,
    of_keys=False,
):
    """The equations with a fault."""
    if part.context_dim is None:
        q, k, v = part.qkv(x).chunk(3, -1)
    else:
        q, (k, v) = part.q(x), part.kv(source).chunk(2, -1)
    q, k, v = (split_heads(t, part.heads) for t in (q, k, v))
    if part.router == "linear":
        gates = linear_gates(part, x, fewer, renormed, times, alphas, swapped, last, over)
    else:
        asked = k if of_keys and k.shape == q.shape else q
        length = asked.square().sum(-1)[:, 0 if whole else part.shared :].mT
        best = length.topk(max(1, part.active - fewer), -1, largest=not least).indices
        gates = torch.zeros_like(length).scatter(-1, best, 1.0)
        gates = gates[..., -(part.heads - part.shared) :]
        parts = [torch.ones_like(gates[..., :1]).expand(*gates.shape[:2], part.shared), gates]
        gates = torch.cat(parts[::-1] if last else parts, -1)
    q, gates = q * q.shape[-1] ** (0.5 if scale else 0.0), gates.mT[..., None]
    if keys and gates.shape[2] == v.shape[2]:
        return part.proj(merge_heads(dot_product_attention(part, q, k, v * gates, mask)))
    return part.proj(merge_heads(dot_product_attention(part, q, k, v, mask) * gates))


def linear_gates(part, x, fewer, renormed, times, alphas, swapped, last, over):
    """The gates of linear routers with a fault."""
    code, ones = part.scaling == "code", torch.ones_like(x[..., :1])
    p = ones if part.route is None else part.route(x).softmax(over)
    best = p.topk(max(1, part.active - fewer), -1).indices
    routed = torch.zeros_like(p).scatter(-1, best, 1.0) * p
    if code:
        if renormed:
            routed = routed / routed.sum(-1, keepdim=True)
        routed = routed * (part.active if times else 1)
    if part.divide is None:
        return routed
    alpha = part.divide(x).softmax(-1) * (alphas if code else 1)
    one, two = alpha.flip(-1).split(1, -1) if swapped else alpha.split(1, -1)
    always = ones if part.weigh is None else part.weigh(x).softmax(-1) * (part.shared if code else 1)
    parts = [one * always, two * routed]
    return torch.cat(parts[::-1] if last else parts, -1)


def with_fault(**fault):
    """Mixture of heads with one fault."""

    def mix(self, x, source, *, mask, layout):
        return mixed(self, x, source, mask, **fault)

    return wrong(MixtureOfHeads, mix=mix)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=20).ok


MUTANTS = {
    "one head too few": with_fault(fewer=1),
    "shares that are not renormed": with_fault(renormed=False),
    "gates that sum to one": with_fault(times=False),
    "alphas that sum to one": with_fault(alphas=1),
    "alphas swapped": with_fault(swapped=True),
    "shared heads last": with_fault(last=True),
    "softmax over the tokens": with_fault(over=1),
    "softmax over the batch": with_fault(over=0),
    "no scale": with_fault(scale=True),
    "gates of the keys": with_fault(keys=True),
    "the shortest queries": with_fault(least=True),
    "shared heads compete with the routed": with_fault(whole=True),
    "lengths of the keys": with_fault(of_keys=True),
    "the mask ignored": wrong(
        MixtureOfHeads, mix=lambda self, x, source, *, mask, layout: mixed(self, x, source, Mask())
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def moh(heads, dim=24, tokens=5, **options) -> MixtureOfHeads:
    """In float64, with weights of a size that matters."""
    return spread(MixtureOfHeads(place(dim, heads, tokens), **options), 0.5)


# By hand


@pytest.mark.parametrize("scaling,wanted", [("code", [4 / 3, 2 / 3, 0]), ("paper", [4 / 7, 2 / 7, 0])])
def test_hand_the_best_two_of_three(scaling, wanted):
    """p = (4, 2, 1) / 7."""
    part = moh(3, 3, shared=0, active=2, scaling=scaling)
    with torch.no_grad():
        part.route.weight.copy_(torch.tensor([[math.log(4)], [math.log(2)], [0.0]]).expand(3, 3) / 3)
    near(part.gates(torch.ones(1, 1, 3).double()), wanted, 1e-7)


@pytest.mark.parametrize(
    "scaling,wanted", [("code", [3 / 2, 1 / 2, 1 / 2]), ("paper", [3 / 4, 1 / 8, 1 / 8])]
)
def test_hand_one_shared_and_two_routed(scaling, wanted):
    """(3, 1) / 4 between the kinds; equal routed heads; one shared head, whose gate is α₁."""
    part = set_all(moh(3, 3, shared=1, active=2, scaling=scaling), 0.0)
    with torch.no_grad():
        part.divide.weight[0] = math.log(3) / 3
    assert part.weigh is None
    near(part.gates(torch.ones(1, 1, 3).double()), wanted)


@pytest.mark.parametrize(
    "options,routers",
    [
        ({"shared": 3, "active": 6}, 9 + 3 + 2),  # stage 3 of MoH-ViT-S-75
        ({"shared": 1, "active": 6}, 11 + 2),
        ({"shared": 0, "active": 6}, 12),
        ({"shared": 12, "active": 0}, 12),
        ({"shared": 11, "active": 1}, 11 + 2),
    ],
)
def test_hand_parameters(options, routers):
    """W_r, W_s and W₀ have no biases; a softmax over one head has no weights."""
    c = 24
    assert count(MixtureOfHeads(place(c, 12), **options)) == 4 * (c * c + c) + c * routers


@pytest.mark.parametrize(
    "heads,shared,active",
    [(1, 0, 1), (2, 0, 2), (3, 0, 2), (4, 1, 2), (8, 2, 4), (12, 3, 6), (16, 4, 8), (24, 6, 12)],
)
def test_hand_three_quarters_by_default(heads, shared, active):
    """3 and 6 of 12 and 4 and 8 of 16 are the authors'."""
    part = MixtureOfHeads(place(48, heads))
    assert (part.shared, part.active) == (shared, active)


def test_hand_what_is_left_out_is_filled_in():
    for options, wanted in (
        ({"shared": 2}, (2, 4)),
        ({"shared": 7}, (7, 1)),
        ({"shared": 8}, (0, 8)),
        ({"active": 6}, (2, 6)),
        ({"shared": 0}, (0, 6)),
        ({"shared": 1, "active": 7}, (1, 7)),
        ({"active": 0}, (0, 8)),
    ):
        part = MixtureOfHeads(place(48, 8), **options)
        assert (
            (part.shared, part.active) == wanted == split_of(8, options.get("shared"), options.get("active"))
        )


@pytest.mark.parametrize("heads,shared,active", [(32, 16, 8), (8, 4, 2), (4, 2, 1), (2, 1, 1), (1, 0, 1)])
def test_hand_without_parameters_half_is_shared(heads, shared, active):
    """16 and 8 of 32 are MoH-LLaMA3's; as many parameters as a plain model has."""
    part = MixtureOfHeads(place(32, heads), router="query_norm")
    assert (part.shared, part.active) == (shared, active)
    assert count(part) == 4 * (32 * 32 + 32)


def test_hand_the_longest_queries():
    """Lengths 9, 1, 3 and 2, the first shared."""
    part = moh(4, 4, tokens=1, shared=1, active=2, router="query_norm")
    near(part.longest(torch.tensor([-9.0, 1.0, -3.0, 2.0]).double().view(1, 4, 1, 1)), [1, 0, 1, 1])
    near(part.longest(torch.ones(1, 4, 1, 1).double()).sum(), 3)


def test_a_scaling_of_gates_of_zero_and_one_is_refused():
    with pytest.raises(RecipeError, match="AZ214.*scaling: paper"):
        MixtureOfHeads(place(8, 4), router="query_norm", scaling="paper")


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True)])
def test_identity_all_heads_without_parameters_are_multi_head_attention(mask):
    site = place(24, 6, 5)
    part, multi = moh(6, shared=2, active=4, router="query_norm"), MultiHead(site, Softmax(site)).double()
    multi.load_state_dict(part.state_dict())
    x = normal(2, 5, 24)
    near(part(x, mask=mask, layout=site.layout), multi(x, mask=mask, layout=site.layout))


@pytest.mark.parametrize("shared,active", [(3, 2), (5, None), (None, 4), (None, 5), (2, 0), (0, 0)])
def test_what_cannot_be_is_refused(shared, active):
    with pytest.raises(RecipeError, match="AZ214.* of 4 heads"):
        MixtureOfHeads(place(8, 4), shared=shared, active=active)


# Identities


def test_identity_what_the_gates_sum_to():
    """Σ shared / s = α₁, Σ routed / a = α₂, together 2; and E - a routed gates are exactly 0, for every token."""
    part, x = moh(6, shared=2, active=3), normal(2, 5, 24)
    gates = part.gates(x)
    near(gates[..., :2].sum(-1) / 2 + gates[..., 2:].sum(-1) / 3, torch.full((2, 5), 2.0))
    near(gates[..., :2].sum(-1) / 2, 2 * part.divide(x).softmax(-1)[..., 0])
    assert ((gates[..., 2:] == 0).sum(-1) == 1).all() and (gates[..., :2] > 0).all()
    near(seen(part, x, tap="gate", layout=Layout((5,))), gates.mT)


def without_routers(part):
    """All routers at zero."""
    for layer in (part.route, part.weigh, part.divide):
        if layer is not None:
            nn.init.zeros_(layer.weight)
    return part


@pytest.mark.parametrize("shared,active", [(2, 4), (0, 6), (6, 0), (1, 5), (5, 1)])
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 5) < 0.6)])
def test_identity_routers_of_zero_and_all_heads_are_multi_head_attention(shared, active, mask):
    site = place(24, 6, 5)
    part, multi = (
        without_routers(moh(6, shared=shared, active=active)),
        MultiHead(site, Softmax(site)).double(),
    )
    multi.load_state_dict(
        {name: t for name, t in part.state_dict().items() if name.split(".")[0] in ("qkv", "proj")}
    )
    x = normal(2, 5, 24)
    near(part(x, mask=mask, layout=site.layout), multi(x, mask=mask, layout=site.layout))


def test_identity_timms_weights_load():
    """Continued training starts from a plain model: names and order of the projections are timm's."""
    timms, part = (
        Attention(24, num_heads=6, qkv_bias=True).double().eval(),
        without_routers(moh(6, shared=2, active=4)),
    )
    assert not part.load_state_dict(timms.state_dict(), strict=False).unexpected_keys
    x = normal(2, 5, 24)
    near(part(x, layout=Layout((5,))), timms(x))


def test_identity_norms_of_queries_and_keys_are_those_of_multi_head_attention():
    site = place(24, 6, 5, qk_norm=True)
    part, multi = spread(MixtureOfHeads(site, shared=2, active=4)), MultiHead(site, Softmax(site)).double()
    multi.load_state_dict({k: t for k, t in part.state_dict().items() if k in multi.state_dict()})
    x = normal(2, 5, 24)
    near(without_routers(part)(x, layout=site.layout), multi(x, layout=site.layout))


@pytest.mark.parametrize("scaling", ["code", "paper"])
def test_identity_shared_alone_are_routed_and_active(scaling):
    """s = H, a = 0 weighs all heads softly, by H softmax(W x): so does s = 0, a = H."""
    one, other = moh(6, shared=6, active=0, scaling=scaling), moh(6, shared=0, active=6, scaling=scaling)
    other.load_state_dict(one.state_dict())
    x = normal(2, 5, 24)
    near(one.gates(x), (6 if scaling == "code" else 1) * one.route(x).softmax(-1))
    near(one(x, layout=Layout((5,))), other(x, layout=Layout((5,))))


@pytest.mark.parametrize("active", [1, 2, 3])
def test_identity_routers_of_zero_give_active_heads_a_gate_of_one(active):
    gates = without_routers(moh(6, shared=2, active=active)).gates(normal(2, 5, 24))
    near(gates[..., :2], torch.ones(2, 5, 2))
    near(gates[..., 2:].sort(-1).values, (torch.arange(4) >= 4 - active).double().expand(2, 5, 4))


def balance(part, x):
    """The authors' loss E Σ_e P_e f_e, as a training loop collects it."""
    with auxiliary_losses(part) as extra:
        part(x, layout=Layout((x.shape[1],)))
    return extra.mean()


def test_identity_of_the_balance_loss_with_loops():
    part, x = moh(6, shared=2, active=2), normal(2, 5, 24)
    share, count = [0.0] * 4, [0] * 4
    for sample in x:
        for token in sample:
            p = part.route(token).softmax(-1).tolist()
            for e in range(4):
                share[e] += p[e] / 10
            for e in sorted(range(4), key=lambda e: -p[e])[:2]:
                count[e] += 1
    near(balance(part, x), 4 * sum(p * f / 10 for p, f in zip(share, count, strict=True)))
    assert balance(moh(6, shared=6, active=0), x) > 0  # all heads are routed, and all active
    assert balance(moh(6, shared=5, active=1), x) == 0.0  # one alone has no router


def test_identity_of_the_balance_loss():
    """a where P is uniform, E where all tokens want the same heads alone, E where all heads are active."""
    x = normal(2, 5, 24)
    near(balance(without_routers(moh(12, shared=0, active=6)), x), 6.0)
    near(balance(moh(12, shared=0, active=12), x), 12.0)
    collapsed = without_routers(moh(12, shared=0, active=6))
    with torch.no_grad():
        collapsed.route.weight[:6, 0] = 1e3
    x[..., 0] = x[..., 0].abs() + 1
    near(balance(collapsed, x), 12.0)


@pytest.mark.parametrize("scaling", ["code", "paper"])
def test_identity_routers_learn_through_the_heads_that_are_active(scaling):
    """With `code` the logits of others have no say, and one active head's has none either; with `paper` all have."""
    x = normal(1, 1, 24)
    for active in (1, 2):
        part = moh(6, shared=2, active=active, scaling=scaling)
        part(x, layout=Layout((1,))).square().sum().backward()
        learns = part.route.weight.grad.abs().amax(1) > 1e-12
        chosen = part.gates(x)[0, 0, 2:] > 0
        if scaling == "paper":
            assert learns.all()
        else:
            assert learns.tolist() == (chosen & (active > 1)).tolist()


def test_gates_are_those_of_the_token_that_asks():
    """Another query changes nobody else's gates; a hidden key changes nothing."""
    part, x = moh(6), normal(1, 5, 24)
    other = x.clone()
    other[:, 4] += 3
    near(part.gates(other)[:, :4], part.gates(x)[:, :4])
    out, moved = (part(t, mask=Mask(keys=torch.arange(5)[None] < 4), layout=Layout((5,))) for t in (x, other))
    near(moved[:, :4], out[:, :4])


def test_the_map_shows_what_is_used():
    part, x = moh(6, shared=2, active=2), normal(2, 5, 24)
    weights = seen(part, x, layout=Layout((5,)))
    near(weights.sum(-1), part.gates(x).mT)
    assert ((weights == 0).all(-1).sum(1) == 2).all()


def test_narrow_numbers_stay_near():
    narrow(
        MixtureOfHeads, [(2, 7, 12)], site=place(12, 3, 7), shared=1, active=2
    )  # no choice hangs on rounding
