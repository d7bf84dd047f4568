"""Multi-head latent attention of DeepSeek-V2, arXiv:2405.04434, §2.1."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, place, seen, spread, wrong
from torch import nn

from attnzoo.core import KVCache, Law, Layout, Mask, MultiHead, options_of
from attnzoo.functional import dot_product_attention
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.projection.multi_head_latent import MultiHeadLatent
from attnzoo.testing import against


def rms(norm, t):
    """By the root of the mean square."""
    return t / torch.sqrt((t * t).mean() + 1e-6) * norm.weight


def turned(t, position):
    """Each pair as a complex number, times e^{i p θ}."""
    if not len(t):
        return t
    angles = [position * 10000 ** (-2 * i / len(t)) for i in range(len(t) // 2)]
    by = torch.tensor([complex(math.cos(angle), math.sin(angle)) for angle in angles], dtype=torch.complex128)
    return torch.view_as_real(torch.complex(t[0::2], t[1::2]) * by).flatten()


@against(MultiHeadLatent, examples=15)
def test_oracle(component, options, x, allowed):
    """Token by token c, k_R and the queries; then head by head, score by score."""
    (b, n, c), heads, out = x.shape, component.heads, []
    d = c // heads
    rank = options["rank"] or 4 * d
    extra = 2 * (max(1, d // 4) if options["pairs"] is None else options["pairs"])
    for s in range(b):
        latents, shared, queries = [], [], []
        for i, token in enumerate(x[s]):
            low = component.down.weight @ token
            latents.append(rms(component.norm, low[:rank]))
            shared.append(turned(low[rank:], i))
            if options["query_rank"]:
                token = rms(component.query_norm, component.query_down.weight @ token)
            queries.append((component.query_up.weight @ token).split(d + extra))
        up = component.up.weight.split(d)  # W_UK and W_UV of the first head, of the second ...
        merged = []
        for h in range(heads):
            k, v = torch.stack(latents) @ up[2 * h].T, torch.stack(latents) @ up[2 * h + 1].T
            rows = []
            for i in range(n):
                see = allowed[s, h, i].nonzero()[:, 0].tolist()
                query, tail = queries[i][h][:d], turned(queries[i][h][d:], i)
                scores = (k[see] @ query + torch.stack(shared)[see] @ tail) / math.sqrt(d + extra)
                rows.append(scores.softmax(0) @ v[see])
            merged.append(torch.stack(rows))
        out.append(torch.cat(merged, 1) @ component.proj.weight.T)
    return torch.stack(out)


def before(change):
    """The mechanism, changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return MultiHeadLatent.mix(self, x, source, mask=mask, layout=layout)

    return wrong(MultiHeadLatent, mix=mix)


def latents(change):
    """Other latents and turned keys."""
    return wrong(
        MultiHeadLatent,
        _latents=lambda self, x, first=0: change(self, *MultiHeadLatent._latents(self, x, first), x),
    )


def unturned(self, latent, key, x):
    return latent, self.down(x)[:, None, :, self.rank :]


def of_the_latent(self, latent, key, x):
    """k_R of the normed latent, not of x."""
    return latent, torch.zeros_like(key) + latent.mean(-1)[:, None, :, None]


def scaled_by_head(self, q, k, v, mask):
    return dot_product_attention(self, q * (q.shape[-1] / v.shape[-1]) ** 0.5, k, v, mask)


def no_causality(self, q, k, v, mask):
    return dot_product_attention(self, q, k, v, Mask(mask.keys, mask.pairs))


def off_by_one(self, q, k, v, mask):
    if not mask.causal:
        return dot_product_attention(self, q, k, v, mask)
    early = Mask(pairs=torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool).tril(-1))
    return dot_product_attention(self, q, k, v, early)


def kinds_first(tensor, pattern, **sizes):
    """All of W_UK, then all of W_UV, rather than head by head."""
    from einops import rearrange

    return rearrange(tensor, pattern.replace("(h t d)", "(t h d)"), **sizes)


