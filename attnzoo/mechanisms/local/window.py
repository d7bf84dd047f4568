"""Window attention: tokens attend within windows of the grid, which every other layer shifts.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021, arXiv:2103.14030, §3.2.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Head, Law, Paper, PositiveInt, Site
from attnzoo.functional import relative_bias
from attnzoo.functional.groups import Groups, attend_in_groups


class Window(Head):
    """softmax(q kᵀ / √d + B) v within windows of M × M tokens, B a table by the way from key to query.

    Args:
        site: Where the head is put.
        window: M, the side of a window in tokens; a shorter side of the grid is one window.
        shift: By M / 2, rounded down, along both sides: in no layer, in each (`half`), or in odd ones (`alternate`,
            the paper's), counted from 0. A side that is one window is not shifted.
        bias: Whether there is a table B.
    """

    card = Card(
        name="window",
        family=Family.LOCAL,
        summary="Swin: attention within windows of the grid, shifted in every other layer, by relative position.",
        equation="softmax(q kᵀ / √d + B) v within windows",
        paper=Paper(
            "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
            "Liu et al.",
            2021,
            "arXiv:2103.14030",
            where="§3.2, eq. 4",
        ),
        time="n w c",
        memory="h n w + n c",
        params="h * (2 * window - 1)**2 if bias else 0",
        flops="4 * prod(ceil(s / min(window, s)) * min(window, s) for s in sides) "
        "* (p + prod(min(window, s) for s in sides)) * c + 4 * p * n * c",
        masks={"keys", "causal", "pairs"},
        grid=2,
        taps={"scores": "b h x w", "weights": "b h x w"},
        laws={Law.STOCHASTIC, Law.LOCAL, Law.LINEAR_IN_VALUES, Law.BOUNDED, Law.HEADS_APART},
        notes="A grid that windows do not divide is filled up with tokens that do not exist. What a shift brings "
        "together across an edge is hidden exactly, where the authors' code lowers scores by 100. Special tokens, "
        "which are ours, are keys of all windows and attend to all, without B. On a side shorter than a window the "
        "outer rows of B have no say. Taps show the rows of the grid: special tokens, then the window.",
    )

    @classmethod
    def claims(cls, *, shift: str, **options) -> Card:
        where = {"none": "No layer is", "half": "Each layer is", "alternate": "Odd layers are"}[shift]
        return replace(cls.card, notes=f"{where} shifted. {cls.card.notes}")

    def __init__(
        self,
        site: Site,
        *,
        window: PositiveInt = 7,
        shift: Literal["none", "half", "alternate"] = "alternate",
        bias: bool = True,
    ):
        super().__init__(site)
        self.window, self.shifted = window, shift == "half" or (shift == "alternate" and site.layer % 2 == 1)
        side = 2 * window - 1
        self.bias = nn.Parameter(torch.empty(site.heads, side, side)) if bias else None
        self.init_weights()

    def init_weights(self) -> None:
        """The table from N(0, 0.02²), cut at two of its deviations."""
        if self.bias is not None:
            nn.init.trunc_normal_(self.bias, std=0.02, a=-0.04, b=0.04)

    def no_weight_decay(self) -> set[str]:
        return set() if self.bias is None else {"bias"}

    def reach(self) -> int:
        return self.window - 1

    def attend(self, q, k, v, *, mask, layout):
        y, x = layout.grid
        i, j = min(self.window, y), min(self.window, x)
        shift = (i // 2 if self.shifted and i < y else 0, j // 2 if self.shifted and j < x else 0)
        groups, taps = Groups((y, x), (i, j), shift), (self.scores, self.weights)
        bias = None if self.bias is None else relative_bias(self.bias, (i, j))
        return attend_in_groups(q, k, v, groups=groups, mask=mask, prefix=layout.prefix, taps=taps, bias=bias)
