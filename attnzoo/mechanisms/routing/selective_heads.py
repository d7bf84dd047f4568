"""Selective heads: each token chooses heads, and each head attends among the tokens that have chosen it.

Yang et al., "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer", 2025,
arXiv:2503.02495 (selective multi-head attention).
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Fraction, Law, Mechanism, Paper, Site, Tap
from attnzoo.functional import gated_attention, greatest, merge_heads, rearrange, split_heads


class SelectiveHeads(Mechanism):
    """Σ_h g_h(x) (softmax(q_h k_hᵀ / √d) v_h W_h + b_h): h runs over the a heads of largest p = softmax(W_g x + b_g).

    The softmax of a head is over those tokens that have chosen it too.

    Args:
        site: Where the mechanism is put.
        active: Which share of the heads a token chooses: a is that, rounded down, and at least 1.
        gate: g, of the chosen heads: `softmax`, p_h; `normed`, a p_h / Σ p over the chosen, of which there are at least
            two, for one alone would always have 1; `none`, 1. That is the authors': no gradient reaches W_g, so it is a
            buffer, drawn once, and b_g is zero.
    """

    card = Card(
        name="selective_heads",
        family=Family.ROUTING,
        summary="Union of experts: tokens choose heads, and heads attend among the tokens that have chosen them.",
        equation="Σ_{h ∈ top_a(p)} p_h (W_h softmax(q_h k_hᵀ / √d) v_h + b_h)\n"
        "p = softmax(W_g x + b_g),  softmax over tokens that chose h",
        paper=Paper(
            "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer",
            "Yang et al.",
            2025,
            "arXiv:2503.02495",
        ),
        time="n m c + n c c",
        memory="h n m",
        params="3 * (c + qkv_bias) * c + 4 * qk_norm * d + (c + proj_bias * h) * c "
        "+ (h > 1 and gate != 'none') * (c + 1) * h",
        flops="(h > 1) * 2 * n * c * h + 8 * n * c**2 + 4 * n * m * c + 2 * proj_bias * n * h * c",
        masks={"keys", "causal", "pairs"},
        honours={"qkv_bias", "proj_bias", "qk_norm", "rotary"},
        taps={"shares": "b n k", "gate": "b h n", "scores": "b h n m", "weights": "b h n m"},
        laws={Law.SUBSTOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="The authors' gates choose and do not multiply, so W_g never learns: `gate: none`. Their heads all take "
        "as many tokens as the most chosen one of the batch has, filled up with tokens that have not chosen them; here "
        "no such token takes part, and samples have no say in each other. Rotary positions are those in the sequence. "
        "All pairs are computed under a mask: no operation is saved. The tap `weights` shows the softmax times the "
        "gate. Ties are broken as PyTorch's topk does.",
    )

    shares: Tap
    drawn: Tensor | None

    @classmethod
    def claims(cls, *, gate: str, **options) -> Card:
        if gate == "none":  # it has no gradient
            return replace(cls.card, taps={name: cls.card.taps[name] for name in ("scores", "weights")})
        return replace(cls.card, laws=cls.card.laws - {Law.SUBSTOCHASTIC}) if gate == "normed" else cls.card

    def __init__(
        self, site: Site, *, active: Fraction = 0.5, gate: Literal["softmax", "normed", "none"] = "softmax"
    ):
        super().__init__(site)
        c, heads, d = site.dim, site.heads, site.head_dim
        fewest = min(2, heads) if gate == "normed" else 1
        self.active, self.by = max(fewest, math.floor(active * heads + 1e-6)), gate  # a third of three is one
        self.route = nn.Linear(c, heads) if heads > 1 and gate != "none" else None
        self.register_buffer("drawn", torch.empty(heads, c) if heads > 1 and gate == "none" else None)
        self.qkv = nn.Linear(c, 3 * c, bias=site.qkv_bias)
        self.q_norm = site.norm(d) if site.qk_norm else nn.Identity()
        self.k_norm = site.norm(d) if site.qk_norm else nn.Identity()
        self.rotary, self.std = site.rotary, (2 / (c + d)) ** 0.5
        self.proj = nn.Linear(c, c, bias=False)  # W_h, side by side
        self.bias = nn.Parameter(torch.empty(heads, c)) if site.proj_bias else None  # b_h
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier's normal numbers for each head's slices, and biases of zero."""
        for layer in (self.qkv, self.proj):
            nn.init.normal_(layer.weight, std=self.std)
        for bias in (self.qkv.bias, self.bias, None if self.route is None else self.route.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.drawn is not None:
            bound = self.proj.in_features**-0.5
            nn.init.uniform_(self.drawn, -bound, bound)

    def gates(self, x):
        """Which heads a token chooses, and g: (b n h) each."""
        if self.heads == 1:
            p = x[..., :1].softmax(dim=-1)  # 1, whatever x
        else:
            p = (self.route(x) if self.drawn is None else F.linear(x, self.drawn)).softmax(dim=-1)
        p = p if self.by == "none" else self.shares(p)
        chosen = greatest(p, self.active)
        if self.by == "none":
            return chosen > 0, chosen
        g = p * chosen
        if self.by == "normed" and self.heads > 1:
            g = self.active * g / g.sum(dim=-1, keepdim=True)
        return chosen > 0, g

    def mix(self, x, source, *, mask, layout):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = layout.turn(q), layout.turn(k)
        chosen, gate = (rearrange(t, "b n h -> b h n") for t in self.gates(x))
        pairs = chosen[..., None] & chosen[..., None, :]
        mask = replace(mask, pairs=pairs if mask.pairs is None else pairs & mask.pairs)
        gate = gate if self.by == "none" else self.gate(gate)
        out = self.proj(merge_heads(gated_attention(self, q, k, v, gate, mask)))
        return out if self.bias is None else out + gate.mT @ self.bias
