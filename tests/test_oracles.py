"""Every mechanism whose equations are easy to get wrong agrees with a loop written from its paper (`tests/oracles`)."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
from oracles import fusions as fusion_loops
from oracles import soft as soft_loops
from oracles.additive import additive as additive_loop
from oracles.elu_linear import elu_linear as elu_linear_loop
from oracles.elu_linear import recurrent
from oracles.fourier import fourier as fourier_loop
from oracles.grouped_query import grouped_query as grouped_query_loop
from oracles.luong_global import concat_score, dot_score, general_score
from oracles.luong_global import luong_global as luong_global_loop
from oracles.luong_local import aligned
from oracles.luong_local import luong_local as luong_local_loop
from oracles.neighborhood import pairs as neighbours_loop
from oracles.softmax import softmax as softmax_loop
from oracles.squeeze_excite import squeeze_excite as squeeze_excite_loop
from timm.layers import SEModule
from torch import nn
from torch.nn import functional as F

from attnzoo.core import NO_MASK, Layout, Mask, Site
from attnzoo.core.fusion import inside_heads
from attnzoo.functional import split_heads
from attnzoo.fusions.concat import Concat
from attnzoo.fusions.difference import Difference
from attnzoo.fusions.gated import Gated
from attnzoo.fusions.low_rank import LowRank
from attnzoo.mechanisms.additive.additive import Additive
from attnzoo.mechanisms.additive.luong_global import LuongGlobal
from attnzoo.mechanisms.additive.luong_local import LuongLocal
from attnzoo.mechanisms.additive.soft import Soft
from attnzoo.mechanisms.channel.squeeze_excite import SqueezeExcite
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.linear.elu_linear import EluLinear
from attnzoo.mechanisms.local.neighborhood import Neighborhood
from attnzoo.mechanisms.mixing.fourier import Fourier
from attnzoo.mechanisms.projection.grouped_query import GroupedQuery

SEEDS = range(10)
ALL = ("keys", "pairs", "causal")


@dataclass(frozen=True)
class Case:
    """Random sizes: b samples, h heads of d channels, n queries, m keys, e channels of the context."""

    seed: int
    b: int
    h: int
    d: int
    n: int
    m: int
    e: int
    mask: Mask

    @property
    def c(self) -> int:
        """Channels of the tokens."""
        return self.h * self.d

    def site(self, cross: bool = False, **fields) -> Site:
        """A place for a mechanism of these sizes."""
        context_dim = self.e if cross else None
        return Site("oracle", self.c, self.h, Layout((self.m,)), context_dim=context_dim, **fields)

    def heads(self):
        """Queries, keys and values (b h n d)."""
        return tuple(
            torch.randn(self.b, self.h, size, self.d, dtype=torch.float64)
            for size in (self.n, self.m, self.m)
        )

    def tokens(self, cross: bool = False):
        """x (b n c) and a context (b m e), or None; then n is m."""
        x = torch.randn(self.b, self.n, self.c, dtype=torch.float64)
        return x, torch.randn(self.b, self.m, self.e, dtype=torch.float64) if cross else None

    def sees(self, b: int, h: int = 0):
        """The mask as a question about query i and key j."""

        def answer(i: int, j: int) -> bool:
            keys, pairs = self.mask.keys, self.mask.pairs
            if keys is not None and not keys[b, j]:
                return False
            if pairs is not None and not pairs[b % pairs.shape[0], h % pairs.shape[1], i, j]:
                return False
            return not self.mask.causal or self.m - 1 - j >= self.n - 1 - i  # steps back from the newest

        return answer

    def keep(self, b: int) -> list[bool]:
        """Which keys of a sample exist."""
        return [True] * self.m if self.mask.keys is None else self.mask.keys[b].tolist()


def draw(seed: int, kinds=ALL, *, square: bool = False, one_head: bool = False) -> Case:
    """A case with a random subset of these kinds of mask; some rows end up empty."""
    torch.manual_seed(seed)
    r = random.Random(seed)
    b, h, d, n, m = r.randint(1, 3), r.randint(1, 3), r.randint(1, 4), r.randint(1, 7), r.randint(1, 7)
    n = m if square else n
    chosen = [kind for kind in kinds if r.random() < 0.6] if seed else []  # seed 0: nobody is masked
    keys = torch.rand(b, m) < 0.7 if "keys" in chosen else None
    shape = (r.choice([1, b]), 1 if one_head else r.choice([1, h]), n, m)
    pairs = torch.rand(shape) < 0.7 if "pairs" in chosen else None
    return Case(seed, b, h, d, n, m, r.randint(1, 5), Mask(keys=keys, pairs=pairs, causal="causal" in chosen))


def same(found, wanted, tolerance: float = 1e-10) -> None:
    """Equal up to a tolerance relative to the largest number."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    assert found.shape == wanted.shape
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * scale)


