"""VAN's large kernel attention, arXiv:2202.09741, §3, eq. 1-2."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, spread, wrong
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, Site
from attnzoo.errors import RecipeError
from attnzoo.mechanisms.mixing.large_kernel import LargeKernel
from attnzoo.testing import against


def at(grid, prefix=0, dim=4, **wishes) -> Site:
    """A site on a plane."""
    return Site("hand", dim, 1, Layout(grid, prefix), **wishes)


def pointwise(conv, t):
    """W t + b for every token."""
    return t @ conv.weight[:, :, 0, 0].T + (0 if conv.bias is None else conv.bias)


def gathered(conv, taps, step, image, there):
    """Σ over taps (y, x) of w[y, x] t[place + step (y, x)] + b, of places on the grid that exist; image by place."""
    out, middle = {}, [size // 2 for size in conv.weight.shape[2:]]
    known = {place: torch.where(there[place], value, 0.0) for place, value in image.items()}
    for y, x in image:
        total = conv.bias
        for dy in range(-(taps // 2), taps // 2 + 1):
            for dx in range(-(taps // 2), taps // 2 + 1):
                place = y + step * dy, x + step * dx
                if place in known:  # its tap was made, then
                    assert abs(dy) <= middle[0] and abs(dx) <= middle[1]
                    total = total + conv.weight[:, 0, middle[0] + dy, middle[1] + dx] * known[place]
        out[y, x] = total
    return out


@against(LargeKernel, examples=20)
def test_oracle(component, options, x, layout, keys):
    """Place by place: x + W₂ (u ⊙ W DWD(DW(u))), u = gelu(W₁ x); without the unit u ⊙ W DWD(DW(u)), u = x."""
    (_, columns), p, unit = layout.grid, layout.prefix, options["unit"]
    step = options["dilation"]
    places = {divmod(i, columns): p + i for i in range(layout.length - p)}
    hidden = {}
    for place, i in places.items():
        u = pointwise(component.proj_in, x[:, i]) if unit else x[:, i]
        hidden[place] = u * (1 + torch.erf(u / math.sqrt(2))) / 2 if unit else u
    there = {place: keys[:, i, None] for place, i in places.items()}
    taps = math.ceil((options["kernel"] or 21) / step)
    once = gathered(component.near_conv, 2 * step - 1, 1, hidden, there)
    twice = gathered(component.far_conv, taps, step, once, there)
    out = [x[:, i] for i in range(p)]
    for place, i in places.items():
        gated = hidden[place] * pointwise(component.mix_conv, twice[place])
        out.append(x[:, i] + pointwise(component.proj_out, gated) if unit else gated)
    return torch.stack(out, 1)


def mixed(
    part,
    x,
    mask,
    layout,
    gate=lambda g: g,
    join=torch.mul,
    residual=True,
    swapped=False,
    turned=False,
    first=True,
    between=True,
    act=F.gelu,
    special=lambda t: t,
):
    """The equations with a fault."""
    p = layout.prefix
    image = layout.to_grid(x[:, p:])
    there = (
        torch.ones_like(image[:, :1]) if mask.keys is None else layout.to_grid(mask.keys[:, p:, None] * 1.0)
    )
    u = act(part.proj_in(image)) if part.unit else image
    near_conv, far_conv = part.near_conv, part.far_conv
    if swapped:
        near_conv, far_conv = far_conv, near_conv
    if turned:
        with torch.no_grad():
            near_conv.weight.copy_(near_conv.weight.flip(2))
    found = near_conv(u * there if first else u)
    found = far_conv(found * there if between else found)
    out = part.proj_out(join(u, gate(part.mix_conv(found))))
    return layout.from_grid(special(x[:, :p]), image + out if part.unit and residual else out)


def with_fault(**fault):
    """Large kernel attention with one fault."""
    return wrong(
        LargeKernel, mix=lambda self, x, source, *, mask, layout: mixed(self, x, mask, layout, **fault)
    )


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=15).ok


MUTANTS = {
    "a sigmoid": with_fault(gate=torch.sigmoid),
    "added": with_fault(join=torch.add),
    "no residual": with_fault(residual=False),
    "the dilated convolution first": with_fault(swapped=True),
    "rows of taps turned": with_fault(turned=True),
    "no gelu": with_fault(act=lambda u: u),
    "gelu by tanh": with_fault(act=lambda u: F.gelu(u, approximate="tanh")),
    "padding seen": with_fault(first=False),
    "padding seen by the second convolution": with_fault(between=False),
    "special tokens lost": with_fault(special=torch.zeros_like),
    "the mask ignored": wrong(
        LargeKernel, mix=lambda self, x, source, *, mask, layout: mixed(self, x, Mask(), layout)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def zeroed(part, *biases):
    """The module with these biases, or all, at zero."""
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            if name.endswith("bias") and (not biases or name.split(".")[0] in biases):
                parameter.zero_()
    return part


# By hand


def test_hand_three_tokens_in_a_row():
    """DW sums a token and its neighbours, W doubles, u gates."""
    part = zeroed(LargeKernel(at((1, 3), dim=1), kernel=1, dilation=2, unit=False).double())
    with torch.no_grad():
        part.near_conv.weight.fill_(1)
        part.far_conv.weight.fill_(1)
        part.mix_conv.weight.fill_(2)
    assert part.near_conv.weight.shape == (1, 1, 3, 3) and part.far_conv.weight.shape == (1, 1, 1, 1)
    x = torch.tensor([1.0, 2, 4]).double().reshape(1, 3, 1)
    near(part(x, layout=Layout((1, 3))), [1 * 6, 2 * 14, 4 * 12])


@pytest.mark.parametrize("unit,wanted", [(False, 9024), (True, 17344)])
@pytest.mark.parametrize("grid,kernel", [((14, 14), None), ((10, 3), None), ((14, 14), 21), ((4, 4), 21)])
def test_hand_parameters(grid, kernel, unit, wanted):
    c = 64
    assert wanted == (3 * c**2 + 79 * c if unit else c**2 + 77 * c)
    assert count(LargeKernel(at(grid, dim=c), kernel=kernel, unit=unit)) == wanted


def test_hand_parameters_of_other_kernels():
    """2 δ - 1 and ⌈K / δ⌉ taps along a side; by default at most as many of the latter as the grid has use for."""
    for kernel, dilation, near_, far in (13, 2, 3, 7), (7, 7, 13, 1), (5, 1, 1, 5), (35, 5, 9, 7):
        part = LargeKernel(at((14, 14)), kernel=kernel, dilation=dilation, unit=False)
        assert count(part) == 4 * (near_**2 + far**2 + 2) + 16 + 4
    for side, far in (1, 1), (3, 1), (4, 3), (6, 3), (7, 5), (9, 5), (10, 7), (99, 7):
        assert LargeKernel(at((1, side))).far_conv.weight.shape == (4, 1, far, far)


def test_hand_biases_are_those_of_the_site():
    names = dict(LargeKernel(at((14, 14), qkv_bias=False, proj_bias=False)).named_parameters())
    assert "proj_in.bias" not in names and "proj_out.bias" not in names and "mix_conv.bias" in names


def test_hand_the_start():
    """N(0, 2 groups / (k² outputs)): 2 / 25, 2 / 49 and 2 / c; biases of zero."""
    part = LargeKernel(at((14, 14), dim=256))
    taps = {"near_conv": 25, "far_conv": 49, "mix_conv": 256, "proj_in": 256, "proj_out": 256}
    for name, number in taps.items():
        conv = getattr(part, name)
        assert 0.93 < conv.weight.detach().std() * math.sqrt(number / 2) < 1.07
        assert not conv.bias.any()


def test_hand_the_support_is_23_by_23():
    """Not 21: 5 + 6 · 3. As its reach says."""
    layout = Layout((25, 25))
    part = zeroed(LargeKernel(at((25, 25), dim=1), unit=False).double())
    with torch.no_grad():
        for conv in (part.near_conv, part.far_conv, part.mix_conv):
            conv.weight.fill_(1)
    x = torch.ones(1, 625, 1).double().requires_grad_()
    (gradient,) = torch.autograd.grad(part(x, layout=layout)[0, 312, 0], x)  # the middle
    support = gradient.reshape(25, 25) != 0
    assert support[1:24, 1:24].all() and support.sum() == 23**2
    assert part.reach() == 11


# Identities


@pytest.mark.parametrize("unit", [False, True])
def test_identity_a_gate_of_one(unit):
    """W = 0 with a bias of 1: the gate alone gives x; the unit x + W₂ gelu(W₁ x)."""
    part, x = spread(LargeKernel(at((3, 4), 1), unit=unit)), normal(2, 13, 4)
    with torch.no_grad():
        part.mix_conv.weight.zero_()
        part.mix_conv.bias.fill_(1)
    grid = x[:, 1:]
    wanted = grid + pointwise(part.proj_out, F.gelu(pointwise(part.proj_in, grid))) if unit else grid
    near(part(x, layout=Layout((3, 4), 1)), torch.cat([x[:, :1], wanted], 1))


def test_identity_a_last_projection_of_zero_leaves_the_residual():
    part, x = spread(LargeKernel(at((3, 4)))), normal(2, 12, 4)
    with torch.no_grad():
        part.proj_out.weight.zero_()
        part.proj_out.bias.zero_()
    near(part(x, layout=Layout((3, 4))), x)


def test_identity_of_degree_two_without_biases():
    part, x = zeroed(spread(LargeKernel(at((5, 6)), unit=False))), normal(2, 30, 4)
    near(part(3 * x, layout=Layout((5, 6))), 9 * part(x, layout=Layout((5, 6))), 1e-10)


def test_identity_shifts_away_from_the_borders():
    """A small picture in a field of zeros, moved: beyond the reach of borders all moves; at a border it does not."""
    grid, layout = (29, 30), Layout((29, 30))
    part, x = zeroed(spread(LargeKernel(at(grid, dim=2)), 0.3)), torch.zeros(1, *grid, 2).double()
    x[:, 11:17, 11:17] = normal(1, 6, 6, 2)
    out = part(x.flatten(1, 2), layout=layout).reshape(x.shape)
    moved = part(x.roll((1, 2), (1, 2)).flatten(1, 2), layout=layout).reshape(x.shape)
    near(moved, out.roll((1, 2), (1, 2)))
    cut = part(x.roll(-11, 1).flatten(1, 2), layout=layout).reshape(x.shape)  # to the upper border
    assert (cut - out.roll(-11, 1)).abs().max() > 1e-6


def test_identity_one_wide_convolution_away_from_the_borders():
    """DWD(DW(u)) is a convolution by channel with the 23 × 23 taps that an impulse shows."""
    part = zeroed(spread(LargeKernel(at((45, 45), dim=2), unit=False), 0.3))
    impulse = torch.zeros(1, 2, 45, 45).double()
    impulse[..., 22, 22] = 1
    kernel = part.far_conv(part.near_conv(impulse))[0, :, None, 11:34, 11:34].flip(2, 3)
    x = normal(1, 2, 45, 45)
    gate = pointwise(part.mix_conv, F.conv2d(x, kernel, groups=2)[..., 11, 11])  # around the place (22, 22)
    out = part(x.flatten(2).mT, layout=Layout((45, 45)))
    near(out[:, 22 * 45 + 22], x[..., 22, 22] * gate, 1e-9)


@pytest.mark.parametrize("grid", [(4, 5), (1, 1), (2, 9)])
def test_identity_taps_beyond_the_grid_have_no_say(grid):
    """The kernel of 21, with its outer taps cut off, gives the same on a small grid."""
    small, large = spread(LargeKernel(at(grid))), spread(LargeKernel(at(grid), kernel=21))
    x = normal(2, math.prod(grid), 4)
    assert count(small) < count(large)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            whole = large.get_parameter(name)
            if parameter.ndim == 4:
                cut = [(a - b) // 2 for a, b in zip(whole.shape[2:], parameter.shape[2:], strict=True)]
                whole = whole[:, :, cut[0] : whole.shape[2] - cut[0], cut[1] : whole.shape[3] - cut[1]]
            parameter.copy_(whole)
    near(small(x, layout=Layout(grid)), large(x, layout=Layout(grid)))


@pytest.mark.parametrize("unit", [False, True])
def test_identity_padding_is_a_smaller_picture(unit):
    """Rows and columns that do not exist are as if the borders lay before them."""
    part, x = spread(LargeKernel(at((6, 7)), unit=unit)), normal(2, 6, 7, 4)
    keys = torch.zeros(2, 6, 7, dtype=torch.bool)
    keys[:, :4, :5] = True
    x[~keys] = math.nan
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=Layout((6, 7))).reshape(x.shape)
    near(out[:, :4, :5].flatten(1, 2), part(x[:, :4, :5].flatten(1, 2), layout=Layout((4, 5))))


def test_the_gate_is_what_multiplies():
    part, x = spread(LargeKernel(at((3, 4)), unit=False)), normal(2, 12, 4)
    gate = seen(part, x, tap="gate", layout=Layout((3, 4)))
    assert gate.shape == (2, 4, 3, 4)
    near(part(x, layout=Layout((3, 4))), x * gate.flatten(2).mT)


def test_an_even_number_of_taps_is_refused():
    with pytest.raises(RecipeError, match="AZ214.*has 2 taps, and no middle"):
        LargeKernel(at((14, 14)), kernel=4, dilation=2)
    with pytest.raises(RecipeError, match="a kernel from 19 to 21"):
        LargeKernel(at((14, 14)), kernel=22)
    assert [LargeKernel(at((14, 14)), kernel=k).reach() for k in (1, 3, 13, 15)] == [2, 2, 8, 8]


def test_narrow_numbers_stay_near():
    narrow(LargeKernel, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))), kernel=9)
