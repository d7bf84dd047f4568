"""RCMHA, arXiv:2308.03429; sinusoids of arXiv:1901.02860."""

import math

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, place, seen, set_all, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask, MultiHead, Site, options_of
from attnzoo.errors import RecipeError, ZooError
from attnzoo.functional import rearrange
from attnzoo.mechanisms.dot_product.relative_conv import RelativeConv, by_pair, distances
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.testing import against


def convolved(conv, t, head, before, there):
    """Token by token Σ_a ω_a t_{i-before+a} + β over tokens that exist, (n d); taps of the head, or of all heads."""
    n, d = t.shape
    own = slice(head * d, (head + 1) * d) if conv.weight.shape[0] > d else slice(0, d)
    out = []
    for i in range(n):
        total = torch.zeros(d).double() if conv.bias is None else conv.bias[own]
        for a in range(3):
            if 0 <= (j := i - before + a) < n and there[j]:
                total = total + conv.weight[own, 0, a] * t[j]
        out.append(total)
    return torch.stack(out)


def relative_of(component, head, r):
    """R_r and b_r of a head."""
    c, heads = component.q.in_features, component.heads
    d, p = c // heads, component.far
    own = slice(head * d, (head + 1) * d)
    if p:
        slot = p - 1 - max(1 - p, min(p - 1, r))
        return component.position[slot, own], component.position_bias[slot, head]
    angles = [r * 10000 ** (-i / c) for i in range(0, c, 2)]
    s = [math.sin(t) for t in angles] + [math.cos(t) for t in angles]
    row = sum(s[i] * component.position[i, own] for i in range(c))
    return row, row @ component.position_bias[:, head]


@against(RelativeConv, examples=25)
def test_oracle(component, options, x, keys, allowed):
    """Query by query: (q_i·k_j + u·k_j + q_i·R_{i-j} + b_{i-j}) / √d for the keys j that it may see."""
    (b, n, c), heads = x.shape, component.heads
    d, before, there = c // heads, 2 if options["padding"] == "causal" else 1, keys.tolist()
    relative = {(h, r): relative_of(component, h, r) for h in range(heads) for r in range(1 - n, n)}
    merged = torch.zeros(b, n, c).double()
    for s in range(b):
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            q, k, v = (
                convolved(
                    getattr(component, f"{name}_conv"),
                    getattr(component, name)(x[s])[:, own],
                    h,
                    before,
                    there[s],
                )
                for name in "qkv"
            )
            for i in range(n):
                see = allowed[s, h, i].nonzero().flatten().tolist()
                if not see:
                    continue
                rows, bias = (torch.stack(t) for t in zip(*(relative[h, i - j] for j in see), strict=True))
                scores = k[see] @ q[i] + k[see] @ component.key_bias[h] + rows @ q[i] + bias
                merged[s, i, own] = (scores / math.sqrt(d)).softmax(0) @ v[see]
    return component.proj(merged)


