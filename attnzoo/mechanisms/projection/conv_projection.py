"""Convolutional projections: a small convolution on the grid before the matrices of queries, keys and values.

Wu et al., "CvT: Introducing Convolutions to Vision Transformers", 2021, arXiv:2103.15808, §3.2.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mask, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import dot_product_attention, merge_heads, split_heads


class ConvProjection(Mechanism):
    """P softmax(W_q conv(x) (W_k conv(x))ᵀ s) W_v conv(x): each conv is by channel; two are strided.

    Args:
        site: Where the mechanism is put.
        kernel: Side of the convolutions in tokens, odd.
        stride: Step between the places that keys and values are of.
        scale: s: `width`, 1 / √c, as the authors' code; `head`, 1 / √d, as elsewhere.

    Raises:
        OptionError: AZ214, when the kernel has no middle.
    """

    card = Card(
        name="conv_projection",
        family=Family.PROJECTION,
        summary="CvT: queries, keys and values are convolved on the grid; keys and values with a stride.",
        equation="P softmax(q kᵀ / √c) v\nq = W_q conv_q(x),  k = W_k conv_k(x),  v = W_v conv_v(x)",
        paper=Paper(
            "CvT: Introducing Convolutions to Vision Transformers",
            "Wu et al.",
            2021,
            "arXiv:2103.15808",
            where="§3.2, eq. 2",
        ),
        time="n m c + n c c",
        memory="h n m + n c",
        params="3 * kernel**2 * c + 4 * c**2 + (4 * qkv_bias + proj_bias) * c",
        flops="2 * kernel**2 * c * (n - p + 2 * (r := prod(ceil(s / stride) for s in sides))) "
        "+ 4 * (n + p + r) * c**2 + 4 * n * (p + r) * c",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n r", "weights": "b h n r"},
        laws={Law.STOCHASTIC},
        fidelity="adapted",
        notes="The batch norms after the convolutions would let samples depend on each other: kernels and their biases "
        "stand for them, as in eval mode. Keys have no biases, which a softmax would not see. Special tokens are not "
        "convolved. Tokens that do not exist are zeros, as what lies beyond the grid; a key exists where the token in "
        "the middle of its kernel does. There are n / stride² keys.",
    )

    @classmethod
    def claims(cls, *, kernel: int, stride: int, **options) -> Card:
        if stride > 1:
            return cls.card
        card = replace(cls.card, taps={"scores": "b h n m", "weights": "b h n m"})
        if kernel > 1:
            return card
        return replace(
            card,
            masks={"keys", "causal", "pairs"},
            laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        )

    def __init__(
        self,
        site: Site,
        *,
        kernel: PositiveInt = 3,
        stride: PositiveInt = 2,
        scale: Literal["width", "head"] = "width",
    ):
        super().__init__(site)
        if kernel % 2 == 0:
            raise OptionError(
                f"`conv_projection`: a kernel of {kernel} has no middle", help="choose an odd one"
            )
        c, half = site.dim, kernel // 2
        self.stride = stride
        self.factor = (site.head_dim / c) ** 0.5 if scale == "width" else 1.0  # beside 1 / √d
        self.q_conv = nn.Conv2d(c, c, kernel, padding=half, groups=c, bias=site.qkv_bias)
        self.k_conv = nn.Conv2d(c, c, kernel, stride, half, groups=c, bias=False)
        self.v_conv = nn.Conv2d(c, c, kernel, stride, half, groups=c, bias=site.qkv_bias)
        self.q = nn.Linear(c, c, bias=site.qkv_bias)
        self.k = nn.Linear(c, c, bias=False)
        self.v = nn.Linear(c, c, bias=site.qkv_bias)
        self.proj = nn.Linear(c, c, bias=site.proj_bias)

    def mix(self, x, source, *, mask, layout):
        prefix, tokens = layout.split(x)
        if mask.keys is not None:
            there = mask.keys[:, layout.prefix :, None]  # (b n 1)
            tokens = tokens.masked_fill(~there, 0.0)
            if self.stride > 1:
                there = layout.to_grid(there)[:, 0, :: self.stride, :: self.stride].flatten(1)
                mask = Mask(keys=torch.cat([mask.keys[:, : layout.prefix], there], dim=1))
        grid = layout.to_grid(tokens)
        # Zeros to the right of a grid narrower than the stride, which change nothing: without them oneDNN's gradient of
        # a kernel in bfloat16 reads memory that nobody wrote.
        short = self.stride - layout.grid[1]
        wide = F.pad(grid, (0, short)) if short > 0 else grid
        q, k, v = (
            split_heads(project(layout.from_grid(prefix, conv(t))), self.heads)
            for project, conv, t in (
                (self.q, self.q_conv, grid), (self.k, self.k_conv, wide), (self.v, self.v_conv, wide),
            )
        )  # fmt: skip
        return self.proj(merge_heads(dot_product_attention(self, q * self.factor, k, v, mask)))