def by_head(case: Case, loop, q, k, v):
    """A loop over one head, for all heads: loop(head, q, k, v, sees) with lists."""
    return [
        [
            loop(h, q[b, h].tolist(), k[b, h].tolist(), v[b, h].tolist(), case.sees(b, h))
            for h in range(case.h)
        ]
        for b in range(case.b)
    ]


def spread(part: nn.Module) -> nn.Module:
    """The part in float64 with parameters of a size that matters."""
    part = part.double().eval()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_(std=0.7)
    return part


def numbers(module: nn.Module) -> dict[str, list]:
    """Its parameters as nested lists."""
    return {name: parameter.tolist() for name, parameter in module.named_parameters()}


def test_the_cases_hold_masks_of_every_kind_and_empty_rows():
    cases = [draw(seed) for seed in SEEDS]
    assert {kind for case in cases for kind in case.mask.kinds} == set(ALL)
    assert any(not case.mask.kinds for case in cases)
    dense = [case.mask.dense(case.n, case.m) for case in cases if case.mask.kinds]
    assert any(not allowed.any(dim=-1).all() for allowed in dense)
    assert any(case.n < case.m for case in cases) and any(case.n > case.m for case in cases)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_softmax(seed, watched):
    case = draw(seed)
    q, k, v = case.heads()
    head = Softmax(case.site())
    if watched:
        head.weights.register_forward_hook(lambda *_: None)
    found = head(q, k, v, mask=case.mask, layout=Layout((case.m,)))
    same(found, by_head(case, lambda h, *qkv: softmax_loop(*qkv), q, k, v))


@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_is_pytorchs(seed):
    case = draw(seed)
    q, k, v = case.heads()
    allowed = case.mask.dense(case.n, case.m)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    if allowed is not None:
        wanted = torch.where(allowed.any(-1, keepdim=True), wanted, 0.0)
    same(Softmax(case.site())(q, k, v, mask=case.mask, layout=Layout((case.m,))), wanted)


@pytest.mark.parametrize("seed", SEEDS)
def test_soft_pooled(seed):
    case = draw(seed, ("keys",))
    q, k, v = case.heads()
    head = spread(Soft(case.site(), hidden=3))
    p = numbers(head)
    wanted = [
        [
            soft_loops.pooled(v[b, h].tolist(), p["value_weight"][h], p["value_bias"][h], p["score_weight"][h], case.keep(b), case.n)
            for h in range(case.h)
        ]
        for b in range(case.b)
    ]  # fmt: skip
    same(head(q, k, v, mask=case.mask, layout=Layout((case.m,))), wanted)


