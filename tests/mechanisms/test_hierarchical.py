"""HAT-Net's hierarchical attention, arXiv:2106.03180."""

import itertools
import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, seen, set_all, spread, wrong
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, MultiHead, Site, options_of
from attnzoo.functional import masked_group_norm
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.local.hierarchical import Hierarchical
from attnzoo.testing import against


def at(grid, prefix=0, dim=4, heads=2, **wishes) -> Site:
    """A site on a plane."""
    return Site("hand", dim, heads, Layout(grid, prefix), **wishes)


def normed(norm, tokens, exist):
    """Tokens by place, normalised by the mean and deviation of all numbers of those that exist."""
    numbers = torch.cat([tokens[place] for place in exist]) if exist else torch.zeros(1).double()
    mean = sum(numbers) / len(numbers)
    deviation = torch.sqrt(sum((numbers - mean) ** 2) / len(numbers) + 1e-6)
    return {place: (t - mean) / deviation * norm.weight + norm.bias for place, t in tokens.items()}


def attention(queries, keys, values, heads, known):
    """Softmax attention from each place to those that it knows, head by head."""
    out = {}
    for here, q in queries.items():
        see, d, parts = known[here], len(q) // heads, []
        for own in (slice(h * d, (h + 1) * d) for h in range(heads)):
            if see:
                scores = torch.stack([keys[there][own] for there in see]) @ q[own]
                weights = (scores / math.sqrt(d)).softmax(0)
                parts.append(weights @ torch.stack([values[there][own] for there in see]))
            else:
                parts.append(0 * q[own])
        out[here] = torch.cat(parts)
    return out


def window(place, side):
    """Which one of this side a place lies in."""
    return place[0] // side, place[1] // side


@against(Hierarchical, examples=20)
def test_oracle(component, options, x, layout, keys):
    """Step by step, over the tokens by place. Those that do not exist are zeros, which ask and are not asked."""
    c, columns, p, heads = x.shape[2], layout.grid[1], layout.prefix, component.heads
    side, ratio, out = options["window"], options["ratio"], []
    for s in range(len(x)):
        places = {divmod(i, columns): p + i for i in range(layout.length - p)}
        exist = [place for place, i in places.items() if keys[s, i]]
        tokens = {place: x[s, i] if place in exist else 0 * x[s, i] for place, i in places.items()}
        qkv = {place: component.qkv(t) for place, t in normed(component.norm, tokens, exist).items()}
        q, k, v = ({place: t[i : i + c] for place, t in qkv.items()} for i in (0, c, 2 * c))
        if side == 1:
            found = attention(q, k, v, heads, dict.fromkeys(places, exist))
        else:
            windows = {
                place: [other for other in exist if window(place, side) == window(other, side)]
                for place in places
            }
            local = attention(q, k, v, heads, windows)
            g = normed(
                component.window_norm, {place: tokens[place] + local[place] for place in places}, exist
            )
            pools = {}
            for place in exist:
                pools.setdefault(window(place, ratio), []).append(g[place])
            pooled = {square: sum(members) / len(members) for square, members in pools.items()}
            kv = {
                square: component.kv(t)
                for square, t in normed(component.pool_norm, pooled, list(pooled)).items()
            }
            k, v = ({square: t[i : i + c] for square, t in kv.items()} for i in (0, c))
            q = {place: component.q(t) for place, t in g.items()}
            found = attention(q, k, v, heads, dict.fromkeys(places, list(pooled)))
            found = {place: found[place] + g[place] for place in places}
        out.append(torch.cat([x[s, :p], component.proj(torch.stack([found[place] for place in places]))]))
    return torch.stack(out)


