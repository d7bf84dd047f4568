"""Hierarchical attention: within small windows, then from every token to a pooled map.

Liu et al., "Vision Transformers with Hierarchical Attention", 2024, arXiv:2106.03180, H-MHSA.
"""

from dataclasses import replace

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mask, Mechanism, Paper, PositiveInt, Site, Tap
from attnzoo.functional import (
    dot_product_attention,
    existing,
    masked_group_norm,
    masked_mean,
    masked_softmax,
    merge_heads,
    split_heads,
    unwindows,
    windows,
)  # fmt: skip


class Hierarchical(Mechanism):
    """W (Y + g): g = norm(x + L), L attention of norm(x) within windows, Y from g to norm(meanpool(g)).

    Args:
        site: Where the mechanism is put.
        window: G, side of the windows in tokens; with 1 there are none, and all attend to all: W attention(norm(x)).
        ratio: r, side of the squares of tokens that are pooled for Y.
    """

    card = Card(
        name="hierarchical",
        family=Family.LOCAL,
        summary="Attention within windows, then of every token to a pooled map of what came out.",
        equation="W (Y + g)\n"
        "g = norm(x + L),  L = attention(norm(x)) within windows\n"
        "Y = softmax(q kᵀ / √d) v,  q = W_q g,  [k; v] = W_kv norm(meanpool(g))",
        paper=Paper(
            "Vision Transformers with Hierarchical Attention",
            "Liu et al.",
            2024,
            "arXiv:2106.03180",
            "H-MHSA",
        ),
        time="n w c + n m c + n c c",
        memory="h n w + h n m + n c",
        params="4 * c * c + (3 * qkv_bias + proj_bias + 2) * c "
        "+ ((3 * c + 3 * qkv_bias + 4) * c if window > 1 else 0)",
        flops="8 * (n - p) * c * c + (4 * (n - p)**2 * c if window == 1 else 2 * (n - p) * c * c "
        "+ 4 * prod(ceil(s / min(window, s)) * min(window, s)**2 for s in sides) * c "
        "+ 4 * prod(ceil(s / ratio) for s in sides) * (c + n - p) * c)",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={
            "scores_windows": "b h y x w",
            "weights_windows": "b h y x w",
            "scores": "b h n r",
            "weights": "b h n r",
        },
        laws={Law.STOCHASTIC},
        notes="Grids that windows or squares do not divide are filled up with tokens that do not exist; those have no "
        "part in windows, means and norms. The authors' unused norm is left out, and they drop whole channels where "
        "`proj_drop` drops entries. Special tokens have no place on the grid: they come out as they went in, so where "
        "nothing else mixes, pool the mean. There are n / r² pooled keys. The defaults are those of the authors' third "
        "stage, of 14 × 14 tokens.",
    )

    scores_windows: Tap
    weights_windows: Tap

    @classmethod
    def claims(cls, *, window: int, **options) -> Card:
        taps = {name: axes for name, axes in cls.card.taps.items() if window > 1 or "windows" not in name}
        return replace(cls.card, taps=taps)

    def __init__(self, site: Site, *, window: PositiveInt = 7, ratio: PositiveInt = 2):
        super().__init__(site)
        c = site.dim
        self.window, self.ratio = window, ratio
        self.norm = nn.GroupNorm(1, c, eps=1e-6)
        self.qkv = nn.Linear(c, 3 * c, bias=site.qkv_bias)
        if window > 1:
            self.window_norm, self.pool_norm = (nn.GroupNorm(1, c, eps=1e-6) for _ in range(2))
            self.q = nn.Linear(c, c, bias=site.qkv_bias)
            self.kv = nn.Linear(c, 2 * c, bias=site.qkv_bias)
        self.proj = nn.Linear(c, c, bias=site.proj_bias)
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02²), as the authors' code; biases 0."""
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.zeros_(parameter) if "bias" in name else nn.init.trunc_normal_(parameter, std=0.02)

    def mix(self, x, source, *, mask, layout):
        there, grid = existing(x, mask)[:, layout.prefix :], layout.grid
        prefix, x = layout.split(x)
        x = x.masked_fill(~there[..., None], 0.0)
        q, k, v = self.qkv(masked_group_norm(self.norm, x, there)).chunk(3, dim=-1)
        if self.window > 1:
            x = masked_group_norm(self.window_norm, x + self._windows(q, k, v, there, grid), there)  # g
            pooled, there = self._pooled(x, there, grid)
            k, v = self.kv(masked_group_norm(self.pool_norm, pooled, there)).chunk(2, dim=-1)
            q = self.q(x)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        out = dot_product_attention(self, q, k, v, mask if mask.keys is None else Mask(keys=there))
        out = merge_heads(out) if self.window == 1 else merge_heads(out) + x
        return torch.cat([prefix, self.proj(out)], dim=1)

    def _windows(self, q, k, v, there, grid):
        """What each token receives within its window, (b n c)."""
        cut = grid, [min(self.window, side) for side in grid]
        q, k, v = (windows(split_heads(t, self.heads), *cut) for t in (q, k, v))  # (b h r w d)
        allowed = windows(there[:, None, :, None], *cut).mT
        allowed = unwindows(allowed.expand(-1, -1, -1, q.shape[3], -1), *cut).unflatten(2, grid)
        scores = unwindows(q * q.shape[-1] ** -0.5 @ k.mT, *cut).unflatten(2, grid)  # (b h y x w)
        weights = self.weights_windows(masked_softmax(self.scores_windows(scores), allowed))
        return merge_heads(unwindows(windows(weights.flatten(2, 3), *cut) @ v, *cut))

    def _pooled(self, g, there, grid):
        """Means over the tokens of each square that exist, (b r c), and whether there are any, (b r)."""
        sides = [min(self.ratio, side) for side in grid]
        g, there = (windows(t, grid, sides) for t in (g, there[..., None]))  # (b r w c), (b r w 1)
        return masked_mean(g, there, dim=2), there[..., 0].any(dim=2)
