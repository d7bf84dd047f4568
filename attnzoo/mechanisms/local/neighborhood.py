"""Neighborhood attention, generalised: window, stride, dilation, causal windows.

Hassani et al., "Neighborhood Attention Transformer", 2023, arXiv:2204.07143, §3.1; "Generalized Neighborhood
Attention: Multi-dimensional Sparse Attention at the Speed of Light", 2025, arXiv:2504.16922, §3; dilation as in
arXiv:2209.15001.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnzoo.core import Card, Family, Head, Law, Layout, Paper, PositiveInt, Site
from attnzoo.functional import Windows, attention_from_scores, dot_product_attention, neighbours
from attnzoo.functional.neighbours import by_way, each, tiled_attention, tiles_save, windows_along


class Neighborhood(Head):
    """Each grid token attends to the window around it on the grid; special tokens attend to all and are seen by all.

    Each option is one for all dimensions of the grid, or a list with one for each.

    Args:
        site: Where the head is put.
        window: Side of the window, in tokens; a shorter grid side is seen whole.
        stride: Neighbouring queries that share a window, in tokens; the window gives blocked attention.
        dilation: Step between the tokens of a window, in tokens.
        causal: Whether windows end with their query.
        bias: Whether a table by the way from query to key, in steps of the dilation, is added to the scores, as in the
            first paper; to and from special tokens nothing is.

    Raises:
        OptionError: AZ214, when the stride is longer than the window, or a list has not one for each dimension.
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
        params="h * prod(near if past[i] else 2 * near - 1 for axes in [len(sides)] "
        "for w, step, past in [(each(window, axes), each(dilation, axes), each(causal, axes))] "
        "for i in range(axes) for near in [min(w[i], ceil(sides[i] / step[i]))]) if bias else 0",
        flops="sum(4 * (n * n if 2 * asking * asked >= (n - p)**2 else asking * (p + asked) + p * n) * c "
        "for axes in [len(sides)] for tile in [round(64 ** (1 / axes))] "
        "for w, t, step in [(each(window, axes), each(stride, axes), each(dilation, axes))] "
        "for asking in [prod(step[i] * ceil(ceil(sides[i] / step[i]) / tile) * tile for i in range(axes))] "
        "for asked in [prod(min(ceil(sides[i] / step[i]), w[i] + tile + t[i] - 2) for i in range(axes))])",
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
        "taps, masks of pairs, small grids and `bias` ask for. The first paper has a `bias`, the second none; it "
        "is smaller where the grid that it is built for is, and on a larger one its ends stand for what is farther.",
    )

    @classmethod
    def claims(cls, *, stride: int | list[int], bias: bool, **options) -> Card:
        lists = [one for one in (stride, *options.values()) if isinstance(one, list)]
        card = replace(cls.card, grid=len(lists[0])) if lists else cls.card
        card = replace(card, flops="4 * n * n * c") if bias else card
        return card if {*each(stride, 1)} == {1} else replace(card, laws=card.laws - {Law.SHIFT_EQUIVARIANT})

    def __init__(
        self,
        site: Site,
        *,
        window: PositiveInt | list[PositiveInt] = 7,
        stride: PositiveInt | list[PositiveInt] = 1,
        dilation: PositiveInt | list[PositiveInt] = 1,
        causal: bool | list[bool] = False,
        bias: bool = False,
    ):
        super().__init__(site)
        self.window, self.stride, self.dilation, self.causal = window, stride, dilation, causal
        table = [side.ways for side in self.along(site.layout)]
        self.bias = nn.Parameter(torch.empty(site.heads, *table)) if bias else None
        self.init_weights()

    def init_weights(self) -> None:
        """The table from N(0, 0.02²), cut at two of its deviations."""
        if self.bias is not None:
            nn.init.trunc_normal_(self.bias, std=0.02, a=-0.04, b=0.04)

    def no_weight_decay(self) -> set[str]:
        return set() if self.bias is None else {"bias"}

    def reach(self) -> int:
        axes = max(len(each(one, 1)) for one in (self.window, self.dilation))
        along = zip(each(self.window, axes), each(self.dilation, axes), strict=True)
        return max((window - 1) * step for window, step in along)  # at a border the window lies to one side

    def along(self, layout: Layout) -> list[Windows]:
        """The windows of each dimension."""
        return windows_along(layout.grid, self.window, self.stride, self.dilation, self.causal)

    def neighbours(self, layout: Layout, device: torch.device) -> Bool[Tensor, "1 1 n n"]:
        """Who sees whom."""
        return neighbours(self.along(layout), layout, device)

    def ways(self, layout: Layout, table: Tensor) -> Float[Tensor, "h n n"]:
        """What the table holds for the way from each token to each other."""
        return by_way(table, self.along(layout), layout)

    def attend(self, q, k, v, *, mask, layout):
        sides, watched = self.along(layout), self.scores.watched or self.weights.watched
        if not watched and mask.pairs is None and self.bias is None and tiles_save(sides):
            return tiled_attention(self, q, k, v, mask, layout, sides)
        pairs = self.neighbours(layout, q.device)
        mask = replace(mask, pairs=pairs if mask.pairs is None else pairs & mask.pairs)
        if self.bias is None:
            return dot_product_attention(self, q, k, v, mask)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT + self.ways(layout, self.bias).to(q.dtype)
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        return attention_from_scores(self, scores, v, allowed)
