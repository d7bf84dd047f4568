"""Focal modulation, arXiv:2203.11926, §3: timm's layers, with a key mask, special tokens and taps."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, set_all, spread, wrong
from timm.layers import LayerNorm2d
from timm.models.focalnet import FocalModulation as Timms
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, Site, options_of
from attnzoo.mechanisms.mixing.focal_modulation import FocalModulation
from attnzoo.testing import against


def linear(conv, x):
    """W x + b of a 1 × 1 convolution, of each row."""
    return x @ conv.weight[:, :, 0, 0].T + (0 if conv.bias is None else conv.bias)


def gelu(y):
    return y * (1 + torch.erf(y / math.sqrt(2))) / 2


@against(FocalModulation, examples=16)
def test_oracle(component, options, x, layout, keys):
    """Level by level, token by token, tap by tap; what does not exist is zero at every level."""
    layers, c, p, (rows, columns) = component.layers, x.shape[2], layout.prefix, layout.grid
    levels, out = options["levels"], []
    for s in range(x.shape[0]):
        made = linear(layers.f, x[s])
        q, z, g = made[:, :c], made[p:, c : 2 * c].reshape(rows, columns, c), made[:, 2 * c :]
        there = keys[s, p:].reshape(rows, columns)
        m = [torch.zeros(c).double() for _ in range(layout.length)]
        for level in range(levels):
            side = options["window"] + 2 * level
            kernel, total, around = layers.focal_layers[level][0].weight[:, 0], torch.zeros_like(z), side // 2
            wide = F.pad(z * there[..., None], (0, 0, around, around, around, around))
            for down in range(side):
                for right in range(side):
                    total = total + kernel[:, down, right] * wide[down : down + rows, right : right + columns]
            z = gelu(total) * there[..., None]
            for i in range(rows * columns):
                m[p + i] = m[p + i] + g[p + i, level] * z.flatten(0, 1)[i]
        everything = gelu(z[there].sum(0) / max(1, int(there.sum())))
        for i in range(layout.length):
            total = (m[i] + g[i, levels] * everything) / (levels + 1 if options["normalise"] else 1)
            m[i] = q[i] * linear(layers.h, total)
            if options["post_norm"]:
                centred = m[i] - m[i].mean()
                m[i] = (
                    centred / torch.sqrt((centred**2).mean() + layers.norm.eps) * layers.norm.weight
                    + layers.norm.bias
                )
        out.append(linear(layers.proj, torch.stack(m)))
    return torch.stack(out)


def modulated(
    self, x, mask, layout, hide=lambda k: k, always=True, act=F.gelu, mean=True, first=False, gates=True, order=None,
    h=True, total=False, share=True, prefix=False, last=False, product=True,
):  # fmt: skip
    """The equations with a fault."""
    layers, p, c = self.layers, layout.prefix, x.shape[2]
    keys = torch.ones(x.shape[:2], dtype=torch.bool) if mask.keys is None else hide(mask.keys)
    there, image = layout.to_grid(keys[:, p:, None]).double(), layers.f(x.mT[..., None])[..., 0]
    q, z, g = image.split([c, c, layers.focal_level + 1], 1)
    z, g = layout.to_grid(z[:, :, p:].mT) * there, g if gates else torch.ones_like(g)
    start, m = z, torch.zeros_like(z)
    for level, (conv, _) in enumerate(layers.focal_layers):
        z = act(conv(start if first else z)) * (there if always else 1)
        at = level if order is None else order - level
        m = m + z * there * layout.to_grid(g[:, at : at + 1, p:].mT)
    number = there.sum((2, 3)).clamp(min=1) if not total else there[0, 0].numel()
    everything = (start if last else z * there).sum((2, 3)) / number
    everything = act(everything) if share else everything
    m = torch.cat([torch.zeros(len(x), c, p).double(), m.flatten(2)], 2)
    if mean:
        shares = g[:, -1:] * everything[:, :, None]
        m = m + (torch.cat([0 * shares[:, :, :p], shares[:, :, p:]], 2) if prefix else shares)
    m = m / (layers.focal_level + 1) if layers.normalize_modulator else m
    m = layers.h(m[..., None])[..., 0] if h else m
    out = q * m if product else q + m
    return layers.proj(layers.norm(out[..., None]))[..., 0].mT


def with_fault(**fault):
    """The mechanism with one fault."""
    return wrong(
        FocalModulation,
        mix=lambda self, x, source, *, mask, layout: modulated(self, x, mask, layout, **fault),
    )


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=6).ok


MUTANTS = {
    "padding enters later levels": with_fault(always=False),
    "no gelu": with_fault(act=lambda t: t),
    "no mean of all": with_fault(mean=False),
    "every level reads the tokens": with_fault(first=True),
    "no gates": with_fault(gates=False),
    "gates in another order": with_fault(order=2),
    "no h": with_fault(h=False),
    "a mean of padding, too": with_fault(total=True),
    "no gelu of the mean": with_fault(share=False),
    "the mean of the tokens": with_fault(last=True),
    "special tokens gather nothing": with_fault(prefix=True),
    "a sum for the product": with_fault(product=False),
    "the mask ignored": with_fault(hide=torch.ones_like),
    "the mask inverted": with_fault(hide=torch.logical_not),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def at(dim=8, grid=(4, 5), prefix=0, **wishes) -> Site:
    """A site on a plane."""
    return Site("hand", dim, 2, Layout(grid, prefix), **wishes)


def focal(dim=8, grid=(4, 5), prefix=0, **options) -> FocalModulation:
    """In float64, with weights of a size that matters."""
    return spread(FocalModulation(at(dim, grid, prefix), **options), 0.5)


# By hand


def test_hand_one_token():
    """All weights 1 and no biases: q, z and g are 2; the middle tap gives gelu(2), then gelu of it, whose mean is it."""
    part = set_all(FocalModulation(at(1, (1, 1), qkv_bias=False, proj_bias=False)), 1.0)
    x = torch.tensor([[[2.0]]]).double()
    one = F.gelu(x)
    two = F.gelu(one)
    near(part(x, layout=Layout((1, 1))), 2 * 2 * (one + two + F.gelu(two)))
    near(seen(part, x, tap="gate_levels", layout=Layout((1, 1))), [[[2, 2, 2]]])


def test_hand_without_gates_the_bias_of_the_projection_is_left():
    part, x = focal(), normal(2, 20, 8)
    with torch.no_grad():
        part.layers.f.weight[16:].zero_(), part.layers.f.bias[16:].zero_(), part.layers.h.bias.zero_()
    near(part(x, layout=Layout((4, 5))), part.layers.proj.bias.expand(2, 20, 8))


@pytest.mark.parametrize(
    "dim,window,levels,number", [(16, 3, 2, 1683), (8, 5, 3, 8 * 20 + 20 + 2 * 72 + 8 * 155)]
)
def test_hand_parameters(dim, window, levels, number):
    """F, h and P, and kernels of window, window + 2, ...; 1683 is timm's for 16 channels, as is the rest."""
    part = FocalModulation(at(dim), window=window, levels=levels)
    assert count(part) == number == count(Timms(dim, window, levels))
    assert part.layers.kernel_sizes == [window + 2 * i for i in range(levels)]
    bare = FocalModulation(at(dim, qkv_bias=False, proj_bias=False), window=window, levels=levels)
    assert count(part) - count(bare) == (2 * dim + levels + 1) + dim + dim
    assert count(FocalModulation(at(dim), window=window, levels=levels, post_norm=True)) == number + 2 * dim


