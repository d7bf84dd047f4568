"""Spatial reduction of PVT v2, arXiv:2106.13797, §3.2."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, set_all, spread, wrong
from timm.models.pvt_v2 import Attention
from torch import nn

from attnzoo.core import Layout, Mask, MultiHead, OptionError, Site, options_of
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.linear.spatial_reduction import SpatialReduction
from attnzoo.testing import against


def normed(norm, t):
    """(t - mean) / deviation, of one vector."""
    off = t - t.mean()
    return off / torch.sqrt((off * off).mean() + norm.eps) * norm.weight + norm.bias


def read_from(component, options, x, layout, keys):
    """What one sample is read from: special tokens, then squares or bins by row, and whether each exists."""
    layers, p, (rows, columns) = component.layers, layout.prefix, layout.grid
    found = [(x[i], bool(keys[i])) for i in range(p)]
    if options["linear"]:

        def ends(i, size):
            return range(i * size // 7, math.ceil((i + 1) * size / 7))

        for a in range(7):
            for b in range(7):
                here = [p + y * columns + x_ for y in ends(a, rows) for x_ in ends(b, columns)]
                here = [i for i in here if keys[i]]
                mean = sum(x[i] for i in here) / len(here) if here else torch.zeros(x.shape[1]).double()
                u = normed(layers.norm, layers.sr.weight[:, :, 0, 0] @ mean + layers.sr.bias)
                found.append((u * 0.5 * (1 + torch.erf(u / math.sqrt(2))), bool(here)))
        return found
    r = options["ratio"] or 2
    for a in range(-(-rows // r)):
        for b in range(-(-columns // r)):
            total, any_ = layers.sr.bias, False
            for dy in range(r):
                for dx in range(r):
                    y, x_ = a * r + dy, b * r + dx
                    i = p + y * columns + x_
                    if y < rows and x_ < columns and keys[i]:
                        total, any_ = total + layers.sr.weight[:, :, dy, dx] @ x[i], True
            found.append((normed(layers.norm, total), any_))
    return found


@against(SpatialReduction, examples=20)
def test_oracle(component, options, x, layout, keys, allowed):
    """Softmax attention head by head, from every token to what is read from."""
    (b, n, c), heads, layers, out = x.shape, component.heads, component.layers, []
    d = c // heads

    def affine(layer, t):
        return t @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    for s in range(b):
        whole = options["ratio"] == 1 and not options["linear"]
        found = [(t, True) for t in x[s]] if whole else read_from(component, options, x[s], layout, keys[s])
        there = torch.tensor([exists for _, exists in found])
        q, kv = affine(layers.q, x[s]), affine(layers.kv, torch.stack([u for u, _ in found]))
        merged = []
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            k, v, rows = kv[:, :c][:, own], kv[:, c:][:, own], []
            for i in range(n):
                see = allowed[s, h, i] if whole else there
                rows.append((k[see] @ q[i, own] / math.sqrt(d)).softmax(0) @ v[see])
            merged.append(torch.stack(rows))
        out.append(affine(layers.proj, torch.cat(merged, 1)))
    return torch.stack(out)


def before(change):
    """The mechanism, changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return SpatialReduction.mix(self, x, source, mask=mask, layout=layout)

    return wrong(SpatialReduction, mix=mix)


def reducing(change):
    """What is read from, changed."""
    return wrong(SpatialReduction, _reduced=lambda self, x, mask, layout: change(self, x, mask, layout))


def reduced(self, x, mask, layout):
    return SpatialReduction._reduced(self, x, mask, layout)


def special_left_out(self, x, mask, layout):
    u, mask = reduced(self, x, mask, layout)
    p = layout.prefix
    return u[:, p:], mask if mask.keys is None else Mask(keys=mask.keys[:, p:])


def all_read(self, x, mask, layout):
    """Squares of nobody are read, too."""
    u, other = reduced(self, x, mask, layout)
    if mask.keys is None:
        return u, other
    p = layout.prefix
    return u, Mask(keys=torch.cat([mask.keys[:, :p], torch.ones_like(u[:, p:, 0], dtype=torch.bool)], 1))


def scaled(self):
    self.layers.q.weight.mul_(1.5)


