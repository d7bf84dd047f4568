"""Reduced attention, arXiv:2410.13732."""

import itertools
import math

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, place, seen, spread, wrong

from attnzoo.core import Layout, Mask, MultiHead, options_of
from attnzoo.errors import RecipeError, UnsupportedContext, UnsupportedMask
from attnzoo.functional import masked_softmax, merge_heads, split_heads
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.projection.reduced import Reduced
from attnzoo.testing import against

ONE_HEAD = ("collapsed", "cholesky", "mirrored")


def triangle_of(numbers, c):
    """T, written row by row."""
    numbers = iter(numbers.flatten())
    return torch.stack(
        [
            torch.stack([next(numbers) if j <= i else torch.zeros(()).double() for j in range(c)])
            for i in range(c)
        ]
    )


def linear(layer, x):
    """x W + b; x itself where there is no matrix."""
    if not hasattr(layer, "weight"):
        return x
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def logits_of(part, options, x, s, h, d):
    """Of all queries and keys of a sample, before the scale: the head h has the channels from h d on."""
    if options["qk"] in ("cholesky", "mirrored"):
        t = triangle_of(part.q.weight, x.shape[1])
        return x @ (t @ t.T if options["qk"] == "cholesky" else t + t.T - torch.diag(t.diag())) @ s.T
    if options["qk"] == "collapsed":
        return linear(part.q, x) @ s.T
    mine = slice(h * d, (h + 1) * d)
    return linear(part.q, x)[:, mine] @ linear(part.q if options["qk"] == "shared" else part.k, s)[:, mine].T


@against(Reduced, examples=10)
def test_oracle(component, options, x, source, allowed):
    """Query by query; in one head it has all channels."""
    b, n, c = x.shape
    heads = 1 if options["qk"] in ONE_HEAD else component.heads
    d, out = c // heads, []
    for s in range(b):
        v, merged = linear(component.v, source[s]), []
        width = v.shape[1] // heads
        for h in range(heads):
            logits = logits_of(component, options, x[s], source[s], h, d)
            rows = []
            for i in range(n):
                see = allowed[s, min(h, allowed.shape[1] - 1), i]
                scores = logits[i, see] / (math.sqrt(d) if options["scaled"] else 1)
                rows.append(scores.softmax(0) @ v[see, h * width : (h + 1) * width])
            merged.append(torch.stack(rows))
        out.append(linear(component.proj, torch.cat(merged, 1)))
    return torch.stack(out)


def of_kind(qk):
    """The oracle, asked about one form of W_QK."""
    return against(Reduced, examples=20, options=lambda options: options.get("qk", "collapsed") == qk)(
        test_oracle.oracle
    )


test_oracle_of_full, test_oracle_of_shared = of_kind("full"), of_kind("shared")
test_oracle_of_collapsed, test_oracle_of_cholesky = of_kind("collapsed"), of_kind("cholesky")
test_oracle_of_mirrored = of_kind("mirrored")


def symmetric(part):
    """T Tᵀ, or S."""
    t = triangle_of(part.q.weight, part.q.dim)
    return t + t.T - torch.diag(t.diag()) if part.q.mirrored else t @ t.T


def matrices(part, x, source):
    """Queries, keys and values with all their channels; a triangle is all in the queries."""
    q = x @ symmetric(part) if hasattr(part.q, "mirrored") else part.q(x)
    k = part.q(source) if part.same and not hasattr(part.q, "mirrored") else part.k(source)
    return q, k, part.v(source)


def mixing(
    project=matrices, scale=lambda part, q: q.shape[-1] ** -0.5 * part.factor, mask=lambda mask: mask, over=-1
):
    """The mechanism, explicitly and with a fault."""

    def mix(self, x, source, *, mask, layout, change=mask):
        q, k, v = (split_heads(t, self.parts) for t in project(self, x, source))
        scores = q @ k.mT * scale(self, q)
        weights = masked_softmax(scores, change(mask).dense(x.shape[1], source.shape[1]))
        weights = weights if over == -1 else scores.softmax(over)
        return self.proj(merge_heads(weights @ v))

    return wrong(Reduced, mix=mix)


