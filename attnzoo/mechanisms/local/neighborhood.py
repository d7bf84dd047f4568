"""Neighborhood attention, generalised: window, stride, dilation, causal windows.

Hassani et al., "Neighborhood Attention Transformer", 2023, arXiv:2204.07143, §3.1; "Generalized Neighborhood
Attention: Multi-dimensional Sparse Attention at the Speed of Light", 2025, arXiv:2504.16922, §3; dilation as in
arXiv:2209.15001.
"""

from dataclasses import replace
from functools import reduce

import torch
from jaxtyping import Bool
from torch import Tensor

from attnzoo.core import Card, Family, Head, Law, Layout, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import dot_product_attention


def windows(length: int, window: int, stride: int, dilation: int, causal: bool) -> Bool[Tensor, "n n"]:
    """Who sees whom along one dimension: a boolean (length, length).

    Tokens with equal index modulo the dilation form a group; inside a group, queries of one stride share the window of
    their leader. A window always holds `window` keys: it is shifted, not cut, at the ends (causal windows are cut).

    Args:
        length: Tokens along the dimension.
        window: Side of the window, in tokens of a group; the whole group where that is shorter.
        stride: Neighbouring queries that share a window.
        dilation: Step between the tokens of a group.
        causal: Whether a window ends with its query.
    """
    i = torch.arange(length)
    a, group = i // dilation, i % dilation
    members = (length - group + dilation - 1) // dilation  # tokens in the group of i
    side = members.clamp(max=window)
    if causal:
        leader = torch.minimum(a // stride * stride + stride - 1, members - 1)
        start, end = (leader - side + 1).clamp(min=0), a + 1
    else:
        leader = torch.minimum(a // stride * stride + stride // 2, members - 1)
        start = torch.minimum((leader - side // 2).clamp(min=0), members - side)
        end = start + side
    return (group[:, None] == group) & (a >= start[:, None]) & (a < end[:, None])


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
        paper=Paper(
            "Neighborhood Attention Transformer",
            "Hassani et al.",
            2023,
            "arXiv:2204.07143",
            where="§3.1; strides and causal windows: arXiv:2504.16922, §3",
        ),
        time="n m c",
        memory="h n m",
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
        notes="Computed as dense attention under a window mask: it saves nothing over softmax here.",
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

    def neighbours(self, layout: Layout, device: torch.device) -> Bool[Tensor, "1 1 n n"]:
        """Who sees whom: the conjunction over dimensions, special tokens added."""
        sides = [
            windows(side, self.window, self.stride, self.dilation, self.causal).to(device)
            for side in layout.grid
        ]
        grid = reduce(lambda outer, inner: torch.kron(outer, inner), sides)  # row-major, as tokens are
        seen = torch.ones(layout.length, layout.length, dtype=torch.bool, device=device)
        seen[layout.prefix :, layout.prefix :] = grid
        return seen[None, None]

    def attend(self, q, k, v, *, mask, layout):
        pairs = self.neighbours(layout, q.device)
        mask = replace(mask, pairs=pairs if mask.pairs is None else pairs & mask.pairs)
        return dot_product_attention(self, q, k, v, mask)
