"""Differential attention, arXiv:2410.05258, §2.1."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, set_all, spread, wrong
from timm.layers import DiffAttention

from attnzoo.core import Layout, Mask, Site, options_of
from attnzoo.errors import RecipeError
from attnzoo.functional import masked_softmax, split_heads
from attnzoo.mechanisms.dot_product.differential import Differential
from attnzoo.testing import against


def linear(layer, x):
    """W x + b for every token."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def projected(part, x, source):
    """Queries, keys and values, side by side."""
    c = x.shape[-1]
    if part.context_dim is not None:
        kv = linear(part.kv, source)
        return linear(part.q, x), kv[..., :-c], kv[..., -c:]
    qkv = linear(part.qkv, x)
    w = (qkv.shape[-1] - c) // 2
    return qkv[..., :w], qkv[..., w : 2 * w], qkv[..., 2 * w :]


def its_lambda(part, start):
    """λ."""
    pairs = (part.lambda_q1, part.lambda_k1), (part.lambda_q2, part.lambda_k2)
    first, second = (torch.exp(sum(a * b for a, b in zip(q, k, strict=True))) for q, k in pairs)
    return first - second + start


@against(Differential, examples=30)
def test_oracle(component, options, x, source, allowed):
    """Head by head and query by query; head h asks with parts 2h and 2h + 1 of D channels each. The layer is the first."""
    (b, n, c), heads = x.shape, component.heads
    start = 0.2 if options["start"] is None else options["start"]
    wide, d = c // heads, -(-(c // heads) // 2)
    q, k, v = projected(component, x, source)
    merged, lam = torch.zeros_like(x), its_lambda(component, start)
    for s in range(b):
        for h in range(heads):
            one, two = slice(2 * h * d, (2 * h + 1) * d), slice((2 * h + 1) * d, (2 * h + 2) * d)
            for i in range(n):
                see = allowed[s, h, i]
                if see.any():
                    first, second = (
                        (k[s, see, part] @ q[s, i, part] / math.sqrt(d)).softmax(0) for part in (one, two)
                    )
                    out = (first - lam * second) @ v[s, see, h * wide : (h + 1) * wide]
                    out = out / torch.sqrt((out**2).mean() + 1e-5) * component.sub_norm.weight
                    merged[s, i, h * wide : (h + 1) * wide] = (1 - start) * out
    return linear(component.proj, merged)


def with_fault(
    cut=lambda t, h: t.unflatten(-1, (h, 2, -1)).permute(3, 0, 2, 1, 4), lam=lambda part: its_lambda(part, part.start),
    minus=lambda a, b, lam: a - lam * b, norm=lambda part, t: part.sub_norm(t), after=lambda part: 1 - part.start,
    hide=lambda allowed: (allowed, allowed), scale=lambda d: d**-0.5, turn=lambda q, k: (q, k),
):  # fmt: skip
    """The equation with one fault."""

    def mix(self, x, source, *, mask, layout):
        q, k, v = projected(self, x, source)
        (q1, q2), (k1, k2) = turn(cut(q, self.heads), cut(k, self.heads))
        allowed = mask.dense(x.shape[1], source.shape[1])
        seen = (None, None) if allowed is None else hide(allowed)
        one, two = (
            masked_softmax(q @ k.mT * scale(q.shape[-1]), a)
            for q, k, a in ((q1, k1, seen[0]), (q2, k2, seen[1]))
        )
        out = norm(self, minus(one, two, lam(self)) @ split_heads(v, self.heads)) * after(self)
        return self.proj(out.transpose(1, 2).flatten(2))

    return wrong(Differential, mix=mix)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


def dealt(t, h):
    """All first halves before all second halves."""
    return t.unflatten(-1, (2, h, -1)).permute(2, 0, 3, 1, 4)