def before(change):
    """The mechanism, changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return RelativeConv.mix(self, x, source, mask=mask, layout=layout)

    return wrong(RelativeConv, mix=mix)


def with_relative(change):
    """The mechanism whose R and b are changed."""
    return wrong(RelativeConv, _relative=lambda self, q: change(*RelativeConv._relative(self, q)))


def one_later(self):
    """Taps of which the last is the token before."""
    for conv in (self.q_conv, self.k_conv, self.v_conv):
        conv.weight.copy_(conv.weight.roll(-1, 2) * torch.tensor([1.0, 1, 0]))


def turned(self):
    for conv in (self.q_conv, self.k_conv, self.v_conv):
        conv.weight.copy_(conv.weight.flip(2))


def unmasked_taps(self, x, source, *, mask, layout):
    """Padding enters the convolutions."""
    where = mask.dense(x.shape[1], x.shape[1])
    where = None if where is None else where.expand(x.shape[0], 1, *where.shape[2:])
    return RelativeConv.mix(self, x, source, mask=Mask(pairs=where), layout=layout)


def only_taps_masked(self, x, source, *, mask, layout):
    """Padding is zeros that are attended to."""
    seen = x if mask.keys is None else torch.where(mask.keys[..., None], x, 0.0)
    return RelativeConv.mix(self, seen, source, mask=Mask(causal=mask.causal), layout=layout)


MUTANTS = {
    "no u": before(lambda self: self.key_bias.zero_()),
    "q and k swapped": before(lambda self: self.q.weight.copy_(self.k.weight)),
    "taps in the other order": before(turned),
    "the token's own tap is the middle": before(one_later),
    "no bias of the convolution": before(lambda self: self.v_conv.bias.zero_()),
    "values not convolved": before(lambda self: self.v_conv.weight.copy_(torch.tensor([0.0, 0, 1]).expand(self.v_conv.weight.shape))),
    "no b": with_relative(lambda keys, bias: (keys, 0 * bias)),
    "no R": with_relative(lambda keys, bias: (0 * keys, bias)),
    "distances turned": with_relative(lambda keys, bias: (keys.flip(1), bias.flip(1))),
    "distances off by one": with_relative(lambda keys, bias: (keys.roll(1, 1), bias.roll(1, 1))),
    "only q k is scaled": with_relative(lambda keys, bias: (keys * keys.shape[-1] ** 0.5, bias * keys.shape[-1] ** 0.5)),
    "padding in the convolutions": wrong(RelativeConv, mix=unmasked_taps),
    "padding attended to": wrong(RelativeConv, mix=only_taps_masked),
    "causality ignored": wrong(RelativeConv, mix=lambda self, x, source, *, mask, layout: RelativeConv.mix(self, x, source, mask=Mask(keys=mask.keys), layout=layout)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def plain(part: RelativeConv) -> RelativeConv:
    """Taps (0, 0, 1), the token's own, without biases; R, b and u of zero."""
    with torch.no_grad():
        for conv in (part.q_conv, part.k_conv, part.v_conv):
            conv.weight.copy_(torch.tensor([0.0, 0, 1]).expand(conv.weight.shape))
            if conv.bias is not None:
                conv.bias.zero_()
        for name, parameter in part.named_parameters():
            if name in ("key_bias", "position", "position_bias"):
                parameter.zero_()
    return part


def softmax_with(part: RelativeConv, site: Site) -> MultiHead:
    """Softmax attention with its projections; queries and keys have no bias."""
    full = MultiHead(site, Softmax(site)).double()
    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat([part.q.weight, part.k.weight, part.v.weight]))
        full.qkv.bias.zero_()
        full.qkv.bias[-site.dim :] = part.v.bias
    full.proj.load_state_dict(part.proj.state_dict())
    return full


# By hand


def test_hand_taps_of_one_channel():
    """ω = (1, 10, 100), β = 1000: tap 2 is the token's own; before the first token are zeros."""
    part = RelativeConv(place(1, tokens=4)).double()
    with torch.no_grad():
        part.q_conv.weight.copy_(torch.tensor([[[1.0, 10, 100]]]))
        part.q_conv.bias.fill_(1000)
    near(part._near(part.q_conv, line(1, 2, 3, 4)), [1100, 1210, 1321, 1432])
    both = RelativeConv(place(1, tokens=4), padding="symmetric").double()
    both.q_conv.load_state_dict(part.q_conv.state_dict())
    near(both._near(both.q_conv, line(1, 2, 3, 4)), [1210, 1321, 1432, 1043])


def test_hand_b_alone_weighs_by_distance():
    """q = k = 0, v = x: b_0 = ln 2, b_1 = ln 6, others 0; causally the second token weighs (6, 2) / 8."""
    part = set_all(RelativeConv(place(1, tokens=3)), 0.0)
    with torch.no_grad():
        part.v.weight.fill_(1)
        part.v_conv.weight[..., 2] = 1
        part.proj.weight.fill_(1)
        part.position_bias.copy_(torch.tensor([[1, 6, 2, 1, 1]]).T.double().log())  # r = 2, 1, 0, -1, -2
    where = {"mask": Mask(causal=True), "layout": Layout((3,))}
    near(part(line(4, 8, 16), **where), [4, (6 * 4 + 2 * 8) / 8, (1 * 4 + 6 * 8 + 2 * 16) / 9])
    free = seen(part, line(4, 8, 16), layout=Layout((3,)))
    near(free, [[2 / 4, 1 / 4, 1 / 4], [6 / 9, 2 / 9, 1 / 9], [1 / 9, 6 / 9, 2 / 9]])