@pytest.mark.parametrize("gate_scale", ["tokens", "one"])
@pytest.mark.parametrize("seed", SEEDS)
def test_soft_gated(seed, gate_scale):
    case = draw(seed, ("keys",), square=True)
    q, k, v = case.heads()
    head = spread(Soft(case.site(), variant="gated", gate_scale=gate_scale))
    p = numbers(head)
    wanted = []
    for b in range(case.b):
        scale = sum(case.keep(b)) if gate_scale == "tokens" else 1
        wanted.append([
            soft_loops.gated(v[b, h].tolist(), p["value_weight"][h], p["value_bias"][h], p["score_weight"][h], case.keep(b), scale)
            for h in range(case.h)
        ])  # fmt: skip
    same(head(q, k, v, mask=case.mask, layout=Layout((case.m,))), wanted)


@pytest.mark.parametrize("seed", SEEDS)
def test_soft_bahdanau(seed):
    case = draw(seed)
    q, k, v = case.heads()
    head = spread(Soft(case.site(), variant="bahdanau", hidden=2))
    p = numbers(head)

    def loop(h, q, k, v, sees):
        return soft_loops.bahdanau(
            q, k, v, p["query_weight"][h], p["key_weight"][h], p["score_weight"][h], sees
        )

    same(head(q, k, v, mask=case.mask, layout=Layout((case.m,))), by_head(case, loop, q, k, v))


@pytest.mark.parametrize("seed", SEEDS)
def test_soft_cls_query(seed):
    case = draw(seed, ())
    q, k, v = case.heads()
    head = spread(Soft(case.site(), variant="cls_query"))
    p = numbers(head)

    def loop(h, q, k, v, sees):
        return soft_loops.cls_query(q, k, v, p["query_weight"][h], p["key_weight"][h], p["score_weight"][h])

    same(head(q, k, v, layout=Layout((case.m,))), by_head(case, loop, q, k, v))


def source_of(case: Case, x, context) -> list:
    """What is read from, by sample."""
    return (x if context is None else context).tolist()


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_additive(seed, cross):
    case = draw(seed, square=not cross, one_head=True)
    x, context = case.tokens(cross)
    part = spread(Additive(case.site(cross), hidden=3))
    w, u, v = (t.tolist() for t in (part.query.weight, part.key.weight, part.score_weight))
    sources = source_of(case, x, context)
    sums = torch.tensor([additive_loop(x[b].tolist(), sources[b], w, u, v, case.sees(b)) for b in range(case.b)], dtype=torch.float64)  # fmt: skip
    wanted = sums if sums.shape[-1] == case.c else sums @ part.proj.weight.T + part.proj.bias
    same(part(x, context, mask=case.mask, layout=Layout((case.m,))), wanted.detach())


@pytest.mark.parametrize("score", ["dot", "general", "concat", "location"])
@pytest.mark.parametrize("seed", SEEDS)
def test_luong_global(seed, score):
    cross = bool(seed % 2)
    case = draw(seed, square=not cross, one_head=True)
    if score == "dot":
        case = replace(case, e=case.c)
    x, context = case.tokens(cross)
    part = spread(LuongGlobal(case.site(cross), score=score, hidden=3))
    p, sources = numbers(part), source_of(case, x, context)
    wanted = []
    for b in range(case.b):
        h, s = x[b].tolist(), sources[b]
        joined = []
        if score == "concat":
            joined = [[*one, *two] for one, two in zip(p["query.weight"], p["key.weight"], strict=True)]
        scores = {
            "dot": lambda t, j, h=h, s=s: dot_score(h[t], s[j]),
            "general": lambda t, j, h=h, s=s: general_score(h[t], s[j], p["general.weight"]),
            "concat": lambda t, j, h=h, s=s, w=joined: concat_score(h[t], s[j], w, p["score_weight"]),
            "location": lambda t, j, h=h: dot_score(p["location.weight"][j], h[t]),
        }
        wanted.append(luong_global_loop(h, s, scores[score], p["proj.weight"], case.sees(b)))
    same(part(x, context, mask=case.mask, layout=Layout((case.m,))), wanted)


