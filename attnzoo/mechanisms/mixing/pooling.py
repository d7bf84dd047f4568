"""Pooling of PoolFormer: each token receives the mean of its neighbours, less itself.

Yu et al., "MetaFormer Is Actually What You Need for Vision", 2022, arXiv:2111.11418, §3.2, eq. 4.
"""

from typing import Literal

import torch
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, Paper, Site


class Pooling(Mechanism):
    """mean of x over a size × size window around each token, - x: nothing is learned.

    Args:
        site: Where the mechanism is put.
        size: Side of the window, in tokens.
        subtract: Whether the token itself is taken off, for a host that adds it again.
    """

    card = Card(
        name="pooling",
        family=Family.MIXING,
        summary="PoolFormer: the mean of the neighbours, less the token itself; nothing is learned.",
        equation="mean(x_{ρ(i)}) − x_i\nρ(i) = window around i",
        paper=Paper(
            "MetaFormer Is Actually What You Need for Vision",
            "Yu et al.",
            2022,
            "arXiv:2111.11418",
            where="§3.2, eq. 4",
        ),
        time="n c",
        memory="n c",
        params="0",
        flops="0",
        masks={"keys"},
        grid=2,
        laws={Law.LOCAL},
        notes="At the border the mean is of the tokens that there are, as in the authors' code. Special tokens have no "
        "neighbours: they are means of themselves, and `subtract` leaves zero of them.",
    )

    def __init__(self, site: Site, *, size: Literal[3, 5, 7, 9] = 3, subtract: bool = True):
        super().__init__(site)
        self.size, self.subtract = size, subtract

    def reach(self) -> int:
        return self.size // 2

    def mix(self, x, source, *, mask, layout):
        p = layout.prefix
        image = layout.to_grid(x[:, p:])  # (b c y x)
        if mask.keys is None:
            mean = F.avg_pool2d(image, self.size, 1, self.size // 2, count_include_pad=False)
        else:
            there = layout.to_grid(mask.keys[:, p:, None])
            total = F.avg_pool2d(image.masked_fill(~there, 0.0), self.size, 1, self.size // 2)
            share = F.avg_pool2d(there.to(x.dtype), self.size, 1, self.size // 2)
            mean = total / torch.where(share > 0, share, 1.0)  # of nobody: zero
        out = layout.from_grid(x[:, :p], mean)
        return out - x if self.subtract else out