def test_hand_the_whole_sum_is_scaled():
    """d = 4, q_i = k_j = (1, 1, 1, 1), u = R = 1 and b = 2: (4 + 4 + 4 + 2) / 2."""
    part = plain(set_all(RelativeConv(place(4, tokens=2)), 0.0))
    with torch.no_grad():
        for linear in (part.q, part.k):
            linear.weight.fill_(0.25)
        part.key_bias.fill_(1)
        part.position.fill_(1)
        part.position_bias.fill_(2)
    near(seen(part, torch.ones(1, 2, 4).double(), tap="scores", layout=Layout((2,))), 7 * torch.ones(2, 2))


def test_hand_entries_by_distance():
    """n = 3: each pair (i, j) gets its entry i - j."""
    q = torch.zeros(1, 1, 3, 1)
    assert distances(q).tolist() == [2, 1, 0, -1, -2]
    rows = 10 * torch.arange(3.0)[:, None] + distances(q)
    near(by_pair(rows[None, None]), [[0, -1, -2], [11, 10, 9], [22, 21, 20]])


@pytest.mark.parametrize("options,taps,relative", [
    ({}, 3 * 3 * 16 + 2 * 16, (2 * 10 - 1) * (128 + 8)),
    ({"taps": "per_head"}, 3 * 3 * 128 + 2 * 128, (2 * 10 - 1) * (128 + 8)),
    ({"distance": 4096}, 3 * 3 * 16 + 2 * 16, 8191 * (128 + 8)),
    ({"relative": "sinusoids"}, 3 * 3 * 16 + 2 * 16, 128 * 128 + 128),
])  # fmt: skip
def test_hand_parameters(options, taps, relative):
    """Eight heads of 16 channels: four matrices, biases of v and the output, taps, u, R and b."""
    part = RelativeConv(place(128, 8, 10), **options)
    assert count(part) == 4 * 128**2 + 2 * 128 + taps + 128 + relative


def test_hand_the_start():
    part = RelativeConv(place(12, 3, 5), taps="per_head")
    assert not any(p.any() for p in (part.key_bias, part.position, part.position_bias))
    near(part.q_conv.weight, torch.tensor([1 / 6, 1 / 6, 1 / 2]).expand(12, 1, 3), 1e-7)
    both = RelativeConv(place(12, 3, 5), taps="per_head", padding="symmetric")
    near(both.q_conv.weight, torch.tensor([1 / 6, 1 / 2, 1 / 6]).expand(12, 1, 3), 1e-7)


def test_defaults():
    wanted = {"taps": "shared", "padding": "causal", "relative": "table", "distance": None}
    assert options_of(RelativeConv)().model_dump() == wanted


# Identities


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 6) < 0.6)])
@pytest.mark.parametrize("taps", ["shared", "per_head"])
def test_identity_without_taps_and_positions_it_is_softmax(taps, mask):
    site = place(12, 3, 6)
    part, x = plain(spread(RelativeConv(site, taps=taps))), normal(2, 6, 12)
    wanted = softmax_with(part, site)(x, mask=mask, layout=site.layout)
    there = torch.ones(2, 6).bool() if mask.keys is None else mask.keys  # what is padded does not ask either
    near(part(x, mask=mask, layout=site.layout)[there], wanted[there])


def test_identity_at_the_start_it_is_softmax_of_what_is_convolved():
    site, x = place(12, 3, 6), normal(2, 6, 12)
    part = RelativeConv(site).double()
    q, k, v = (
        getattr(part, f"{name}_conv")(
            nn.functional.pad(rearrange(getattr(part, name)(x), "b n (h d) -> (b h) d n", h=3), (2, 0))
        )
        for name in "qkv"
    )
    q, k, v = (rearrange(t, "(b h) d n -> b h n d", h=3) for t in (q, k, v))
    heads = Softmax(site)(q, k, v, mask=Mask(causal=True), layout=site.layout)
    wanted = part.proj(rearrange(heads, "b h n d -> b n (h d)"))
    near(part(x, mask=Mask(causal=True), layout=site.layout), wanted)


def test_identity_taps_of_all_heads_alike_are_shared():
    site, x = place(12, 3, 6), normal(2, 6, 12)
    shared, own = spread(RelativeConv(site)), spread(RelativeConv(site, taps="per_head"))
    state = {
        k: t.repeat(3, *[1] * (t.ndim - 1)) if "_conv" in k else t for k, t in shared.state_dict().items()
    }
    own.load_state_dict(state)
    near(own(x, layout=site.layout), shared(x, layout=site.layout))


