"""Persistent memory: learned keys and values beside those of the tokens.

Sukhbaatar et al., "Augmenting Self-attention with Persistent Memory", 2019, arXiv:1907.01470, §4.2.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Head, Law, NonNegativeInt, Paper, Site, Tap
from attnzoo.functional import masked_softmax


class Memory(Head):
    """softmax(q [k, k']ᵀ / √d) [v, v'] with r keys k' and values v' for each head, which no mask hides.

    Args:
        site: Where the head is put.
        slots: r, the number of learned keys and values per head; none is softmax attention.
        start: `random`, as the authors', or `identity`, softmax attention at first: s + γ (m - s), s being softmax
            attention, m the above, and γ a gate per head that starts at 0.
    """

    card = Card(
        name="memory",
        family=Family.LATENT,
        summary="Softmax attention over the tokens and learned keys and values beside them.",
        equation="softmax(q [k; k']ᵀ / √d) [v; v']",
        paper=Paper(
            "Augmenting Self-attention with Persistent Memory",
            "Sukhbaatar et al.",
            2019,
            "arXiv:1907.01470",
            where="§4.2",
        ),
        time="n m c + n r c",
        memory="h n m + h n r",
        params="2 * slots * c + (h if start == 'identity' and slots else 0)",
        flops="4 * n * m * c + 4 * n * slots * c",
        masks={"keys", "causal", "pairs"},
        context=True,
        incremental=True,
        taps={
            "scores": "b h n m",
            "scores_memory": "b h n r",
            "weights": "b h n m",
            "weights_memory": "b h n r",
        },
        laws={Law.PERMUTATION_EQUIVARIANT, Law.SUBSTOCHASTIC, Law.HEADS_APART},
        notes="The paper has a thousand slots and more, in the place of feed-forward layers, which a host here keeps; "
        "hence fewer by default. A query that may attend to no token gets zeros, not the memory alone.",
    )

    scores_memory: Tap
    weights_memory: Tap

    @classmethod
    def claims(cls, *, start: str, **options) -> Card:
        # γ may leave [0, 1]
        return (
            replace(cls.card, laws=cls.card.laws - {Law.SUBSTOCHASTIC}) if start == "identity" else cls.card
        )

    def __init__(
        self, site: Site, *, slots: NonNegativeInt = 64, start: Literal["random", "identity"] = "random"
    ):
        super().__init__(site)
        self.key_slots = nn.Parameter(torch.empty(site.heads, slots, site.head_dim))
        self.value_slots = nn.Parameter(torch.empty(site.heads, slots, site.head_dim))
        self.gamma = nn.Parameter(torch.empty(site.heads)) if start == "identity" and slots else None
        self.init_weights()

    def init_weights(self) -> None:
        """k' / √d from N(0, 1/d) and v' / √r from N(0, 1/r): what is learned is scaled, as the authors do; γ at 0."""
        nn.init.normal_(self.key_slots, std=self.key_slots.shape[2] ** -0.5)
        nn.init.normal_(self.value_slots, std=max(1, self.value_slots.shape[1]) ** -0.5)
        if self.gamma is not None:
            nn.init.zeros_(self.gamma)

    def attend(self, q, k, v, *, mask, layout):
        slots, m = self.key_slots.shape[1], k.shape[2]
        more_k, more_v = self.key_slots * q.shape[-1] ** 0.5, self.value_slots * slots**0.5  # (h r d)
        q = q * q.shape[-1] ** -0.5
        allowed = mask.dense(q.shape[2], m, q.device)
        scores = self.scores(q @ k.mT)
        memory = self.scores_memory(q @ more_k.mT)
        both = torch.cat([scores, memory], dim=-1)
        if allowed is None:
            weights = both.softmax(dim=-1)
        else:
            weights = masked_softmax(both, F.pad(allowed, (0, slots), value=True))
            weights = weights.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)
        weights, memory = weights[..., :m], weights[..., m:]
        if self.gamma is not None:
            gamma = self.gamma[:, None, None]
            alone = masked_softmax(scores, allowed)
            weights, memory = alone + gamma * (weights - alone), gamma * memory
        return self.weights(weights) @ v + self.weights_memory(memory) @ more_v