def before(change):
    """The mechanism, changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return Hierarchical.mix(self, x, source, mask=mask, layout=layout)

    return wrong(Hierarchical, mix=mix)


def within(change):
    """The mechanism whose windows get other queries, keys, values or tokens."""
    return wrong(
        Hierarchical,
        _windows=lambda self, q, k, v, there, grid: Hierarchical._windows(
            self, *change(self, q, k, v, there), grid
        ),
    )


def unmasked(self, x, source, *, mask, layout):
    return Hierarchical.mix(self, x, source, mask=Mask(), layout=layout)


def only_zeroed(self, x, source, *, mask, layout):
    """Padding is zeros that are tokens like others."""
    seen = x if mask.keys is None else x.masked_fill(~mask.keys[..., None], 0.0)
    seen = torch.cat([x[:, : layout.prefix], seen[:, layout.prefix :]], 1)
    return Hierarchical.mix(self, seen, source, mask=Mask(), layout=layout)


def norm_of_each_token(norm, x, there):
    """Statistics of each token."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)


def norm_of_the_batch(norm, x, there):
    """Statistics of all samples."""
    return masked_group_norm(norm, x.flatten(0, 1)[None], there.flatten(0, 1)[None]).reshape(x.shape)


def norm_of_padding(norm, x, there):
    """Statistics of padding, too."""
    return masked_group_norm(norm, x)


def from_the_pooled_map(self, g, there, grid):
    """The sum of a square, not its mean."""
    pooled, exist = Hierarchical._pooled(self, g, there, grid)
    return pooled * self.ratio**2, exist


def residual_of_the_normed(self, x, source, *, mask, layout):
    """norm(norm(x) + L) in the place of norm(x + L)."""
    p = layout.prefix
    there = torch.ones_like(x[:, p:, 0], dtype=torch.bool) if mask.keys is None else mask.keys[:, p:]
    changed = masked_group_norm(self.norm, x[:, p:].masked_fill(~there[..., None], 0.0), there)

    def once(norm, t, there):
        return t if norm is self.norm else masked_group_norm(norm, t, there)

    changed = torch.cat([x[:, :p], changed], 1)
    out = patched(Hierarchical, "masked_group_norm", once).mix(
        self, changed, source, mask=mask, layout=layout
    )
    return torch.cat([x[:, :p], out[:, p:]], 1)