MUTANTS = {
    "halves far apart": with_fault(cut=dealt),
    "the maps exchanged": with_fault(minus=lambda a, b, lam: b - lam * a),
    "the maps added": with_fault(minus=lambda a, b, lam: a + lam * b),
    "λ of the start alone": with_fault(lam=lambda part: part.start),
    "λ without its start": with_fault(lam=lambda part: its_lambda(part, 0)),
    "products of λ exchanged": with_fault(lam=lambda part: 2 * part.start - its_lambda(part, part.start)),
    "no exponentials in λ": with_fault(lam=lambda part: part.lambda_q1 @ part.lambda_k1 - part.lambda_q2 @ part.lambda_k2 + part.start),
    "no norm": with_fault(norm=lambda part, t: t * part.sub_norm.weight),
    "a norm over all heads": with_fault(norm=lambda part, t: t / (t.square().mean((1, 3), keepdim=True) + 1e-5).sqrt() * part.sub_norm.weight),
    "a norm that centres": with_fault(norm=lambda part, t: torch.nn.functional.layer_norm(t, t.shape[-1:], part.sub_norm.weight)),
    "another ε": with_fault(norm=lambda part, t: t / (t.square().mean(-1, keepdim=True) + 1e-3).sqrt() * part.sub_norm.weight),
    "not scaled by 1 - λ₀": with_fault(after=lambda part: 1.0),
    "scaled by 1 - λ": with_fault(after=lambda part: 1 - its_lambda(part, part.start)),
    "the scale of whole heads": with_fault(scale=lambda d: (2 * d) ** -0.5),
    "q and k swapped": with_fault(turn=lambda q, k: (k, q) if q.shape == k.shape else (q, k)),
    "the second map is not masked": with_fault(hide=lambda allowed: (allowed, torch.ones_like(allowed))),
    "the mask inverted": with_fault(hide=lambda allowed: (~allowed, ~allowed)),
    "the mask ignored": with_fault(hide=lambda allowed: (None, None)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def differential(site=None, **options) -> Differential:
    """In float64, with parameters of a size that matters."""
    return spread(Differential(site or place(12, 3, 5), **options), 0.5)


# By hand


@pytest.mark.parametrize("layer,start", [(0, 0.2), (1, 0.3555), (2, 0.4707), (11, 0.7779)])
def test_hand_where_lambda_starts(layer, start):
    """0.8 - 0.6 exp(-0.3 l), l from 0."""
    assert round(Differential(place(4, layer=layer)).start, 4) == start


def test_hand_two_maps():
    """A₁ = (.75, .25), A₂ = (.5, .5), λ = .2: the map is (.65, .15), of the tap and of a hand-made head."""
    part = set_all(Differential(Site("hand", 2, 1, Layout((2,)), context_dim=2), start=0.2), 0.0)
    with torch.no_grad():
        part.q.bias.fill_(1.0)
        part.kv.weight[0, 0] = math.log(3)  # the first half of the key
        part.kv.weight[2:].copy_(torch.eye(2))
        part.sub_norm.weight.fill_(1.0)
        part.proj.weight.copy_(torch.eye(2))
    x, context = torch.zeros(1, 1, 2).double(), torch.eye(2).double()[None]
    near(seen(part, x, context, layout=Layout((1,))), [0.65, 0.15])
    rms = math.sqrt((0.65**2 + 0.15**2) / 2 + 1e-5)
    near(part(x, context, layout=Layout((1,))), [0.8 * 0.65 / rms, 0.8 * 0.15 / rms])


@pytest.mark.parametrize("dim,heads", [(12, 3), (32, 4), (16, 1)])
def test_hand_parameters(dim, heads):
    """Multi-head attention's, 4 D for λ and 2 D for the norm; no biases in the paper."""
    d = dim // heads // 2
    part = Differential(place(dim, heads, qkv_bias=False, proj_bias=False))
    assert count(part) == 4 * dim * dim + 4 * d + 2 * d


def test_hand_parameters_of_odd_heads():
    """3 channels of values, 2 × 2 of queries and keys."""
    part = Differential(place(9, 3, qkv_bias=False, proj_bias=False))
    assert part.qkv.weight.shape == (12 + 12 + 9, 9) and part.lambda_q1.shape == (2,)


def test_hand_starts():
    """Vectors of λ from N(0, 0.1²), a norm of ones; a λ near its start."""
    part = Differential(place(4000, 1))
    for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
        assert abs(getattr(part, name).std() - 0.1) < 0.01
    assert (part.sub_norm.weight == 1).all() and options_of(Differential)().model_dump() == {"start": None}


# Identities


@pytest.mark.parametrize("wishes", [{}, {"qk_norm": True}, {"scale_norm": True}])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["none", "causal", "pairs"])
def test_identity_timms_layer(wishes, fused, kind):
    site = Site("hand", 24, 3, Layout((5,)), layer=2, **wishes)
    part, x = differential(site), normal(2, 5, 24)
    theirs = (
        DiffAttention(24, 3, qkv_bias=True, depth=2, norm_layer=torch.nn.LayerNorm, **wishes).double().eval()
    )
    theirs.load_state_dict(part.state_dict())
    theirs.fused_attn = fused
    pairs = torch.rand(2, 1, 5, 5) < 0.6
    pairs |= torch.eye(5, dtype=torch.bool)
    mask = {"none": Mask(), "causal": Mask(causal=True), "pairs": Mask(pairs=pairs)}[kind]
    wanted = theirs(x, attn_mask=pairs if kind == "pairs" else None, is_causal=kind == "causal")
    near(part(x, mask=mask, layout=site.layout), wanted, 1e-6)  # whose λ is in single precision
    theirs._compute_lambda = lambda: its_lambda(theirs, theirs.lambda_init)
    wanted = theirs(x, attn_mask=pairs if kind == "pairs" else None, is_causal=kind == "causal")
    near(part(x, mask=mask, layout=site.layout), wanted)


@pytest.mark.parametrize("layer", [0, 3])
def test_identity_equal_halves_are_normalised_softmax_attention(layer):
    """(1 - λ) cancels in the norm, but for its sign and ε."""
    site = place(12, 3, 5, layer=layer, proj_bias=False)
    part, x = differential(site), normal(2, 5, 12)
    part.sub_norm.eps = 1e-14
    with torch.no_grad():
        part.proj.weight.copy_(torch.eye(12))
        for rows in part.qkv.weight[:24].unflatten(0, (6, 2, 2)), part.qkv.bias[:24].unflatten(0, (6, 2, 2)):
            rows[:, 1] = rows[:, 0]
    q, k, v = part.qkv(x).chunk(3, -1)
    q, k = (t.unflatten(-1, (3, 2, 2))[:, :, :, 0].transpose(1, 2) for t in (q, k))
    plain = (q @ k.mT / math.sqrt(2)).softmax(-1) @ split_heads(v, 3)
    plain = part.sub_norm(plain).transpose(1, 2).flatten(2) * (1 - part.start)
    for product, sign in ((0.0, 1), (-1.0, 1), (1.5, -1)):  # λ = λ₀, less, and far above 1
        with torch.no_grad():
            part.lambda_q1.fill_(product), part.lambda_k1.fill_(1.0)
            part.lambda_q2.zero_()
        near(part(x, layout=site.layout), sign * plain, 1e-8)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 5) < 0.7)])
