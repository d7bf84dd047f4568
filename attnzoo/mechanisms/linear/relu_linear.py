"""Multi-scale linear attention with the feature map relu, of EfficientViT.

Cai et al., "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction", 2023, arXiv:2205.14756,
§3.1. The layers are timm's `LiteMLA`.
"""

from dataclasses import replace

import torch
from torch.nn import functional as F

from attnzoo.core import (
    Card,
    Family,
    Law,
    Mechanism,
    NonNegativeInt,
    OptionError,
    Paper,
    PositiveFloat,
    Site,
)
from attnzoo.functional import rearrange


class ReluLinear(Mechanism):
    """relu(q_i) Σ_j relu(k_j)ᵀ v_j / (relu(q_i) · Σ_j relu(k_j) + ε) in each head; the heads side by side, projected.

    Half of the heads have W_qkv x, the others conv(W_qkv x): by channel on the grid, and then a matrix each for the
    queries, the keys and the values of a head.

    Args:
        site: Where the mechanism is put.
        scale: Side of the convolution in tokens, odd; 0 for the heads of W_qkv x alone.
        eps: Added to the divisor, so that queries without a positive channel get zeros.

    Raises:
        OptionError: AZ214, when the convolution has no middle.
    """

    card = Card(
        name="relu_linear",
        family=Family.LINEAR,
        summary="EfficientViT's linear attention: φ = relu, and as many heads again that see neighbourhoods.",
        equation="W_o (relu(q_i) Σ_j relu(k_j)ᵀ v_j) / (relu(q_i)·Σ_j relu(k_j) + ε)\n"
        "[q; k; v] = [W_qkv x; conv(W_qkv x)]",
        paper=Paper(
            "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction",
            "Cai et al.",
            2023,
            "arXiv:2205.14756",
            where="§3.1, eq. 1-3",
        ),
        time="n c c",
        memory="n c + c d",
        params="3 * c * c + (3 * (scale**2 + d) * c if scale else 0)"
        " + ((2 if scale else 1) * c + proj_bias) * c",
        flops="6 * n * c * c + (6 * n * (scale**2 + d) * c if scale else 0)"
        " + (2 if scale else 1) * (4 * n * c * (d + 1) + 2 * n * c * c)",
        masks={"keys"},
        grid=2,
        honours={"proj_bias"},
        fidelity="adapted",
        notes="The batch norm after W would let samples depend on each other: W and its bias stand for it, as in eval "
        "mode. Queries, keys and values have no biases. Heads are as wide as the site's; the authors' have 16 or 32 "
        "channels. Special tokens attend and are attended to; to the convolution each is a grid of its own. Tokens "
        "that do not exist are zeros, as what lies beyond the grid.",
    )

    @classmethod
    def claims(cls, *, scale: int, **options) -> Card:
        return cls.card if scale else replace(cls.card, grid=None, laws={Law.PERMUTATION_EQUIVARIANT})

    def __init__(self, site: Site, *, scale: NonNegativeInt = 5, eps: PositiveFloat = 1e-5):
        super().__init__(site)
        from timm.models.efficientvit_mit import LiteMLA  # here, so that a list does not wait for timm

        if scale and scale % 2 == 0:
            raise OptionError(
                f"`relu_linear`: a scale of {scale} has no middle", help="choose an odd `scale`"
            )
        self.head_dim, self.eps = site.head_dim, eps
        self.layers = LiteMLA(
            site.dim,
            site.dim,
            heads=site.heads,
            dim=site.head_dim,
            use_bias=(False, site.proj_bias),
            norm_layer=(None, None),
            scales=(scale,) if scale else (),
        )

    def mix(self, x, source, *, mask, layout):
        layers = self.layers
        qkv = layers.qkv(x.mT[..., None])[..., 0].mT  # (b n 3c)
        held = qkv if mask.keys is None else qkv.masked_fill(~mask.keys[..., None], 0.0)
        scales = torch.cat([qkv, *(self._near(conv, held, layout) for conv in layers.aggreg)], dim=-1)
        q, k, v = rearrange(scales, "b n (h t d) -> t b h n d", t=3, d=self.head_dim)
        q, k = q.relu(), k.relu()
        if mask.keys is not None:
            k = k.masked_fill(~mask.keys[:, None, :, None], 0.0)
        out = self._attend(q, k, v).to(x.dtype)
        return layers.proj(rearrange(out, "b h n d -> b (h d) n 1"))[..., 0].mT

    def _attend(self, q, k, v):
        """q (kᵀ v) / (q · Σ k)."""
        if v.dtype in (torch.float16, torch.bfloat16):  # sums over all tokens overflow and lose digits
            q, k, v = q.float(), k.float(), v.float()
        out = q @ (k.mT @ F.pad(v, (0, 1), value=1.0))  # the sum of k is what values of one give
        return out[..., :-1] / (out[..., -1:] + self.eps)

    def _near(self, conv, qkv, layout):
        """Grid tokens and, each on its own, special tokens, convolved: (b n 3c)."""
        prefix, tokens = layout.split(qkv)
        grid = conv(layout.to_grid(tokens))
        if not layout.prefix:
            return layout.from_grid(prefix, grid)
        alone = conv(rearrange(prefix, "b p c -> (b p) c 1 1"))
        return layout.from_grid(rearrange(alone, "(b p) c 1 1 -> b p c", p=layout.prefix), grid)
