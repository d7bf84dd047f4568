"""Soft attention inside the heads, the second branch of HAM.

Martínez-Marín et al., "Transformer Architecture Reconfiguration Using Heterogeneous Attention", §3; the scores are
Bahdanau's, arXiv:1409.0473. The paper leaves the reading open; `pooled` is ours, the others are named options.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Head, Law, Paper, PositiveInt, Site
from attnzoo.functional import additive_scores, attention_from_scores, masked_softmax

TITLE = "Transformer Architecture Reconfiguration Using Heterogeneous Attention"


class Soft(Head):
    """Bahdanau's soft attention over a head's own values.

    `pooled`: u_j = tanh(V_j W + b), α = softmax_j(u_j w), every token receives Σ_j α_j V_j.
    `gated`: the same α, but token j receives α_j V_j, times the number of tokens with `gate_scale: tokens`.
    `bahdanau`: α_ij = softmax_j(wᵀ tanh(K_j W₁ + Q_i W₂)), token i receives Σ_j α_ij V_j.
    `cls_query`: as `bahdanau` with the first token as the only query; every token receives its result.

    Args:
        site: Where the head is put.
        variant: Which of the four.
        hidden: Width of the small network per head, in channels; the head's own width when null.
        gate_scale: What `gated` multiplies α by: the number of `tokens`, so that a flat α changes nothing, or `one`.
    """

    card = Card(
        name="soft",
        family=Family.ADDITIVE,
        summary="HAM's soft attention: one additive map over the tokens pools each head's values.",
        equation="Σ_j α_j v_j\nα_j = softmax_j(wᵀ tanh(W v_j + b))",
        paper=Paper(TITLE, "Martínez-Marín et al.", where="§3"),
        time="n c d",
        memory="h n d",
        params="(c + 2 * h) * (hidden or d)",
        flops="2 * m * (c + h) * (hidden or d) + (variant == 'pooled') * 2 * m * c",
        masks={"keys"},
        context=True,
        taps={"scores": "b h m", "weights": "b h m"},
        laws={Law.STOCHASTIC, Law.BOUNDED, Law.PERMUTATION_EQUIVARIANT, Law.HEADS_APART},
        fidelity="adapted",
        notes="The paper does not say how the one map meets the tokens: `pooled` is our reading. It is linear in the "
        "values only where the map does not come from them (bahdanau, cls_query).",
    )
    renamed = {"reading": "variant"}

    @classmethod
    def claims(cls, *, variant: str, **options) -> Card:
        card, laws = cls.card, cls.card.laws
        if variant == "pooled":
            return card
        if variant == "gated":
            return replace(card, context=False, laws=laws - {Law.BOUNDED})
        params, laws = "(2 * c + h) * (hidden or d)", laws | {Law.LINEAR_IN_VALUES}
        asking = "n" if variant == "bahdanau" else "1"
        flops = f"2 * ({asking} + m) * c * (hidden or d) + 2 * {asking} * m * (c + (hidden != 1) * h * (hidden or d))"
        card = replace(card, params=params, flops=flops, laws=laws)
        if variant == "bahdanau":
            return replace(
                card,
                time="n m c + n c d + m c d",
                memory="h n m + h m d",
                masks={"keys", "causal", "pairs"},
                incremental=True,
                taps={"scores": "b h n m", "weights": "b h n m"},
            )
        # the first token is special, and no key mask says whether it exists
        return replace(card, masks=frozenset(), laws=laws - {Law.PERMUTATION_EQUIVARIANT})

    def __init__(
        self,
        site: Site,
        *,
        variant: Literal["pooled", "gated", "bahdanau", "cls_query"] = "pooled",
        hidden: PositiveInt | None = None,
        gate_scale: Literal["tokens", "one"] = "tokens",
    ):
        super().__init__(site)
        self.variant, self.gate_scale = variant, gate_scale
        h, d, a = site.heads, site.head_dim, hidden or site.head_dim
        if variant in ("pooled", "gated"):
            self.value_weight = nn.Parameter(torch.empty(h, d, a))
            self.value_bias = nn.Parameter(torch.empty(h, a))
        else:
            self.key_weight = nn.Parameter(torch.empty(h, d, a))
            self.query_weight = nn.Parameter(torch.empty(h, d, a))
        self.score_weight = nn.Parameter(torch.empty(h, a))
        self.init_weights()

    def init_weights(self) -> None:
        """Weights N(0, 0.02²) as every Linear of the paper's model, biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"value_bias"} if self.variant in ("pooled", "gated") else set()

    def attend(self, q, k, v, *, mask, layout):
        if self.variant == "bahdanau":
            scores = additive_scores(q @ self.query_weight, k @ self.key_weight, self.score_weight)
            return attention_from_scores(self, scores, v, mask.dense(q.shape[2], k.shape[2], q.device))
        if self.variant == "cls_query":
            hidden = torch.tanh(k @ self.key_weight + q[:, :, :1] @ self.query_weight)
            scores = torch.einsum("bhma,ha->bhm", hidden, self.score_weight)
        else:
            scores = self._value_scores(v)
        allowed = None if mask.keys is None else mask.keys[:, None]
        weights = self.weights(masked_softmax(self.scores(scores), allowed))
        if self.variant == "gated":
            tokens = v.shape[2] if allowed is None else allowed.sum(dim=-1)[..., None, None]
            return weights[..., None] * v * (tokens if self.gate_scale == "tokens" else 1)
        pooled = weights[:, :, None] @ v  # (b h 1 d)
        return pooled.expand(-1, -1, q.shape[2], -1)

    def _value_scores(self, v):
        """tanh(V W + b) w, (b h m): one product per head over all samples, which takes v as it lies in memory."""
        b, h, m, d = v.shape
        rows = v.transpose(0, 1).reshape(h, b * m, d)
        hidden = torch.baddbmm(self.value_bias[:, None], rows, self.value_weight).tanh_()  # (h b*m a)
        return (hidden @ self.score_weight[..., None]).reshape(h, b, m).transpose(0, 1)
