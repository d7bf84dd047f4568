"""Element-wise product, HAM A's fusion.

Martínez-Marín et al., "Transformer Architecture Reconfiguration Using Heterogeneous Attention", §3.
"""

from functools import reduce
from operator import mul

from attnzoo.core import Fusion, FusionCard, Law, Paper


class Hadamard(Fusion):
    """Π_i a_i. With `start: identity`: a₁ ⊙ (1 + γ Π_{i>1} a_i), γ = 0 at first."""

    card = FusionCard(
        name="hadamard",
        summary="Element-wise product of the branches: Π aᵢ (HAM A).",
        equation="Π_i a_i",
        paper=Paper(
            "Transformer Architecture Reconfiguration Using Heterogeneous Attention",
            "Martínez-Marín et al.",
            where="§3",
        ),
        laws={Law.SINGLE, Law.SYMMETRIC, Law.IDENTITY_START, Law.TOKEN_LOCAL},
    )

    def merge(self, branches, x):
        return reduce(mul, branches)

    def merge_from_first(self, branches, x, **handed):
        return branches[0] * (1 + self.gamma * reduce(mul, branches[1:]))
