"""Cisformer: attention whose projections are those of the position, so that nothing is alike from place to place.

Gros, "Small transformer architectures for task switching", 2025, arXiv:2508.04461, abstract.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.core import Card, Family, Law, Mechanism, Paper, Site
from attnzoo.functional import dot_product_attention, einsum, merge_heads, split_heads
from attnzoo.functional.expressive import expressive_weights


class Cisformer(Mechanism):
    """yᵢ = (Σⱼ aᵢⱼ vⱼ) W_O^i of qᵢ = xᵢ W_Q^i, kᵢ = xᵢ W_K^i, vᵢ = xᵢ W_V^i: position i has matrices of its own.

    Of fewer tokens than it was built for it uses the matrices of the first ones.

    Args:
        site: Where the mechanism is put.
        attention: a: `softmax`, of q kᵀ / √d; `expressive`, e / Σ e with e = z² / (1 + z²), z = q kᵀ; or `extensive`,
            e itself, as we read the paper's name.
    """

    card = Card(
        name="cisformer",
        family=Family.PROJECTION,
        summary="Cisformer: attention with query, key, value and output matrices for each position.",
        equation="W_O^i Σ_j a_ij v_j\na = softmax(q kᵀ / √d)\nq_i = W_Q^i x_i,  k_i = W_K^i x_i,  v_i = W_V^i x_i",
        paper=Paper("Small transformer architectures for task switching", "Gros", 2025, "arXiv:2508.04461"),
        time="n m c + n c c",
        memory="h n m + n c",
        params="n * (4 * c + 3 * qkv_bias + proj_bias) * c + 4 * qk_norm * d",
        flops="8 * n * c * c + 4 * n * m * c",
        masks={"keys", "causal", "pairs"},
        fixed_length="most",
        honours={"qkv_bias", "proj_bias", "qk_norm"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC},
        fidelity="inspired",
        notes="We have seen the abstract, which says that it is the transformer that is not invariant to translations; "
        "the matrices are our reading. MLPs by position belong to it, but here they are the host's. The same matrices "
        "at all positions make multi-head attention. In the paper only this with extensive attention reaches 95 %.",
    )

    @classmethod
    def claims(cls, *, attention: str, **options) -> Card:
        return replace(cls.card, laws=set()) if attention == "extensive" else cls.card

    def __init__(self, site: Site, *, attention: Literal["softmax", "expressive", "extensive"] = "softmax"):
        super().__init__(site)
        c, d, n = site.dim, site.head_dim, self.length
        self.attention = attention
        self.qkv = nn.Parameter(torch.empty(n, c, 3 * c))  # W_Q, W_K, W_V
        self.qkv_bias = nn.Parameter(torch.empty(n, 3 * c)) if site.qkv_bias else None
        self.q_norm, self.k_norm = (site.norm(d) if site.qk_norm else nn.Identity() for _ in "qk")
        self.proj = nn.Parameter(torch.empty(n, c, c))  # W_O
        self.proj_bias = nn.Parameter(torch.empty(n, c)) if site.proj_bias else None
        self.init_weights()

    def init_weights(self) -> None:
        """Matrices uniform within 1 / √c, each position's drawn by itself; biases zero."""
        bound = self.proj.shape[1] ** -0.5
        for matrices in (self.qkv, self.proj):
            nn.init.uniform_(matrices, -bound, bound)
        for bias in (self.qkv_bias, self.proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def no_weight_decay(self) -> set[str]:
        return {
            name
            for name, bias in (("qkv_bias", self.qkv_bias), ("proj_bias", self.proj_bias))
            if bias is not None
        }

    def mix(self, x, source, *, mask, layout):
        q, k, v = by_position(x, self.qkv, self.qkv_bias).chunk(3, dim=-1)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.attention == "softmax":
            heads = dot_product_attention(self, q, k, v, mask)
        else:
            z, allowed = self.scores(q @ k.mT), mask.dense(q.shape[2], k.shape[2], q.device)
            norm: Literal["row", "none"] = "row" if self.attention == "expressive" else "none"
            heads = self.weights(expressive_weights(z, allowed, norm)) @ v
        return by_position(merge_heads(heads), self.proj, self.proj_bias)


def by_position(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each token times the matrix of its place, plus the bias: (b n c) and (N c e), n ≤ N, to (b n e)."""
    n = x.shape[1]
    out = einsum(x, weight[:n], "b n c, n c e -> b n e")
    return out if bias is None else out + bias[:n]