@pytest.mark.parametrize("alignment", ["monotonic", "predictive"])
@pytest.mark.parametrize("score", ["dot", "general"])
@pytest.mark.parametrize("seed", SEEDS)
def test_luong_local(seed, score, alignment):
    cross = bool(seed % 2)
    case = draw(seed, ALL if alignment == "monotonic" else ("keys",), square=not cross, one_head=True)
    if score == "dot":
        case = replace(case, e=case.c)
    window = 1 + seed % 3
    x, context = case.tokens(cross)
    part = spread(LuongLocal(case.site(cross), alignment=alignment, window=window, score=score))
    p, sources = numbers(part), source_of(case, x, context)
    wanted = []
    for b in range(case.b):
        h, s = x[b].tolist(), sources[b]
        positions = [float(t) for t in range(case.n)]
        if alignment == "predictive":
            positions = [
                aligned(target, p["position.weight"], p["position_weight"], sum(case.keep(b))) for target in h
            ]

        def rate(t, j, h=h, s=s):
            return dot_score(h[t], s[j]) if score == "dot" else general_score(h[t], s[j], p["general.weight"])

        gaussian = alignment == "predictive"
        wanted.append(
            luong_local_loop(h, s, rate, positions, window, gaussian, p["proj.weight"], case.sees(b))
        )
    same(part(x, context, mask=case.mask, layout=Layout((case.m,))), wanted)


@pytest.mark.parametrize("seed", range(20))
def test_elu_linear(seed):
    case = draw(seed, ("keys", "causal"))
    q, k, v = case.heads()
    found = EluLinear(case.site())(q, k, v, mask=case.mask, layout=Layout((case.m,)))
    same(found, by_head(case, lambda h, *qkv: elu_linear_loop(*qkv), q, k, v))


@pytest.mark.parametrize("seed", SEEDS)
def test_elu_linear_is_a_recurrent_network(seed):
    case = draw(seed, (), square=True)
    q, k, v = case.heads()
    found = EluLinear(case.site(), eps=1e-3)(q, k, v, mask=Mask(causal=True), layout=Layout((case.m,)))
    same(found, by_head(case, lambda h, q, k, v, sees: recurrent(q, k, v, 1e-3), q, k, v))


NEIGHBOURHOODS = [
    (grid, prefix, {"window": window, "stride": stride, "dilation": dilation, "causal": causal})
    for seed in range(30)
    for r in [random.Random(seed)]
    for grid in [tuple(r.randint(1, 7) for _ in range(1 + seed % 2))]
    for prefix in [r.randint(0, 2)]
    for window in [r.randint(1, 5)]
    for stride, dilation, causal in [(r.randint(1, window), r.randint(1, 3), r.random() < 0.4)]
]


@pytest.mark.parametrize("grid,prefix,options", NEIGHBOURHOODS)
def test_neighborhood(grid, prefix, options):
    layout = Layout(grid, prefix)
    n, h = layout.length, 2
    site = Site("oracle", 4, h, layout)
    q, k, v = (torch.randn(2, h, n, 2, dtype=torch.float64) for _ in range(3))
    outer = Mask(keys=torch.rand(2, n) < 0.8, pairs=torch.rand(1, h, n, n) < 0.8) if prefix else NO_MASK
    case = Case(0, 2, h, 2, n, n, 1, outer)
    near = neighbours_loop(grid, prefix, **options)

    def loop(h, q, k, v, sees):
        return softmax_loop(q, k, v, lambda i, j: near[i][j] and sees(i, j))

    found = Neighborhood(site, **options)(q, k, v, mask=outer, layout=layout)
    same(found, by_head(case, loop, q, k, v))


