"""Convolutional projections of CvT, arXiv:2103.15808, §3.2."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, set_all, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask, MultiHead, OptionError, Site, options_of
from attnzoo.functional import dot_product_attention
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.projection import conv_projection
from attnzoo.mechanisms.projection.conv_projection import ConvProjection
from attnzoo.testing import against


def convolved(conv, project, t, layout, there, stride):
    """W conv(t) of special tokens as they are and of every `stride`-th place, and which token each is of."""
    p, (rows, columns), half = layout.prefix, layout.grid, conv.weight.shape[-1] // 2
    out, of = list(t[:p]), list(range(p))
    for y in range(0, rows, stride):
        for x in range(0, columns, stride):
            total = torch.zeros(t.shape[1]).double() if conv.bias is None else conv.bias
            for v in range(max(0, y - half), min(rows, y + half + 1)):
                for u in range(max(0, x - half), min(columns, x + half + 1)):
                    i = p + v * columns + u
                    if there[i]:
                        total = total + conv.weight[:, 0, v - y + half, u - x + half] * t[i]
            out.append(total)
            of.append(p + y * columns + x)
    out = torch.stack(out) @ project.weight.T
    return out if project.bias is None else out + project.bias, of


@against(ConvProjection, examples=15)
def test_oracle(component, options, x, layout, keys, allowed):
    """Place by place; then softmax attention head by head, of keys whose own token exists."""
    (b, n, c), heads, stride, out = x.shape, component.heads, options["stride"], []
    d = c // heads
    scale = 1 / math.sqrt(c if options["scale"] == "width" else d)
    for s in range(b):
        where = layout, keys[s]
        q, _ = convolved(component.q_conv, component.q, x[s], *where, 1)
        k, of = convolved(component.k_conv, component.k, x[s], *where, stride)
        v, _ = convolved(component.v_conv, component.v, x[s], *where, stride)
        merged = []
        for h in range(heads):
            own, rows = slice(h * d, (h + 1) * d), []
            for i in range(n):
                see = [j for j, token in enumerate(of) if allowed[s, h, i, token]]
                rows.append((scale * k[see, own] @ q[i, own]).softmax(0) @ v[see, own])
            merged.append(torch.stack(rows))
        proj = component.proj
        out.append(torch.cat(merged, 1) @ proj.weight.T + (0 if proj.bias is None else proj.bias))
    return torch.stack(out)


def before(change):
    """The mechanism, changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return ConvProjection.mix(self, x, source, mask=mask, layout=layout)

    return wrong(ConvProjection, mix=mix)


def mixing(change):
    """The mechanism with its inputs changed."""

    def mix(self, x, source, *, mask, layout):
        x, mask, layout = change(x, mask, layout)
        return ConvProjection.mix(self, x, source, mask=mask, layout=layout)

    return wrong(ConvProjection, mix=mix)


def no_bias(self):
    """The norm's β left out."""
    for conv in (self.q_conv, self.v_conv):
        if conv.bias is not None:
            conv.bias.zero_()


def turned(self):
    for conv in (self.q_conv, self.k_conv, self.v_conv):
        conv.weight.copy_(conv.weight.mT.clone())


