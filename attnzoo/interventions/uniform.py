"""Attention to all alike."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.core import Fraction, Here, InstrumentCard, Intervention


@dataclass(kw_only=True, eq=False)
class Uniform(Intervention):
    """A_ij ← (1 − u) A_ij + u Σ_k A_ik / m_i for the m_i keys j that query i may see, (b h n m).

    What heads choose is taken away, and how much they take is kept: the sum of each row. With u = 1 every query
    receives the mean of the values. Keys that the mask forbids stay at 0; where a mechanism itself sees few keys (a
    window), the mean is over all that the mask allows.

    Args:
        strength: u, from 0 to 1.
    """

    card = InstrumentCard(
        "uniform",
        "Attend to all alike: each row becomes, or moves towards, its mean over the visible keys.",
        equation="A_ij ← (1 − u) A_ij + u Σ_k A_ik / m_i",
    )
    neutral = {"strength": 0.0}
    strength: Fraction = 1.0

    def edit_weights(self, weights: Tensor, here: Here) -> Tensor:
        n, m = weights.shape[-2:]
        allowed = here.mask.dense(n, m, weights.device)
        keys = torch.ones_like(weights) if allowed is None else allowed.to(weights.dtype).expand_as(weights)
        mean = weights.sum(dim=-1, keepdim=True) / keys.sum(dim=-1, keepdim=True).clamp(min=1)
        return (1 - self.strength) * weights + self.strength * mean * keys
