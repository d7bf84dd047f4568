"""ULSAM: groups of channels each learn one map of where to look, and are emphasised by it.

Saini et al., "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks", WACV 2020,
arXiv:2006.15102, §3, eq. 1-4.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import masked_softmax


class PlaceNorm(nn.Module):
    """γ (t - μ) / σ + β, with mean and deviation of each channel over the places of its own sample that exist.

    Args:
        channels: How many.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, t, there):
        """(b c y x), normalised; `there` (b 1 y x) says which places exist, None that all do."""
        if there is None:
            var, mean = torch.var_mean(t, dim=(2, 3), correction=0, keepdim=True)
        else:
            number = there.sum(dim=(2, 3), keepdim=True).clamp(min=1)
            mean = t.masked_fill(~there, 0.0).sum(dim=(2, 3), keepdim=True) / number
            var = (t - mean).square().masked_fill(~there, 0.0).sum(dim=(2, 3), keepdim=True) / number
        normed = (t - mean) * torch.rsqrt(var + 1e-5)
        return normed * self.gain[:, None, None] + self.shift[:, None, None]


class Ulsam(Mechanism):
    """x ⊙ (1 + A), A = softmax over places of PW(maxpool(DW(x))) for each of k groups of channels.

    DW scales each channel, the maximum is over 3 × 3 places, PW sums the channels of a group.

    Args:
        site: Where the mechanism is put.
        groups: k, how many groups; must divide the channels. None takes 4, or the most of 2 and 1 that divides.
        norm: `none` is the paper's equation; `places` normalises and rectifies what DW and PW give, over the places of
            a sample where the authors' code takes those of the batch.

    Raises:
        OptionError: AZ214, when the groups do not divide the channels.
    """

    card = Card(
        name="ulsam",
        family=Family.CHANNEL,
        summary="Each group of channels is emphasised by one map over the grid, from a maximum and 1 × 1 convolutions.",
        equation="x ⊙ (1 + A)\nA = softmax(PW(maxpool(DW(x))))",
        paper=Paper(
            "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
            "Saini et al.",
            2020,
            "arXiv:2006.15102",
            where="§3, eq. 1-4",
        ),
        time="n c",
        memory="n c",
        params="2 * c + (norm == 'places') * 2 * (c + (groups or max(k for k in (1, 2, 4) if c % k == 0)))",
        flops="4 * (n - p) * c",
        masks={"keys"},
        grid=2,
        taps={"weights": "b k m"},
        laws={Law.STOCHASTIC},
        notes="Special tokens have no place on the grid: their weights are 0, and they come out as they went in. "
        "`norm: places` is adapted from the authors' code, whose batch norms would make samples depend on each other; "
        "biases that a norm or the softmax would cancel are left out. On a large grid weights are about 1 / n, and the "
        "output hardly differs from the input.",
    )

    @classmethod
    def claims(cls, *, norm: str, **options) -> Card:
        return cls.card if norm == "none" else replace(cls.card, fidelity="adapted")

    def __init__(
        self, site: Site, *, groups: PositiveInt | None = None, norm: Literal["none", "places"] = "none"
    ):
        super().__init__(site)
        groups = groups or math.gcd(4, site.dim)
        if site.dim % groups:
            raise OptionError(
                f"`ulsam`: {groups} groups do not divide {site.dim} channels",
                help=f"choose one of {', '.join(str(g) for g in range(1, site.dim + 1) if site.dim % g == 0)}",
            )
        self.scale = nn.Conv2d(site.dim, site.dim, 1, groups=site.dim, bias=False)  # DW
        self.point = nn.Conv2d(site.dim, groups, 1, groups=groups, bias=False)  # PW
        self.scale_norm = PlaceNorm(site.dim) if norm == "places" else None
        self.point_norm = PlaceNorm(groups) if norm == "places" else None
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)

    def mix(self, x, source, *, mask, layout):
        p, there, allowed = layout.prefix, None, None
        if mask.keys is not None:
            allowed = mask.keys[:, None, p:]
            there = allowed.unflatten(2, layout.grid)  # (b 1 y x)
        image = self.scale(layout.to_grid(x[:, p:]))
        if self.scale_norm is not None:
            image = self.scale_norm(image, there).relu()
        if there is not None:
            image = image.masked_fill(~there, float("-inf"))
        image = self.pool(image)
        if there is not None:  # nobody may be near; such a place has no weight
            image = image.masked_fill(~there, 0.0)
        maps = self.point(image)  # (b k y x)
        if self.point_norm is not None:
            maps = self.point_norm(maps, there).relu()
        weights = masked_softmax(maps.flatten(2), allowed)
        weights = self.weights(nn.functional.pad(weights, (p, 0)))  # (b k n)
        return x + x * weights.repeat_interleave(x.shape[-1] // weights.shape[1], dim=1).mT
