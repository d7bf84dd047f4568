"""MSA-Conv of TiC, arXiv:2310.04134."""

import itertools
import math

import pytest
import torch
from by_hand import count, narrow, near, normal, seen, set_all, spread, wrong

from attnzoo.core import Law, Layout, Mask, Site, options_of
from attnzoo.errors import RecipeError
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.local.msa_conv import MsaConv
from attnzoo.testing import against


def at(grid, prefix=0, dim=4, heads=2, **wishes) -> Site:
    """A site on a plane."""
    return Site("hand", dim, heads, Layout(grid, prefix), **wishes)


def attended(q, k, v, there, options):
    """One head, place by place: dicts of q, k and v, those that exist; softmax over the taps around a place's square."""
    (rows, columns), p, side = options["grid"], options["pool"], options["kernel"] // 2
    squares = {}
    for place in q:
        if there[place]:
            squares.setdefault((place[0] // p, place[1] // p), []).append(place)
    height, width = -(-rows // p), -(-columns // p)
    out = {}
    for y, x in q:
        keys, values = [], []
        for i, j in itertools.product(range(-side, side + 1), repeat=2):
            square = y // p + options["dilation"] * i, x // p + options["dilation"] * j
            if options["padding"] == "circular":
                square = square[0] % height, square[1] % width
            if members := squares.get(square):
                keys.append(sum(k[m] for m in members) / len(members))
                values.append(sum(v[m] for m in members) / len(members))
            elif options["padding"] == "zeros":
                keys.append(torch.zeros_like(q[y, x]))
                values.append(torch.zeros_like(q[y, x]))
        if keys:
            scores = torch.stack(keys) @ q[y, x] / math.sqrt(len(q[y, x]))
            out[y, x] = scores.softmax(0) @ torch.stack(values)
        else:
            out[y, x] = 0 * q[y, x]
    return out


def moved(places, head, options):
    """Where each place goes when head 0, 1, 2, 3, 0, ... moves not at all, down, right, both."""
    rows, columns = options["grid"]
    down, right = {"none": (0, 0), "half": (rows // 2, columns // 2)}.get(
        options["shift"], (options["kernel"] // 2,) * 2
    )
    down, right = down * (head % 4 in (1, 3)), right * (head % 4 in (2, 3))
    return {(y, x): ((y + down) % rows, (x + right) % columns) for y, x in places}


@against(MsaConv, examples=20)
def test_oracle(component, options, x, layout, keys):
    """Head by head: move, attend, move back; then relu(Conv(o + x)) of what exists."""
    (rows, columns), p, c = layout.grid, layout.prefix, x.shape[2]
    options = options | {"grid": (rows, columns)}
    places = list(itertools.product(range(rows), range(columns)))
    heads = 1 if options["single"] else component.heads
    d, weight, bias = c // heads, component.qkv.weight[:, :, 0, 0], component.qkv.bias
    out = []
    for s in range(len(x)):
        qkv = x[s, p:] @ weight.T + (0 if bias is None else bias)
        there = dict(zip(places, keys[s, p:].tolist(), strict=True))
        merged = {place: [] for place in places}
        for h in range(heads):
            to = moved(places, h, options)
            parts = [
                {to[place]: qkv[i, first + h * d : first + (h + 1) * d] for i, place in enumerate(places)}
                for first in (0, c, 2 * c)
            ]
            found = attended(*parts, {to[place]: there[place] for place in places}, options)
            for place in places:
                merged[place].append(found[to[place]])
        o = {place: torch.cat(found) for place, found in merged.items()}
        if options["tail"] != "none":
            kernel, side, whole = component.conv.weight, options["kernel"] // 2, {}
            o = {place: o[place] + x[s, p + i] for i, place in enumerate(places) if there[place]}
            for y, x_ in places:
                total = torch.zeros(c).double() if component.conv.bias is None else component.conv.bias
                for i, j in itertools.product(range(-side, side + 1), repeat=2):
                    if (near_ := o.get((y + i, x_ + j))) is not None:
                        tap = kernel[:, :, side + i, side + j]
                        total = total + (tap @ near_ if options["tail"] == "conv" else tap[:, 0] * near_)
                whole[y, x_] = torch.where(total > 0, total, 0)
            o = whole
        out.append(torch.cat([x[s, :p], torch.stack([o[place] for place in places])]))
    return torch.stack(out)


def before(change):
    """The mechanism, changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return MsaConv.mix(self, x, source, mask=mask, layout=layout)

    return wrong(MsaConv, mix=mix)


def swapped(self):
    """Keys for queries and queries for keys."""
    q, k, v = self.qkv.weight.chunk(3)
    self.qkv.weight.copy_(torch.cat([k, q, v]))
    if self.qkv.bias is not None:
        q, k, v = self.qkv.bias.chunk(3)
        self.qkv.bias.copy_(torch.cat([k, q, v]))


def around(change):
    """The mechanism whose attention gets other queries, keys, values or tokens."""
    return wrong(
        MsaConv,
        _around=lambda self, q, k, v, seen, grid: MsaConv._around(self, *change(self, q, k, v, seen), grid),
    )


def without_the_token(self, x, source, *, mask, layout):
    """Conv(o) in the place of Conv(o + x)."""
    if self.conv is None:
        return MsaConv.mix(self, x, source, mask=mask, layout=layout)
    conv, self.conv = self.conv, None
    out = MsaConv.mix(self, x, source, mask=mask, layout=layout)[:, layout.prefix :]
    self.conv = conv
    if mask.keys is not None:
        out = out.masked_fill(~mask.keys[:, layout.prefix :, None], 0.0)
    return layout.from_grid(x[:, : layout.prefix], conv(layout.to_grid(out)).relu())


def unmasked_conv(self, x, source, *, mask, layout):
    """Padding is hidden from the attention and enters the convolution."""
    conv, self.conv = self.conv, None
    out = MsaConv.mix(self, x, source, mask=mask, layout=layout)
    self.conv = conv
    if conv is None:
        return out
    image = layout.to_grid((out + x)[:, layout.prefix :])
    return layout.from_grid(x[:, : layout.prefix], conv(image).relu())


MUTANTS = {
    "no scale": around(lambda self, q, k, v, seen: (q * q.shape[-1] ** 0.5, k, v, seen)),
    "the scale of all channels": around(lambda self, q, k, v, seen: (q * self.parts**-0.5, k, v, seen)),
    "q and k swapped": before(swapped),
    "the mask ignored": around(lambda self, q, k, v, seen: (q, k, v, torch.ones_like(seen))),
    "padding enters the convolution": wrong(MsaConv, mix=unmasked_conv),
    "the token not added": wrong(MsaConv, mix=without_the_token),
    "columns first": around(lambda self, q, k, v, seen: (q, k.flip(2), v.flip(2), seen)),
    "zeros for masked, masked for zeros": before(lambda self: setattr(self, "padding", {"masked": "zeros", "zeros": "masked"}.get(self.padding, "circular"))),
    "no circle": before(lambda self: setattr(self, "padding", "zeros" if self.padding == "zeros" else "masked")),
    "no dilation": before(lambda self: setattr(self, "dilation", 1)),
    "no pooling": before(lambda self: setattr(self, "pool", 1)),
    "no shift": before(lambda self: setattr(self, "shift", "none")),
    "half a shift": before(lambda self: setattr(self, "shift", {"half": "kernel"}.get(self.shift, self.shift))),
    "moved on, not back": wrong(MsaConv, _moved=lambda self, t, grid, sign: MsaConv._moved(self, t, grid, 1)),
    "taps of Conv turned": before(lambda self: self.conv is None or self.conv.weight.copy_(self.conv.weight.flip(2, 3))),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    result = test_oracle.compare(mutant, shrink=False, examples=120)
    assert result.status == "failed", "a wrong version was not noticed"
    assert result.reason.startswith("claimed: equals its oracle; but"), result.reason


def alone(grid, prefix=0, dim=4, heads=2, **options) -> MsaConv:
    """The attention without a tail, with parameters of a size that matters."""
    return spread(MsaConv(at(grid, prefix, dim, heads), tail="none", **options))


def projected(part, x):
    """q, k and v of tokens, (b n c) each."""
    return (x @ part.qkv.weight[:, :, 0, 0].T + part.qkv.bias).chunk(3, -1)


# By hand


def test_hand_a_kernel_of_one_gives_v_plus_x():
    """o = v; Conv of one tap that is an identity, then relu."""
    part, x = spread(MsaConv(at((3, 4)), kernel=1)), normal(2, 12, 4)
    with torch.no_grad():
        part.conv.weight.copy_(torch.eye(4)[..., None, None])
        part.conv.bias.zero_()
    near(part(x, layout=Layout((3, 4))), (projected(part, x)[2] + x).relu())
    bare = alone((3, 4), kernel=1)
    near(bare(x, layout=Layout((3, 4))), projected(bare, x)[2])


@pytest.mark.parametrize("padding,wanted", [
    ("masked", [[12 / 4, 21 / 6, 16 / 4], [27 / 6, 45 / 9, 33 / 6], [24 / 4, 39 / 6, 28 / 4]]),
    ("zeros", [[12 / 9, 21 / 9, 16 / 9], [27 / 9, 45 / 9, 33 / 9], [24 / 9, 39 / 9, 28 / 9]]),
    ("circular", [[5.0] * 3] * 3),
])  # fmt: skip
def test_hand_queries_of_zero_give_means(padding, wanted):
    """Of 1 to 9 in rows of three: of the taps that lie on the grid, of all nine, or around the corner."""
    part = set_all(MsaConv(at((3, 3), dim=1, heads=1), padding=padding, tail="none"), 0.0)
    with torch.no_grad():
        part.qkv.weight[2] = 1  # v = x
    x = torch.arange(1.0, 10).double().reshape(1, 9, 1)
    near(part(x, layout=Layout((3, 3))), wanted)


def test_hand_zeros_take_their_share():
    """At a corner 5 of 9 taps lie outside: with scores of zero 5/9 of the weights, which give nothing."""
    part = set_all(MsaConv(at((3, 3)), padding="zeros", tail="none"), 0.0)
    weights = seen(part, normal(1, 9, 4), layout=Layout((3, 3)))
    near(weights, torch.ones(1, 2, 3, 3, 9).double() / 9)
    corner = weights[0, 0, 0, 0].reshape(3, 3)
    near(corner.sum() - corner[1:, 1:].sum(), 5 / 9)


def test_hand_two_taps():
    """A row of two tokens, x = (0, ln 3), q = 1, k = v = x: weights (1/4, 3/4) for both, in a kernel of 3."""
    part = set_all(MsaConv(at((1, 2), dim=1, heads=1), tail="none"), 0.0)
    with torch.no_grad():
        part.qkv.bias[0] = 1
        part.qkv.weight[1:] = 1
    x = torch.tensor([1.0, 3]).double().log().reshape(1, 2, 1)
    near(part(x, layout=Layout((1, 2))), [0.75 * math.log(3)] * 2)


def test_hand_one_square_gives_the_mean_value():
    part, x = alone((3, 4), pool=4), normal(2, 12, 4)
    near(part(x, layout=Layout((3, 4))), projected(part, x)[2].mean(1, keepdim=True).expand_as(x))


@pytest.mark.parametrize("tail,more", [("none", 0), ("conv", 9 * 64 + 8), ("depthwise", 9 * 8 + 8)])
def test_hand_parameters(tail, more):
    c = 8
    assert count(MsaConv(at((4, 4), dim=c), tail=tail)) == 3 * c * c + 3 * c + more


def test_hand_parameters_without_biases():
    site = at((4, 4), dim=8, qkv_bias=False, proj_bias=False)
    assert count(MsaConv(site, kernel=5)) == 3 * 64 + 25 * 64


def test_defaults():
    wanted = {
        "kernel": 3,
        "dilation": 1,
        "padding": "masked",
        "single": False,
        "shift": "none",
        "pool": 1,
        "tail": "conv",
    }
    assert options_of(MsaConv)().model_dump() == wanted


# Identities


@pytest.mark.parametrize("keys", [None, torch.rand(2, 12) < 0.6])
def test_identity_a_kernel_over_the_whole_grid_is_softmax(keys):
    """2 · 4 - 1 taps to a side, those beyond the border hidden."""
    part, x, layout = alone((3, 4), kernel=7), normal(2, 12, 4), Layout((3, 4))
    q, k, v = (t.unflatten(2, (2, 2)).transpose(1, 2) for t in projected(part, x))
    wanted = Softmax(at((3, 4)))(q, k, v, mask=Mask(keys=keys), layout=layout)
    near(part(x, mask=Mask(keys=keys), layout=layout), wanted.transpose(1, 2).flatten(2))


def test_identity_circular_taps_commute_with_shifts():
    part, x, layout = (
        alone((3, 5), padding="circular", kernel=3, dilation=2),
        normal(2, 3, 5, 4),
        Layout((3, 5)),
    )
    out = part(x.flatten(1, 2), layout=layout).reshape(x.shape)
    turned = part(x.roll((2, 1), (1, 2)).flatten(1, 2), layout=layout).reshape(x.shape)
    near(turned, out.roll((2, 1), (1, 2)))


@pytest.mark.parametrize("shift", ["half", "kernel"])
def test_identity_on_a_circle_a_shift_of_heads_is_nothing(shift):
    """Its whole effect comes from opposite borders that become neighbours."""
    grid, x = (4, 6), normal(2, 24, 8)
    outs = {}
    for padding, how in itertools.product(("circular", "masked"), ("none", shift)):
        part = MsaConv(at(grid, dim=8, heads=4), padding=padding, shift=how, tail="none").double()
        torch.manual_seed(1)
        outs[padding, how] = spread(part)(x, layout=Layout(grid))
    near(outs["circular", shift], outs["circular", "none"])
    differs = (outs["masked", shift] - outs["masked", "none"]).abs().amax((0, 1)) > 1e-3
    assert differs.tolist() == [False] * 2 + [True] * 6  # head 0 stays where it is


def test_identity_dilated_taps_and_nothing_else():
    part, layout = alone((7, 7), dilation=2), Layout((7, 7))
    x = normal(1, 49, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(part(x, layout=layout)[0, 24].sum(), x)  # the middle, (3, 3)
    felt = (gradient.abs().amax(2) > 0).reshape(7, 7).nonzero().tolist()
    assert felt == [[y, x] for y in (1, 3, 5) for x in (1, 3, 5)]


@pytest.mark.parametrize("padding", ["masked", "zeros"])
@pytest.mark.parametrize("more", [{}, {"pool": 2}, {"dilation": 2}, {"tail": "depthwise"}])
def test_identity_what_does_not_exist_lies_beyond_the_border(padding, more):
    part, x = spread(MsaConv(at((6, 7)), padding=padding, **more)), normal(2, 6, 7, 4)
    keys = torch.zeros(2, 6, 7, dtype=torch.bool)
    keys[:, :4, :5] = True
    x[~keys] = math.nan
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=Layout((6, 7))).reshape(x.shape)
    near(out[:, :4, :5].flatten(1, 2), part(x[:, :4, :5].flatten(1, 2), layout=Layout((4, 5))))


def test_identity_a_pooled_kernel_spans_its_squares():
    """Of squares of 2 × 2 equal tokens, pooled attention is that on the grid of squares."""
    part, small = alone((4, 6), pool=2), MsaConv(at((2, 3)), tail="none").double()
    small.load_state_dict(part.state_dict())
    x = normal(2, 2, 3, 4)
    large = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    wanted = small(x.flatten(1, 2), layout=Layout((2, 3))).reshape(x.shape)
    found = part(large.flatten(1, 2), layout=Layout((4, 6))).reshape(large.shape)
    near(found, wanted.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_identity_one_head_is_as_wide_as_the_tokens():
    single, site = alone((3, 4), single=True), MsaConv(at((3, 4), heads=1), tail="none").double()
    site.load_state_dict(single.state_dict())
    x = normal(2, 12, 4)
    near(single(x, layout=Layout((3, 4))), site(x, layout=Layout((3, 4))))


def test_special_tokens_come_out_as_they_went_in():
    part, x = spread(MsaConv(at((3, 4), 2))), normal(2, 14, 4)
    out = part(x, layout=Layout((3, 4), 2))
    assert torch.equal(out[:, :2], x[:, :2])
    near(out[:, 2:], part(x[:, 2:], layout=Layout((3, 4))))


# Claims and refusals


def test_claims():
    card = MsaConv.card_for
    assert Law.LOCAL in card().laws and card().fidelity == "adapted"
    for options in ({"padding": "circular"}, {"shift": "half"}):
        assert Law.LOCAL not in card(**options).laws
    assert card(pool=2).fidelity == card(shift="kernel").fidelity == "inspired"
    assert card(tail="none").honours == {"qkv_bias"}


def test_kernels_without_a_middle_or_widened_twice_are_refused():
    with pytest.raises(RecipeError, match="AZ214.*a kernel of 4 has no middle"):
        MsaConv(at((3, 4)), kernel=4)
    with pytest.raises(RecipeError, match="AZ214.*both widen"):
        MsaConv(at((3, 4)), pool=2, dilation=2)


def test_narrow_numbers_stay_near():
    narrow(MsaConv, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))))
