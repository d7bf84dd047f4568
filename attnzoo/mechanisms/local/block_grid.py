"""Block and grid attention, of MaxViT: within blocks of neighbours, then between tokens that lie far apart.

Tu et al., "MaxViT: Multi-Axis Vision Transformer", 2022, arXiv:2204.01697, §3.1-3.2.
"""

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, Paper, PositiveInt, Site, Tap
from attnzoo.functional import merge_heads, rearrange, relative_bias
from attnzoo.functional.groups import Groups, attend_in_groups


def evenly(side: int, most: int) -> int:
    """How many rows a grid has that takes every s-th of a side, s the least for which that is not more than `most`."""
    return -(-side // -(-side // most))


class BlockGrid(Mechanism):
    """B + G, B = attention(x) within blocks of P × P tokens, G = attention(norm(x + B)) within grids of G × G tokens.

    A grid takes every y/G-th row and x/G-th column, so that all grids together cover the map. Both attentions are
    W softmax(q kᵀ / √d + table) v, the table by the way from key to query in steps of the block or the grid.

    Args:
        site: Where the mechanism is put.
        block: P, the side of a block; a shorter side of the map that it is built for is one block.
        across: G, how many rows and columns a grid takes at most; of a shorter side all.
        bias: Whether there are tables.
    """

    card = Card(
        name="block_grid",
        family=Family.LOCAL,
        summary="MaxViT: attention within blocks of neighbours, then within grids of tokens that lie far apart.",
        equation="B + G\n"
        "B = attention(x) within blocks,  G = attention(norm(x + B)) within grids\n"
        "attention(x) = W softmax(q kᵀ / √d + table) v",
        paper=Paper(
            "MaxViT: Multi-Axis Vision Transformer", "Tu et al.", 2022, "arXiv:2204.01697", where="§3.1-3.2"
        ),
        time="n w c + n c c",
        memory="h n w + n c",
        params="8 * c * c + 2 * (3 * qkv_bias + proj_bias + 1) * c + (h * (prod(2 * min(block, s) - 1 for s in sides) "
        "+ prod(2 * ceil(s / ceil(s / across)) - 1 for s in sides)) if bias else 0)",
        flops="16 * n * c * c + 8 * p * n * c + sum(4 * prod(ceil(s / w) * w for s, w in group) "
        "* (p + prod(w for s, w in group)) * c for group in ([(s, min(block, s)) for s in sides], "
        "[(s, ceil(s / ceil(s / across))) for s in sides]))",
        masks={"keys", "causal"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={
            "scores_blocks": "b h x w",
            "weights_blocks": "b h x w",
            "scores": "b h x w",
            "weights": "b h x w",
        },
        laws={Law.STOCHASTIC},
        fidelity="adapted",
        notes="What both add to x is given, for the host adds x; the paper's MLP between both is left out, and its "
        "convolution before them. Maps that blocks or grids do not divide, which timm refuses, are filled up with "
        "tokens that do not exist; a side of 8 in grids of 7 at most is two grids of 4. Special tokens, which are "
        "ours, belong to all blocks and grids, and read all. Taps show the rows of the map.",
    )

    scores_blocks: Tap
    weights_blocks: Tap

    def __init__(self, site: Site, *, block: PositiveInt = 7, across: PositiveInt = 7, bias: bool = True):
        super().__init__(site)
        grid, c = site.layout.grid, site.dim
        self.sides = [min(block, side) for side in grid], [evenly(side, across) for side in grid]
        self.qkv_blocks, self.qkv = (nn.Linear(c, 3 * c, bias=site.qkv_bias) for _ in range(2))
        self.proj_blocks, self.proj = (nn.Linear(c, c, bias=site.proj_bias) for _ in range(2))
        self.norm = site.norm(c)
        self.bias_blocks, self.bias = (
            nn.Parameter(torch.empty(site.heads, 2 * i - 1, 2 * j - 1)) if bias else None
            for i, j in self.sides
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Tables from N(0, 0.02²), cut at two of its deviations."""
        for table in (self.bias_blocks, self.bias):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04)

    def no_weight_decay(self) -> set[str]:
        return set() if self.bias is None else {"bias_blocks", "bias"}

    def mix(self, x, source, *, mask, layout):
        blocks, grids = self._groups(layout)
        near = self._attend(self.qkv_blocks(x), self.bias_blocks, blocks, mask, layout.prefix)
        near = self.proj_blocks(near)
        far = self._attend(self.qkv(self.norm(x + near)), self.bias, grids, mask, layout.prefix)
        return near + self.proj(far)

    def _groups(self, layout):
        """How the map is cut into blocks and into grids."""
        (y, x), ((i, j), (k, m)) = layout.grid, self.sides
        blocks = Groups((y, x), (min(i, y), min(j, x)))
        return blocks, Groups((y, x), (evenly(y, k), evenly(x, m)), strided=True)

    def _attend(self, qkv, table, groups, mask, p):
        """What each token receives within its group, (b n c)."""
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        bias = None if table is None else relative_bias(table, groups.sides)
        taps = (self.scores, self.weights) if groups.strided else (self.scores_blocks, self.weights_blocks)
        return merge_heads(
            attend_in_groups(q, k, v, groups=groups, mask=mask, prefix=p, taps=taps, bias=bias)
        )
