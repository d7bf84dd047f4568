"""Sigmoid attention: every pair is weighed for itself, with a bias that makes up for the number of keys.

Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", 2024, arXiv:2409.04431, §2-3.
"""

from dataclasses import replace
from typing import Literal

import torch

from attnzoo.core import Card, Family, Head, Law, Paper, Site


class Sigmoid(Head):
    """σ(q kᵀ / √d - ln N) v: weights need not sum to 1, and each knows of its own query and key only.

    Args:
        site: Where the head is put.
        count: What N counts: `seen`, the keys that a query may attend to, which under a causal mask are more with each
            query; `keys`, those that exist, in each sample; `site`, the tokens it was built for, whatever is given.
    """

    card = Card(
        name="sigmoid",
        family=Family.DOT_PRODUCT,
        summary="A sigmoid of each score in the place of the softmax, with the bias -ln N for N keys.",
        equation="σ(q kᵀ / √d − ln N) v",
        paper=Paper(
            "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
            "Ramapuram et al.",
            2024,
            "arXiv:2409.04431",
            where="§2, eq. 3; the bias: §3",
        ),
        time="n m c",
        memory="h n m",
        params="0",
        flops="4 * n * m * c",
        masks={"keys", "causal", "pairs"},
        context=True,
        incremental=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.PERMUTATION_EQUIVARIANT, Law.LINEAR_IN_VALUES, Law.HEADS_APART},
        notes="The tap `scores` shows q kᵀ / √d, before the bias, which is not learned. The authors' N is a constant, "
        "the length they train with (`site`), under causal masks too. `seen` and `keys` follow the length, and are the "
        "same without causal masks and pairs. With `keys` what a token receives depends on how many follow, and causal "
        "masks are refused. The authors stabilise it by LayerScale or norms of queries and keys, which are the host's.",
    )

    @classmethod
    def claims(cls, *, count: str, **options) -> Card:
        if count == "keys":
            return replace(cls.card, masks={"keys", "pairs"}, incremental=False)
        return cls.card

    def __init__(self, site: Site, *, count: Literal["seen", "keys", "site"] = "seen"):
        super().__init__(site)
        self.count = count

    def attend(self, q, k, v, *, mask, layout):
        scores = self.scores((q * q.shape[-1] ** -0.5) @ k.mT)
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        exact = torch.promote_types(scores.dtype, torch.float32)  # half precision has no large whole numbers
        bias = -self._number(mask, allowed, k).to(exact).log()
        weights = (scores + bias.to(scores.dtype)).sigmoid()
        return self.weights(weights if allowed is None else weights.masked_fill(~allowed, 0.0)) @ v

    def _number(self, mask, allowed, k):
        """N, in a shape that broadcasts to (b h n m); at least 1."""
        if self.count == "seen" and allowed is not None:
            return allowed.expand(*allowed.shape[:-1], k.shape[2]).sum(dim=-1, keepdim=True).clamp(min=1)
        if self.count == "keys" and mask.keys is not None:
            return mask.keys.sum(dim=-1).clamp(min=1)[:, None, None, None]
        return torch.full((), self.length if self.count == "site" else k.shape[2], device=k.device)
