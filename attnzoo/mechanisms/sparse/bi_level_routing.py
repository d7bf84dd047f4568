"""Bi-level routing attention, of BiFormer: regions choose regions, and tokens attend to those of the chosen ones.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", 2023, arXiv:2303.08810, §3.2.
"""

from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mask, Mechanism, Paper, PositiveInt, Site
from attnzoo.functional import existing, masked_mean, merge_heads, rearrange, split_heads
from attnzoo.functional.groups import Groups, read_in_groups, special_rows, with_special

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
        "do not exist, and those have no part in means, nor are regions without any chosen; the authors' code fills up "
        "with zeros that are read. Special tokens, which are ours, are keys of all and read all, outside regions and "
        "convolution. Taps show the rows of the grid: special tokens, then those of the chosen regions, best first.",
    )

    def __init__(
        self, site: Site, *, regions: PositiveInt = 7, chosen: PositiveInt = 4, local: PositiveInt = 5,
        scale: Literal["full", "dim"] = "full",
    ):  # fmt: skip
        super().__init__(site)
        self.regions, self.chosen = regions, chosen
        self.factor = (site.dim if scale == "full" else site.head_dim) ** -0.5
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=site.qkv_bias)
        self.local = nn.Conv2d(site.dim, site.dim, local, groups=site.dim) if local > 1 else None  # DWC
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)

    def mix(self, x, source, *, mask, layout):
        (rows, columns), p, h = layout.grid, layout.prefix, self.heads
        sides = (-(-rows // min(self.regions, rows)), -(-columns // min(self.regions, columns)))
        groups = Groups((rows, columns), sides)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        near_q, near_k, near_v = (groups.cut(t[:, p:]) for t in (q, k, v))  # (b r w c)
        there = groups.cut(existing(x, mask)[:, p:, None])  # (b r w 1)
        best = route(near_q, near_k, there, self.chosen)  # (b r k)
        factor = self.factor * (x.shape[-1] // h) ** 0.5  # the kernel divides by √d
        near_q, first = by_head(near_q * factor, h), split_heads(q[:, :p] * factor, h)
        k, v_heads = split_heads(k, h), split_heads(v, h)
        near_k, near_v = (
            with_special(by_head(of_regions(near, best), h), t, p)  # (b h r p+k*w d)
            for near, t in ((near_k, k), (near_v, v_heads))
        )
        allowed = None
        if mask.keys is not None or groups.filled != groups.grid:
            allowed = readable(of_regions(there, best) & there.any(dim=2, keepdim=True), mask, p)
        taps = self.scores, self.weights
        out = read_in_groups(near_q, near_k, near_v, groups=groups, taps=taps, allowed=allowed)
        if p:
            drop = self.attn_drop if self.training else 0.0
            out = torch.cat([special_rows(first, k, v_heads, mask, drop), out], dim=2)
        out = merge_heads(out)
        return self.proj(out if self.local is None else out + self._around(self.local, v, mask, layout))

    def _around(self, conv, v, mask, layout):
        """DWC(v), nothing for special tokens."""
        p, side = layout.prefix, conv.kernel_size[0]
        v = v if mask.keys is None else v * mask.keys[..., None]
        image = F.pad(layout.to_grid(v[:, p:]), [(side - 1) // 2, side // 2] * 2)
        return layout.from_grid(torch.zeros_like(v[:, :p]), conv(image))


def by_head(t: Tensor, heads: int) -> Tensor:
    """(b r w h*d) -> (b h r w d)."""
    return rearrange(t, "b r w (h d) -> b h r w d", h=heads)


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


for _name in ("route", "of_regions", "readable"):
    fx.wrap(_name)  # symbolic tracing knows no lengths
