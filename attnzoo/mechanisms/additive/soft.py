"""Soft attention inside the heads, the second branch of HAM.

Martínez-Marín et al., "Transformer Architecture Reconfiguration Using Heterogeneous Attention", §3; the scores are
Bahdanau's, arXiv:1409.0473. The paper leaves the reading open; `pooled` is ours, the others are named options.
"""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnzoo.core import NO_MASK, Card, Family, Head, Law, Layout, Mask, Paper, PositiveInt, Site, Tap
from attnzoo.errors import UnsupportedContext
from attnzoo.functional import additive_scores, attention_from_scores, masked_softmax

Variant = Literal["pooled", "gated", "bahdanau", "cls_query"]


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
        paper=Paper("Transformer Architecture Reconfiguration Using Heterogeneous Attention", "Martínez-Marín et al.",
                    where="§3"),
        time="n c d",
        memory="h n d",
        masks={"keys"},
        context=True,
        weights="b h m",
        laws={Law.STOCHASTIC, Law.LINEAR_IN_VALUES, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="The paper does not say how the one map meets the tokens: `pooled` is our reading. It is linear in the "
        "values only where the map does not come from them (bahdanau, cls_query).",
    )  # fmt: skip
    renamed = {"reading": "variant"}

    @classmethod
    def claims(cls, *, variant: Variant = "pooled", **options) -> Card:
        laws = {Law.STOCHASTIC}
        if variant == "bahdanau":
            return replace(
                cls.card,
                time="n m c",
                memory="h m d",
                masks=frozenset({"keys", "causal", "pairs"}),
                incremental=True,
                weights="b h n m",
                laws=frozenset(laws | {Law.LINEAR_IN_VALUES, Law.BOUNDED, Law.PERMUTATION_EQUIVARIANT}),
            )
        if variant == "cls_query":  # the first token is special, and no key mask says whether it exists
            return replace(
                cls.card, masks=frozenset(), laws=frozenset(laws | {Law.LINEAR_IN_VALUES, Law.BOUNDED})
            )
        if variant == "gated":
            return replace(cls.card, context=False, laws=frozenset(laws | {Law.PERMUTATION_EQUIVARIANT}))
        return replace(cls.card, laws=frozenset(laws | {Law.BOUNDED, Law.PERMUTATION_EQUIVARIANT}))

    def __init__(
        self,
        site: Site,
        *,
        variant: Variant = "pooled",
        hidden: PositiveInt | None = None,
        gate_scale: Literal["tokens", "one"] = "tokens",
    ):
        super().__init__()
        self.card = self.claims(variant=variant)
        self.variant, self.gate_scale, self.attn_drop = variant, gate_scale, site.attn_drop
        h, d, a = site.heads, site.head_dim, hidden or site.head_dim
        if variant in ("pooled", "gated"):
            self.value_weight = nn.Parameter(torch.empty(h, d, a))
            self.value_bias = nn.Parameter(torch.empty(h, a))
        else:
            self.key_weight = nn.Parameter(torch.empty(h, d, a))
            self.query_weight = nn.Parameter(torch.empty(h, d, a))
        self.score_weight = nn.Parameter(torch.empty(h, a))
        axes = "b h n m" if variant == "bahdanau" else "b h m"
        self.scores, self.weights = Tap(axes), Tap(axes)
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

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m d"],
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
    ) -> Float[Tensor, "b h n d"]:
        dropout = self.attn_drop if self.training else 0.0
        if self.variant == "bahdanau":
            scores = additive_scores(q @ self.query_weight, k @ self.key_weight, self.score_weight)
            allowed = mask.dense(q.shape[2], k.shape[2], q.device)
            return attention_from_scores(scores, v, allowed, self.scores, self.weights, dropout)
        mask.only(*self.card.masks)
        if self.variant == "cls_query":
            hidden = torch.tanh(k @ self.key_weight + q[:, :, :1] @ self.query_weight)
            scores = torch.einsum("bhma,ha->bhm", hidden, self.score_weight)
        else:
            scores = self._value_scores(v)
        allowed = None if mask.keys is None else mask.keys[:, None]
        weights = self.weights(masked_softmax(self.scores(scores), allowed))
        weights = nn.functional.dropout(weights, dropout)
        if self.variant == "gated":
            if q.shape[2] != v.shape[2]:
                raise UnsupportedContext(
                    "AZ404", "`soft` with `variant: gated` gates tokens by themselves; it has no context"
                )
            tokens = v.shape[2] if allowed is None else allowed.sum(dim=-1)[..., None, None]
            return weights[..., None] * v * (tokens if self.gate_scale == "tokens" else 1)
        pooled = weights[:, :, None] @ v  # (b h 1 d)
        return pooled.expand(-1, -1, q.shape[2], -1)

    def _value_scores(self, v: Tensor) -> Tensor:
        """tanh(V W + b) w, (b h m): one product per head over all samples, which takes v as it lies in memory."""
        b, h, m, _ = v.shape
        rows = v.transpose(0, 1).reshape(h, b * m, -1)
        hidden = torch.baddbmm(self.value_bias[:, None], rows, self.value_weight).tanh_()  # (h b*m a)
        return (hidden @ self.score_weight[..., None]).reshape(h, b, m).transpose(0, 1)
