"""Axial attention: along the columns of the grid, then along its rows, with positions that have a say everywhere.

Wang et al., "Axial-DeepLab: Stand-Alone Axial-Attention for Panoptic Segmentation", 2020, arXiv:2003.07853, §3.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, Paper, Site, Tap
from attnzoo.functional import by_distance, einsum, merge_heads, rearrange
from attnzoo.functional.groups import Groups, attend_in_groups, seen_in_groups, special_rows, with_special


class Axial(Mechanism):
    """W_o rows(columns(x)); along a line o_i = Σ_j w_ij (v_j + r^v_{i-j}), w a softmax over j of the scores

    a q_i k_j + b q_i r^q_{i-j} + c k_j r^k_{i-j}. Queries, keys, r^q and r^k are half as wide as values and r^v; the
    tables of r are shared by the heads of an axis.

    Args:
        site: Where the mechanism is put.
        positions: Whether there are r; without, it is plain attention along each axis.
        merge: Rows read what columns gave (`sequential`), or both read x and are added (`sum`).
        scale: a, b and c of each head: learned from d^-½ on, where there are positions; or d^-½, or 1. d is of queries.
    """

    card = Card(
        name="axial",
        family=Family.LOCAL,
        summary="Attention along the columns of the grid, then along its rows, by relative position.",
        equation="W_o rows(columns(x))\nin each line o_i = Σ_j w_ij (v_j + r^v_{i−j})\n"
        "w_ij = softmax_j(a q_i·k_j + b q_i·r^q_{i−j} + c k_j·r^k_{i−j})",
        paper=Paper("Axial-DeepLab: Stand-Alone Axial-Attention for Panoptic Segmentation", "Wang et al.", 2020,
                    "arXiv:2003.07853", "§3, eq. 4"),
        time="n m c + n c c",
        memory="h n m + n c",
        params="2 * (c + qkv_bias) * (c + 2 * h * (narrow := max(1, d // 2))) + (c + proj_bias) * c "
        "+ (2 * (sum(sides) - 1) * (d + 2 * narrow) + (6 * h if scale == 'learned' else 0) if positions else 0)",
        # over one channel, where queries are so narrow, einsum multiplies element by element
        flops="2 * n * c * (3 * c + 4 * h * (narrow := max(1, d // 2))) "
        "+ 2 * h * (d + narrow) * sum((n - p) * (p + s) + p * n for s in sides) "
        "+ (2 * h * (d + (2 * narrow if narrow > 1 else 0)) * (n - p) * sum(sides) if positions else 0)",
        masks={"keys", "causal"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps=dict.fromkeys(("scores_columns", "weights_columns", "scores", "weights"), "b h x w"),
        laws={Law.STOCHASTIC},
        fidelity="adapted",
        notes="m is y + x, the keys of a token: n^1.5 on a square grid. The authors' norms over the batch would let "
        "samples have a say in each other: what they scale, a, b and c do. r of distances beyond the grid it was built "
        "for are those of the farthest. Special tokens, which are ours, belong to all lines, with r = 0, and read all. "
        "Pairs are honoured by `merge: sum` alone, for in sequence a token reads through others.",
    )  # fmt: skip

    scores_columns: Tap
    weights_columns: Tap

    @classmethod
    def claims(cls, *, merge: str, **options) -> Card:
        return replace(cls.card, masks=cls.card.masks | {"pairs"}) if merge == "sum" else cls.card

    def __init__(
        self, site: Site, *, positions: bool = True, merge: Literal["sequential", "sum"] = "sequential",
        scale: Literal["learned", "dim", "none"] = "learned",
    ):  # fmt: skip
        super().__init__(site)
        self.sequential, self.scale = merge == "sequential", scale
        c, h, d = site.dim, site.heads, site.head_dim
        self.narrow = max(1, d // 2)
        self.widths = [self.narrow, self.narrow, d]  # of q, k and v
        wide = sum(self.widths)
        self.columns, self.rows = (nn.Linear(c, h * wide, bias=site.qkv_bias) for _ in range(2))
        self.of_columns, self.of_rows = (
            nn.Parameter(torch.empty(2 * side - 1, wide)) if positions else None for side in site.layout.grid
        )
        self.gains = nn.Parameter(torch.empty(2, 3, h)) if positions and scale == "learned" else None
        self.proj = nn.Linear(c, c, bias=site.proj_bias)
        self.init_weights()

    def init_weights(self) -> None:
        """The authors': deviations of c^-½ for projections, of d^-½ for tables."""
        for layer, table in ((self.columns, self.of_columns), (self.rows, self.of_rows)):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            if table is not None:
                nn.init.normal_(table, std=self.widths[2] ** -0.5)
        if self.gains is not None:
            nn.init.constant_(self.gains, self.narrow**-0.5)

    def no_weight_decay(self) -> set[str]:
        return {"gains"} if self.gains is not None else set()

    def mix(self, x, source, *, mask, layout):
        y, x_ = layout.grid
        out = self._along(0, x, self.columns, self.of_columns, Groups((y, x_), (y, 1)), mask, layout)
        read = out if self.sequential else x
        more = self._along(1, read, self.rows, self.of_rows, Groups((y, x_), (1, x_)), mask, layout)
        return self.proj(more if self.sequential else out + more)

    def _along(self, axis, x, layer, table, groups, mask, layout):
        """What each token receives along one axis, (b n c)."""
        taps = (self.scores, self.weights) if axis else (self.scores_columns, self.weights_columns)
        e, p = self.narrow, layout.prefix
        q, k, v = rearrange(layer(x), "b n (h e) -> b h n e", h=self.heads).split(self.widths, dim=-1)
        if table is None:
            q = q * e**0.5 if self.scale == "none" else q  # the kernel divides by √d
            return merge_heads(attend_in_groups(q, k, v, groups=groups, mask=mask, prefix=p, taps=taps))
        a, b, c = self._gains(axis)
        r_q, r_k, r_v = by_distance(table, max(groups.sides)).split(self.widths, dim=-1)
        near_q, near_k = groups.cut(q[:, :, p:]), groups.cut(k[:, :, p:])  # (b h r w d)
        near = b * einsum(near_q, r_q, "b h r i d, i j d -> b h r i j")
        near = near + c * einsum(near_k, r_k, "b h r j d, i j d -> b h r i j")
        scores = a * (near_q @ with_special(near_k, k, p).mT) + F.pad(near, (p, 0))
        shares = groups.weights(scores, taps, seen_in_groups(q, groups, mask, p))  # (b h r w p+w)
        out = shares @ with_special(groups.cut(v[:, :, p:]), v, p)
        out = groups.join(out + einsum(shares[..., p:], r_v, "b h r i j, i j d -> b h r i d"))
        if p:
            drop = self.attn_drop if self.training else 0.0
            first = (q[:, :, :p, None] * (a * e**0.5))[:, :, :, 0]
            out = torch.cat([special_rows(first, k, v, mask, drop), out], dim=2)
        return merge_heads(out)

    def _gains(self, axis):
        """a, b and c, (h 1 1 1) or one number each."""
        if self.gains is not None:
            return self.gains[axis, :, :, None, None, None].unbind(0)
        return [self.narrow**-0.5 if self.scale == "dim" else 1.0] * 3
