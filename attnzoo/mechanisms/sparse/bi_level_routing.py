"""Bi-level routing attention, of BiFormer: regions choose regions, and tokens attend to those of the chosen ones.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", 2023, arXiv:2303.08810, §3.2.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mask, Mechanism, Paper, PositiveInt, Site
from attnzoo.functional import existing, masked_mean, merge_heads, rearrange, split_heads
from attnzoo.functional.groups import Groups, filled_up, read_in_groups, special_rows, with_special
from attnzoo.functional.windows import unwindows

TITLE = "BiFormer: Vision Transformer with Bi-Level Routing Attention"


class BiLevelRouting(Mechanism):
    """W_o (softmax(s q kᵀ) v + DWC(v)), keys and values of the K regions whose mean key suits one's region best.

    Regions are compared by mean query and mean key, over all channels and without a gradient.

    Args:
        site: Where the mechanism is put.
        regions: S; the grid is cut into S × S regions, or as many as it has rows and columns.
        chosen: K, how many regions a region reads; all where there are fewer.
        local: Side of the depthwise convolution of the values; 1 for none.
        scale: s: `full`, c^-½, the authors', or `dim`, d^-½ of a head.
        padding: What fills up regions that do not divide the grid: `hidden`, nobody; `zeros`, tokens of zero that are
            read as all others, to S × S regions in any case, as in the authors' code.
    """

    card = Card(
        name="bi_level_routing",
        family=Family.SPARSE,
        summary="BiFormer: each region of the grid chooses few regions, and its tokens attend to theirs.",
        equation="W_o (softmax(q kᵀ / √c) v + DWC(v))\nk, v of regions top_K(q̄ k̄ᵀ)",
        paper=Paper(TITLE, "Zhu et al.", 2023, "arXiv:2303.08810", where="§3.2, eq. 3-8"),
        time="n m c + n c c",
        memory="h n m + n c",
        params="4 * c**2 + (3 * qkv_bias + proj_bias) * c + (local > 1) * (local**2 + 1) * c",
        flops="8 * n * c**2 + 2 * (r := prod(ceil(s / ceil(s / min(regions, s))) for s in sides)) ** 2 * c "
        "+ 4 * r * (w := prod(ceil(s / min(regions, s)) for s in sides)) * (p + min(chosen, r) * w) * c "
        "+ 4 * p * n * c + (local > 1) * 2 * local**2 * (n - p) * c",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h x w", "weights": "b h x w"},
        laws={Law.STOCHASTIC},
        notes="m is K n / S², the keys of a token. Regions that do not divide the grid are filled up with tokens that "
        "do not exist, and those have no part in means, nor are regions without any chosen. Special tokens, which are "
        "ours, are keys of all and read all, outside regions and convolution. Taps show the rows of the grid: special "
        "tokens, then those of the chosen regions, best first.",
    )

    @classmethod
    def claims(cls, *, padding: str, **options) -> Card:
        if padding == "hidden":
            return cls.card
        places = "sum(4 * r * w * (p + min(chosen, r) * w) * c + (local > 1) * 2 * local**2 * r * w * c + 2 * r**2 * c "
        places += "for r in [regions**2] for w in [prod(ceil(s / regions) for s in sides)])"
        return replace(cls.card, flops=f"8 * n * c**2 + 4 * p * n * c + {places}")

    def __init__(
        self, site: Site, *, regions: PositiveInt = 7, chosen: PositiveInt = 4, local: PositiveInt = 5,
        scale: Literal["full", "dim"] = "full", padding: Literal["hidden", "zeros"] = "hidden",
    ):  # fmt: skip
        super().__init__(site)
        self.regions, self.chosen, self.zeros = regions, chosen, padding == "zeros"
        self.factor = (site.dim if scale == "full" else site.head_dim) ** -0.5
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=site.qkv_bias)
        self.local = nn.Conv2d(site.dim, site.dim, local, groups=site.dim) if local > 1 else None  # DWC
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)

    def mix(self, x, source, *, mask, layout):
        grid, p, h = layout.grid, layout.prefix, self.heads
        number = [self.regions if self.zeros else min(self.regions, side) for side in grid]
        sides = -(-grid[0] // number[0]), -(-grid[1] // number[1])
        groups = Groups(grid, sides, least=(number[0], number[1]) if self.zeros else (1, 1))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        parts = [groups.cut(t[:, p:]) for t in (q, k, v)]
        there = groups.cut(existing(x, mask)[:, p:, None])
        if self.zeros:
            parts, there = filled_up(parts, there, groups, self.qkv.bias)
        near_q, near_k, near_v = parts  # (b r w c), and there (b r w 1)
        best = route(near_q, near_k, there, self.chosen)  # (b r k)
        held = near_v.masked_fill(~there, 0.0)
        around = 0.0 if self.local is None else self._around(self.local, held, groups, layout)
        factor = self.factor * (x.shape[-1] // h) ** 0.5  # the kernel divides by √d
        parts = [near_q * factor, of_regions(near_k, best), of_regions(near_v, best)]
        near_q, near_k, near_v = (rearrange(t, "b r w (h d) -> b h r w d", h=h) for t in parts)
        first, k, v = (split_heads(t, h) for t in (q[:, :p] * factor, k, v))
        near_k, near_v = with_special(near_k, k, p), with_special(near_v, v, p)  # (b h r p+k*w d)
        allowed = None
        if mask.keys is not None or groups.filled != grid:
            allowed = readable(of_regions(there, best) & there.any(dim=2, keepdim=True), mask, p)
        taps = self.scores, self.weights
        out = read_in_groups(near_q, near_k, near_v, groups=groups, taps=taps, allowed=allowed)
        drop = self.attn_drop if self.training else 0.0
        out = torch.cat([special_rows(first, k, v, mask, drop), out], dim=2) if p else out
        return self.proj(merge_heads(out) + around)

    def _around(self, conv, near, groups, layout):
        """DWC(v), nothing for special tokens, of v by region (b r w c)."""
        (rows, columns), (y, x), side = layout.grid, groups.filled, conv.kernel_size[0]
        y, x = (y, x) if self.zeros else (rows, columns)
        image = unwindows(near, groups.filled, groups.sides).mT.unflatten(2, groups.filled)[..., :y, :x]
        image = conv(F.pad(image, [(side - 1) // 2, side // 2] * 2))[..., :rows, :columns]
        return F.pad(image.flatten(2).mT, (0, 0, layout.prefix, 0))


def route(q: Tensor, k: Tensor, there: Tensor, chosen: int) -> Tensor:
    """The regions whose mean key (b r w c) suits a region's mean query best, best first, (b r k)."""
    q, k = (masked_mean(t.detach(), there, dim=2) for t in (q, k))
    suits = (q @ k.mT).masked_fill(~there.any(dim=2).mT, float("-inf"))  # (b r r)
    return suits.topk(min(chosen, k.shape[1]), dim=-1).indices


def of_regions(t: Tensor, best: Tensor) -> Tensor:
    """What the places of the chosen regions have, (b r w e) -> (b r k*w e)."""
    (b, r, k), (w, e) = best.shape, t.shape[2:]
    at = best.reshape(b, r * k, 1, 1).expand(-1, -1, w, e)
    return t.expand(b, -1, -1, -1).gather(1, at).reshape(b, r, k * w, e)


def readable(there: Tensor, mask: Mask, p: int) -> Tensor:
    """Which special tokens, and which places of the chosen regions (b r k*w 1), are read: (b 1 r 1 p+k*w)."""
    near = there.mT[:, None]
    if mask.keys is None:
        return F.pad(near, (p, 0), value=True)
    special = mask.keys[:, None, None, None, :p].expand(-1, -1, near.shape[2], -1, -1)
    return torch.cat([special, near], dim=-1)


for _name in ("filled_up", "route", "of_regions", "readable"):
    fx.wrap(_name)  # symbolic tracing knows no lengths
