"""Attention to few keys.

Gupta et al., "Memory-efficient Transformers via Top-k Attention", 2021, arXiv:2106.06899, §2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.core import Here, InstrumentCard, Intervention, Paper, PositiveInt


@dataclass(kw_only=True, eq=False)
class KeepTop(Intervention):
    """A_ij ← A_ij Σ_k A_ik / Σ_{k∈K_i} A_ik for j in K_i, and 0 for others; K_i: the largest weights of row i.

    Of softmax attention that is softmax over the largest scores alone. Rows keep their sums. Where weights may be
    negative, the largest by size are kept. Of equal weights any may be kept.

    Args:
        keys: How many, of each row (b h n m); None keeps all.
        rescale: Whether rows keep their sums; without it what is not kept is lost.
    """

    card = InstrumentCard(
        "keep_top",
        "Attend to few: only the largest weights of each query are kept.",
        equation="A_ij ← A_ij Σ_k A_ik / Σ_{k∈K_i} A_ik for j ∈ K_i, else 0",
        paper=Paper(
            "Memory-efficient Transformers via Top-k Attention",
            "Gupta et al.",
            2021,
            "arXiv:2106.06899",
            "§2",
        ),
    )
    neutral = {"keys": None}
    keys: PositiveInt | None = 8
    rescale: bool = True

    def edit_weights(self, weights: Tensor, here: Here) -> Tensor:
        m = weights.shape[-1]
        if self.keys is None or self.keys >= m:
            return weights
        best = weights.abs().topk(self.keys, dim=-1).indices
        kept = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, best, True)
        few = weights.masked_fill(~kept, 0.0)
        if not self.rescale:
            return few
        total, left = (part.sum(dim=-1, keepdim=True) for part in (weights, few))
        return few * torch.where(left == 0, 1.0, total / left.masked_fill(left == 0, 1.0))
