"""Shared convolutions in the place of projections, arXiv:2504.11517."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, spread, wrong
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, MultiHead, OptionError
from attnzoo.functional import masked_softmax, nearest_factors, rearrange
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.projection.convshare import ConvShare, kernels_of
from attnzoo.testing import against


def map_of(c):
    """Rows and columns: the two factors of c that are nearest to each other."""
    return min(
        ((c // x, x) for x in range(1, c + 1) if c % x == 0 and c // x <= x), key=lambda s: s[1] - s[0]
    )


def matrix(kernels, c, zeros, top=None, left=None, flip=False):
    """What kernels (M y x) make of a map, entry by entry, as a matrix (M y' x', c)."""
    (rows, columns), (number, high, broad) = map_of(c), kernels.shape
    top = (high - 1) // 2 if top is None else top
    left = (broad - 1) // 2 if left is None else left
    top, left, ys, xs = (top, left, rows, columns) if zeros else (0, 0, rows - high + 1, columns - broad + 1)
    out = torch.zeros(number, ys, xs, rows, columns).double()
    for y in range(ys):
        for x in range(xs):
            for u in range(high):
                for v in range(broad):
                    i, j = y + u - top, x + v - left
                    if 0 <= i < rows and 0 <= j < columns:
                        out[:, y, x, i, j] = kernels[:, -1 - u, -1 - v] if flip else kernels[:, u, v]
    return out.reshape(number * ys * xs, c)


def linear(bank, x, zeros):
    """The maps that the kernels give, one after another; each with its bias."""
    kernels = bank.weight[:, 0].detach()
    out = x @ matrix(kernels, x.shape[1], zeros).T
    return out if bank.bias is None else out + bank.bias.repeat_interleave(out.shape[1] // len(kernels))


def heads_of(part, x, source, form):
    """Queries, keys and values of every head of a sample, and what the heads become."""
    if form != "unshared":
        q, k, v = (
            linear(bank, t, form == "same") for bank, t in ((part.q, x), (part.k, source), (part.v, source))
        )
        d = x.shape[1] // part.heads
        cut = [[t[:, h * d : (h + 1) * d] for h in range(part.heads)] for t in (q, k, v)]
        return *cut, lambda heads: linear(part.proj, torch.cat(heads, 1), form == "same")
    parts = []
    for bank in (part.q, part.k, part.v):  # token i has the kernels from i h on
        kernels = bank.weight[:, 0].detach()
        rows = [
            [matrix(kernels[i * part.heads + h][None], x.shape[1], True) @ x[i] for i in range(len(x))]
            for h in range(part.heads)
        ]
        parts.append([torch.stack(row) for row in rows])
    return *parts, sum


@against(ConvShare, examples=5)
def test_oracle(component, options, x, source, allowed):
    """Every convolution as the matrix that it is, then query by query and head by head."""
    out = []
    for s in range(len(x)):
        q, k, v, join = heads_of(component, x[s], source[s], options["form"])
        merged = []
        for h in range(component.heads):
            rows = []
            for i in range(x.shape[1]):
                see = allowed[s, h, i]
                scores = k[h][see] @ q[h][i] / math.sqrt(q[h].shape[1])
                rows.append(scores.softmax(0) @ v[h][see])
            merged.append(torch.stack(rows))
        out.append(join(merged))
    return torch.stack(out)


def of_form(form):
    """The oracle, asked about one form."""
    keep = lambda options: options.get("form", "valid") == form  # noqa: E731
    return against(ConvShare, examples=9, options=keep)(test_oracle.oracle)


test_oracle_of_valid, test_oracle_of_same = of_form("valid"), of_form("same")
test_oracle_of_compact, test_oracle_of_unshared = of_form("compact"), of_form("unshared")


def even(options):
    return options.get("form") == "same" and options.get("kernel") == 2


test_oracle_of_even_kernels = against(ConvShare, examples=8, options=even)(test_oracle.oracle)


def mixing(
    bank=lambda part, bank, x: part._project(bank, x),
    split=lambda part, t: rearrange(t, "b n (h d) -> b h n d", h=part.heads),
    scale=lambda d, heads: d**-0.5,
    mask=lambda mask: mask,
    turned=False,
    over=-1,
    tokens=lambda bank, maps: bank(maps),
    join=lambda t: t.sum(1),
):
    """The equations, without a fault or with one."""

    def mix(self, x, source, *, mask, layout, change=mask):
        if self.form == "unshared":
            maps = self.pad(x.unflatten(2, (self.rows, -1)))
            q, k, v = (
                rearrange(tokens(c, maps), "b (n h) y x -> b h n (y x)", h=self.heads)
                for c in (self.q, self.k, self.v)
            )
        else:
            q, k, v = (
                split(self, bank(self, c, t)) for c, t in ((self.q, x), (self.k, source), (self.v, source))
            )
        q, k = (k, q) if turned and q.shape == k.shape else (q, k)
        scores = q @ k.mT * scale(q.shape[-1], self.heads)
        weights = masked_softmax(scores, change(mask).dense(x.shape[1], source.shape[1]))
        read = (weights if over == -1 else scores.softmax(over)) @ v
        if self.form == "unshared":
            return join(read)
        return bank(self, self.proj, rearrange(read, "b h n d -> b n (h d)"))

    return wrong(ConvShare, mix=mix)


ORACLES = {
    "valid": test_oracle_of_valid,
    "same": test_oracle_of_same,
    "compact": test_oracle_of_compact,
    "unshared": test_oracle_of_unshared,
}


@pytest.mark.parametrize("form", ORACLES)
def test_the_form_without_a_fault_is_not_caught(form):
    assert ORACLES[form].compare(mixing(), examples=5).ok


def with_kernels(change):
    """The convolutions with other kernels."""

    def bank(part, bank, x):
        weight = change(bank.weight)
        if weight.shape != bank.weight.shape:
            return part._project(bank, x)
        if part.form == "valid":
            return F.linear(x, weight.flatten(1), bank.bias)
        maps = part.pad(rearrange(x, "b n (y x) -> (b n) 1 y x", y=part.rows))
        return rearrange(F.conv2d(maps, weight, bank.bias), "(b n) m y x -> b n (m y x)", n=x.shape[1])

    return bank


def columns_first(part, bank, x):
    """Maps written column by column."""
    if part.form == "valid":
        return part._project(bank, x)
    maps = bank(part.pad(rearrange(x, "b n (x y) -> (b n) 1 y x", y=part.rows)))
    return rearrange(maps, "(b n) m y x -> b n (m x y)", n=x.shape[1])


def kernels_last(part, bank, x):
    """The numbers of all kernels at a place, then those of the next."""
    maps = part._project(bank, x).unflatten(2, (bank.out_channels, -1))
    return rearrange(maps, "b n m p -> b n (p m)")


def padded_before(part, bank, x):
    """An even kernel with one more tap to the left, and above."""
    left, right, top, below = part.pad.padding
    maps = F.pad(rearrange(x, "b n (y x) -> (b n) 1 y x", y=part.rows), (right, left, below, top))
    return rearrange(bank(maps), "(b n) m y x -> b n (m y x)", n=x.shape[1])


UNMASKED, ACAUSAL = mixing(mask=lambda mask: Mask()), mixing(mask=lambda mask: Mask(mask.keys, mask.pairs))
MUTANTS = {
    "kernels flipped": (test_oracle_of_same, mixing(with_kernels(lambda w: w.flip(2, 3)))),
    "kernels flipped, as large as the map": (
        test_oracle_of_valid,
        mixing(with_kernels(lambda w: w.flip(2, 3))),
    ),
    "kernels flipped, without zeros": (test_oracle_of_compact, mixing(with_kernels(lambda w: w.flip(2, 3)))),
    "rows and columns of kernels swapped": (test_oracle_of_same, mixing(with_kernels(lambda w: w.mT))),
    "maps written column by column": (test_oracle_of_same, mixing(columns_first)),
    "kernels in another order": (test_oracle_of_valid, mixing(with_kernels(lambda w: w.roll(1, 0)))),
    "places before kernels": (test_oracle_of_compact, mixing(kernels_last)),
    "zeros on the other side": (test_oracle_of_even_kernels, mixing(padded_before)),
    "heads dealt the other way": (
        test_oracle_of_valid,
        mixing(split=lambda part, t: rearrange(t, "b n (d h) -> b h n d", h=part.heads)),
    ),
    "never scaled": (test_oracle_of_same, mixing(scale=lambda d, heads: 1.0)),
    "scaled by all channels": (test_oracle_of_valid, mixing(scale=lambda d, heads: (d * heads) ** -0.5)),
    "queries and keys swapped": (test_oracle_of_valid, mixing(turned=True)),
    "softmax over the queries": (test_oracle_of_same, mixing(over=-2)),
    "softmax over the samples": (test_oracle_of_valid, mixing(over=0)),
    "the mask ignored": (test_oracle_of_valid, UNMASKED),
    "the mask ignored, unshared": (test_oracle_of_unshared, UNMASKED),
    "causality ignored": (test_oracle_of_same, ACAUSAL),
    "one kernel for all tokens": (
        test_oracle_of_unshared,
        mixing(
            tokens=lambda bank, maps: F.conv2d(
                maps, bank.weight[:1].expand_as(bank.weight), groups=bank.groups
            )
        ),
    ),
    "tokens in another order": (
        test_oracle_of_unshared,
        mixing(tokens=lambda bank, maps: F.conv2d(maps, bank.weight.flip(0), groups=bank.groups)),
    ),
    "the mean of the heads": (test_oracle_of_unshared, mixing(join=lambda t: t.mean(1))),
    "scaled by the channels of a head": (
        test_oracle_of_unshared,
        mixing(scale=lambda d, heads: (d / heads) ** -0.5),
    ),
}


@pytest.mark.parametrize("oracle,mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(oracle, mutant):
    caught(oracle, mutant)


def share(dim=64, heads=4, tokens=5, **options) -> ConvShare:
    """In float64, with weights of a size that matters."""
    biases = {name: options.pop(name, True) for name in ("qkv_bias", "proj_bias")}
    return spread(ConvShare(place(dim, heads, tokens, **biases), **options), 0.3)


# By hand


@pytest.mark.parametrize(
    "width,sides", [(64, (8, 8)), (192, (12, 16)), (1, (1, 1)), (7, (1, 7)), (12, (3, 4)), (18, (3, 6))]
)
def test_hand_maps_are_as_square_as_they_can_be(width, sides):
    assert nearest_factors(width) == map_of(width) == sides


@pytest.mark.parametrize("form,kernel,width,wanted", [
    ("valid", None, 64, (64, (8, 8))), ("same", None, 64, (1, (3, 3))), ("same", 4, 64, (1, (4, 4))),
    ("same", None, 7, (1, (1, 3))), ("compact", None, 64, (4, (5, 5))), ("compact", 5, 64, (4, (5, 5))),
    ("compact", 7, 64, (16, (7, 7))), ("compact", 1, 64, (1, (1, 1))), ("compact", None, 81, (9, (7, 7))),
    ("compact", None, 192, (4, (7, 9))), ("unshared", None, 64, (1, (7, 7))), ("unshared", None, 4, (1, (3, 3))),
])  # fmt: skip
def test_hand_kernels_give_as_many_channels_as_they_take(form, kernel, width, wanted):
    """M (p - k + 1)² = c without zeros; 4 · 4² = 64 with k = 5."""
    assert kernels_of(form, kernel, width) == wanted


@pytest.mark.parametrize("form,kernel,width", [
    ("valid", 8, 64), ("compact", 6, 64), ("compact", 8, 64), ("compact", 9, 64), ("compact", None, 49),
    ("compact", None, 12), ("compact", None, 7), ("same", 16, 64), ("same", 2, 7), ("unshared", 17, 64),
])  # fmt: skip
def test_hand_others_are_refused(form, kernel, width):
    """3² does not divide 64; 7 × 7 leaves 7² or 1; a tap 8 from the middle meets no map of 8."""
    with pytest.raises(OptionError, match="no kernels"):
        ConvShare(place(width, 1), form=form, kernel=kernel)


def test_a_context_of_another_width_is_for_kernels_as_large_as_its_maps():
    for form in ("same", "compact"):
        with pytest.raises(OptionError, match="the context has"):
            ConvShare(place(64, 4, context_dim=16), form=form)
    assert ConvShare(place(64, 4, context_dim=15)).k.weight.shape == (64, 1, 3, 5)


@pytest.mark.parametrize("options,number", [
    ({}, 4 * 64 * 64 + 3 * 64), ({"form": "same"}, 4 * 9 + 3), ({"form": "compact"}, 4 * 100 + 3 * 4),
    ({"form": "compact", "kernel": 7}, 4 * 16 * 49 + 3 * 16), ({"form": "unshared"}, 3 * 5 * 4 * 49),
])  # fmt: skip
def test_hand_parameters(options, number):
    """M k² of each convolution, and M biases, none of the keys: 100 weights where a Linear has 4096."""
    assert count(ConvShare(place(64, 4, 5), **options)) == number


def test_hand_a_kernel_with_zeros_around_the_map():
    """(1 2; 3 4) with (0 1 0; 2 3 4; 0 5 0), a cross: top left 3 · 1 + 4 · 2 + 5 · 3 = 26."""
    part = share(4, 1, 1, form="same", qkv_bias=False, proj_bias=False)
    with torch.no_grad():
        part.v.weight.copy_(torch.tensor([[[[0.0, 1, 0], [2, 3, 4], [0, 5, 0]]]]))
        part.proj.weight.copy_(torch.tensor([[[[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]]]))
    near(part(torch.tensor([[[1.0, 2, 3, 4]]]).double(), layout=Layout((1,))), [26, 28, 26, 20])


def test_hand_an_even_kernel_reaches_right_and_below():
    """(1 2; 3 4) with (1 10; 100 1000): each place, its right, the one below, and the one across; then zeros."""
    part = share(4, 1, 1, form="same", kernel=2)
    with torch.no_grad():
        part.v.weight.copy_(torch.tensor([[[[1.0, 10], [100, 1000]]]]))
    maps = part._project(part.v, torch.tensor([[[1.0, 2, 3, 4]]]).double()) - part.v.bias
    near(maps, [4321, 402, 43, 4])


@pytest.mark.parametrize("form", ["valid", "same", "compact"])
def test_hand_it_starts_uniformly_within_one_over_the_side(form):
    """Kaiming on a fan-in of k², as PyTorch's convolutions: within ± 1 / k."""
    part = ConvShare(place(64, 4), form=form)
    side = part.q.weight.shape[-1]
    largest = max(conv.weight.abs().max() for conv in (part.q, part.k, part.v, part.proj))
    assert 0.8 / side < largest <= 1 / side


