"""Sum, HAM B's fusion.

Martínez-Marín et al., "Transformer Architecture Reconfiguration Using Heterogeneous Attention", §3.
"""

from functools import reduce
from operator import add

import torch

from attnzoo.core import Fusion, FusionCard, Law, Paper


class Add(Fusion):
    """Σ_i a_i. With `start: identity`: a₁ + γ Σ_{i>1} a_i, γ = 0 at first."""

    card = FusionCard(
        name="add",
        summary="Sum of the branches: Σ aᵢ (HAM B).",
        equation="Σ_i a_i",
        paper=Paper(
            "Transformer Architecture Reconfiguration Using Heterogeneous Attention",
            "Martínez-Marín et al.",
            where="§3",
        ),
        laws={Law.SINGLE, Law.SYMMETRIC, Law.ADDITIVE, Law.NEUTRAL_ZERO, Law.IDENTITY_START, Law.TOKEN_LOCAL},
    )

    def merge(self, branches, x):
        return reduce(add, branches)

    def merge_from_first(self, branches, x, **handed):
        return torch.addcmul(branches[0], self.gamma, reduce(add, branches[1:]))