def triangles(change):
    """The mechanism with another matrix made of T."""

    def project(part, x, source):
        return x @ change(triangle_of(part.q.weight, part.q.dim)), source, part.v(source)

    return mixing(project)


def turned(part, x, source):
    q, k, v = matrices(part, x, source)
    return (k, q, v) if x is source else (q, k, v)


def transposed(part, x, source):
    q, k, v = matrices(part, x, source)
    square = hasattr(part.v, "weight") and x.shape[-1] == source.shape[-1]
    return q, k, torch.nn.functional.linear(source, part.v.weight.T, part.v.bias) if square else v


ORACLES = [
    test_oracle_of_full,
    test_oracle_of_shared,
    test_oracle_of_collapsed,
    test_oracle_of_cholesky,
    test_oracle_of_mirrored,
]


@pytest.mark.parametrize("oracle", ORACLES, ids=("full", "shared", *ONE_HEAD))
def test_the_form_without_a_fault_is_not_caught(oracle):
    assert oracle.compare(mixing(), examples=10).ok


UNMASKED, ACAUSAL = mixing(mask=lambda mask: Mask()), mixing(mask=lambda mask: Mask(mask.keys, mask.pairs))
MUTANTS = {
    "Tᵀ T for T Tᵀ": (test_oracle_of_cholesky, triangles(lambda t: t.T @ t)),
    "T for T Tᵀ": (test_oracle_of_cholesky, triangles(lambda t: t)),
    "an upper triangle": (test_oracle_of_cholesky, triangles(lambda t: t.flip(0, 1) @ t.flip(0, 1).T)),
    "the diagonal twice": (test_oracle_of_mirrored, triangles(lambda t: t + t.T)),
    "T not mirrored": (test_oracle_of_mirrored, triangles(lambda t: t)),
    "never scaled": (test_oracle_of_collapsed, mixing(scale=lambda part, q: 1.0)),
    "always scaled": (test_oracle_of_full, mixing(scale=lambda part, q: q.shape[-1] ** -0.5)),
    "scaled by the channels of a head": (
        test_oracle_of_collapsed,
        mixing(scale=lambda part, q: q.shape[-1] ** -0.5 * part.factor * part.heads**0.5),
    ),
    "queries and keys swapped": (test_oracle_of_full, mixing(turned)),
    "W_QK transposed": (test_oracle_of_collapsed, mixing(turned)),
    "keys without W_Q": (
        test_oracle_of_shared,
        mixing(lambda part, x, source: (part.q(x), source, part.v(source))),
    ),
    "W_V transposed": (test_oracle_of_shared, mixing(transposed)),
    "the mask ignored": (test_oracle_of_full, UNMASKED),
    "the mask ignored, in one head": (test_oracle_of_cholesky, UNMASKED),
    "causality ignored": (test_oracle_of_mirrored, ACAUSAL),
    "softmax over the queries": (test_oracle_of_collapsed, mixing(over=-2)),
    "softmax over the samples": (test_oracle_of_collapsed, mixing(over=0)),
}