MUTANTS = {
    "twice the scale": before(lambda self: setattr(self, "factor", 2 * self.factor)),
    "always the scale of a head": before(lambda self: setattr(self, "factor", 1.0)),
    "keys' matrix for the queries": before(lambda self: self.q.weight.copy_(self.k.weight)),
    "one kernel for keys and values": before(lambda self: self.v_conv.weight.copy_(self.k_conv.weight)),
    "no convolution of the queries": before(lambda self: nn.init.dirac_(self.q_conv.weight, groups=self.q_conv.groups)),
    "no β": before(no_bias),
    "kernels turned": before(turned),
    "the mask ignored": mixing(lambda x, mask, layout: (x, Mask(), layout)),
    "rows for columns": mixing(lambda x, mask, layout: (x, mask, Layout(layout.grid[::-1], layout.prefix))),
    "special tokens on the grid": mixing(lambda x, mask, layout: (x, mask, Layout((1, layout.length)))),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def at(grid, prefix=0, dim=8, heads=2, **wishes) -> Site:
    """A site on a plane."""
    return Site("hand", dim, heads, Layout(grid, prefix), **wishes)


def part_of(grid=(4, 4), prefix=0, **options) -> ConvProjection:
    """In float64, with parameters of a size that matters."""
    return spread(ConvProjection(at(grid, prefix), **options), 0.4)


# By hand


def test_hand_kernels_of_one_sum_neighbours(monkeypatch):
    """On a grid of 3 × 3 that holds 1 ... 9, after a special token: all sums for queries, corners and middles for keys."""
    layout, held = Layout((3, 3), 1), []
    part = set_all(ConvProjection(at((3, 3), 1, 1, 1, qkv_bias=False)), 1.0)
    monkeypatch.setattr(
        conv_projection,
        "dot_product_attention",
        lambda self, q, k, v, mask: held.extend([q, k, v, mask]) or q,
    )
    x = torch.tensor([50.0, *range(1, 10)]).double()[None, :, None]
    keys = torch.ones(1, 10, dtype=torch.bool)
    keys[0, 9] = False  # the 9
    part(x, mask=Mask(keys=keys), layout=layout)
    near(held[0], [50, 12, 21, 16, 27, 36, 24, 24, 30, 19])
    near(held[1], [50, 12, 16, 24, 19])
    assert held[3].keys.tolist() == [[True, True, True, True, False]]


def test_hand_a_stride_beyond_the_grid_leaves_one_key():
    """Everything gets the only value."""
    part, x = part_of(stride=4), normal(2, 16, 8)
    grid = Layout((4, 4)).to_grid(x)
    wanted = part.proj(part.v(part.v_conv(grid)[:, :, 0, 0]))
    near(part(x, layout=Layout((4, 4))), wanted[:, None].expand(2, 16, 8))


@pytest.mark.parametrize("options,wanted", [({}, 3 * 72 + 2 * 8), ({"kernel": 1}, 3 * 8 + 2 * 8), ({"kernel": 5, "stride": 1}, 3 * 200 + 2 * 8)])  # fmt: skip
def test_hand_parameters(options, wanted):
    """Three kernels for each channel, β of queries and values; four matrices, three biases."""
    assert count(ConvProjection(at((4, 4)), **options)) == wanted + 4 * 64 + 3 * 8


def test_defaults_claims_and_refusals():
    assert options_of(ConvProjection)().model_dump() == {"kernel": 3, "stride": 2, "scale": "width"}
    assert ConvProjection.card_for(stride=1).masks == {"keys"}
    assert ConvProjection.card_for(stride=1, kernel=1).masks == {"keys", "causal", "pairs"}
    with pytest.raises(OptionError, match="kernel of 4 has no middle"):
        part_of(kernel=4)


# Identities


@pytest.mark.parametrize("scale,factor", [("width", 2**-0.5), ("head", 1.0)])
def test_identity_kernels_of_one_token_are_multi_head_attention(scale, factor):
    """With the scale 1 / √c queries are shorter by √h."""
    site, x = at((3, 4), 1), normal(2, 13, 8)
    part, full = part_of((3, 4), 1, kernel=1, stride=1, scale=scale), MultiHead(site, Softmax(site)).double()
    with torch.no_grad():
        for conv in (part.q_conv, part.k_conv, part.v_conv):
            nn.init.dirac_(conv.weight, groups=8)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        full.qkv.weight.copy_(torch.cat([factor * part.q.weight, part.k.weight, part.v.weight]))
        full.qkv.bias.copy_(torch.cat([factor * part.q.bias, torch.zeros(8), part.v.bias]))
    full.proj.load_state_dict(part.proj.state_dict())
    both = Mask(keys=torch.rand(2, 13) < 0.6, pairs=torch.rand(2, 2, 13, 13) < 0.6)
    for mask in (Mask(), Mask(causal=True), both):
        there = torch.ones(2, 13, dtype=torch.bool) if mask.keys is None else mask.keys
        near(part(x, mask=mask, layout=site.layout)[there], full(x, mask=mask, layout=site.layout)[there])


def test_identity_batch_norms_in_eval_mode():
    """Convolution without bias, batch norm, matrix: the authors' projection, folded into kernel and bias."""
    layout, x = Layout((4, 5)), normal(2, 20, 8)
    part, norm = part_of((4, 5)), nn.BatchNorm2d(8).double().eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    plain = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        part.v_conv.weight.copy_(factor[:, None, None, None] * plain.weight)
        part.v_conv.bias.copy_(norm.bias - factor * norm.running_mean)
    grid = layout.to_grid(x)
    near(part.v_conv(grid), norm(plain(grid))[:, :, ::2, ::2])


def test_identity_equal_keys_are_weighed_alike():
    part = part_of((4, 4))
    nn.init.zeros_(part.k.weight)
    near(seen(part, normal(2, 16, 8), layout=Layout((4, 4))), torch.full((2, 2, 16, 4), 0.25))


def test_identity_padding_is_a_smaller_picture():
    part, x = part_of((6, 7)), normal(2, 6, 7, 8)
    keys = torch.zeros(2, 6, 7, dtype=torch.bool)
    keys[:, :3, :5] = True
    x[~keys] *= 100
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=Layout((6, 7))).reshape(x.shape)
    near(out[:, :3, :5].flatten(1, 2), part(x[:, :3, :5].flatten(1, 2), layout=Layout((3, 5))))


def test_narrow_numbers_stay_near():
    assert conv_projection.dot_product_attention is dot_product_attention
    narrow(ConvProjection, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))))


@pytest.mark.parametrize(
    "stride,grid", [(2, (3, 1)), (3, (3, 1)), (3, (3, 2)), (2, (3, 2)), (2, (1, 1)), (3, (1, 1)), (4, (2, 1))]
)
def test_gradients_in_autocast_read_no_unwritten_memory(stride, grid):
    """oneDNN's of a kernel did, in bfloat16 and channels last, where a grid has fewer columns than the stride."""
    layout = Layout(grid, prefix=0)
    component = ConvProjection(Site("blocks.0.attn", dim=6, heads=2, layout=layout), stride=stride)
    for _ in range(5):
        component.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = component(normal(2, layout.length, 6).float(), layout=layout)
        # What is freed here is what the next tensors and scratchpads are made of.
        freed = [torch.full((int(16 * 2 ** (k / 4)),), math.nan) for k in range(64) for _ in range(3)]
        del freed
        out.float().sum().backward()
        for name, parameter in component.named_parameters():
            assert parameter.grad.isfinite().all(), name