MUTANTS = {
    "windows without a scale": within(lambda self, q, k, v, there: (q * (q.shape[-1] / self.heads) ** 0.5, k, v, there)),
    "q and k swapped in windows": within(lambda self, q, k, v, there: (k, q, v, there)),
    "padding in windows": within(lambda self, q, k, v, there: (q, k, v, torch.ones_like(there))),
    "windows too small": before(lambda self: setattr(self, "window", max(2, self.window - 1) if self.window > 1 else 1)),
    "squares too large": before(lambda self: setattr(self, "ratio", self.ratio + 1)),
    "a norm of each token": patched(Hierarchical, "masked_group_norm", norm_of_each_token),
    "a norm of the batch": patched(Hierarchical, "masked_group_norm", norm_of_the_batch),
    "padding in the norms": patched(Hierarchical, "masked_group_norm", norm_of_padding),
    "sums of squares": wrong(Hierarchical, _pooled=from_the_pooled_map),
    "the mask ignored": wrong(Hierarchical, mix=unmasked),
    "padding is zeros": wrong(Hierarchical, mix=only_zeroed),
    "the residual of what is normalised": wrong(Hierarchical, mix=residual_of_the_normed),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def hierarchical(grid, prefix=0, dim=4, heads=2, **options) -> Hierarchical:
    """In float64, with parameters of a size that matters."""
    return spread(Hierarchical(at(grid, prefix, dim, heads), **options))


def group_norm(norm, x):
    """PyTorch's, of one group, over tokens (b n c)."""
    return F.group_norm(x.mT, 1, norm.weight, norm.bias, norm.eps).mT


def softmax_of(q, k, v, heads=2):
    """Softmax attention of tokens (b n c), all to all."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    head = Softmax(at((1, k.shape[2]), dim=heads * q.shape[-1], heads=heads))
    return head(q, k, v, layout=Layout((k.shape[2],))).transpose(1, 2).flatten(2)


# By hand


def test_hand_the_norm_is_of_the_whole_sample():
    """(1, 3, 5, 7) in two tokens of two channels: mean 4, variance 5; of the first token alone: mean 2, variance 1."""
    norm, t = Hierarchical(at((1, 2), dim=2)).norm.double(), torch.tensor([[[1.0, 3], [5, 7]]]).double()
    every, first = torch.ones(1, 2).bool(), torch.tensor([[True, False]])
    near(masked_group_norm(norm, t, every), torch.tensor([[-3.0, -1], [1, 3]]).double() / math.sqrt(5 + 1e-6))
    near(masked_group_norm(norm, t, first)[:, :1], torch.tensor([-1.0, 1]).double() / math.sqrt(1 + 1e-6))


def test_hand_queries_and_keys_of_zero_give_means_of_windows_then_of_all():
    """v = norm(x) in windows of two of a row; then Y = 0, and what comes out is g = norm(x + the mean of v)."""
    part = set_all(Hierarchical(at((1, 4), dim=1, heads=1), window=2, ratio=1), 0.0)
    with torch.no_grad():
        part.qkv.weight[2] = 1  # v = norm(x)
        part.proj.weight.fill_(1)
        for norm in (part.norm, part.window_norm):
            norm.weight.fill_(1)
    x = torch.tensor([-1.0, 1, -1, 1]).double().reshape(1, 4, 1)
    near(part(x, layout=Layout((1, 4))), x / math.sqrt(1 + 1e-6))  # the means are zero
    x = torch.tensor([-1.0, -1, 1, 1]).double().reshape(1, 4, 1)
    twice = 1 + 1 / math.sqrt(1 + 1e-6)  # x + L
    near(part(x, layout=Layout((1, 4))), x * twice / math.sqrt(twice**2 + 1e-6))


@pytest.mark.parametrize("window,wanted", [(2, 7 * 64 + 13 * 8), (1, 4 * 64 + 6 * 8)])
def test_hand_parameters(window, wanted):
    """The authors have 2 c more in either case, of a norm that they do not use."""
    assert count(Hierarchical(at((4, 4), dim=8), window=window)) == wanted


def test_hand_the_start():
    part = Hierarchical(at((4, 4), dim=64))
    assert 0.018 < part.qkv.weight.std() < 0.022 and not part.qkv.bias.any() and not part.proj.bias.any()
    assert (part.window_norm.weight == 1).all() and not part.window_norm.bias.any()


def test_defaults():
    assert options_of(Hierarchical)().model_dump() == {"window": 7, "ratio": 2}


# Identities


def test_identity_one_window_and_no_pooling_are_two_attentions():
    part, x, layout = hierarchical((3, 3), window=3, ratio=1), normal(2, 9, 4), Layout((3, 3))
    g = group_norm(part.window_norm, x + softmax_of(*part.qkv(group_norm(part.norm, x)).chunk(3, -1)))
    y = softmax_of(part.q(g), *part.kv(group_norm(part.pool_norm, g)).chunk(2, -1))
    near(part(x, layout=layout), part.proj(y + g))


@pytest.mark.parametrize("keys", [None, torch.rand(2, 12) < 0.6])
def test_identity_without_windows_it_is_softmax_after_a_norm(keys):
    site, layout, x = at((3, 4)), Layout((3, 4)), normal(2, 12, 4)
    part, full = hierarchical((3, 4), window=1), MultiHead(site, Softmax(site)).double()
    full.load_state_dict({k: t for k, t in part.state_dict().items() if "norm" not in k})
    there = torch.ones(2, 12).bool() if keys is None else keys
    wanted = full(masked_group_norm(part.norm, x, there), mask=Mask(keys=keys), layout=layout)
    near(part(x, mask=Mask(keys=keys), layout=layout)[there], wanted[there])
    if keys is None:
        near(masked_group_norm(part.norm, x, there), group_norm(part.norm, x))


def test_identity_windows_know_nothing_of_each_other():
    """Before the global step: a token's gradient stays within its window of 2 × 3, of a grid that they do not divide."""
    part, grid = hierarchical((5, 4), window=3), (5, 4)
    q, k, v = (t.requires_grad_() for t in normal(3, 1, 20, 4))
    out = part._windows(q, k, v, torch.ones(1, 20).bool(), grid)
    found = torch.autograd.grad(out[0, 6].sum(), (k, v))  # place (1, 2)
    for gradient in found:
        felt = (gradient.abs().amax(2) > 0).reshape(grid).nonzero().tolist()
        assert felt == [[y, x] for y in range(3) for x in range(3)]
    found = torch.autograd.grad(part._windows(q, k, v, torch.ones(1, 20).bool(), grid)[0, 19].sum(), v)
    assert (found[0].abs().amax(2) > 0).reshape(grid).nonzero().tolist() == [[3, 3], [4, 3]]


def test_identity_one_square_gives_its_value_to_all():
    part, x, layout = hierarchical((4, 4), window=2, ratio=4), normal(2, 16, 4), Layout((4, 4))
    there = torch.ones(2, 16).bool()
    local = part._windows(*part.qkv(masked_group_norm(part.norm, x, there)).chunk(3, -1), there, (4, 4))
    g = group_norm(part.window_norm, x + local)
    value = part.kv(group_norm(part.pool_norm, g.mean(1, keepdim=True)))[..., 4:]
    near(part(x, layout=layout), part.proj(value + g))
    assert seen(part, x, layout=layout).shape == (2, 2, 16, 1)


def test_identity_windows_of_a_divided_grid_are_softmax_in_each():
    part, x = hierarchical((4, 6), window=2), normal(2, 4, 6, 12)
    out = part._windows(*x.flatten(1, 2).chunk(3, -1), torch.ones(2, 24).bool(), (4, 6)).reshape(2, 4, 6, 4)
    for y, x_ in itertools.product((0, 2), (0, 2, 4)):
        own = x[:, y : y + 2, x_ : x_ + 2].flatten(1, 2)
        near(out[:, y : y + 2, x_ : x_ + 2].flatten(1, 2), softmax_of(*own.chunk(3, -1)))


def test_identity_padding_is_a_smaller_picture():
    part, x = hierarchical((6, 7), window=3), normal(2, 6, 7, 4)
    keys = torch.zeros(2, 6, 7, dtype=torch.bool)
    keys[:, :4, :5] = True
    x[~keys] = math.nan
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=Layout((6, 7))).reshape(x.shape)
    near(out[:, :4, :5].flatten(1, 2), part(x[:, :4, :5].flatten(1, 2), layout=Layout((4, 5))))


def test_identity_the_scale_of_the_tokens_has_no_say_but_in_the_residual():
    """norm(s x) = norm(x); x + L is not normalised before."""
    part, x, layout = hierarchical((3, 4), window=1), normal(2, 12, 4), Layout((3, 4))
    near(part(1e4 * x, layout=layout), part(1e6 * x, layout=layout), 1e-8)
    part = hierarchical((3, 4), window=2)
    assert (part(1e4 * x, layout=layout) - part(x, layout=layout)).abs().max() > 0.1


def test_special_tokens_come_out_as_they_went_in():
    part, x = hierarchical((3, 4), 2), normal(2, 14, 4)
    out = part(x, layout=Layout((3, 4), 2))
    assert torch.equal(out[:, :2], x[:, :2])
    near(out[:, 2:], part(x[:, 2:], layout=Layout((3, 4))))


def test_claims():
    assert Hierarchical.card_for().taps.keys() - Hierarchical.card_for(window=1).taps.keys() == {
        "scores_windows",
        "weights_windows",
    }


def test_narrow_numbers_stay_near():
    narrow(Hierarchical, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))), window=2)
