"""Selective heads (union of experts), arXiv:2503.02495."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, set_all, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask, MultiHead, options_of, rotate
from attnzoo.functional import masked_softmax, merge_heads, split_heads
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.routing.selective_heads import SelectiveHeads
from attnzoo.testing import against


def linear(layer, x):
    """W x + b for every token."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def router(component, x):
    """W_g x + b_g, (b n h); one head needs none."""
    if component.heads == 1:
        return torch.zeros_like(x[..., :1])
    return x @ component.drawn.T if component.route is None else linear(component.route, x)


def number(heads, options):
    """a."""
    least = min(2, heads) if options["gate"] == "normed" else 1
    return max(least, int(options["active"] * heads))


@against(SelectiveHeads, examples=40)
def test_oracle(component, options, x, allowed):
    """Head by head the tokens that have chosen it are taken out, attend among themselves, and are put back, summed."""
    (b, n, c), heads = x.shape, component.heads
    d, out = c // heads, torch.zeros_like(x)
    q, k, v = linear(component.qkv, x).split(c, -1)
    for s in range(b):
        p = router(component, x)[s].softmax(-1)
        chosen = [sorted(range(heads), key=lambda h, i=i: -float(p[i, h].detach()))[: number(heads, options)] for i in range(n)]  # fmt: skip
        for h in range(heads):
            tokens, mine = [i for i in range(n) if h in chosen[i]], slice(h * d, (h + 1) * d)
            for i in tokens:
                see, result = [j for j in tokens if allowed[s, h, i, j]], torch.zeros(d).double()
                if see:
                    weights = (k[s, see, mine] @ q[s, i, mine] / math.sqrt(d)).softmax(0)
                    result = weights @ v[s, see, mine]
                given = component.proj.weight[:, mine] @ result
                given = given if component.bias is None else given + component.bias[h]
                gate = 1.0 if options["gate"] == "none" else p[i, h]
                if options["gate"] == "normed" and heads > 1:
                    gate = len(chosen[i]) * p[i, h] / sum(p[i, other] for other in chosen[i])
                out[s, i] = out[s, i] + gate * given
    return out


def mixed(
    part,
    x,
    mask,
    fewer=0,
    worst=False,
    over=-1,
    of_queries=True,
    of_keys=True,
    scale=True,
    all_keys=False,
    swapped=False,
    one_bias=False,
    gated=True,
    renormed=True,
):
    """The equations with a fault."""
    p = router(part, x).softmax(over)
    best = (-p if worst else p).topk(max(1, part.active - fewer), -1).indices
    chosen = torch.zeros_like(p).scatter(-1, best, 1.0)
    gate = chosen if part.by == "none" else chosen * (p if gated else 1)
    if part.by == "normed" and renormed and part.heads > 1:
        gate = part.active * gate / gate.sum(-1, keepdim=True)
    gate, chosen = gate.mT, chosen.mT > 0
    q, k, v = (split_heads(t, part.heads) for t in part.qkv(x).chunk(3, -1))
    q, k = (k, q) if swapped else (q, k)
    pairs = chosen[..., None] & chosen[..., None, :]
    pairs = pairs if of_queries else chosen[..., None, :].expand_as(pairs)
    pairs = pairs if of_keys else chosen[..., None].expand_as(pairs)
    allowed = mask.dense(x.shape[1], x.shape[1])
    allowed = pairs if allowed is None or all_keys else pairs & allowed
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale else 1)
    out = part.proj(merge_heads(masked_softmax(scores, allowed) @ v * (gate[..., None] if of_queries else 1)))
    if part.bias is None:
        return out
    return out + (part.bias.sum(0) if one_bias else gate.mT @ part.bias)