@pytest.mark.parametrize("oracle,mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(oracle, mutant):
    caught(oracle, mutant)


# By hand


def reduced(dim=6, heads=1, tokens=5, **options) -> Reduced:
    """In float64, with parameters of a size that matters."""
    biases = {name: options.pop(name, True) for name in ("qkv_bias", "proj_bias")}
    return spread(Reduced(place(dim, heads, tokens, **biases), **options))


def test_hand_collapsed_is_one_product():
    """W_QK = [[0, ln 3], [0, 0]] (from x_i to x_j), unscaled: x_0 = (1, 0) weighs x_1 = (0, 1) three times."""
    part = reduced(2, tokens=2, scaled=False, qkv_bias=False)
    with torch.no_grad():
        part.q.weight.copy_(torch.tensor([[0, 0], [math.log(3), 0]]))  # q = x Wᵀ
    x = torch.eye(2).double()[None]
    near(part(x, layout=Layout((2,))), [[0.25, 0.75], [0.5, 0.5]], 1e-7)


def test_hand_cholesky():
    """T = [[1, 0], [2, 3]]: T Tᵀ = [[1, 2], [2, 13]]; mirrored: [[1, 2], [2, 3]]."""
    for qk, wanted in (("cholesky", [[1, 2], [2, 13]]), ("mirrored", [[1, 2], [2, 3]])):
        part = reduced(2, tokens=2, qk=qk, scaled=False)
        with torch.no_grad():
            part.q.weight.copy_(torch.tensor([[1, 2, 3]]))
        near(seen(part, torch.eye(2).double()[None], layout=Layout((2,)), tap="scores"), wanted)


def test_hand_one_channel():
    """c = 1, W_QK = ln 3, x = (0, 1): token 0 weighs alike, token 1 as 1 : 3."""
    part = reduced(1, tokens=2, qkv_bias=False)
    with torch.no_grad():
        part.q.weight.fill_(math.log(3))
    near(part(line(0, 1), layout=Layout((2,))), [0.5, 0.75], 1e-7)


@pytest.mark.parametrize("qk,vo,heads,number", [
    ("full", "full", 4, 4 * 64), ("collapsed", "full", 4, 3 * 64), ("collapsed", "collapsed", 4, 2 * 64),
    ("collapsed", "identity", 4, 64), ("shared", "full", 4, 3 * 64), ("cholesky", "identity", 4, 36),
    ("mirrored", "identity", 4, 36), ("cholesky", "full", 4, 36 + 2 * 64), ("full", "identity", 4, 2 * 64),
    ("full", "collapsed", 1, 3 * 64), ("shared", "identity", 4, 64),
])  # fmt: skip
def test_hand_parameters(qk, vo, heads, number):
    """Of 8 channels, without biases: full attention 4c², collapsed 3c², 2c², c², a triangle c (c + 1) / 2."""
    assert count(Reduced(place(8, heads, qkv_bias=False, proj_bias=False), qk=qk, vo=vo)) == number


def test_defaults():
    assert options_of(Reduced)().model_dump() == {"qk": "collapsed", "vo": "identity", "scaled": True}


def test_triangles_start_as_timms_matrices_and_are_decayed_like_them():
    part = Reduced(place(64), qk="cholesky")
    assert 0.018 < part.q.weight.std() < 0.022 and part.q.weight.ndim == 2


# Identities


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    "mask", [Mask(), Mask(causal=True), Mask(keys=torch.tensor([[1, 0, 1, 1, 0]] * 2).bool())]
)
def test_identity_full_is_multi_head_attention(heads, mask):
    site = place(6, heads, 5)
    part, multi = reduced(6, heads, qk="full", vo="full"), spread(MultiHead(site, Softmax(site)))
    with torch.no_grad():
        multi.qkv.weight.copy_(torch.cat([part.q.weight, part.k.weight, part.v.weight]))
        multi.qkv.bias[:6], multi.qkv.bias[12:] = part.q.bias, part.v.bias  # that of the keys has no say
        multi.proj.load_state_dict(part.proj.state_dict())
    x = normal(2, 5, 6)
    near(part(x, mask=mask, layout=site.layout), multi(x, mask=mask, layout=site.layout))