def test_identity_symmetric_taps_are_causal_ones_a_token_later():
    site, t = place(12, 3, 6), normal(2, 6, 12)
    causal, both = spread(RelativeConv(site)), RelativeConv(site, padding="symmetric").double()
    both.load_state_dict(causal.state_dict())
    near(both._near(both.q_conv, t)[:, :, :-1], causal._near(causal.q_conv, t)[:, :, 1:])


def test_identity_sinusoids_are_a_table():
    """R_r = W s_r, b_r = w·R_r, written into the rows of a table."""
    site, x = place(12, 3, 6), normal(2, 6, 12)
    waves, table = spread(RelativeConv(site, relative="sinusoids")), spread(RelativeConv(site))
    table.load_state_dict({k: t for k, t in waves.state_dict().items() if "position" not in k}, strict=False)
    with torch.no_grad():
        for h, r in [(h, r) for h in range(3) for r in range(-5, 6)]:
            own = slice(4 * h, 4 * h + 4)
            table.position[5 - r, own], table.position_bias[5 - r, h] = relative_of(waves, h, r)
    near(waves(x, layout=site.layout), table(x, layout=site.layout))


def test_identity_the_authors_slots():
    """Their 2 P rows, of which P - r is R_r: row 0, of a distance of P, is the one that is left out."""
    part, p = spread(RelativeConv(place(4, 2, 5), distance=7)), 7
    theirs = torch.cat([normal(1, 4), part.position]).reshape(2 * p, 2, 2)  # row, head, channel
    keys, bias = part._relative(torch.zeros(1, 2, 5, 2).double())
    for column, r in enumerate(range(4, -5, -1)):
        near(keys[:, column], theirs[p - r])
        near(bias[:, column], part.position_bias[p - r - 1])


def test_identity_tokens_far_apart_share_the_last_row():
    site, x = place(12, 3, 6), normal(2, 6, 12)
    short, long = spread(RelativeConv(site, distance=3)), RelativeConv(site).double()
    at = [0, 0, 0, 0, 1, 2, 3, 4, 4, 4, 4]
    state = {k: t[at] if k.startswith("position") else t for k, t in short.state_dict().items()}
    long.load_state_dict(state)
    near(short(x, layout=site.layout), long(x, layout=site.layout))


def test_identity_padding_in_front_is_a_shorter_sequence():
    """A table knows distances only, and tokens that do not exist are zeros to the convolution."""
    part, x = spread(RelativeConv(place(12, 3, 7))), normal(2, 7, 12)
    keys = torch.arange(7).expand(2, 7) >= 3
    x[~keys] = math.nan
    out = part(x, mask=Mask(keys=keys), layout=Layout((7,)))[:, 3:]
    near(out, part(x[:, 3:], layout=Layout((4,))))


def test_identity_constant_scores_along_diagonals():
    """Of equal tokens, beyond the first two, the score depends on i - j alone."""
    part = spread(RelativeConv(place(12, 3, 7)))
    scores = seen(part, normal(1, 1, 12).expand(1, 7, 12), tap="scores", layout=Layout((7,)))[..., 2:, 2:]
    near(scores[..., 1:, 1:], scores[..., :-1, :-1])


# Claims and refusals


def test_what_is_hidden_by_pairs_is_refused_and_causality_with_symmetric_taps():
    x, layout = normal(1, 3, 4), Layout((3,))
    with pytest.raises(ZooError, match="AZ402"):
        RelativeConv(place(4)).double()(x, mask=Mask(pairs=torch.ones(1, 1, 3, 3).bool()), layout=layout)
    with pytest.raises(ZooError, match="AZ402"):
        RelativeConv(place(4), padding="symmetric").double()(x, mask=Mask(causal=True), layout=layout)


def test_a_distance_for_sinusoids_is_refused():
    with pytest.raises(RecipeError, match="AZ214.*sinusoids have no table"):
        RelativeConv(place(4), relative="sinusoids", distance=5)


@pytest.mark.parametrize("relative", ["table", "sinusoids"])
def test_narrow_numbers_stay_near(relative):
    narrow(RelativeConv, [(2, 7, 12)], site=place(12, 3, 7), relative=relative)
