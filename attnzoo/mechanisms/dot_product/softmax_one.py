"""Softmax off by one: a query may attend to nobody, as if there were one more key whose score and value are zero.

Miller, "Attention Is Off By One", 2023, eq. "softmax₁"; a learned score: "gpt-oss-120b & gpt-oss-20b Model Card", 2025,
arXiv:2508.10925, §2.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Head, Law, Paper, Site
from attnzoo.functional import dot_product_attention


class SoftmaxOne(Head):
    """Weights exp(z_ij) / (e^s + Σ_j exp(z_ij)), z = q kᵀ / √d, with s = 0.

    Args:
        site: Where the head is put.
        learned: Whether s, the score of a sink, is learned for each head; it starts at 0.
    """

    card = Card(
        name="softmax_one",
        family=Family.DOT_PRODUCT,
        summary="Softmax with a one added to its sum, so that a query may attend to nobody; a learned sink if wished.",
        equation="A v\nA_ij = exp(z_ij) / (1 + Σ_l exp(z_il)),  z = q kᵀ / √d",
        paper=Paper("Attention Is Off By One", "Miller", 2023, "evanmiller.org/attention-is-off-by-one.html"),
        time="n m c",
        memory="h n m",
        params="h if learned else 0",
        flops="4 * n * (m + 1) * h * (d + learned)",
        masks={"keys", "causal", "pairs"},
        context=True,
        incremental=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.SUBSTOCHASTIC, Law.PERMUTATION_EQUIVARIANT, Law.LINEAR_IN_VALUES, Law.HEADS_APART},
        notes="No mask hides the sink, taps do not show it. The learned score is that of gpt-oss (arXiv:2508.10925), "
        "which does not say how it starts. The fused kernel forms no (n, m) tensor, with the sink as a key in front of "
        "the others; memory is that of the explicit form, which taps ask for.",
    )

    def __init__(self, site: Site, *, learned: bool = False):
        super().__init__(site)
        self.sink = nn.Parameter(torch.empty(site.heads)) if learned else None  # s
        self.init_weights()

    def init_weights(self) -> None:
        """s = 0, the softmax off by one."""
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def no_weight_decay(self) -> set[str]:
        return set() if self.sink is None else {"sink"}

    def attend(self, q, k, v, *, mask, layout):
        if not (self.scores.watched or self.weights.watched):
            return self._fused(q, k, v, mask)
        scores = self.scores((q * q.shape[-1] ** -0.5) @ k.mT)
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        sink = torch.zeros_like(scores[..., :1]) if self.sink is None else self._sink(scores[..., :1])
        return self.weights(torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]) @ v

    def _sink(self, like):
        """s of each head, in the shape and dtype of (b h n 1)."""
        return self.get_parameter("sink")[:, None, None].to(like.dtype).expand_as(like)

    def _fused(self, q, k, v, mask):
        """The sink is a key before the first, of zeros; where its score is learned, a channel is added to hold it."""
        d = q.shape[-1]
        if self.sink is not None:
            score = self._sink(k[:, :, :1, :1]) * d**0.5
            q, k, v = torch.cat([q, torch.ones_like(q[..., :1])], dim=-1), F.pad(k, (0, 1)), F.pad(v, (0, 1))
            q = q * ((d + 1) / d) ** 0.5  # what follows divides by √(d + 1)
            k = torch.cat([F.pad(score, (d, 0)), k], dim=2)
        else:
            k = F.pad(k, (0, 0, 1, 0))
        v = F.pad(v, (0, 0, 1, 0))
        keys, pairs = (
            None if part is None else F.pad(part, (1, 0), value=True) for part in (mask.keys, mask.pairs)
        )
        if mask.kinds == ("causal",) and q.shape[2] + 1 == k.shape[2]:
            # a query in front, of nobody, makes it as square as the kernel's own causal form wants it
            q = F.pad(q, (0, 0, 1, 0))
            return dot_product_attention(self, q, k, v, mask)[:, :, 1:, :d]
        return dot_product_attention(self, q, k, v, replace(mask, keys=keys, pairs=pairs))[..., :d]