def test_identity_rows_of_the_map_sum_to_one_minus_lambda(mask):
    part, x = differential(), normal(2, 5, 12)
    rows = seen(part, x, mask=mask, layout=Layout((5,))).sum(-1)
    some = torch.ones(5, 5, dtype=torch.bool) if mask.free else mask.dense(5, 5)
    near(rows, ((1 - its_lambda(part, 0.2)) * some.any(-1)).expand(2, 3, 5))


def test_identity_lambda_of_zero_is_softmax_attention_of_first_halves():
    site = place(12, 3, 5, proj_bias=False)
    part, x = differential(site, start=0.0), normal(2, 5, 12)
    with torch.no_grad():
        part.lambda_q1.zero_(), part.lambda_q2.zero_()  # e⁰ - e⁰
    q, k, v = part.qkv(x).chunk(3, -1)
    q, k = (t.unflatten(-1, (3, 2, 2))[:, :, :, 0].transpose(1, 2) for t in (q, k))
    near(seen(part, x, layout=site.layout), (q @ k.mT / math.sqrt(2)).softmax(-1))
    assert seen(part, x, layout=site.layout, tap="scores").shape == (2, 2, 3, 5, 5)


def test_identity_a_head_gives_numbers_of_one_size():
    """Its mean square is that of the norm's weight, whatever the maps."""
    site = place(12, 3, 5, proj_bias=False)
    part, x = differential(site), normal(2, 5, 12)
    with torch.no_grad():
        part.sub_norm.weight.fill_(1.0)
        part.proj.weight.copy_(torch.eye(12))
    squares = part(x, layout=site.layout).unflatten(-1, (3, 4)).square().mean(-1)
    near(squares, torch.full((2, 5, 3), 0.8**2), 2e-3)


def test_a_start_of_one_is_refused():
    with pytest.raises(RecipeError, match="AZ214.*a `start` of 1 leaves nothing"):
        Differential(place(12, 3), start=1.0)


def test_dropout_meets_the_difference():
    """Entries of the map that are not dropped are as large as 1 / (1 - p) makes them."""
    torch.manual_seed(0)
    site = Site("hand", 12, 3, Layout((5,)), attn_drop=0.5)
    part, x = spread(Differential(site), 0.5).train(), normal(2, 5, 12)
    shown, used = [], []
    part.weights.register_forward_hook(lambda module, args, out: shown.append(out.detach()))
    part.sub_norm.register_forward_hook(lambda module, args, out: used.append(args[0].detach()))
    part(x, layout=site.layout)
    v = split_heads(part.qkv(x)[..., 24:], 3)
    assert (used[0] - shown[0] @ v).abs().max() > 1e-2
    part.eval()(x, layout=site.layout)
    near(used[1], shown[1] @ v)
    near(shown[0], shown[1])


@pytest.mark.parametrize("watched", [False, True])
def test_dropout_drops_entries_of_the_difference(watched):
    """Of a token alone the one entry is 1 - λ > 0, and dropped as a whole: heads look where they do without
    dropout, or are zero."""
    torch.manual_seed(0)
    site = Site("hand", 12, 3, Layout((1,)), attn_drop=0.5)
    part, x = spread(Differential(site), 0.1), normal(1, 1, 12).expand(64, -1, -1)
    used, keep = [], lambda module, args, out: used.append(out.detach())
    part.sub_norm.register_forward_hook(keep)
    if watched:
        part.weights.register_forward_hook(lambda module, args, out: None)
    for module in (part.eval(), part.train()):
        module(x, layout=site.layout)
    whole, found = used
    kept = found.abs().amax(dim=-1, keepdim=True) > 0
    assert 0 < kept.float().mean() < 1
    assert (found * whole >= 0).all()


def test_narrow_numbers_stay_near():
    narrow(Differential, [(2, 7, 24)], site=place(24, 3, 7))
