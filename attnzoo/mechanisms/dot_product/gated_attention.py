"""Gated attention: what attention gives is gated, channel by channel or head by head, by the token that asked.

Qiu et al., "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free", 2025,
arXiv:2505.06708, §2.2, eq. 5; positions G1, G2 and G5.
"""

from dataclasses import replace
from typing import Literal

from torch import nn

from attnzoo.core import Card, Family, Law, OptionError, Paper, Site
from attnzoo.functional import dot_product_attention, merge_heads, split_heads
from attnzoo.functional.projections import Projected


class GatedAttention(Projected):
    """W_o (softmax(q kᵀ / √d) v ⊙ σ(W_g x)): between the merged heads and their projection stands a gate.

    Args:
        site: Where the mechanism is put.
        by: `channel`, a gate for each channel, W_g (c c), or `head`, one for each head, W_g (c h).
        at: What is gated: `merged` heads (G1), the best in the paper; `values` (G2), by the tokens that are read from;
            or what is `projected` (G5), by channel.

    Raises:
        OptionError: AZ214, for a gate by head where heads are projected already.
    """

    card = Card(
        name="gated_attention",
        family=Family.DOT_PRODUCT,
        summary="Softmax attention whose output is gated by a sigmoid of the token that asked.",
        equation="W_o (softmax(q kᵀ / √d) v ⊙ σ(W_g x))",
        paper=Paper(
            "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
            "Qiu et al.",
            2025,
            "arXiv:2505.06708",
            where="§2.2, eq. 5",
        ),
        time="n m c + n c c",
        memory="h n m + n c",
        params="2 * (c + e) * c + (3 * qkv_bias + proj_bias) * c + 4 * qk_norm * d"
        " + (e if at == 'values' else c) * (c if by == 'channel' else h)",
        flops="4 * n * c * c + 4 * m * e * c + 4 * n * m * c"
        " + 2 * (m * e if at == 'values' else n * c) * (c if by == 'channel' else h)",
        masks={"keys", "causal", "pairs"},
        context=True,
        honours={"qkv_bias", "proj_bias", "qk_norm", "rotary"},
        taps={"scores": "b h n m", "weights": "b h n m", "gate": "b n c"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        notes="W_g has no bias. x is what the host hands over, after its norm. The authors' models have grouped "
        "queries, a norm of queries and keys, and rotary positions, of which a site may ask for the last two. Without "
        "a context the state-dict keys of what is not the gate are timm's.",
    )

    @classmethod
    def claims(cls, *, by: str, at: str, **options) -> Card:
        axes = f"b {'m' if at == 'values' else 'n'} {'c' if by == 'channel' else 'h'}"
        return replace(cls.card, taps={**cls.card.taps, "gate": axes})

    def __init__(
        self,
        site: Site,
        *,
        by: Literal["channel", "head"] = "channel",
        at: Literal["merged", "values", "projected"] = "merged",
    ):
        super().__init__(site)
        if (by, at) == ("head", "projected"):
            raise OptionError(
                "`gated_attention`: what is projected has no heads that a gate could be for",
                help="choose `by: channel`, or `at: merged`",
            )
        self.at, self.each = at, 1 if by == "channel" else site.head_dim  # channels that share a gate
        self.rotary = site.rotary and site.context_dim is None
        source = site.context_dim or site.dim
        self.add_projections(site)
        self.gate_proj = nn.Linear(
            source if at == "values" else site.dim, site.dim // self.each, bias=False
        )  # W_g
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)

    def mix(self, x, source, *, mask, layout):
        q, k, v = self.projected(x, source)
        gate = self.gate(self.gate_proj(source if self.at == "values" else x).sigmoid())
        gate = gate.repeat_interleave(self.each, dim=-1) if self.each > 1 else gate
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v * gate if self.at == "values" else v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = layout.turn(q), layout.turn(k)
        merged = merge_heads(dot_product_attention(self, q, k, v, mask))
        out = self.proj(merged * gate if self.at == "merged" else merged)
        return out * gate if self.at == "projected" else out