MUTANTS = {
    "k_R is not turned": latents(unturned),
    "k_R of the latent": latents(of_the_latent),
    "the latent is not normed": before(lambda self: setattr(self, "norm", nn.Identity())),
    "queries' latent is not normed": before(lambda self: setattr(self, "query_norm", nn.Identity())),
    "positions from one": wrong(MultiHeadLatent, _queries=lambda self, x, first=0: MultiHeadLatent._queries(self, x, first + 1)),
    "the scale of the unturned channels": patched(MultiHeadLatent, "dot_product_attention", scaled_by_head),
    "the causal mask is dropped": patched(MultiHeadLatent, "dot_product_attention", no_causality),
    "causal off by one": patched(MultiHeadLatent, "dot_product_attention", off_by_one),
    "W_UK and W_UV not head by head": patched(MultiHeadLatent, "rearrange", kinds_first),
    "the mask ignored": wrong(MultiHeadLatent, mix=lambda self, x, source, *, mask, layout: MultiHeadLatent.mix(self, x, source, mask=Mask(), layout=layout)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((7,))


def part_of(dim=8, heads=2, **options) -> MultiHeadLatent:
    """In float64, with parameters of a size that matters."""
    return spread(MultiHeadLatent(place(dim, heads, 7), **options), 0.5)


# By hand


def test_hand_a_shared_key_that_is_turned():
    """q_C = 0, q_R = (3, 0), k_R = (1, 0): tokens one apart score 3 cos 1 / √3, a token itself 3 / √3."""
    part = MultiHeadLatent(place(1, 1, 2), rank=1, pairs=1).double()
    with torch.no_grad():
        part.query_up.weight.copy_(torch.tensor([[0.0], [3.0], [0]]))
        part.down.weight.copy_(torch.tensor([[1.0], [1], [0]]))
    x = torch.ones(1, 2, 1).double()
    scores = seen(part, x, layout=Layout((2,)), tap="scores")[0, 0] * math.sqrt(3)
    near(scores, [[3, 3 * math.cos(1)], [3 * math.cos(1), 3]])


def test_hand_the_paper_s_numbers():
    """Of 128 channels a head: 512 of c, 64 of k_R, 576 to cache, where 128 heads would have 32 768, 57 times as many."""
    part = MultiHeadLatent(place(256, 2))
    assert (part.rank, part.turned) == (512, 64) and part.rank + part.turned == 576
    assert 2 * 128 * 128 // 576 == 32768 // 576 == 56 and round(32768 / 576) == 57


@pytest.mark.parametrize("options,wanted", [
    ({}, 64 * 2 * (32 + 16) + 64 * (128 + 16) + 128 + 128 * 128 + 64 * 64),
    ({"rank": 8, "pairs": 0}, 64 * 64 + 64 * 8 + 8 + 8 * 128 + 64 * 64),
    ({"rank": 8, "pairs": 2, "query_rank": 6}, 64 * 6 + 6 + 6 * 2 * 36 + 64 * 12 + 8 + 8 * 128 + 64 * 64),
])  # fmt: skip
def test_hand_parameters(options, wanted):
    assert count(MultiHeadLatent(place(64, 2), **options)) == wanted


def test_hand_a_step_caches_the_latent_and_the_turned_key():
    part, cache = part_of(rank=5, pairs=1), KVCache()
    part.step(normal(2, 3, 8), cache, mask=Mask(causal=True), layout=Layout((3,)))
    assert [tuple(t.shape) for t in cache.extend(normal(2, 0, 5), normal(2, 0, 2))] == [(2, 3, 5), (2, 3, 2)]


def test_defaults_and_claims():
    assert options_of(MultiHeadLatent)().model_dump() == {"rank": None, "pairs": None, "query_rank": None}
    assert MultiHeadLatent(place(6, 3)).turned == 2  # of two channels a head
    assert MultiHeadLatent.card_for(pairs=0).laws == {Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT}


# Identities


@pytest.mark.parametrize("options", [{}, {"pairs": 0}, {"rank": 3, "pairs": 2, "query_rank": 5}])
@pytest.mark.parametrize("steps", [[7], [1] * 7, [3, 1, 3]])
def test_identity_absorbed_and_step_by_step_it_is_the_same(options, steps):
    """A step attends to the latents: (q W_UKᵀ) c, and W_UV after the weights."""
    part, x, cache, found = part_of(**options), normal(2, 7, 8), KVCache(), []
    keys = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [1, 0, 1, 1, 1, 1, 1]]).bool()
    for new in x.split(steps, 1):
        m = cache.length + new.shape[1]
        found.append(part.step(new, cache, mask=Mask(keys=keys[:, :m], causal=True), layout=Layout((m,))))
    near(torch.cat(found, 1), part(x, mask=Mask(keys=keys, causal=True), layout=LAYOUT))


def test_identity_a_step_sees_what_is_put_around_the_matrix():
    """An adapter of W_UK and W_UV is more than their weight: then all tokens are looked at again."""
    part, x, cache = part_of(), normal(2, 7, 8), KVCache()
    part.up = nn.Sequential(part.up, nn.Linear(16, 16).double())
    found = [
        part.step(t, cache, mask=Mask(causal=True), layout=Layout((i + 1,)))
        for i, t in enumerate(x.split(1, 1))
    ]
    near(torch.cat(found, 1), part(x, mask=Mask(causal=True), layout=LAYOUT))


def test_identity_without_turned_keys_it_is_multi_head_attention_with_factored_matrices():
    """Of a latent as wide as the tokens that is not normed."""
    part, site, x = part_of(rank=8, pairs=0), place(8, 2, 7), normal(2, 7, 8)
    part.norm = nn.Identity()
    full = MultiHead(site, Softmax(site)).double()
    k, v = (part.up.weight @ part.down.weight).unflatten(0, (2, 2, 4)).unbind(1)
    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat([part.query_up.weight, k.flatten(0, 1), v.flatten(0, 1)]))
        full.proj.weight.copy_(part.proj.weight)
        full.qkv.bias.zero_()
        full.proj.bias.zero_()
    for mask in (Mask(), Mask(causal=True), Mask(pairs=torch.rand(2, 2, 7, 7) < 0.6)):
        near(part(x, mask=mask, layout=LAYOUT), full(x, mask=mask, layout=LAYOUT))


def test_identity_keys_and_values_have_the_rank_of_the_latent():
    part, x = part_of(rank=3), normal(7, 8)
    assert torch.linalg.matrix_rank(part.up(part._latents(x[None])[0][0])) == 3


def test_identity_scores_know_distances_only():
    """Equal tokens: the score of a pair is that of any other as far apart."""
    part, x = part_of(), normal(1, 1, 8).expand(1, 7, 8)
    scores = seen(part, x, layout=LAYOUT, tap="scores")
    near(scores[..., 1:, 1:], scores[..., :-1, :-1])
    assert (scores[0, 0, 0] - scores[0, 0, 0, 0]).abs().max() > 1e-3


def test_identity_the_length_of_a_token_has_no_say_in_its_values():
    """c is normed: all tokens 1000 times as long give the same values, up to ε."""
    part, x = part_of(), 100 * normal(2, 7, 8)
    near(part._latents(1000 * x)[0], part._latents(x)[0], 1e-7)


def test_narrow_numbers_stay_near():
    narrow(MultiHeadLatent, [(2, 7, 12)], site=place(12, 3, 7))
