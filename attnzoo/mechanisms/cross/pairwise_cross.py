"""Pair-wise cross-attention: another image's tokens join the own ones as keys, to disturb self-attention in training.

Zhu et al., "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification", CVPR
2022, §3.3, equation 4.
"""

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, Site
from attnzoo.functional import dot_product_attention, rearrange


class PairwiseCross(Mechanism):
    """softmax(q₁ [k₁; k₂]ᵀ / √d) [v₁; v₂]: 1 is the tokens themselves, 2 the context, through the same projections.

    Without a context, or with an empty one, it is plain self-attention, whose state-dict keys it has.

    Args:
        site: Where the mechanism is put; its context, if there is one, has the tokens' width.

    Raises:
        OptionError: AZ214, at a site with a context of another width.
    """

    card = Card(
        name="pairwise_cross",
        family=Family.CROSS,
        summary="Self-attention in which the tokens of another image join the own ones as keys, in training only.",
        equation="W_o softmax(q₁ [k₁; k₂]ᵀ / √d) [v₁; v₂]\n"
        "q₁ = W_q x,  k₁ = W_k x,  k₂ = W_k s,  v₁ = W_v x,  v₂ = W_v s",
        paper=Paper(
            "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
            "Zhu et al.",
            2022,
            "CVPR 2022",
            where="§3.3, eq. 4",
        ),
        time="n n c + n m c + n c c + m c c",
        memory="h n n + h n m",
        params="3 * (c + qkv_bias) * c + (c + proj_bias) * c",
        flops="8 * n * c * c + 4 * n * n * c + (4 * m * c * c + 4 * n * m * c if context else 0)",
        context="beside",
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n w", "weights": "b h n w"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        notes="A host of kind dual with `b: {stream: pair}` hands the context over at a.i.self, in training alone. The "
        "paper trains with and without pairs and weighs both losses, as `train: {method: dual_cross}` does with a host "
        "of kind vit. In its taps w counts the own tokens, then those of the context.",
    )

    def __init__(self, site: Site):
        super().__init__(site)
        if site.context_dim not in (None, site.dim):
            raise OptionError(
                f"`pairwise_cross` has one projection for both: {site.context_dim} channels are not {site.dim}",
                help="bring the context to the width of the tokens first",
            )
        self.dim = site.dim
        site.head_dim  # noqa: B018 - raises AZ308 when the heads do not divide the width
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=site.qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)

    def mix(self, x, source, *, mask, layout):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if self.context_dim is not None:
            weight, bias = self.qkv.weight[self.dim :], self.qkv.bias
            kv = F.linear(source, weight, None if bias is None else bias[self.dim :])
            k2, v2 = rearrange(kv, "b m (two h d) -> two b h m d", two=2, h=self.heads)
            k, v = torch.cat([k, k2], dim=2), torch.cat([v, v2], dim=2)
        out = dot_product_attention(self, q, k, v, mask)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))
