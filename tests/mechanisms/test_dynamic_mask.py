"""Dynamic mask attention, arXiv:2508.02124."""

import itertools
import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, spread, wrong
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, options_of, rotate
from attnzoo.errors import RecipeError
from attnzoo.functional import masked_softmax, merge_heads, split_heads
from attnzoo.mechanisms.projection.grouped_query import GroupedQuery
from attnzoo.mechanisms.sparse.dynamic_mask import DynamicMask, best
from attnzoo.testing import against


def linear(layer, x):
    """x W + b."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def window_of(rank, seen, window):
    """The best keys, a list, of those seen, a list."""
    return sorted(seen, key=lambda j: -rank[j].item())[:window]


@against(DynamicMask, examples=40, options=lambda options: "window" in options)  # the default is 2048
def test_oracle(component, options, x, source, allowed):
    """Sample by sample, head by head, query by query; δ key by key."""
    (b, n, c), m, heads = x.shape, source.shape[1], component.heads
    group, d = options["group"], c // heads
    out = torch.zeros_like(x)
    for s in range(b):
        q, kv = linear(component.q, x[s]), linear(component.kv, source[s])
        values = kv[:, kv.shape[1] // 2 :]
        rank = [component.strength * (1 + linear(component.delta, values[j]).exp()).log() for j in range(m)]
        for h, i in itertools.product(range(heads), range(n)):
            g = h // group
            k, v = kv[:, g * d : (g + 1) * d], values[:, g * d : (g + 1) * d]
            kept = window_of([r[g] for r in rank], allowed[s, h, i].nonzero().flatten().tolist(), options["window"])  # fmt: skip
            if kept:
                delta = torch.stack([rank[j][g] for j in kept])
                scores = k[kept] @ q[i, h * d : (h + 1) * d] / math.sqrt(d)
                weights = (scores + (delta.exp() if options["exponential"] else delta)).softmax(0)
                out[s, i, h * d : (h + 1) * d] = weights @ v[kept]
    return linear(component.proj, out)


def plain(part, rank, allowed):
    """Which keys are kept."""
    return best(rank.detach(), allowed, part.window)


def mixing(keep=plain, bias=lambda bias: bias, of_keys=False, deal=None, scale=-0.5):
    """The mechanism, explicitly and with a fault."""

    def mix(self, x, source, *, mask, layout):
        k, v = self.kv(source).chunk(2, dim=-1)
        rank = (self.strength * F.softplus(self.delta(k if of_keys else v))).mT[:, :, None]
        groups = self.heads // self.group
        q, k, v = split_heads(self.q(x), self.heads), split_heads(k, groups), split_heads(v, groups)
        repeat = deal or (lambda t, times: t.repeat_interleave(times, dim=1))
        k, v, rank = (repeat(t, self.group) for t in (k, v, rank))
        kept = keep(self, rank, mask.dense(x.shape[1], source.shape[1]))
        scores = (q * q.shape[-1] ** scale) @ k.mT + bias(rank.exp() if self.exponential else rank)
        return self.proj(merge_heads(masked_softmax(scores, kept) @ v))

    return wrong(DynamicMask, mix=mix)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(mixing(), examples=25).ok


def unfiltered(part, rank, allowed):
    """Hidden keys fill up rows that are short."""
    low = rank if allowed is None else torch.where(allowed, rank, float("-inf"))
    keys = low.topk(min(part.window, low.shape[-1]), dim=-1).indices
    return torch.zeros_like(low, dtype=torch.bool).scatter(-1, keys, True)


def before_the_mask(part, rank, allowed):
    """The best of all keys; then those of them that may be seen."""
    kept = plain(part, rank, None)
    return kept if allowed is None else kept & allowed


MUTANTS = {
    "the worst are kept": mixing(lambda part, rank, allowed: plain(part, -rank, allowed)),
    "all are kept": mixing(lambda part, rank, allowed: best(rank.detach(), allowed, 4096)),
    "one more is kept": mixing(lambda part, rank, allowed: best(rank.detach(), allowed, part.window + 1)),
    "chosen before the mask": mixing(before_the_mask),
    "short rows filled with hidden keys": mixing(unfiltered),
    "the mask ignored": mixing(lambda part, rank, allowed: plain(part, rank, None)),
    "δ not in the scores": mixing(bias=lambda bias: 0 * bias),
    "δ in the scores without a gradient": mixing(bias=torch.Tensor.detach),
    "δ of keys": mixing(of_keys=True),
    "no scale": mixing(scale=0),
    "groups dealt in turn": mixing(deal=lambda t, times: t.repeat(1, times, *[1] * (t.ndim - 2))),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def dynamic(dim=8, heads=4, tokens=6, **options) -> DynamicMask:
    """In float64, with parameters of a size that matters."""
    return spread(DynamicMask(place(dim, heads, tokens), **options))


def causal(m):
    return torch.ones(m, m, dtype=torch.bool).tril()[None, None]


def kept_by(rank, allowed=None, window=3):
    """The keys that each query keeps."""
    found = best(torch.tensor(rank, dtype=torch.float64)[None, None, None], allowed, window)
    return [set(row.nonzero().flatten().tolist()) for row in found[0, 0]]


# By hand

DELTA = (0.1, 0.5, -0.2, 0.9, 0.3, 0.0)


def test_hand_the_best_three_so_far():
    wanted = [{0}, {0, 1}, {0, 1, 2}, {0, 1, 3}, {1, 3, 4}, {1, 3, 4}]
    assert kept_by(DELTA, causal(6)) == wanted
    assert kept_by(DELTA) == [{1, 3, 4}]


def test_hand_the_best_three_so_far_between_projections():
    """One head of one channel, v = δ, A = 1 and W_Δ = 1: softplus keeps the order."""
    part = dynamic(1, 1, window=3)
    with torch.no_grad():
        for layer, weight, bias in ((part.q, 0, 0), (part.delta, 1, 0), (part.proj, 1, 0)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
        part.kv.weight.copy_(torch.tensor([[0.0], [1]]))
        part.kv.bias.zero_()
        part.strength.fill_(1.0)
    x = torch.tensor(DELTA, dtype=torch.float64)[None, :, None]
    weights = seen(part, x, mask=Mask(causal=True), layout=Layout((6,)))[0, 0]
    assert [set(row.nonzero().flatten().tolist()) for row in weights] == kept_by(DELTA, causal(6))
    best_three = x[0, [1, 3, 4], 0]
    wanted = ((1 + best_three.exp()) / (1 + best_three.exp()).sum() * best_three).sum()  # e^softplus = 1 + e
    near(part(x, mask=Mask(causal=True), layout=Layout((6,)))[0, 5], [wanted])
    near(part(x, layout=Layout((6,)))[0], [[wanted]] * 6)
    near(seen(part, x, layout=Layout((6,)), tap="scores")[0, 0, 0], (1 + x[0, :, 0].exp()).log())


@pytest.mark.parametrize("group", [1, 2, 4])
def test_hand_parameters(group):
    """c² for queries and outputs each, 2 c g d for keys and values, g d g for W_Δ, g for A; no biases."""
    part = DynamicMask(place(8, 4, qkv_bias=False, proj_bias=False), group=group)
    g, c, d = 4 // group, 8, 2
    assert count(part) == 2 * c * c + 2 * c * g * d + g * d * g + g


def test_defaults():
    wanted = {"window": 2048, "group": 1, "exponential": False}
    assert options_of(DynamicMask)().model_dump() == wanted


def test_a_starts_small_and_not_at_zero():
    strength = torch.cat([DynamicMask(place(64, 64)).strength for _ in range(20)])
    assert 0.015 < strength.std() < 0.025 and abs(strength.mean()) < 0.005


# Identities


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(
    "mask", [Mask(), Mask(causal=True), Mask(keys=torch.tensor([[1, 0, 1, 1, 0, 1]] * 2).bool())]
)
def test_identity_without_a_and_with_a_wide_window_it_is_grouped_query_attention(group, mask):
    part, plain_ = dynamic(group=group, window=6), spread(GroupedQuery(place(8, 4, 6), groups=4 // group))
    with torch.no_grad():
        part.strength.zero_()
    for name in ("q", "kv", "proj"):
        getattr(plain_, name).load_state_dict(getattr(part, name).state_dict())
    x = normal(2, 6, 8)
    near(part(x, mask=mask, layout=Layout((6,))), plain_(x, mask=mask, layout=Layout((6,))))


def test_identity_a_constant_in_all_of_delta_has_no_say():
    """W_Δ = 0: δ = A softplus(b) for all keys, whatever b."""
    part, x = dynamic(window=6), normal(2, 6, 8)
    with torch.no_grad():
        part.delta.weight.zero_()
    before = part(x, layout=Layout((6,)))
    with torch.no_grad():
        part.delta.bias.add_(2.0)
    near(part(x, layout=Layout((6,))), before)
    rank = torch.randn(2, 3, 1, 9)
    assert torch.equal(best(rank, causal(9), 4), best(rank + 8, causal(9), 4))


@pytest.mark.parametrize("window", [1, 3, 5])
def test_identity_rows_keep_at_most_the_window(window):
    part = dynamic(window=window)
    x, pairs = normal(2, 6, 8), torch.rand(2, 4, 6, 6) < 0.7
    for mask in (Mask(), Mask(causal=True), Mask(pairs=pairs), Mask(keys=pairs[:, 0, 0], causal=True)):
        allowed = mask.dense(6, 6)
        number = torch.full((1, 1, 1), 6) if allowed is None else allowed.sum(-1)
        weights = seen(part, x, mask=mask, layout=Layout((6,)))
        wanted = number.clamp(max=window).expand(2, 4, 6)
        assert torch.equal((weights > 0).sum(-1), wanted)


def test_identity_a_key_that_was_left_never_returns():
    """Under a causal mask, with δ fixed."""
    rank = torch.randn(2, 3, 1, 12)
    kept = best(rank, causal(12), 4)
    for i in range(11):
        again = kept[:, :, i + 1, : i + 1] & ~kept[:, :, i, : i + 1]
        assert not again.any()


def test_identity_exp_keeps_the_same_keys():
    part, other = dynamic(window=3), dynamic(window=3, exponential=True)
    torch.nn.init.constant_(part.strength, 0.3)  # no weight of a key that is kept vanishes
    other.load_state_dict(part.state_dict())
    x = normal(2, 6, 8)
    one, two = (seen(p, x, layout=Layout((6,))) for p in (part, other))
    assert torch.equal(one > 0, two > 0) and (one - two).abs().max() > 1e-3


def test_identity_a_window_is_a_shorter_context():
    """Where all queries may see the same, what is not kept might as well not be there."""
    part = spread(DynamicMask(place(4, 1, 3, context_dim=5), window=2))
    x, context = normal(1, 3, 4), normal(1, 7, 5)
    v = part.kv(context).chunk(2, -1)[1]
    order = (part.strength * F.softplus(part.delta(v)))[0, :, 0].argsort(descending=True)
    shorter = context[:, order[:2].sort().values]
    near(part(x, context, layout=Layout((3,))), part(x, shorter, layout=Layout((3,))))


def test_keys_that_are_not_kept_get_no_gradient_and_the_others_teach_a():
    part = spread(DynamicMask(place(4, 1, 3, context_dim=5), window=2))
    x, context = normal(1, 3, 4), normal(1, 7, 5).requires_grad_()
    kept = seen(part, x, context, layout=Layout((3,)))[0, 0, 0] > 0
    part(x, context, layout=Layout((3,))).square().sum().backward()
    assert torch.equal(context.grad[0].abs().sum(-1) > 0, kept) and kept.sum() == 2
    assert part.strength.grad.abs().min() > 0 and part.delta.weight.grad.abs().max() > 0


@pytest.mark.parametrize("keys", [None, torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0] * 7]).bool()])
def test_no_pairs_are_formed_while_all_queries_see_the_same(keys, monkeypatch):
    """Scores of seven queries and the two keys that are kept."""
    part, shapes = dynamic(tokens=7, window=2), []
    x, mask = normal(2, 7, 8), Mask(keys=keys)
    watched = part.proj(merge_heads(seen(part, x, mask=mask, layout=Layout((7,))) @ split_heads(part.kv(x).chunk(2, -1)[1], 4)))  # fmt: skip
    monkeypatch.setattr(type(part.scores), "__call__", lambda self, t: shapes.append(tuple(t.shape)) or t)
    near(part(x, mask=mask, layout=Layout((7,))), watched)
    assert shapes == [(2, 4, 7, 2)] * 2  # scores and weights


def test_normed_and_turned_as_the_site_wishes():
    """Queries and keys are normalised, then turned; δ is of values, which are neither."""
    site = place(8, 2, 6, qk_norm=True, rotary=True)
    part = spread(DynamicMask(site, window=6))
    with torch.no_grad():
        part.strength.zero_()
    x = normal(1, 6, 8)
    k, v = (split_heads(t, 2) for t in part.kv(x).chunk(2, -1))
    q, k = rotate(part.q_norm(split_heads(part.q(x), 2))), rotate(part.k_norm(k))
    near(part(x, layout=site.layout), part.proj(merge_heads(F.scaled_dot_product_attention(q, k, v))))


# Claims and refusals


def test_claims():
    card = DynamicMask.card_for
    assert card().fidelity == "adapted" and card(exponential=True).fidelity == "exact"


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(RecipeError, match="AZ214.*groups of 3 heads do not divide 4"):
        dynamic(group=3)


def test_an_exponent_that_overflows_stays_finite():
    part = dynamic(window=3, exponential=True).float()
    x = (1e4 * torch.randn(2, 6, 8)).requires_grad_()
    out = part(x, layout=Layout((6,)))
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"exponential": True}])
def test_narrow_numbers_stay_near(options):
    narrow(
        DynamicMask, [(2, 7, 12)], site=place(12, 3, 7), **options
    )  # a window would choose by the rounding
