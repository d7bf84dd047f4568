"""NSA, native sparse attention, arXiv:2502.11089."""

import math
from dataclasses import replace

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, place, seen, spread, wrong

from attnzoo.core import Layout, Mask, Site, options_of, rotate
from attnzoo.errors import RecipeError
from attnzoo.functional import masked_softmax, rearrange, split_heads
from attnzoo.mechanisms.projection.grouped_query import GroupedQuery
from attnzoo.mechanisms.sparse import native_sparse as module
from attnzoo.mechanisms.sparse.native_sparse import NativeSparse
from attnzoo.testing import against


def linear(layer, x):
    """x Wᵀ + b."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def phi(component, block, length):
    """One key or value of those tokens of a block that exist, {place: token}."""
    if component.phi is None:
        return sum(block.values()) / len(block)
    total = 0
    for i, token in block.items():
        inner = linear(component.phi[0], torch.cat([token, token.new_tensor([i / length])]))
        total = total + linear(component.phi[2], 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2))))
    return total / len(block)


def read(q, k, v):
    """softmax(q kᵀ / √d) v, and its weights."""
    if not len(k):
        return torch.zeros_like(q), []
    p = (k @ q / math.sqrt(len(q))).softmax(0)
    return p @ v, p.tolist()


def ranked(t, p, starts, length, size, readable):
    """Blocks that are readable, best first: own, before, after, first, then by the compressed weight they share."""
    forced = [t // size, t // size - 1, t // size + 1, 0]

    def key(block):
        common = [len(range(max(s, block * size), min(s + length, (block + 1) * size))) for s in starts]
        share = sum(c * weights.get(s, 0.0) for weights in p for s, c in zip(starts, common, strict=True))
        return (forced.index(block) if block in forced else 4), -share, block

    return sorted(readable, key=key)


def by_loops(component, options, x, keys, allowed, causal):
    """Sample by sample, group by group, query by query."""
    (b, n, c), groups, stride = x.shape, options["groups"], options["stride"]
    d, each, length, size = (
        c // component.heads,
        component.heads // groups,
        options["length"] * stride,
        options["block"] * stride,
    )
    starts, out = range(0, n, stride), []
    for s in range(b):
        q, kv, gates = (linear(layer, x[s]) for layer in (component.q, component.kv, component.gates))
        gates, there, rows = gates.sigmoid(), keys[s].tolist(), {}
        for g in range(groups):
            k, v = kv[:, g * d : (g + 1) * d], kv[:, (groups + g) * d :][:, :d]
            held = {i: [j for j in range(i, min(i + length, n)) if there[j]] for i in starts}
            held = {i: js for i, js in held.items() if js}
            few_k, few_v = (
                {i: phi(component, {j - i: t[j] for j in js}, length) for i, js in held.items()}
                for t in (k, v)
            )
            for t in range(n):
                sees = {
                    h: set(allowed[s, h, t].nonzero().flatten().tolist())
                    for h in range(g * each, (g + 1) * each)
                }
                p, compressed = [], {}
                for h, js in sees.items():
                    see = [i for i in held if js.issuperset(held[i]) and not (causal and i + length - 1 > t)]
                    few = [torch.stack([few[i] for i in see]) if see else [] for few in (few_k, few_v)]
                    compressed[h], weights = read(q[t, h * d : (h + 1) * d], *few)
                    p.append(dict(zip(see, weights, strict=True)))
                readable = {j // size for js in sees.values() for j in js}
                chosen = ranked(t, p, starts, length, size, readable)[: options["chosen"]]
                for h, js in sees.items():
                    best = [j for j in sorted(js) if j // size in chosen]
                    near_ = [j for j in sorted(js) if abs(j - t) < options["window"]]
                    selected, window = (
                        read(q[t, h * d : (h + 1) * d], k[at], v[at])[0] for at in (best, near_)
                    )
                    g1, g2, g3 = gates[t, 3 * h : 3 * h + 3]
                    rows[t, h] = g1 * compressed[h] + g2 * selected + g3 * window
        out.append(torch.stack([torch.cat([rows[t, h] for h in range(component.heads)]) for t in range(n)]))
    return linear(component.proj, torch.stack(out))


def telling(options):
    """Small blocks of which not all are chosen, or something else that is not by default."""
    if options.get("stride", 64) * options.get("block", 1) > 4:
        return False
    return options.get("chosen", 1) > 1 or bool({"groups", "compress", "window"} & set(options))


@against(NativeSparse, examples=20, options=telling)
def test_oracle(component, options, x, keys, allowed, mask):
    """See `by_loops`."""
    return by_loops(component, options, x, keys, allowed, mask.causal)


def before(change):
    """Changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return NativeSparse.mix(self, x, source, mask=mask, layout=layout)

    return wrong(NativeSparse, mix=mix)