@pytest.mark.parametrize("norm", ["none", "ortho"])
@pytest.mark.parametrize("seed", range(4))
def test_fourier(seed, norm):
    case = draw(seed, (), square=True)
    x, _ = case.tokens()
    found = Fourier(case.site(), norm=norm)(x, layout=Layout((case.m,)))
    same(found, [fourier_loop(sample, norm == "ortho") for sample in x.tolist()])


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_squeeze_excite(prefix, masked):
    layout = Layout((2, 3), prefix)
    part = spread(SqueezeExcite(Site("oracle", 12, 2, layout), ratio=0.5))
    x = torch.randn(3, layout.length, 12, dtype=torch.float64)
    keys = torch.rand(3, layout.length) < 0.6
    keys[2] = False  # nobody is there: the mean of nothing is zero
    w1, b1, w2, b2 = (t.squeeze().tolist() for t in (part.se.fc1.weight, part.se.fc1.bias, part.se.fc2.weight, part.se.fc2.bias))  # fmt: skip
    wanted = [
        squeeze_excite_loop(x[b].tolist(), prefix, w1, b1, w2, b2, keys[b].tolist() if masked else [True] * layout.length)
        for b in range(3)
    ]  # fmt: skip
    same(part(x, mask=Mask(keys=keys) if masked else NO_MASK, layout=layout), wanted)


@pytest.mark.parametrize("prefix", [0, 1])
def test_squeeze_excite_is_timms_on_the_grid(prefix):
    layout = Layout((3, 4), prefix)
    part = spread(SqueezeExcite(Site("oracle", 32, 2, layout)))
    timms = SEModule(32).double()
    timms.load_state_dict(part.se.state_dict())
    x = torch.randn(2, layout.length, 32, dtype=torch.float64)
    found = part(x, layout=layout)
    grid = layout.to_grid(layout.split(x)[1])
    same(layout.to_grid(layout.split(found)[1]), timms(grid).detach(), 1e-12)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_grouped_query(seed, cross):
    case = draw(seed, square=not cross)
    heads = (1, 2, 4, 6)[seed % 4]
    groups = random.Random(seed).choice([g for g in range(1, heads + 1) if heads % g == 0])
    pairs = case.mask.pairs
    if pairs is not None:
        pairs = pairs[:, :1].expand(-1, heads, -1, -1)
    case = replace(case, h=heads, mask=replace(case.mask, pairs=pairs))
    x, context = case.tokens(cross)
    part = spread(GroupedQuery(case.site(cross), groups=groups))
    source = x if context is None else context
    q = split_heads(part.q(x), heads)
    k, v = (split_heads(t, groups) for t in part.kv(source).chunk(2, dim=-1))
    merged = torch.tensor(
        [
            grouped_query_loop(*(t[b].tolist() for t in (q, k, v)), [case.sees(b, h) for h in range(heads)])
            for b in range(case.b)
        ],
        dtype=torch.float64,
    )
    wanted = part.proj(merged.transpose(1, 2).flatten(2)).detach()
    same(part(x, context, mask=case.mask, layout=Layout((case.m,))), wanted)


def test_grouped_query_is_pytorchs_with_enable_gqa():
    site = Site("oracle", 24, 6, Layout((5,)))
    part = spread(GroupedQuery(site, groups=3))
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    q = split_heads(part.q(x), 6)
    k, v = (split_heads(t, 3) for t in part.kv(x).chunk(2, dim=-1))
    wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    same(part(x, layout=site.layout), part.proj(wanted.transpose(1, 2).flatten(2)).detach())
    tiled = F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
    assert (tiled - wanted).abs().max() > 1e-3


def fusion_of(cls, arity: int, inside: bool, **options):
    """A fusion, its branches and x, on tokens or inside the heads."""
    site = Site("oracle", 6, 2, Layout((4,)), layer=2)
    fusion = spread(cls(inside_heads(site) if inside else site, arity, **options))
    shape = (2, 2, 4, 3) if inside else (2, 4, 6)
    branches = [torch.randn(shape, dtype=torch.float64) for _ in range(arity)]
    return fusion, branches, torch.randn(shape, dtype=torch.float64)


