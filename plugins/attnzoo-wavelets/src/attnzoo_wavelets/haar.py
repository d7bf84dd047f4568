"""Token mixing by a Haar wavelet transform along the grid."""

import torch
from attnzoo.core import Card, Family, Law, Mechanism, Paper, PositiveInt, Site
from torch import nn

from attnzoo_wavelets.transform import analyse, synthesise


class Haar(Mechanism):
    """W Hᵀ (g ⊙ H x) + b: to the wavelet domain, a gain per resolution and channel, back, and a projection.

    At first the approximation is kept and the details are weighed from 0 in the first channel to 1 in the last, so
    that the channels see the grid at all degrees of smoothness.

    Args:
        site: Where the mechanism is put; its grid bounds the number of levels.
        levels: Number of resolutions: level l tells blocks of 2^l tokens a side from their halves. Levels for which
            the site's grid is too small are left out.
    """

    card = Card(
        name="haar",
        family=Family.MIXING,
        summary="Learned gains in the domain of a Haar wavelet transform along the grid.",
        equation="W Hᵀ (g ⊙ H x) + b",
        paper=Paper("A Theory for Multiresolution Signal Decomposition: The Wavelet Representation", "Mallat",
                    1989, "doi:10.1109/34.192463", where="the pyramid; gains and projection are ours"),
        time="n c²",
        memory="n c",
        masks={"keys"},
        grid="any",
        honours={"proj_bias"},
        laws={Law.LOCAL},
        fidelity="inspired",
        notes="The last token of an odd side joins the next coarser level as it is. Special tokens receive the mean "
        "of the grid, with the approximation's gain; grid tokens do not see them. Tokens that do not exist count as "
        "zero, and not in the mean.",
    )  # fmt: skip

    def __init__(self, site: Site, *, levels: PositiveInt = 3):
        super().__init__(site)
        self.levels = levels
        # a side s is one token after ⌈log₂ s⌉ levels
        useful = min(levels, (max(site.layout.grid) - 1).bit_length())
        # the approximation, then details, finest first
        self.gain = nn.Parameter(torch.empty(1 + useful, site.dim))
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)
        self.init_weights()

    def init_weights(self) -> None:
        """1 for the approximation, 0 to 1 over the channels for the details."""
        with torch.no_grad():
            self.gain[0] = 1
            self.gain[1:] = torch.linspace(0, 1, self.gain.shape[1])

    def no_weight_decay(self) -> set[str]:
        return {"gain"}

    def reach(self) -> int:
        return 2**self.levels - 1  # blocks do not overlap

    def mix(self, x, source, *, mask, layout):
        prefix, grid = layout.split(x)
        if mask.keys is None:
            mean = grid.mean(dim=1, keepdim=True)
        else:
            there = mask.keys[:, layout.prefix :, None]
            grid = grid * there
            count = there.sum(dim=1, keepdim=True).clamp(min=1)  # of nothing: zero
            mean = grid.sum(dim=1, keepdim=True) / count
        smoothed = self._weigh(layout.to_grid(grid))
        return self.proj(layout.from_grid(prefix + self.gain[0] * mean, smoothed))

    def _weigh(self, grid):
        """Hᵀ (g ⊙ H x) for a grid, channels first, (b c *grid)."""
        dims = range(2, grid.ndim)
        coarse_gain, *gains = self.gain.unflatten(1, (-1, *[1] * len(dims)))  # (c 1 ... 1) each
        coarse, details = analyse(grid, dims, len(gains))
        weighed = [[gain * band for band in bands] for gain, bands in zip(gains, details, strict=True)]
        return synthesise(coarse_gain * coarse, weighed, dims)