# Identities


@pytest.mark.parametrize(
    "mask", [Mask(), Mask(causal=True), Mask(keys=torch.tensor([[1, 0, 1, 1, 0]] * 2).bool())]
)
@pytest.mark.parametrize("dim,heads", [(16, 4), (12, 3), (7, 1)])
def test_identity_kernels_as_large_as_the_map_are_multi_head_attention(dim, heads, mask):
    """nn.Linear with the weight K as (c, p²): a layer of a ViT, written as convolutions."""
    site = place(dim, heads, 5)
    part, multi = spread(ConvShare(site)), spread(MultiHead(site, Softmax(site)))
    with torch.no_grad():
        multi.qkv.weight.copy_(torch.cat([part.q.weight, part.k.weight, part.v.weight]).flatten(1))
        multi.qkv.bias[:dim], multi.qkv.bias[2 * dim :] = (
            part.q.bias,
            part.v.bias,
        )  # that of the keys has no say
        multi.proj.weight.copy_(part.proj.weight.flatten(1))
        multi.proj.bias.copy_(part.proj.bias)
    x = normal(2, 5, dim)
    near(part(x, mask=mask, layout=site.layout), multi(x, mask=mask, layout=site.layout), 1e-11)


@pytest.mark.parametrize("dim", [16, 12])
def test_identity_kernels_as_large_as_the_map_are_convolutions_too(dim):
    part, x = share(dim, 2), normal(2, 5, dim)
    maps = nn.functional.conv2d(x.reshape(10, 1, *nearest_factors(dim)), part.q.weight, part.q.bias)
    near(part._project(part.q, x), maps.reshape(2, 5, dim), 1e-11)


