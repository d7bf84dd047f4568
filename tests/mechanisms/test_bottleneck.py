"""Attention of bottleneck transformers, arXiv:2101.11605: timm's layers, with masks, special tokens and taps."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, set_all, spread, wrong
from timm.layers.bottleneck_attn import BottleneckAttn
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, MultiHead, Site, options_of
from attnzoo.functional import masked_softmax
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.mixing.bottleneck import Bottleneck
from attnzoo.testing import against


def resized(table, side):
    """A table for another number of places: its ends stay, and numbers between lie on straight lines."""
    size, wanted, out = len(table), 2 * side - 1, []
    for i in range(wanted):
        at = i * (size - 1) / (wanted - 1) if wanted > 1 else 0.0
        left = min(int(at + 1e-12), size - 1)
        right = min(left + 1, size - 1)
        out.append(table[left] * (1 - (at - left)) + table[right] * (at - left))
    return out


@against(Bottleneck, examples=16)
def test_oracle(component, options, x, layout, allowed):
    """Query by query and key by key: the score of content, and of the rows and columns between them."""
    layers, (b, n, c), heads, p = component.layers, x.shape, component.heads, layout.prefix
    (rows, columns), d = layout.grid, c // heads
    down, right = (
        resized(t, s) for t, s in ((layers.pos_embed.height_rel, rows), (layers.pos_embed.width_rel, columns))
    )
    out = torch.zeros_like(x)
    for s in range(b):
        made = x[s] @ layers.qkv.weight[:, :, 0, 0].T + (0 if layers.qkv.bias is None else layers.qkv.bias)
        for h in range(heads):
            q, k, v = (t[:, h * d : (h + 1) * d] for t in made.split(c, 1))
            for i in range(n):
                scores = k @ q[i] / math.sqrt(d)
                if i >= p:
                    (y, z), more = divmod(i - p, columns), [torch.zeros(()).double()] * p
                    for j in range(n - p):
                        way = down[j // columns - y + rows - 1] + right[j % columns - z + columns - 1]
                        more.append(way @ q[i])
                    scores = scores + torch.stack(more) / (math.sqrt(d) if options["scale_bias"] else 1)
                e = torch.exp(scores - scores.max().detach()) * allowed[s, h, i]
                out[s, i, h * d : (h + 1) * d] = (e / e.sum() if e.any() else e) @ v
    return out


def attended(
    self, x, mask, layout, scale=None, bias_scale=None, swap=False, over=-1, hide=lambda a: a, flip=False, turned=False,
    bias=True, keyed=False, absolute=False, heads_last=False,
):  # fmt: skip
    """The equations with a fault."""
    layers, p, n, (rows, columns) = self.layers, layout.prefix, x.shape[1], layout.grid
    made = layers.qkv(x.mT[..., None])[..., 0].unflatten(
        1, (3, self.heads, -1) if not heads_last else (3, -1, self.heads)
    )
    q, k, v = (made.mT if not heads_last else made.transpose(2, 3).mT).unbind(1)
    q, k = (k, q) if swap else (q, k)
    scale = layers.scale if scale is None else scale
    bias_scale = (layers.scale if layers.scale_pos_embed else 1.0) if bias_scale is None else bias_scale
    high, wide = (
        F.interpolate(t.T[None], 2 * s - 1, mode="linear", align_corners=True)[0].T
        for t, s in ((layers.pos_embed.height_rel, rows), (layers.pos_embed.width_rel, columns))
    )
    high, wide = (high.flip(0), wide.flip(0)) if flip else (high, wide)
    y, z = layout.coords().unbind(-1)
    down, right = y - y[:, None], z - z[:, None]
    down, right = (down.abs(), right.abs()) if absolute else (down, right)
    ways = high[down + rows - 1] + wide[right + columns - 1]  # (n m d)
    more = torch.einsum("bhnd,nmd->bhnm", (k if keyed else q)[:, :, p:], ways) * bias_scale
    more = more.mT if turned else more
    scores = q @ k.mT * scale + (F.pad(more, (p, 0, p, 0)) if bias else 0)
    allowed = mask.dense(n, n)
    allowed = torch.ones(1, 1, n, n, dtype=torch.bool) if allowed is None else hide(allowed)
    weights = masked_softmax(scores, allowed) if over == -1 else scores.softmax(over) * allowed
    return (weights @ v).transpose(1, 2).flatten(2)


def with_fault(**fault):
    """The mechanism with one fault."""
    return wrong(
        Bottleneck, mix=lambda self, x, source, *, mask, layout: attended(self, x, mask, layout, **fault)
    )


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=6).ok


MUTANTS = {
    "no scale": with_fault(scale=1.0),
    "the bias always scaled": with_fault(bias_scale=0.5),
    "the bias never scaled": with_fault(bias_scale=1.0),
    "q and k swapped": with_fault(swap=True),
    "softmax over the queries": with_fault(over=-2),
    "softmax over the batch": with_fault(over=0),
    "ways turned round": with_fault(flip=True),
    "the ways of keys to queries": with_fault(turned=True),
    "keys ask the ways": with_fault(keyed=True),
    "no direction": with_fault(absolute=True),
    "no ways": with_fault(bias=False),
    "heads and channels interleaved": with_fault(heads_last=True),
    "the mask ignored": with_fault(hide=torch.ones_like),
    "the mask inverted": with_fault(hide=torch.logical_not),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((3, 4))


def at(dim=8, layout=LAYOUT, heads=2, **wishes) -> Site:
    """A site on a plane."""
    return Site("hand", dim, heads, layout, **wishes)


def bottleneck(dim=8, layout=LAYOUT, heads=2, **options) -> Bottleneck:
    """In float64, with weights of a size that matters."""
    return spread(Bottleneck(at(dim, layout, heads), **options))


# By hand


def test_hand_two_tokens_in_a_row():
    """q = 1 and k = 0: the scores are the ways, ln 3 to the right and ln 7 to the left."""
    part = set_all(Bottleneck(at(1, Layout((1, 2)), 1)), 0.0)
    with torch.no_grad():
        part.layers.qkv.bias[0] = 1
        part.layers.qkv.weight[2] = 1
        part.layers.pos_embed.width_rel.copy_(
            torch.tensor([[math.log(7)], [0], [math.log(3)]], dtype=torch.float64)
        )
    x = torch.tensor([[[4.0], [8.0]]]).double()
    near(seen(part, x, layout=Layout((1, 2))), [[[[0.25, 0.75], [0.875, 0.125]]]])
    near(part(x, layout=Layout((1, 2))), [[[7], [4.5]]])


def test_hand_parameters():
    """3 c² + 3 c for q, k and v; 2 y - 1 and 2 x - 1 rows of d, one table for all heads."""
    for layout, dim, heads in ((LAYOUT, 8, 2), (Layout((7, 5), 1), 12, 3)):
        (y, x), d = layout.grid, dim // heads
        wanted = 3 * dim**2 + 3 * dim + (2 * y + 2 * x - 2) * d
        assert count(Bottleneck(at(dim, layout, heads))) == wanted
        assert count(Bottleneck(at(dim, layout, heads, qkv_bias=False))) == wanted - 3 * dim


def test_hand_the_start():
    part = Bottleneck(at(256, Layout((40, 40)), 4))
    part.init_weights()
    assert abs(part.layers.qkv.weight.detach().std() * 16 - 1) < 0.05
    assert abs(part.layers.pos_embed.height_rel.detach().std() * 8 - 1) < 0.1


def test_defaults():
    assert options_of(Bottleneck)().model_dump() == {"scale_bias": True}


# Identities


@pytest.mark.parametrize("scale_bias", [True, False])
@pytest.mark.parametrize("grid,heads", [((3, 4), 2), ((4, 3), 1), ((1, 5), 4)])
def test_identity_timms_layer(grid, heads, scale_bias):
    theirs = spread(
        BottleneckAttn(
            8, feat_size=grid, num_heads=heads, dim_head=8 // heads, qkv_bias=True, scale_pos_embed=scale_bias
        )
    )
    part, x = (
        bottleneck(layout=Layout(grid), heads=heads, scale_bias=scale_bias),
        normal(3, grid[0] * grid[1], 8),
    )
    part.layers.load_state_dict(theirs.state_dict())
    near(part(x, layout=Layout(grid)), theirs(x.mT.unflatten(2, grid)).flatten(2).mT)


def test_identity_without_ways_it_is_softmax_attention():
    part, x, site = bottleneck(layout=Layout((3, 4), 1)), normal(2, 13, 8), at(layout=Layout((3, 4), 1))
    plain = MultiHead(site, Softmax(site)).double()
    with torch.no_grad():
        part.layers.pos_embed.height_rel.zero_(), part.layers.pos_embed.width_rel.zero_()
        plain.qkv.weight.copy_(part.layers.qkv.weight[..., 0, 0]), plain.qkv.bias.copy_(part.layers.qkv.bias)
        plain.proj.weight.copy_(torch.eye(8)), plain.proj.bias.zero_()
    mask = Mask(keys=torch.rand(2, 13) < 0.7, pairs=torch.rand(2, 2, 13, 13) < 0.8, causal=True)
    for one in (Mask(), mask):
        near(part(x, mask=one, layout=site.layout), plain(x, mask=one, layout=site.layout))


def test_identity_only_ways_matter():
    """With queries and keys that are the same for all, the weights of a token are those of its neighbour, one further."""
    part, x = bottleneck(), normal(1, 12, 8)
    with torch.no_grad():
        part.layers.qkv.weight[:16].zero_()
    scores = seen(part, x, tap="scores", layout=LAYOUT)[0].unflatten(1, (3, 4)).unflatten(3, (3, 4))
    near(scores[:, 0, 0, :2, :3], scores[:, 1, 1, 1:, 1:])
    assert (scores[:, 0, 0, 0, 1] - scores[:, 0, 1, 0, 0]).abs().min() > 1e-6  # and they have a direction


def test_identity_a_corner_has_the_middle_of_the_tables():
    """Padding that leaves a smaller plane is that plane, with the rows of the tables for its ways."""
    part, x = bottleneck(), normal(2, 3, 4, 8)
    keys = torch.zeros(2, 3, 4, dtype=torch.bool)
    keys[:, :2, :3] = True
    small = bottleneck(layout=Layout((2, 3)))
    with torch.no_grad():
        small.layers.qkv.load_state_dict(part.layers.qkv.state_dict())
        small.layers.pos_embed.height_rel.copy_(part.layers.pos_embed.height_rel[1:-1])
        small.layers.pos_embed.width_rel.copy_(part.layers.pos_embed.width_rel[1:-1])
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=LAYOUT).unflatten(1, (3, 4))
    near(out[:, :2, :3].flatten(1, 2), small(x[:, :2, :3].flatten(1, 2), layout=Layout((2, 3))))


def test_identity_on_another_grid_the_tables_keep_their_ends():
    part, x = bottleneck(), normal(2, 35, 8)
    other = bottleneck(layout=Layout((5, 7)))
    other.layers.qkv.load_state_dict(part.layers.qkv.state_dict())
    with torch.no_grad():
        for own, table in zip(
            other.layers.pos_embed.parameters(), part.layers.pos_embed.parameters(), strict=True
        ):
            own.copy_(torch.stack(resized(table, (len(own) + 1) // 2)))
            near(own[[0, -1]], table[[0, -1]])
    near(part(x, layout=Layout((5, 7))), other(x, layout=Layout((5, 7))))


def test_special_tokens_have_no_way():
    part, x = bottleneck(layout=Layout((3, 4), 2)), normal(1, 14, 8)
    scores = seen(part, x, tap="scores", layout=Layout((3, 4), 2))
    made = part.layers.qkv(x.mT[..., None])[..., 0].unflatten(1, (3, 2, 4)).mT
    content = made[:, 0] @ made[:, 1].mT / 2
    near(scores[:, :, :2], content[:, :, :2]), near(scores[:, :, :, :2], content[:, :, :, :2])
    assert (scores - content)[:, :, 2:, 2:].abs().min() > 1e-6


def test_narrow_numbers_stay_near():
    narrow(Bottleneck, [(2, 12, 12)], site=Site("hand", 12, 3, LAYOUT))
