"""Neighborhood attention, generalised: window, stride, dilation, causal windows.

Hassani et al., "Neighborhood Attention Transformer", 2023, arXiv:2204.07143, §3.1; "Generalized Neighborhood
Attention: Multi-dimensional Sparse Attention at the Speed of Light", 2025, arXiv:2504.16922, §3; dilation as in
arXiv:2209.15001.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from attnzoo.core import Card, Family, Head, Law, Layout, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import Windows, dot_product_attention, neighbours, tiled_attention, tiles_save


class Neighborhood(Head):
    """Each grid token attends to the window around it on the grid; special tokens attend to all and are seen by all.

    Args:
        site: Where the head is put.
        window: Side of the window, in tokens; a shorter grid side is seen whole.
        stride: Neighbouring queries that share a window, in tokens; the window gives blocked attention.
        dilation: Step between the tokens of a window, in tokens.
        causal: Whether windows end with their query, along every dimension.

    Raises:
        OptionError: AZ214, when the stride is longer than the window.
    """

    card = Card(
        name="neighborhood",
        family=Family.LOCAL,
        summary="Each token attends to the window around it on the grid; the window shifts at the borders.",
        equation="softmax(q_i k_{ρ(i)}ᵀ / √d) v_{ρ(i)}\nρ(i) = window around i",
        paper=Paper(
            "Neighborhood Attention Transformer",
            "Hassani et al.",
            2023,
            "arXiv:2204.07143",
            where="§3.1; strides and causal windows: arXiv:2504.16922, §3",
        ),
        time="n m c",
        memory="h n m",
        params="0",
        flops="sum(4 * (n * n if 2 * asking * asked >= (n - p)**2 else asking * (p + asked) + p * n) * c "
        "for tile in [round(64 ** (1 / len(sides)))] "
        "for asking in [prod(dilation * ceil(ceil(s / dilation) / tile) * tile for s in sides)] "
        "for asked in [prod(min(ceil(s / dilation), window + tile + stride - 2) for s in sides)])",
        masks={"keys", "causal", "pairs"},
        grid="any",
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={
            Law.STOCHASTIC,
            Law.LOCAL,
            Law.SHIFT_EQUIVARIANT,
            Law.LINEAR_IN_VALUES,
            Law.BOUNDED,
            Law.HEADS_APART,
        },
        notes="While nobody watches its taps, tiles of 64 neighbouring queries look at the keys that one of them sees, "
        "at a cost linear in the tokens. `time` and `memory` are those of the dense form under a window mask, which "
        "taps, masks of pairs and small grids ask for.",
    )

    @classmethod
    def claims(cls, *, stride: int, **options) -> Card:
        return cls.card if stride == 1 else replace(cls.card, laws=cls.card.laws - {Law.SHIFT_EQUIVARIANT})

    def __init__(
        self,
        site: Site,
        *,
        window: PositiveInt = 7,
        stride: PositiveInt = 1,
        dilation: PositiveInt = 1,
        causal: bool = False,
    ):
        super().__init__(site)
        if stride > window:
            raise OptionError(
                f"`neighborhood`: a stride of {stride} is longer than the window of {window}",
                why="queries that share a window must lie inside it",
                help=f"choose a stride from 1 to {window}",
            )
        self.window, self.stride, self.dilation, self.causal = window, stride, dilation, causal

    def reach(self) -> int:
        return (self.window - 1) * self.dilation  # at a border the window lies to one side

    def along(self, layout: Layout) -> list[Windows]:
        """The windows of each dimension."""
        return [Windows(side, self.window, self.stride, self.dilation, self.causal) for side in layout.grid]

    def neighbours(self, layout: Layout, device: torch.device) -> Bool[Tensor, "1 1 n n"]:
        """Who sees whom."""
        return neighbours(self.along(layout), layout, device)

    def attend(self, q, k, v, *, mask, layout):
        sides, watched = self.along(layout), self.scores.watched or self.weights.watched
        if not watched and mask.pairs is None and tiles_save(sides):
            return tiled_attention(self, q, k, v, mask, layout, sides)
        pairs = self.neighbours(layout, q.device)
        mask = replace(mask, pairs=pairs if mask.pairs is None else pairs & mask.pairs)
        return dot_product_attention(self, q, k, v, mask)
