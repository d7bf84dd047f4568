"""Linformer: keys and values are projected along the tokens to a fixed number of slots.

Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020, arXiv:2006.04768, §4, eq. 7.
"""

from typing import Literal

import torch
from torch import nn

from attnzoo.core import NO_MASK, Card, Family, Head, Law, Paper, PositiveInt, Site
from attnzoo.functional import dot_product_attention, einsum


class Linformer(Head):
    """softmax(q (E k)ᵀ / √d) F v, with E and F of r × n shared by all heads.

    Args:
        site: Where the head is put.
        rank: r, the number of slots that stand for the tokens.
        share: `headwise`, E and F of their own, or `kv`, where F is E.
    """

    card = Card(
        name="linformer",
        family=Family.LINEAR,
        summary="Keys and values projected along the tokens to r slots: cost linear in the number of tokens.",
        equation="softmax(q (E k)ᵀ / √d) F v",
        paper=Paper(
            "Linformer: Self-Attention with Linear Complexity",
            "Wang et al.",
            2020,
            "arXiv:2006.04768",
            where="§4, eq. 7",
        ),
        time="n r c + m r c",
        memory="h n r + r m",
        params="rank * m * (2 if share == 'headwise' else 1)",
        flops="4 * rank * m * c + 4 * rank * n * c",
        masks={"keys"},
        context=True,
        fixed_length="most",
        taps={"scores": "b h n r", "weights": "b h n r"},
        laws={Law.STOCHASTIC, Law.LINEAR_IN_VALUES, Law.HEADS_APART},
        notes="Shorter inputs use the first columns of E and F. Keys that do not exist enter the slots as zeros. "
        "Sharing across layers, which the paper offers too, would tie sites and is left out.",
    )

    def __init__(self, site: Site, *, rank: PositiveInt = 256, share: Literal["headwise", "kv"] = "headwise"):
        super().__init__(site)
        # E and F
        self.key_slots = nn.Parameter(torch.empty(rank, self.length))
        self.value_slots = nn.Parameter(torch.empty(rank, self.length)) if share == "headwise" else None
        self.init_weights()

    def init_weights(self) -> None:
        """Entries from N(0, 1/r), as in the proof of theorem 2."""
        for slots in self.parameters():
            nn.init.normal_(slots, std=slots.shape[0] ** -0.5)

    def shared(self) -> set[str]:
        return {"key_slots", "value_slots"}

    def attend(self, q, k, v, *, mask, layout):
        if mask.keys is not None:
            k, v = k * mask.keys[:, None, :, None], v * mask.keys[:, None, :, None]
        e = self.key_slots[:, : k.shape[2]]
        f = e if self.value_slots is None else self.value_slots[:, : k.shape[2]]
        k, v = einsum(e, k, "r m, b h m d -> b h r d"), einsum(f, v, "r m, b h m d -> b h r d")
        return dot_product_attention(self, q, k, v, NO_MASK)