def with_fault(**fault):
    """Selective heads with one fault."""
    return wrong(SelectiveHeads, mix=lambda self, x, source, *, mask, layout: mixed(self, x, mask, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=20).ok


MUTANTS = {
    "one head too few": with_fault(fewer=1),
    "the worst heads": with_fault(worst=True),
    "softmax over the tokens": with_fault(over=1),
    "softmax over the batch": with_fault(over=0),
    "all tokens ask every head": with_fault(of_queries=False),
    "all tokens are keys of every head": with_fault(of_keys=False),
    "no scale": with_fault(scale=False),
    "the mask ignored": with_fault(all_keys=True),
    "q and k swapped": with_fault(swapped=True),
    "biases of all heads": with_fault(one_bias=True),
    "the gate only chooses": with_fault(gated=False),
    "gates that are not renormed": with_fault(renormed=False),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def selective(heads=4, dim=24, tokens=6, **options) -> SelectiveHeads:
    """In float64, with weights of a size that matters; those that are drawn, too."""
    part = spread(SelectiveHeads(place(dim, heads, tokens), **options), 0.5)
    if part.drawn is not None:
        part.drawn.copy_(normal(heads, dim))
    return part


# By hand


@pytest.mark.parametrize(
    "gate,wanted", [("softmax", [4 / 7, 2 / 7, 0]), ("normed", [4 / 3, 2 / 3, 0]), ("none", [1, 1, 0])]
)
def test_hand_the_best_two_of_three(gate, wanted):
    """p = (4, 2, 1) / 7."""
    part = selective(3, 3, active=0.7, gate=gate)
    with torch.no_grad():
        weight = part.drawn if gate == "none" else part.route.weight
        weight.copy_(torch.tensor([[math.log(4)], [math.log(2)], [0.0]]).expand(3, 3) / 3)
        if gate != "none":
            part.route.bias.zero_()
    chosen, gates = part.gates(torch.ones(1, 1, 3).double())
    near(gates, wanted, 1e-7)
    assert chosen.tolist() == [[[True, True, False]]]


def test_hand_two_heads_and_three_tokens():
    """Tokens of sign + choose head 0, of sign - head 1; q = k = 0, so each receives the mean of its own kind."""
    part = set_all(SelectiveHeads(place(2, 2, 3), gate="none"), 0.0)
    with torch.no_grad():
        part.drawn.copy_(torch.tensor([[1.0, 0], [-1, 0]]))
        part.qkv.weight[4:].copy_(torch.eye(2))  # v = x
        part.proj.weight.copy_(torch.eye(2))
        part.bias.copy_(torch.tensor([[10.0, 0], [0, 20]]))  # of each head
    x = torch.tensor([[1.0, 5], [-2, 6], [3, 7]]).double()[None]
    near(part(x, layout=Layout((3,))), [[2 + 10, 0], [0, 6 + 20], [2 + 10, 0]])


@pytest.mark.parametrize("gate", ["softmax", "normed", "none"])
def test_hand_parameters(gate):
    """4 c² + 3 c and a bias of c per head; the router's h c + h, unless it cannot learn."""
    c, h = 24, 4
    part = SelectiveHeads(place(c, h), gate=gate)
    assert count(part) == 4 * c * c + 3 * c + h * c + (0 if gate == "none" else h * c + h)
    assert count(SelectiveHeads(place(c, 1), gate=gate)) == 4 * c * c + 4 * c  # one head has no router
    assert ("drawn" in part.state_dict()) == (gate == "none")


@pytest.mark.parametrize(
    "heads,active,gate,wanted",
    [(1, 0.5, "softmax", 1), (2, 0.5, "softmax", 1), (3, 0.5, "none", 1), (7, 0.5, "softmax", 3), (8, 0.5, "none", 4),
     (3, 1 / 3, "none", 1), (10, 0.3, "softmax", 3), (12, 0.0, "softmax", 1), (12, 1.0, "none", 12),
     (1, 0.5, "normed", 1), (2, 0.5, "normed", 2), (3, 0.5, "normed", 2), (8, 0.5, "normed", 4)],
)  # fmt: skip
def test_hand_how_many(heads, active, gate, wanted):
    """Half of them, rounded down, is the authors'."""
    assert SelectiveHeads(place(2 * heads, heads), active=active, gate=gate).active == wanted


def test_defaults():
    assert options_of(SelectiveHeads)().model_dump() == {"active": 0.5, "gate": "softmax"}


def test_it_starts_as_the_authors_do():
    """Xavier's: each head's slices of W_Q, W_K, W_V and W_O are c × d."""
    part = SelectiveHeads(place(96, 4))
    for weight in (part.qkv.weight, part.proj.weight):
        assert abs(weight.std() * ((96 + 24) / 2) ** 0.5 - 1) < 0.02
    assert not (part.qkv.bias.any() or part.bias.any() or part.route.bias.any())
    assert 0.5 < SelectiveHeads(place(96, 4), gate="none").drawn.abs().max() * 96**0.5 <= 1


# Identities


@pytest.mark.parametrize(
    "mask", [Mask(), Mask(causal=True), Mask(keys=torch.tensor([[1, 0, 1, 1, 0, 1]] * 2).bool())]
)
@pytest.mark.parametrize("gate", ["normed", "none"])
def test_identity_all_heads_are_multi_head_attention_with_the_biases_summed(gate, mask):
    site = place(24, 4, 6)
    part, multi = selective(active=1.0, gate=gate), MultiHead(site, Softmax(site)).double()
    if part.route is not None:  # normed gates are 1 where the router has no opinion
        nn.init.zeros_(part.route.weight), nn.init.zeros_(part.route.bias)
    with torch.no_grad():
        multi.qkv.load_state_dict(part.qkv.state_dict())
        multi.proj.weight.copy_(part.proj.weight)
        multi.proj.bias.copy_(part.bias.sum(0))
    x = normal(2, 6, 24)
    near(part(x, mask=mask, layout=site.layout), multi(x, mask=mask, layout=site.layout))


def test_identity_one_gate_is_the_other_times_a_share():
    """`normed` is a / Σ p times `softmax`, token by token."""
    part, other = selective(), selective(gate="normed")
    other.load_state_dict(part.state_dict())
    x = normal(2, 6, 24)
    chosen, gates = part.gates(x)
    ratio = part.active / gates.sum(-1, keepdim=True)
    near(other(x, layout=Layout((6,))), part(x, layout=Layout((6,))) * ratio)
    assert (chosen.sum(-1) == 2).all() and torch.equal(gates > 0, chosen)
    near(gates, part.route(x).softmax(-1) * chosen)


@pytest.mark.parametrize("gate", ["softmax", "normed", "none"])
def test_identity_tokens_that_have_not_chosen_a_head_might_not_be_there(gate):
    """Kinds of tokens that share no head are two sequences."""
    part = selective(4, gate=gate)
    with torch.no_grad():
        weight = part.drawn if gate == "none" else part.route.weight
        weight.zero_()
        weight[:2, 0], weight[2:, 0] = 3, -3
        if gate != "none":
            part.route.bias.zero_()
    x = normal(1, 6, 24)
    x[0, :, 0] = torch.tensor([1.0, -1, 1, 1, -1, -1])
    out = part(x, layout=Layout((6,)))
    for kind in ([0, 2, 3], [1, 4, 5]):
        near(part(x[:, kind], layout=Layout((3,))), out[:, kind])


def test_identity_another_order_gives_the_same_in_that_order():
    part, x, order = selective(), normal(2, 6, 24), [3, 0, 5, 2, 1, 4]
    near(part(x[:, order], layout=Layout((6,))), part(x, layout=Layout((6,)))[:, order])


def test_identity_a_longer_sequence_changes_nothing_before():
    """Under a causal mask: which heads a token chooses is its own affair."""
    part, x = selective(), normal(2, 9, 24)
    whole = part(x, mask=Mask(causal=True), layout=Layout((9,)))
    near(part(x[:, :6], mask=Mask(causal=True), layout=Layout((6,))), whole[:, :6])


@pytest.mark.parametrize("gate,learns", [("softmax", True), ("normed", True), ("none", False)])
def test_identity_the_router_learns_where_its_gates_multiply(gate, learns):
    part = selective(gate=gate)
    part(normal(2, 6, 24), layout=Layout((6,))).square().sum().backward()
    assert (part.route is not None and bool(part.route.weight.grad.any())) == learns


def test_a_token_that_may_see_nobody_gets_biases():
    part, x = selective(), normal(1, 6, 24)
    out = part(x, mask=Mask(keys=torch.zeros(1, 6, dtype=torch.bool)), layout=Layout((6,)))
    near(out, part.gates(x)[1] @ part.bias)


def test_samples_have_no_say_in_each_other():
    """The authors' heads take as many tokens as the most chosen one of the batch."""
    part, x = selective(), normal(3, 6, 24)
    together = part(x, layout=Layout((6,)))
    near(torch.cat([part(one[None], layout=Layout((6,))) for one in x]), together)


def test_the_map_shows_what_is_used():
    part, x = selective(), normal(2, 6, 24)
    weights = seen(part, x, layout=Layout((6,)))
    chosen, gates = (t.mT for t in part.gates(x))
    near(weights.sum(-1), gates)
    assert torch.equal(weights > 0, chosen[..., None] & chosen[..., None, :])


def test_normed_and_turned_as_the_site_wishes():
    site = place(8, 2, 6, qk_norm=True, rotary=True)
    part = spread(SelectiveHeads(site, active=1.0, gate="none"))
    x = normal(1, 6, 8)
    q, k, v = (split_heads(t, 2) for t in part.qkv(x).chunk(3, -1))
    q, k = rotate(part.q_norm(q)), rotate(part.k_norm(k))
    wanted = part.proj(merge_heads((q @ k.mT / 2).softmax(-1) @ v)) + part.bias.sum(0)
    near(part(x, layout=site.layout), wanted)


def test_narrow_numbers_stay_near():
    narrow(SelectiveHeads, [(2, 7, 12)], site=place(12, 3, 7), active=1.0)  # no choice hangs on rounding