def test_defaults():
    given = {"window": 3, "levels": 2, "normalise": False, "post_norm": False}
    assert options_of(FocalModulation)().model_dump() == given


# Identities


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("window,levels", [(3, 2), (5, 1), (3, 3)])
def test_identity_timms_layer(window, levels, normalise, post_norm):
    theirs = spread(
        Timms(
            8, window, levels, normalize_modulator=normalise, use_post_norm=post_norm, norm_layer=LayerNorm2d
        )
    )
    part = focal(window=window, levels=levels, normalise=normalise, post_norm=post_norm)
    part.layers.load_state_dict(theirs.state_dict())
    x = normal(3, 20, 8)
    near(part(x, layout=Layout((4, 5))), theirs(x.mT.unflatten(2, (4, 5))).flatten(2).mT)


def test_identity_padding_is_a_border():
    """Columns that do not exist are as if the plane ended before them."""
    part, x = focal(), normal(2, 4, 5, 8)
    keys = torch.ones(2, 4, 5, dtype=torch.bool)
    keys[:, :, 3:] = False
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=Layout((4, 5))).unflatten(1, (4, 5))
    near(out[:, :, :3].flatten(1, 2), part(x[:, :, :3].flatten(1, 2), layout=Layout((4, 3))))


def test_identity_special_tokens_change_nothing_for_others():
    part, x = focal(), normal(2, 22, 8)
    out = part(x, layout=Layout((4, 5), 2))
    near(out[:, 2:], part(x[:, 2:], layout=Layout((4, 5))))
    other = x.clone()
    other[:, 1] += 1
    near(part(other, layout=Layout((4, 5), 2))[:, 0], out[:, 0])
    other[:, 7] += 1  # but they gather what the grid holds
    assert (part(other, layout=Layout((4, 5), 2))[:, 0] - out[:, 0]).abs().max() > 1e-6


def test_identity_without_the_last_gate_it_is_local():
    """Sides of 3 and 5 reach 1 + 2 tokens."""
    part, x = focal(grid=(1, 9)), normal(1, 9, 8)
    with torch.no_grad():
        part.layers.f.weight[18:].zero_(), part.layers.f.bias[18:].zero_()
    other = x.clone()
    other[:, 4] += 1
    moved = (part(x, layout=Layout((1, 9))) - part(other, layout=Layout((1, 9)))).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False, *[True] * 7, False]


def test_the_gate_is_what_scales():
    part, x = focal(), normal(2, 20, 8)
    gate = seen(part, x, tap="gate", layout=Layout((4, 5)))
    q = part.layers.f(x.mT[..., None])[:, :8, :, 0].mT
    near(
        part(x, layout=Layout((4, 5))),
        nn.functional.linear(q * gate, part.layers.proj.weight[:, :, 0, 0], part.layers.proj.bias),
    )


def test_where_no_token_exists_nothing_is_nan():
    part, x = focal(), normal(2, 20, 8).requires_grad_()
    out = part(x, mask=Mask(keys=torch.zeros(2, 20, dtype=torch.bool)), layout=Layout((4, 5)))
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in part.parameters())


def test_narrow_numbers_stay_near():
    narrow(FocalModulation, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))))