def masked(change):
    """Under another mask."""

    def mix(self, x, source, *, mask, layout):
        return NativeSparse.mix(self, x, source, mask=change(mask), layout=layout)

    return wrong(NativeSparse, mix=mix)


def choosing(change):
    """Blocks selected by other arguments."""
    return patched(NativeSparse, "selected", lambda *arguments: SELECTED(*change(*arguments)))


def gating(change):
    """Other gates."""
    return patched(NativeSparse, "rearrange", lambda t, *_, **__: change(t))


SELECTED, WHOLE, CLOSE = module.selected, module.whole_blocks, module.close
MUTANTS = {
    "no scale": before(lambda self: self.q.weight.mul_(2.0)),
    "gates that sum to one": gating(lambda t: (g := rearrange(t, "b n (h k) -> b h n k", k=3)) / g.sum(-1, keepdim=True)),
    "gates branch by branch": gating(lambda t: rearrange(t, "b n (k h) -> b h n k", k=3)),
    "branches in another order": gating(lambda t: rearrange(t, "b n (h k) -> b h n k", k=3).flip(-1)),
    "a block is seen with its last token hidden": patched(
        NativeSparse, "whole_blocks", lambda *where: WHOLE(*where).roll(-1, -2)
    ),
    "a block is seen though a pair is forbidden": patched(
        NativeSparse, "whole_blocks", lambda there, allowed, *more: WHOLE(there, there.mT, *more)
    ),
    "means of tokens that do not exist": patched(
        NativeSparse, "masked_mean", lambda t, there, dim: t.mean(dim)
    ),
    "compressed blocks one stride longer": before(
        lambda self: setattr(self, "cuts", (self.cuts[0] + self.cuts[1], *self.cuts[1:]))
    ),
    "selected blocks one stride longer": before(
        lambda self: setattr(self, "cuts", (*self.cuts[:2], self.cuts[1] + self.cuts[2]))
    ),
    "the worst blocks": choosing(lambda p, *more: (-p, *more)),
    "no block is certain": choosing(lambda p, *more: (100 * p, *more)),
    "one block more": choosing(lambda *more: (*more[:-1], more[-1] + 1)),
    "each head selects for itself": choosing(lambda p, *more: (p, *more[:-2], p.shape[1], more[-1])),
    "all of a selected block": choosing(lambda p, allowed, *more: (p, allowed | True, *more)),
    "windows one larger": before(lambda self: setattr(self, "window", self.window + 1)),
    "windows one smaller": before(lambda self: setattr(self, "window", self.window - 1)),
    "a window that ends with the query": patched(
        NativeSparse, "close", lambda allowed, window: CLOSE(allowed, window).tril()
    ),
    "the mask ignored": masked(lambda mask: Mask()),
    "the mask inverted": masked(lambda mask: replace(mask, keys=None if mask.keys is None else ~mask.keys)),
    "a softmax over samples": patched(
        NativeSparse, "masked_softmax", lambda scores, allowed: masked_softmax(scores, allowed).roll(1, 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def sparse(dim=8, heads=4, tokens=24, only=None, **options) -> NativeSparse:
    """In float64, with parameters of a size that matters; with one branch alone, the others' gates closed."""
    part = spread(NativeSparse(place(dim, heads, tokens), **options))
    if only is not None:
        with torch.no_grad():
            part.gates.weight.zero_()
            part.gates.bias.copy_(
                torch.tensor([800.0 if i == only else -800.0 for i in range(3)]).repeat(heads)
            )
    return part


def plain(part, x, mask):
    """Grouped-query attention with the same projections."""
    other = GroupedQuery(place(x.shape[-1], part.heads, x.shape[1]), groups=part.groups).double()
    for name in ("q", "kv", "proj"):
        getattr(other, name).load_state_dict(getattr(part, name).state_dict())
    return other(x, mask=mask, layout=Layout((x.shape[1],)))


def run(part, x, mask=Mask(causal=True)):  # noqa: B008 - it does not change
    return part(x, mask=mask, layout=Layout((x.shape[1],)))


CAUSAL = Mask(causal=True)


@pytest.mark.parametrize("compress", ["mean", "mlp"])
@pytest.mark.parametrize("mask", [Mask(), CAUSAL, Mask(keys=torch.rand(2, 24) < 0.7, causal=True)])
def test_many_blocks_and_few_chosen(compress, mask):
    """More blocks than an oracle of all settings meets; the fifth and sixth are chosen by what they hold."""
    options = {
        "groups": 2,
        "stride": 1,
        "length": 2,
        "block": 2,
        "chosen": 6,
        "window": 3,
        "compress": compress,
    }
    part, x = sparse(**options), normal(2, 24, 8)
    keys = torch.ones(2, 24, dtype=torch.bool) if mask.keys is None else mask.keys
    allowed = keys[:, None, None].expand(2, 4, 24, 24)
    allowed = allowed.tril() if mask.causal else allowed
    with torch.no_grad():
        near(run(part, x, mask), by_loops(part, options, x, keys, allowed, mask.causal), 1e-10)


# By hand


def test_hand_four_tokens_and_blocks_of_two():
    """One head of one channel, q = 0 and v = x: means of what each branch reads, times ½."""
    part = NativeSparse(place(1, 1, 4), stride=2, length=1, block=1, chosen=1, window=1).double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()
        part.kv.weight[1] = part.proj.weight[0] = 1.0
    x = torch.tensor([1.0, 2, 4, 8]).double().reshape(1, 4, 1)
    # compressed (1 + 2) / 2 from the second token on, (4 + 8) / 2 too at the last; own block so far; oneself
    near(run(part, x), [(0 + 1 + 1) / 2, (1.5 + 1.5 + 2) / 2, (1.5 + 4 + 4) / 2, (3.75 + 6 + 8) / 2])
    near(run(part, x, Mask()), [(3.75 + o + i) / 2 for o, i in ((1.5, 1), (1.5, 2), (6, 4), (6, 8))])


@pytest.mark.parametrize("stride,length", [(4, 1), (2, 2), (1, 3)])
def test_hand_a_block_is_seen_from_its_last_token_on(stride, length):
    """Block c iff its last token, (c + 1) l - 1 where s = l, is not after t; before that nothing, and zeros."""
    part, x = sparse(only=0, stride=stride, length=length, block=length), normal(1, 24, 8)
    weights = seen(part, x, mask=CAUSAL, layout=Layout((24,)), tap="weights_compressed")
    last = stride * torch.arange(weights.shape[-1]) + stride * length - 1
    assert torch.equal(weights[0, 0] > 0, last <= torch.arange(24)[:, None])
    first = stride * length - 1
    near(run(part, x)[:, :first], part.proj.bias.expand(1, first, 8))


def test_hand_weights_of_blocks_are_equation_9():
    """p_slc[j] = Σ_{m < l'/s} Σ_{n < l/s} p_cmp[(l'/s) j - m - n], counted from 1, l = 2 s and l' = 4 s."""
    p = torch.rand(9, dtype=torch.float64)
    shares = [
        sum(p[4 * j - m - n - 1] for m in range(4) for n in range(2) if 1 <= 4 * j - m - n <= 9)
        for j in range(1, 11)
    ]
    # 40 tokens and s = 1: the first asks; of blocks 3 to 10 nothing is certain
    found = module.selected(p.expand(1, 1, 40, 9), torch.ones(1, 1, 1, 40).bool(), (2, 1, 4), 1, 3)
    best = max(range(2, 10), key=lambda j: shares[j])
    assert {j // 4 for j in found[0, 0, 0].nonzero().flatten().tolist()} == {0, 1, best}


def test_hand_what_is_selected_first():
    """Its own block, the one before, the first; then the best. Those that nobody may read take no place."""
    every, p = torch.ones(1, 1, 10, 10).bool(), torch.tensor([0.0, 0.2, 0.8, 0, 0]).expand(1, 1, 10, 5)

    def blocks(chosen, allowed, p=p):
        found = module.selected(p, allowed, (2, 2, 2), 1, chosen)[0, 0, 9]
        return {j // 2 for j in found.nonzero().flatten().tolist()}

    assert [blocks(i, every.tril()) for i in range(1, 6)] == [
        {4},
        {3, 4},
        {0, 3, 4},
        {0, 2, 3, 4},
        {0, 1, 2, 3, 4},
    ]
    hidden = torch.isin(torch.arange(10), torch.tensor([0, 1, 6, 7]))
    assert blocks(2, every & ~hidden) == {2, 4} and blocks(3, every & ~hidden) == {1, 2, 4}
    assert blocks(4, every.tril(), 0 * p) == {0, 1, 3, 4}  # of equal ones the first
    middle = module.selected(p, every, (2, 2, 2), 1, 3)[0, 0, 4]
    assert {j // 2 for j in middle.nonzero().flatten().tolist()} == {1, 2, 3}


@pytest.mark.parametrize("heads,groups,d", [(64, 4, 64), (4, 1, 2)])
def test_hand_parameters(heads, groups, d):
    """c² for queries and outputs each, 2 c g d for keys and values, 3 c h for gates; no biases."""
    c = heads * d
    with torch.device("meta"):
        site = Site("hand", c, heads, Layout((4,)), qkv_bias=False, proj_bias=False)
        part, other = (NativeSparse(site, groups=groups, compress=f) for f in ("mean", "mlp"))
    assert count(part) == 2 * c * c + 2 * c * groups * d + 3 * c * heads
    assert count(other) - count(part) == (d + 1) * d + d + d * d + d


def test_defaults():
    wanted = {
        "groups": 1,
        "stride": 64,
        "length": 1,
        "block": 1,
        "chosen": 16,
        "window": 512,
        "compress": "mean",
    }
    assert options_of(NativeSparse)().model_dump() == wanted


# Identities


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mask", [Mask(), CAUSAL, Mask(keys=torch.rand(2, 24) < 0.7, causal=True)])
def test_identity_all_blocks_alone_are_grouped_query_attention(groups, mask):
    """K l' ≥ n, and the gate of that branch open alone."""
    part, x = sparse(only=1, groups=groups, stride=2, length=1, block=2, chosen=6), normal(2, 24, 8)
    near(run(part, x, mask), plain(part, x, mask))


@pytest.mark.parametrize("window", [1, 5, 24])
@pytest.mark.parametrize("causal", [False, True])
def test_identity_the_window_alone_is_grouped_query_attention_in_a_band(window, causal):
    """Keys t - w + 1 to t; to both sides without a causal mask."""
    part, x = sparse(only=2, groups=2, window=window), normal(2, 24, 8)
    band = torch.ones(24, 24, dtype=torch.bool).tril(window - 1).triu(1 - window)
    near(run(part, x, Mask(causal=causal)), plain(part, x, Mask(pairs=band[None, None], causal=causal)))


def test_identity_compressed_blocks_of_one_token_are_grouped_query_attention():
    part, x = sparse(only=0, groups=2, stride=1, length=1, block=1), normal(2, 24, 8)
    for mask in (Mask(), CAUSAL, Mask(pairs=torch.rand(2, 4, 24, 24) < 0.7)):
        near(run(part, x, mask), plain(part, x, mask))


def test_identity_branches_add_up():
    """Gates are not normalised: with all open it is the sum of the branches."""
    options = {"groups": 2, "stride": 2, "length": 2, "block": 2, "chosen": 3, "window": 3}
    part, x, alone = sparse(**options), normal(2, 24, 8), []
    for only in (0, 1, 2, None):
        with torch.no_grad():
            part.gates.weight.zero_()
            part.gates.bias.copy_(
                torch.tensor([800.0 if only in (i, None) else -800.0 for i in range(3)]).repeat(4)
            )
        alone.append(run(part, x) - part.proj.bias)
    near(sum(alone[:3]), alone[3])


def test_identity_gates_are_sigmoids_and_do_not_sum_to_one():
    part, x = sparse(), normal(2, 24, 8)
    gates = seen(part, x, layout=Layout((24,)), tap="gate")
    near(gates, part.gates(x).sigmoid().unflatten(-1, (4, 3)).transpose(1, 2))
    assert (gates.sum(-1) - 1).abs().min() > 1e-3


def test_identity_heads_of_a_group_share_blocks_and_groups_do_not():
    part, x = sparse(groups=2, stride=1, length=1, block=1, chosen=5), normal(2, 24, 8)
    kept = seen(part, x, mask=CAUSAL, layout=Layout((24,)), tap="weights_selected") > 0
    assert torch.equal(kept[:, 0], kept[:, 1]) and torch.equal(kept[:, 2], kept[:, 3])
    assert not torch.equal(kept[:, 0], kept[:, 2])
    assert torch.equal(kept.sum(-1), torch.arange(1, 25).clamp(max=5).expand(2, 4, 24))


@pytest.mark.parametrize("t", [0, 5, 11, 23])
def test_identity_nothing_is_known_of_later_tokens(t):
    part, x = sparse(groups=2, stride=2, length=2, block=3, chosen=3, window=4), normal(2, 24, 8)
    other = torch.cat([x[:, : t + 1], normal(2, 23 - t, 8)], dim=1)
    near(run(part, other)[:, : t + 1], run(part, x)[:, : t + 1])
    near(run(part, x[:, : t + 1]), run(part, x)[:, : t + 1])


def test_identity_pairs_of_earlier_tokens_are_a_causal_mask():
    """Where no block is cut by the end."""
    part, x = sparse(groups=2, stride=2, length=1, block=2, chosen=3, window=4), normal(2, 24, 8)
    pairs = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
    near(run(part, x, Mask(pairs=pairs)), run(part, x))


def test_identity_padding_at_the_end_is_a_shorter_sequence():
    part, x = sparse(groups=2, stride=2, length=2, block=2, chosen=3, window=4), normal(2, 24, 8)
    keys = (torch.arange(24) < 17).expand(2, 24)
    near(run(part, x, Mask(keys=keys, causal=True))[:, :17], run(part, x[:, :17]))
    near(run(part, x, Mask(keys=keys))[:, :17], run(part, x[:, :17], Mask()))


def test_selection_has_no_gradient_and_compression_has():
    """What is not selected, nor in the window, gets its gradient from the compressed branch alone."""
    options = {"stride": 1, "length": 1, "block": 1, "chosen": 3, "window": 1}
    for only, reached in ((1, 3), (0, 24)):
        part, x = sparse(only=only, **options), normal(1, 24, 8).requires_grad_()
        run(part, x)[:, -1].square().sum().backward()
        assert int((x.grad[0].abs().sum(-1) > 0).sum()) == reached


def test_normed_and_turned_as_the_site_wishes():
    """Keys are normalised and turned before they are compressed; values are neither."""
    site = place(8, 2, 6, qk_norm=True, rotary=True)
    part, x = spread(NativeSparse(site, groups=2, stride=2, length=1, block=1)), normal(1, 6, 8)
    k = rotate(part.k_norm(split_heads(part.kv(x).chunk(2, -1)[0], 2)))
    q = rotate(part.q_norm(split_heads(part.q(x), 2)))
    scores = q @ k.unflatten(2, (3, 2)).mean(3).mT / 2
    near(seen(part, x, layout=site.layout, tap="weights_compressed"), scores.softmax(-1))
    near(seen(part, x, layout=site.layout, tap="scores"), q @ k.mT / 2)


def test_dropout_is_of_all_three():
    part, x = NativeSparse(place(8, 2, 6, attn_drop=0.5), stride=1).double(), normal(1, 6, 8)
    assert [
        part.get_submodule(f"weights_{name}").dropout for name in ("compressed", "selected", "window")
    ] == [0.5] * 3
    assert not torch.equal(part.train()(x, layout=Layout((6,))), part.eval()(x, layout=Layout((6,))))


# Refusals


def test_groups_and_blocks_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError, match="AZ214.*3 groups do not divide 4"):
        sparse(groups=3)
    with pytest.raises(RecipeError, match="AZ214.*`block`, 1, is less than `length`, 2"):
        sparse(length=2)


@pytest.mark.parametrize("compress", ["mean", "mlp"])
def test_narrow_numbers_stay_near(compress):
    """With all blocks, or they would be chosen by the rounding."""
    narrow(NativeSparse, [(2, 7, 12)], site=place(12, 3, 7), stride=2, window=3, compress=compress)