def test_identity_one_tap_is_one_number():
    """softmax(q k x xᵀ / √d) x, times v and w."""
    part, x = share(16, 1, form="same", kernel=1, qkv_bias=False, proj_bias=False), normal(2, 5, 16)
    q, k, v, w = (conv.weight.item() for conv in (part.q, part.k, part.v, part.proj))
    weights = (q * k * x @ x.mT / 4).softmax(-1)
    near(seen(part, x, layout=Layout((5,)))[:, 0], weights)
    near(part(x, layout=Layout((5,))), v * w * weights @ x, 1e-11)


def test_identity_compact_kernels_of_one_number_are_the_same_as_padded_ones():
    one, two = share(16, 2, form="compact", kernel=1), share(16, 2, form="same", kernel=1)
    two.load_state_dict(one.state_dict())
    x = normal(2, 5, 16)
    near(one(x, layout=Layout((5,))), two(x, layout=Layout((5,))), 1e-11)


@pytest.mark.parametrize(
    "form,equivariant", [("valid", True), ("same", True), ("compact", True), ("unshared", False)]
)
def test_identity_tokens_may_change_places_because_kernels_are_shared(form, equivariant):
    part, x, order = share(16, 2, form=form), normal(2, 5, 16), [3, 0, 4, 1, 2]
    moved, out = part(x[:, order], layout=Layout((5,))), part(x, layout=Layout((5,)))[:, order]
    assert torch.allclose(moved, out, rtol=0, atol=1e-11) == equivariant


