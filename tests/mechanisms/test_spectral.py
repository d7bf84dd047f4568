"""SpectFormer's spectral gate, arXiv:2304.06446, §3."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask, Site
from attnzoo.mechanisms.mixing.spectral import Spectral
from attnzoo.recipe import compose_file
from attnzoo.testing import against


def at(grid, prefix=0, dim=3) -> Site:
    """A site on a plane."""
    return Site("hand", dim, 1, Layout(grid, prefix))


def gate_of(part):
    """W as it was built: complex numbers by frequency u, v, one for each channel; nothing imaginary in own mirrors."""
    (rows, columns), gate, imag = part.grid, {}, iter(part.imag)
    for u in range(rows):
        for v in range(columns // 2 + 1):
            own = 2 * u in (0, rows) and 2 * v in (0, columns)
            gate[u, v] = part.real[len(gate)] + 0j if own else part.real[len(gate)] + 1j * next(imag)
    assert next(imag, None) is None
    return gate


def cubic(values, size):
    """A list stretched to another length, ends on ends: cubic convolution with a = -3/4, the ends repeated."""
    out = []
    for i in range(size):
        where = i * (len(values) - 1) / (size - 1) if size > 1 else 0.0
        left, total = math.floor(where), 0
        for j in range(left - 1, left + 3):
            t = abs(where - j)
            weight = 1.25 * t**3 - 2.25 * t**2 + 1 if t <= 1 else -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            total = total + weight * values[min(max(j, 0), len(values) - 1)]
        out.append(total)
    return out


def stretched(gate, old, new):
    """W on another grid: rows once round, from frequency 0 to 1; columns to the last that there is."""
    if old == new:
        return gate
    columns = [
        cubic([gate[u % old[0], v] for u in range(old[0] + 1)], new[0] + 1) for v in range(old[1] // 2 + 1)
    ]
    rows = [cubic([column[u] for column in columns], new[1] // 2 + 1) for u in range(new[0])]
    return {(u, v): rows[u][v] for u in range(new[0]) for v in range(new[1] // 2 + 1)}


def kernel_of(gate, grid):
    """The inverse transform of W, by its sum: columns that are not their own mirror stand for two."""
    (rows, columns), kernel = grid, {}
    for a in range(rows):
        for b in range(columns):
            total = 0
            for (u, v), w in gate.items():
                angle = 2 * math.pi * (u * a / rows + v * b / columns)
                times = 1 if 2 * v in (0, columns) else 2
                total = total + times * (w.real * math.cos(angle) - w.imag * math.sin(angle))
            kernel[a, b] = total / (rows * columns)
    return kernel


@against(Spectral, examples=24)
def test_oracle(component, x, layout, keys):
    """The circular convolution of what exists with the inverse transform of W, place by place."""
    (rows, columns), p = layout.grid, layout.prefix
    kernel = kernel_of(stretched(gate_of(component), component.grid, layout.grid), layout.grid)
    out = [x[:, i] for i in range(p)]
    there = keys[:, p:, None]
    image = torch.where(there, x[:, p:], 0.0)
    for y in range(rows):
        for z in range(columns):
            taps = [
                k * image[:, (y - a) % rows * columns + (z - b) % columns] for (a, b), k in kernel.items()
            ]
            out.append(sum(taps))
    return torch.stack(out, 1)


def mixed(
    part,
    x,
    mask,
    layout,
    norm="ortho",
    dims=(1, 2),
    gate=lambda w: w,
    special=lambda t: t,
    round_=True,
    odd=True,
):
    """The equation with a fault."""
    wanted = tuple(layout.grid)
    w = torch.complex(*part.spectrum(wanted, x.dtype))
    if not round_ and wanted != part.grid:  # as if row y were not row 0 again
        same = nn.functional.interpolate
        parts = torch.stack(part.spectrum(part.grid, x.dtype)).movedim(-1, 1)
        parts = same(parts, (wanted[0], wanted[1] // 2 + 1), mode="bicubic", align_corners=True).movedim(
            1, -1
        )
        w = torch.complex(*parts)
    known = x if mask.keys is None else x * mask.keys[..., None]
    image = known[:, layout.prefix :].unflatten(1, layout.grid)
    if len(dims) == 1:
        waves = torch.fft.rfft(image, dim=2, norm="ortho") * gate(w)
        image = torch.fft.irfft(waves, n=layout.grid[1], dim=2, norm="ortho")
    else:
        waves = torch.fft.rfft2(image, dim=dims, norm="ortho") * gate(w)
        rows, columns = layout.grid
        back = (rows, columns if odd or columns == 1 else columns // 2 * 2)  # PyTorch's own guess
        image = torch.fft.irfft2(waves, s=back, dim=dims, norm=norm)
    return torch.cat([special(x[:, : layout.prefix]), image.flatten(1, 2)], 1)


def with_fault(**fault):
    """The gate with one fault."""
    return wrong(Spectral, mix=lambda self, x, source, *, mask, layout: mixed(self, x, mask, layout, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=20).ok


MUTANTS = {
    "W conjugated": with_fault(gate=torch.conj),
    "the real part alone": with_fault(gate=lambda w: w.real),
    "rows of W turned": with_fault(gate=lambda w: w.flip(0)),
    "W twice": with_fault(gate=lambda w: w * w),
    "another scale back": with_fault(norm="backward"),
    "columns only": with_fault(dims=(2,)),
    "an odd column lost": with_fault(odd=False),
    "rows of W that end": with_fault(round_=False),
    "special tokens lost": with_fault(special=torch.zeros_like),
    "the mask ignored": wrong(
        Spectral, mix=lambda self, x, source, *, mask, layout: mixed(self, x, Mask(), layout)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def filled(grid, real, imag=0.0, prefix=0, dim=3) -> Spectral:
    """A gate that is one number everywhere."""
    part = Spectral(at(grid, prefix, dim)).double()
    nn.init.constant_(part.real, real)
    nn.init.constant_(part.imag, imag)
    return part


# By hand


def test_hand_two_tokens():
    """(3, 1) = 2 + 1 · (1, -1): doubled and tripled, 4 + 3 · (1, -1)."""
    part = Spectral(at((1, 2), dim=1)).double()
    with torch.no_grad():
        part.real.copy_(torch.tensor([[2.0], [3.0]]))
    near(part(torch.tensor([[[3.0], [1.0]]]).double(), layout=Layout((1, 2))), [7, 1])


def test_hand_a_wave_turned_by_a_quarter():
    """W = -i at the first frequency of four makes a sine of a cosine."""
    part = Spectral(at((1, 4), dim=1)).double()
    with torch.no_grad():
        part.real.zero_()
        part.imag.fill_(-1)
    assert part.imag.shape == (1, 1)
    near(part(torch.tensor([1.0, 0, -1, 0]).double().reshape(1, 4, 1), layout=Layout((1, 4))), [0, 1, 0, -1])


@pytest.mark.parametrize("grid,own", [((14, 14), 4), ((7, 7), 1), ((6, 5), 2), ((5, 6), 2), ((1, 1), 1)])
def test_hand_parameters(grid, own):
    """2 y (x // 2 + 1) c, without the imaginary parts of bins that are their own mirror."""
    assert count(Spectral(at(grid, dim=8))) == 8 * (2 * grid[0] * (grid[1] // 2 + 1) - own)


@pytest.mark.parametrize(
    ("size", "theirs", "dim"),
    [
        ("tiny", 9_158_376, 256),
        ("xs", 20_028_520, 384),
        ("small", 32_449_768, 384),
        ("base", 57_159_656, 512),
    ],
)
def test_hand_parameters_of_the_authors_models(size, theirs, dim):
    """What the authors' logs say, less the imaginary parts of four bins in each of four spectral blocks."""
    assert compose_file(f"spectformer_{size}").loaded.recipe.expect.params == theirs - 4 * 4 * dim


def test_hand_it_starts_small():
    part = Spectral(at((14, 14), dim=64))
    for parameter in part.parameters():
        assert 0.019 < parameter.detach().std() < 0.021 and parameter.detach().mean().abs() < 1e-3


# Identities


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (5, 2), (1, 6), (6, 1)])
def test_identity_a_gate_of_one_changes_nothing(grid):
    """On a grid of another size, too."""
    part, x = filled(grid, 1.0, prefix=1), normal(2, math.prod(grid) + 1, 3)
    near(part(x, layout=Layout(grid, 1)), x)
    other = Layout((grid[0] + 3, grid[1] + 2), 1)
    x = normal(2, other.length, 3)
    near(part(x, layout=other), x)


@pytest.mark.parametrize("grid", [(4, 6), (3, 5)])
def test_identity_circular_shifts(grid):
    part, x = spread(Spectral(at(grid))), normal(2, *grid, 3)
    out = part(x.flatten(1, 2), layout=Layout(grid)).reshape(x.shape)
    moved = part(x.roll((1, 2), (1, 2)).flatten(1, 2), layout=Layout(grid)).reshape(x.shape)
    near(moved, out.roll((1, 2), (1, 2)))


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (5, 4)])
def test_identity_a_circular_convolution(grid):
    """PyTorch's depthwise convolution of the map, repeated beyond its borders, with irfft2(W), the scale unsplit."""
    part, x = spread(Spectral(at(grid))), normal(2, 3, *grid)
    kernel = torch.fft.irfft2(torch.complex(*part.spectrum(grid, torch.float64)), s=grid, dim=(0, 1))
    kernel = kernel.permute(2, 0, 1)[:, None].flip(2, 3)  # PyTorch correlates
    wide = nn.functional.pad(x, (grid[1] - 1, 0, grid[0] - 1, 0), mode="circular")
    wanted = nn.functional.conv2d(wide, kernel, groups=3).flatten(2).mT
    near(part(x.flatten(2).mT, layout=Layout(grid)), wanted)


