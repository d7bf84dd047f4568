"""How fine the differences between tokens are, layer by layer."""

from dataclasses import dataclass

import torch
from attnzoo import Finding, InstrumentCard, PositiveInt, Probe

from attnzoo_wavelets.transform import analyse


@dataclass(kw_only=True, eq=False)
class BandEnergy(Probe):
    """Share of ‖x‖² of the grid tokens behind each block that lies in the details of a level of the Haar pyramid.

    The transform is orthonormal, so the shares of all levels and of the coarsest approximation sum to 1.

    Args:
        levels: Number of resolutions.
    """

    card = InstrumentCard(
        "band_energy",
        "How fine the differences between the tokens of an image are, layer by layer.",
        equation="‖details_l‖² / ‖x‖²",
        needs={"image"},
    )
    levels: PositiveInt = 2

    def measure(self, subject):
        layout, totals = subject.layout, {}
        for _, recorded, _ in subject.recorded("block"):
            for (_, leaf), tokens in recorded.items():
                grid = layout.to_grid(layout.split(tokens)[1])  # (b c y x)
                coarse, details = analyse(grid, range(2, grid.ndim), self.levels)
                energy = [coarse.square().sum(), *(sum(b.square().sum() for b in bands) for bands in details)]
                totals[leaf] = totals.get(leaf, 0) + torch.stack(energy)
        names = ["coarse", *(f"level_{i}" for i in range(1, self.levels + 1))]
        rows = []
        for leaf, energy in totals.items():
            shares = (energy / energy.sum()).tolist()
            rows.append({"site": leaf.site} | dict(zip(names, shares, strict=True)))
        return Finding.of(rows, shows="coarse")