MUTANTS = {
    "a wrong scale": before(scaled),
    "keys and values swapped": before(lambda self: self.layers.kv.weight.copy_(self.layers.kv.weight.roll(self.layers.kv.out_features // 2, 0))),
    "no norm": before(lambda self: setattr(self.layers, "norm", nn.Identity())),
    "another activation": before(lambda self: setattr(self.layers, "act", nn.ReLU())),
    "the kernel turned": before(lambda self: self.layers.sr is not None and self.layers.sr.weight.copy_(self.layers.sr.weight.mT.clone())),
    "special tokens are not asked": reducing(special_left_out),
    "columns first": reducing(lambda self, x, mask, layout: reduced(self, x, mask, Layout(layout.grid[::-1], layout.prefix))),
    "padding in what is read": reducing(lambda self, x, mask, layout: (reduced(self, x, Mask(), layout)[0], reduced(self, x, mask, layout)[1])),
    "nobody's squares are read": reducing(all_read),
    "the mask ignored": wrong(SpatialReduction, mix=lambda self, x, source, *, mask, layout: SpatialReduction.mix(self, x, source, mask=Mask(), layout=layout)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def at(grid, prefix=0, dim=8, heads=2, **wishes) -> Site:
    """A site on a plane."""
    return Site("hand", dim, heads, Layout(grid, prefix), **wishes)


def part_of(grid=(4, 4), prefix=0, **options) -> SpatialReduction:
    """In float64, with parameters of a size that matters."""
    return spread(SpatialReduction(at(grid, prefix), **options))


# By hand


def test_hand_the_squares_of_a_grid():
    """Kernels of one sum the squares of 0 ... 14 on a grid of 3 × 5, filled up with zeros; a special token is itself."""
    layout = Layout((3, 5), 1)
    part = set_all(SpatialReduction(at((3, 5), 1, 1, 1)), 1.0)
    part.layers.norm = nn.Identity()
    nn.init.zeros_(part.layers.sr.bias)
    x = torch.cat([torch.tensor([99.0]), torch.arange(15.0)]).double()[None, :, None]
    found, mask = part._reduced(x, Mask(), layout)
    near(found[0, :, 0], [99, 12, 20, 13, 21, 25, 14])
    assert mask.free
    keys = torch.ones(1, 16, dtype=torch.bool)
    keys[0, [0, 1, 5, 10, 15]] = False  # the special token, 0, and the last column
    found, mask = part._reduced(x, Mask(keys=keys), layout)
    near(found[0, 1:, 0], [12, 20, 0, 21, 25, 0])
    assert mask.keys.tolist() == [[False, True, True, False, True, True, False]]


def test_hand_parameters():
    """timm's numbers."""
    assert count(SpatialReduction(at((4, 4), 0, 64))) == count(Attention(64, 2, 2)) == 33216
    assert count(SpatialReduction(at((4, 4), 0, 64), linear=True)) == 20928
    assert count(SpatialReduction(at((4, 4), 0, 64), ratio=1)) == 4 * 64 * 65


def test_hand_one_square_is_read_by_all():
    """Where the ratio is the grid, everything gets the only value."""
    part, x = part_of(ratio=4), normal(2, 16, 8)
    u = part.layers.norm(part.layers.sr(Layout((4, 4)).to_grid(x))[:, :, 0, 0])
    wanted = part.layers.proj(part.layers.kv(u)[:, 8:])
    near(part(x, layout=Layout((4, 4))), wanted[:, None].expand(2, 16, 8))


def test_defaults_claims_and_refusals():
    assert options_of(SpatialReduction)().model_dump() == {"ratio": None, "linear": False}
    assert SpatialReduction.card_for(ratio=1).masks == {"keys", "causal", "pairs"}
    assert SpatialReduction.card_for(linear=True).growth == 1
    with pytest.raises(OptionError, match="leave `ratio` out"):
        part_of(ratio=2, linear=True)


# Identities


@pytest.mark.parametrize("options", [{}, {"ratio": 4}, {"ratio": 1}, {"linear": True}])
def test_identity_timms(options):
    part, x = part_of((4, 8), **options), normal(2, 32, 8)
    timms = Attention(8, 2, options.get("ratio", 2), options.get("linear", False), True).double()
    timms.load_state_dict(part.layers.state_dict())
    near(part(x, layout=Layout((4, 8))), timms(x, (4, 8)))


def test_identity_a_ratio_of_one_is_multi_head_attention():
    site, x = at((3, 4), 1), normal(2, 13, 8)
    part, full = part_of((3, 4), 1, ratio=1), MultiHead(site, Softmax(site)).double()
    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat([part.layers.q.weight, part.layers.kv.weight]))
        full.qkv.bias.copy_(torch.cat([part.layers.q.bias, part.layers.kv.bias]))
    full.proj.load_state_dict(part.layers.proj.state_dict())
    both = Mask(keys=torch.rand(2, 13) < 0.6, pairs=torch.rand(2, 2, 13, 13) < 0.6)
    for mask in (Mask(), Mask(causal=True), both):
        near(part(x, mask=mask, layout=site.layout), full(x, mask=mask, layout=site.layout))


@pytest.mark.parametrize("options", [{}, {"linear": True}])
def test_identity_equal_tokens_are_weighed_alike(options):
    part = part_of((4, 4), **options)
    weights = seen(part, normal(2, 1, 8).expand(2, 16, 8), layout=Layout((4, 4)))
    near(weights, torch.full_like(weights, 1 / weights.shape[-1]))


def test_identity_padding_is_a_smaller_picture():
    """Whole squares or not: what lies beyond is zero to the convolution, there and here."""
    part, x = part_of((6, 7)), normal(2, 6, 7, 8)
    keys = torch.zeros(2, 6, 7, dtype=torch.bool)
    keys[:, :3, :5] = True
    x[~keys] *= 100
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=Layout((6, 7))).reshape(x.shape)
    near(out[:, :3, :5].flatten(1, 2), part(x[:, :3, :5].flatten(1, 2), layout=Layout((3, 5))))


def test_identity_seven_by_seven_are_not_pooled():
    """On that grid the linear form is attention to gelu(norm(W x))."""
    layout, x = Layout((7, 7)), normal(1, 49, 8)
    part = part_of((7, 7), linear=True)
    u = part.layers.act(
        part.layers.norm(nn.functional.linear(x, part.layers.sr.weight[:, :, 0, 0], part.layers.sr.bias))
    )
    k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in part.layers.kv(u).chunk(2, -1))
    q = part.layers.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
    out = (q @ k.mT / 2).softmax(-1) @ v
    near(part(x, layout=layout), part.layers.proj(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("options", [{}, {"linear": True}])
def test_narrow_numbers_stay_near(options):
    narrow(SpatialReduction, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))), **options)
