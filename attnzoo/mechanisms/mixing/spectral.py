"""Spectral gating: every channel is filtered by a learned gate on the frequencies of its map.

Patro et al., "SpectFormer: Frequency and Attention is what you need in a Vision Transformer", 2023,
arXiv:2304.06446, §3.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Mechanism, Paper, Site


class Spectral(Mechanism):
    """F⁻¹(W ⊙ F(x)), F the 2-D Fourier transform of each channel, W complex: a circular convolution over the grid.

    A real map has half a spectrum: W has (y, x // 2 + 1, c) bins for a grid of y × x.

    Args:
        site: Where the mechanism is put.
    """

    card = Card(
        name="spectral",
        family=Family.MIXING,
        summary="SpectFormer's gate: a learned filter on the frequencies of every channel's map.",
        equation="F⁻¹(W ⊙ F(x))",
        paper=Paper(
            "SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
            "Patro et al.",
            2023,
            "arXiv:2304.06446",
            where="§3, spectral block",
        ),
        time="n c log(n)",
        memory="n c",
        params="(2 * sides[0] * (sides[1] // 2 + 1) - prod(2 - s % 2 for s in sides)) * c",
        flops="0",
        masks={"keys"},
        grid=2,
        notes="Special tokens have no place on the grid: they come out as they went in, so where nothing else mixes, "
        "pool the mean. Tokens that do not exist are zeros of the map. Bins that are their own mirror image have no "
        "imaginary part, for no output depends on it; the authors store it. On another grid than it was built for, W "
        "is resized bicubically, of which the paper says nothing.",
    )

    def __init__(self, site: Site):
        super().__init__(site)
        self.grid = y, x = site.layout.grid
        bins = y * (x // 2 + 1)
        # bin (u, v) is its own mirror image where 2u and 2v are multiples of the sides; (0, 0) is the first of them
        every = [(u, v) for u in range(y) for v in range(x // 2 + 1)]
        own = [i for i, (u, v) in enumerate(every) if 2 * u % y == 0 and 2 * v % x == 0]
        self.runs = [after - before - 1 for before, after in pairwise([*own, bins])]
        self.real = nn.Parameter(torch.empty(bins, site.dim))
        self.imag = nn.Parameter(torch.empty(bins - len(own), site.dim))
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02²), as the authors' code."""
        nn.init.normal_(self.real, std=0.02)
        nn.init.normal_(self.imag, std=0.02)

    def spectrum(self, grid, dtype):
        """Real and imaginary part of W for a grid, (y x//2+1 c) each.

        Args:
            grid: Its sides; W is resized where they are not those that it was built for.
            dtype: Of the result.
        """
        real, imag = self.real.to(dtype), self.imag.to(dtype)
        zero = torch.zeros_like(real[:1])
        imag = torch.cat([part for run in imag.split(self.runs) for part in (zero, run)])
        parts = torch.stack([real, imag]).unflatten(1, (self.grid[0], -1))  # (2 y x//2+1 c)
        if grid != self.grid:
            # row y is row 0 again, and columns end at half a period: frequencies keep their place
            parts = torch.cat([parts, parts[:, :1]], dim=1).movedim(-1, 1)
            size = (grid[0] + 1, grid[1] // 2 + 1)
            parts = F.interpolate(parts, size, mode="bicubic", align_corners=True)
            parts = parts[:, :, :-1].movedim(1, -1)
        return parts[0], parts[1]

    def mix(self, x, source, *, mask, layout):
        _, tokens = layout.split(x if mask.keys is None else x.masked_fill(~mask.keys[..., None], 0.0))
        wide = torch.promote_types(x.dtype, torch.float32)  # the transform takes no half precision
        image = tokens.to(wide).unflatten(1, layout.grid)  # (b y x c)
        gate = torch.complex(*self.spectrum(tuple(layout.grid), wide))
        waves = torch.fft.rfft2(image, dim=(1, 2), norm="ortho") * gate
        image = torch.fft.irfft2(waves, s=layout.grid, dim=(1, 2), norm="ortho")
        return torch.cat([x[:, : layout.prefix], image.flatten(1, 2).to(x.dtype)], dim=1)