def test_identity_collapsed_preserves_the_function():
    """W_QK = W_Q W_Kᵀ, W_VO = W_V W_O, with their biases, and the scale 1 / √c kept."""
    full, less = reduced(qk="full", vo="full"), reduced(qk="collapsed", vo="collapsed")
    with torch.no_grad():  # a Linear holds the transpose
        less.q.weight.copy_(full.k.weight.T @ full.q.weight)
        less.q.bias.copy_(full.k.weight.T @ full.q.bias)
        less.proj.weight.copy_(full.proj.weight @ full.v.weight)
        less.proj.bias.copy_(full.proj.weight @ full.v.bias + full.proj.bias)
    x = normal(2, 5, 6)
    near(less(x, layout=Layout((5,))), full(x, layout=Layout((5,))))


def test_identity_collapsed_preserves_the_function_across_widths():
    """With a context of 4 channels W_QK is 6 × 4, and the scale is still 1 / √6."""
    site = place(6, 1, 5, context_dim=4)
    full, less = (spread(Reduced(site, qk=qk, vo="collapsed")) for qk in ("full", "collapsed"))
    with torch.no_grad():
        less.q.weight.copy_(full.k.weight.T @ full.q.weight)
        less.q.bias.copy_(full.k.weight.T @ full.q.bias)
        less.proj.load_state_dict(full.proj.state_dict())
    x, context = normal(2, 5, 6), normal(2, 7, 4)
    near(less(x, context, layout=site.layout), full(x, context, layout=site.layout))


def test_identity_the_matrices_of_values_collapse_across_layers():
    """Without skips and norms, S layers of one head have S matrices W_QK and one W_VO: (S + 1) c² numbers."""
    plain, layout = {"qkv_bias": False, "proj_bias": False, "scaled": False}, Layout((5,))
    layers = [reduced(qk="collapsed", vo="collapsed", **plain) for _ in range(3)]
    x = normal(2, 5, 6)
    wanted = x
    for layer in layers:
        wanted = layer(wanted, layout=layout)
    fewer, value = [reduced(qk="collapsed", vo="identity", **plain) for _ in range(3)], torch.eye(6).double()
    out = x
    for less, layer in zip(fewer, layers, strict=True):
        with torch.no_grad():  # x W_QK xᵀ of x = z V is z (V W_QK Vᵀ) zᵀ
            less.q.weight.copy_((value @ layer.q.weight.T @ value.T).T)
        out, value = less(out, layout=layout), value @ layer.proj.weight.T
    near(out @ value, wanted, 1e-9)
    assert sum(map(count, fewer)) + value.numel() == (3 + 1) * 36


@pytest.mark.parametrize("qk", ["shared", "cholesky", "mirrored"])
def test_identity_symmetric_logits(qk):
    scores = seen(reduced(8, 2, qk=qk), normal(2, 5, 8), layout=Layout((5,)), tap="scores")
    near(scores, scores.mT, 1e-11)


def test_identity_cholesky_logits_are_an_inner_product():
    """s_ii ≥ 0 and |s_ij| ≤ √(s_ii s_jj), which mirrored logits need not keep."""
    x = normal(4, 7, 6)
    scores = seen(reduced(qk="cholesky"), x, layout=Layout((7,)), tap="scores")
    own = scores.diagonal(dim1=-2, dim2=-1)
    assert (own >= 0).all()
    assert (scores.abs() <= (own[..., None] * own[..., None, :]).sqrt() * (1 + 1e-12) + 1e-12).all()
    mirrored = seen(reduced(qk="mirrored"), x, layout=Layout((7,)), tap="scores")
    assert (mirrored.diagonal(dim1=-2, dim2=-1) < 0).any()


def test_identity_mirrored_is_collapsed_with_a_symmetric_matrix():
    part, wide = reduced(qk="mirrored"), reduced(qk="collapsed", qkv_bias=False)
    t = triangle_of(part.q.weight, 6)
    with torch.no_grad():
        wide.q.weight.copy_(t + t.tril(-1).T)
    x = normal(2, 5, 6)
    near(part(x, layout=Layout((5,))), wide(x, layout=Layout((5,))))