def by_token(loop, branches, x):
    """loop(branch vectors, x vector) for every token."""
    width = x.shape[-1]
    rows = [t.reshape(-1, width).tolist() for t in branches]
    out = [loop([row[i] for row in rows], token) for i, token in enumerate(x.reshape(-1, width).tolist())]
    return torch.tensor(out, dtype=torch.float64).reshape(x.shape)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("arity", [1, 2, 3])
@pytest.mark.parametrize("activation", ["tanh", "none"])
@pytest.mark.parametrize("rank", [None, 2])
def test_low_rank(arity, inside, activation, rank):
    fusion, branches, x = fusion_of(LowRank, arity, inside, activation=activation, rank=rank)
    down = [(layer.weight.tolist(), layer.bias.tolist()) for layer in fusion.down]
    up = fusion.up.weight.tolist(), fusion.up.bias.tolist()
    assert len(down[0][0]) == (rank or x.shape[-1])
    same(
        fusion(branches, x),
        by_token(lambda s, _: fusion_loops.low_rank(s, down, up, activation == "tanh"), branches, x),
    )


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("arity", [2, 3])
def test_difference(arity, inside):
    fusion, branches, x = fusion_of(Difference, arity, inside)
    share = fusion.share.tolist()
    same(fusion(branches, x), by_token(lambda s, _: fusion_loops.difference(s, share), branches, x))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("arity", [1, 2, 3])
def test_gated(arity, inside):
    fusion, branches, x = fusion_of(Gated, arity, inside)
    weight, bias = fusion.gate.weight.tolist(), fusion.gate.bias.tolist()
    same(fusion(branches, x), by_token(lambda s, t: fusion_loops.gated(s, t, weight, bias), branches, x))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("arity", [1, 2, 3])
def test_concat(arity, inside):
    fusion, branches, x = fusion_of(Concat, arity, inside)
    weight = fusion.merge_proj.weight.tolist()
    same(fusion(branches, x), by_token(lambda s, _: fusion_loops.concat(s, weight), branches, x))


NARROW = [
    (Softmax, {}, ALL), (Soft, {}, ("keys",)), (Soft, {"variant": "gated"}, ("keys",)), (Soft, {"variant": "bahdanau"}, ALL),
    (Soft, {"variant": "cls_query"}, ()), (EluLinear, {}, ("keys", "causal")), (Neighborhood, {"window": 3}, ALL),
    (Additive, {}, ALL), (LuongGlobal, {}, ALL), (LuongGlobal, {"score": "dot"}, ALL), (LuongGlobal, {"score": "concat"}, ALL),
    (LuongGlobal, {"score": "location"}, ALL), (LuongLocal, {"window": 2}, ALL), (Fourier, {"norm": "ortho"}, ()),
    (SqueezeExcite, {"ratio": 0.5}, ("keys",)), (GroupedQuery, {"groups": 1}, ALL),
]  # fmt: skip
"""Mechanisms that the loops above hold in float64. `predictive` is left out: its window has hard edges at a real number."""


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("cls,options,kinds", NARROW, ids=lambda v: getattr(v, "__name__", None))
def test_narrow_numbers_stay_near(cls, options, kinds, dtype, tolerance):
    for seed in range(1, 5):
        case = draw(seed, kinds, square=True, one_head=True)
        case = replace(case, d=4)
        part = cls(case.site(), **options).double().eval()
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.normal_(std=0.3)
        part = part.to(dtype).double()  # what is left is the error of the arithmetic
        token_level = hasattr(part, "attend") is False
        inputs = [case.tokens()[0] if token_level else t for t in ([None] if token_level else case.heads())]
        inputs = [t.to(dtype).double() for t in inputs]
        wanted = part(*inputs, mask=case.mask, layout=Layout((case.m,))).detach()
        found = part.to(dtype)(*(t.to(dtype) for t in inputs), mask=case.mask, layout=Layout((case.m,)))
        assert found.dtype == dtype
        same(found, wanted, tolerance)
