"""Heads that hand through their own values: soft perturbed-attention guidance.

Ahn et al., "Fine-Grained Perturbation Guidance via Attention Head Selection", 2025, arXiv:2506.10978, SoftPAG.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.core import Fraction, Here, InstrumentCard, Intervention, Paper


@dataclass(kw_only=True, eq=False)
class SoftIdentity(Intervention):
    """A ← (1 − u) A + u I, (b h n m), so that o = (1 − u) A v + u v; u = 1 is PAG: each token keeps its own value.

    Heads that form no weights are mixed with their values, o ← (1 − u) o + u v, which is the same. A query that may
    not see itself (padding) keeps its row. Cross-attention, where a query has no value of its own, is left alone.

    `attnzoo.lab.head_hunter.guided` moves what a model answers away from what it answers so perturbed; `head_hunter`
    searches the heads for which that helps most.

    Args:
        strength: u, from 0 to 1.
    """

    card = InstrumentCard(
        "soft_identity",
        "Let heads hand through their own values instead of mixing them (SoftPAG, PAG).",
        equation="A ← (1 − u) A + u I",
        paper=Paper(
            "Fine-Grained Perturbation Guidance via Attention Head Selection",
            "Ahn et al.",
            2025,
            "arXiv:2506.10978",
            "SoftPAG",
        ),
    )
    neutral = {"strength": 0.0}
    own_keys = True
    enough = "first"
    strength: Fraction = 1.0

    def edit_weights(self, weights: Tensor, here: Here) -> Tensor:
        n, m = weights.shape[-2:]
        own = _own(here, n, m, weights.device)
        mixed = (1 - self.strength) * weights + self.strength * own.to(weights.dtype)
        return torch.where(own.any(dim=-1, keepdim=True), mixed, weights)

    def edit_heads(self, out: Tensor, here: Here) -> Tensor:
        assert here.v is not None  # `heads` are edited where a head is called
        n, m = out.shape[2], here.v.shape[2]
        mixed = (1 - self.strength) * out + self.strength * here.v[:, :, m - n :]
        return torch.where(_own(here, n, m, out.device).any(dim=-1, keepdim=True), mixed, out)


def _own(here: Here, n: int, m: int, device: torch.device) -> Tensor:
    """Which key is the query itself, if it may see it, (b or 1, h or 1, n, m); n queries are the last of m tokens."""
    own = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n).triu(m - n)[None, None]
    allowed = here.mask.dense(n, m, device)
    return own if allowed is None else own & allowed