@pytest.mark.parametrize("form,commutes", [("same", True), ("valid", False)])
def test_identity_a_padded_kernel_commutes_with_shifts_of_the_map(form, commutes):
    """Of what lies inside, two places from the borders, one place to the right and below."""
    part, x = share(64, 4, form=form), torch.zeros(1, 1, 8, 8).double()
    x[..., 2:5, 2:5] = normal(3, 3)
    out, moved = (
        part._project(part.q, t.flatten(2)).reshape(1, 1, 8, 8) - part.q.bias[0]
        for t in (x, x.roll((1, 1), (2, 3)))
    )
    assert torch.allclose(moved, out.roll((1, 1), (2, 3)), rtol=0, atol=1e-11) == commutes


def test_identity_equal_kernels_of_all_tokens_are_shared_ones():
    """Unshared, one head, the same kernels everywhere: padded shared kernels without biases, the last the identity."""
    one = share(16, 1, form="unshared", kernel=3)
    two = share(16, 1, form="same", qkv_bias=False, proj_bias=False)
    with torch.no_grad():
        for mine, theirs in ((one.q, two.q), (one.k, two.k), (one.v, two.v)):
            mine.weight.copy_(theirs.weight.expand_as(mine.weight))
        two.proj.weight.zero_()[..., 1, 1] = 1
    x = normal(2, 5, 16)
    near(one(x, layout=Layout((5,))), two(x, layout=Layout((5,))), 1e-11)


def test_identity_unshared_heads_are_summed():
    part, x = share(16, 2, form="unshared"), normal(2, 5, 16)
    total = 0
    for h in range(2):
        one = share(16, 1, form="unshared")
        with torch.no_grad():
            for mine, theirs in ((one.q, part.q), (one.k, part.k), (one.v, part.v)):
                mine.weight.copy_(theirs.weight[h::2])
        total = total + one(x, layout=Layout((5,)))
    near(part(x, layout=Layout((5,))), total, 1e-11)


@pytest.mark.parametrize("form", ["valid", "same", "compact", "unshared"])
def test_narrow_numbers_stay_near(form):
    narrow(ConvShare, [(2, 7, 16)], site=place(16, 2, 7), form=form)