def test_identity_it_is_linear_and_real():
    part, (x, z) = spread(Spectral(at((4, 5), 1))), normal(2, 2, 21, 3)
    both, (one, other) = (
        part(2 * x - 3 * z, layout=Layout((4, 5), 1)),
        (part(t, layout=Layout((4, 5), 1)) for t in (x, z)),
    )
    near(both, 2 * one - 3 * other)
    assert not both.is_complex()


def test_identity_what_is_not_stored_has_no_say():
    """The authors store every imaginary part: those of bins that are their own mirror change no output."""
    part, x = spread(Spectral(at((4, 6)))), normal(1, 4, 6, 3)
    gate, out = (
        torch.complex(*part.spectrum((4, 6), torch.float64)),
        part(x.flatten(1, 2), layout=Layout((4, 6))),
    )
    for u in (0, 2):
        for v in (0, 3):
            gate[u, v] += 5j
    waves = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * gate
    near(torch.fft.irfft2(waves, s=(4, 6), dim=(1, 2), norm="ortho").flatten(1, 2), out)


def test_special_tokens_neither_change_nor_say_anything():
    part, (x, other) = spread(Spectral(at((3, 4), 2))), normal(2, 2, 14, 3)
    out = part(x, layout=Layout((3, 4), 2))
    near(out[:, :2], x[:, :2])
    moved = part(torch.cat([other[:, :2], x[:, 2:]], 1), layout=Layout((3, 4), 2))
    near(moved[:, 2:], out[:, 2:])


def test_what_is_padded_may_hold_anything():
    part, x = spread(Spectral(at((3, 4)))), normal(1, 12, 3)
    keys = torch.arange(12)[None] < 9
    zeros, nans = (
        part(x.masked_fill(~keys[..., None], v), mask=Mask(keys=keys), layout=Layout((3, 4)))
        for v in (0.0, math.nan)
    )
    near(nans, zeros)
    near(zeros, part(x.masked_fill(~keys[..., None], 0.0), layout=Layout((3, 4))))


def test_narrow_numbers_stay_near():
    narrow(Spectral, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))))