@pytest.mark.parametrize("qk", ["full", "shared", *ONE_HEAD])
def test_identity_without_values_tokens_stay_in_the_hull_of_tokens(qk):
    """z_i = Σ_j a_ij x_j, channel by channel of a head: between the least and the greatest, and equal tokens stay."""
    x = normal(3, 5, 6)
    part = reduced(6, 2, qk=qk)
    out, weights = part(x, layout=Layout((5,))), seen(part, x, layout=Layout((5,)))
    assert (out <= x.amax(1, keepdim=True) + 1e-12).all() and (out >= x.amin(1, keepdim=True) - 1e-12).all()
    parts = x.unflatten(2, (weights.shape[1], -1))
    near(out, torch.einsum("bhnm,bmhd->bnhd", weights, parts).flatten(2))
    near(part(x[:, :1].expand_as(x), layout=Layout((5,))), x[:, :1].expand_as(x))


@pytest.mark.parametrize("qk", ["full", "shared", *ONE_HEAD])
def test_identity_scaled_divides_by_the_root_of_the_channels_of_a_head(qk):
    """√c in one head, √d in several; then a factor √(c or d) on one side makes up for it."""
    part, other = reduced(8, 2, qk=qk), reduced(8, 2, qk=qk, scaled=False)
    other.load_state_dict(part.state_dict())
    x = normal(2, 5, 8)
    one, two = (seen(p, x, layout=Layout((5,)), tap="scores") for p in (part, other))
    near(two, one * math.sqrt(8 if qk in ONE_HEAD else 4), 1e-11)


def test_one_head_whatever_the_site_says():
    """Five heads do not divide eight channels, and need not."""
    part, alone = (reduced(8, heads, qk="collapsed", vo="full") for heads in (5, 1))
    alone.load_state_dict(part.state_dict())
    x = normal(2, 5, 8)
    near(part(x, layout=Layout((5,))), alone(x, layout=Layout((5,))))
    assert seen(part, x, layout=Layout((5,))).shape == (2, 1, 5, 5)


# Claims and refusals


@pytest.mark.parametrize(
    "qk,vo", itertools.product(["full", "shared", *ONE_HEAD], ["full", "collapsed", "identity"])
)
def test_claims(qk, vo):
    card = Reduced.card_for(qk=qk, vo=vo)
    assert card.one_head == (qk in ONE_HEAD)
    assert card.context == (qk in ("full", "collapsed") and vo != "identity")
    assert ("proj_bias" in card.honours) == (vo != "identity")
    assert ("qkv_bias" in card.honours) == (vo == "full" or qk not in ("cholesky", "mirrored"))


def test_several_heads_that_do_not_collapse_are_refused():
    with pytest.raises(RecipeError, match="AZ214.*W_V and W_O of 2 heads are not one matrix of 8 × 8"):
        Reduced(place(8, 2), qk="shared", vo="collapsed")


def test_pairs_by_head_are_refused_in_one_head():
    with pytest.raises(UnsupportedMask, match="AZ402"):
        reduced(8, 2)(normal(1, 5, 8), mask=Mask(pairs=torch.ones(1, 2, 5, 5).bool()), layout=Layout((5,)))


@pytest.mark.parametrize("qk", ["shared", "cholesky", "mirrored"])
def test_symmetric_forms_read_no_context(qk):
    with pytest.raises(UnsupportedContext, match="AZ404"):
        Reduced(place(6, context_dim=6), qk=qk, vo="full")(
            torch.ones(1, 2, 6), torch.ones(1, 3, 6), layout=Layout((2,))
        )


@pytest.mark.parametrize(
    "qk,vo", [("collapsed", "identity"), ("cholesky", "full"), ("mirrored", "collapsed"), ("shared", "full")]
)
def test_narrow_numbers_stay_near(qk, vo):
    narrow(Reduced, [(2, 7, 12)], site=place(12, 3, 7), qk=qk, vo=vo)
