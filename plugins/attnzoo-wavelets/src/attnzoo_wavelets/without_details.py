"""Attention that does not tell neighbours apart."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from attnzoo import Fraction, InstrumentCard, Intervention

from attnzoo_wavelets.transform import analyse, synthesise


@dataclass(kw_only=True, eq=False)
class WithoutDetails(Intervention):
    """A_i ← A_i − strength · (its finest details over the grid of keys): two by two keys share what they get.

    Rows keep their sums, and what a row gives to special tokens stays.

    Args:
        strength: 0 changes nothing, 1 leaves no details.
    """

    card = InstrumentCard(
        "without_details",
        "Let attention maps lose their finest details over the grid.",
        equation="A ← A − s · details(A)",
        needs={"image"},
    )
    neutral: ClassVar = {"strength": 0.0}
    strength: Fraction = 1.0

    def edit_weights(self, weights, here):
        prefix, grid = here.layout.prefix, here.layout.grid
        maps = weights[..., prefix:].unflatten(-1, grid)  # (b h n y x)
        dims = range(3, maps.ndim)
        coarse, details = analyse(maps, dims, 1)
        kept = synthesise(coarse, [[(1 - self.strength) * band for band in details[0]]], dims)
        return torch.cat([weights[..., :prefix], kept.flatten(3)], dim=-1)
