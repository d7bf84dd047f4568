"""Mean of the branches, each normalised and scaled by a learned vector.

Dong et al., "Hymba: A Hybrid-head Architecture for Small Language Models", 2024, arXiv:2411.13676, §2.1.
"""

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Fusion, FusionCard, Law, Paper, Site, Start

EPS = 1e-6


class NormedMean(Fusion):
    """Σ_i β_i ⊙ a_i / √(mean(a_i²) + ε) / k, with a learned β_i per branch and channel, 1 at first; ε = 10⁻⁶.

    The mean of squares is over the channels of a token. So the size of a branch has no say, only β has.
    """

    card = FusionCard(
        name="normed_mean",
        summary="Mean of the branches, each normalised and scaled: Σ βᵢ ⊙ RMSNorm(aᵢ) / k.",
        equation="1/k Σ_i β_i ⊙ a_i / √(mean(a_i²) + ε)",
        paper=Paper(
            "Hymba: A Hybrid-head Architecture for Small Language Models",
            "Dong et al.",
            2024,
            "arXiv:2411.13676",
            where="§2.1",
        ),
        laws={Law.IDENTITY_START, Law.TOKEN_LOCAL},
        notes="Inside the heads the norm is that of the channels of a head, on tokens that of all, as in the paper.",
    )

    def __init__(self, site: Site, arity: int, *, start: Start = "free"):
        super().__init__(site, arity, start=start)
        self.beta = nn.Parameter(torch.empty(arity, site.dim))
        self.init_weights()

    def init_weights(self) -> None:
        """The plain mean of what is normalised."""
        nn.init.ones_(self.beta)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"beta"}

    def merge(self, branches, x):
        total = F.rms_norm(branches[0], branches[0].shape[-1:], self.beta[0], EPS)
        for i in range(1, self.arity):
            total = total + F.rms_norm(branches[i], branches[i].shape[-1:], self.beta[i], EPS)
        return total / self.arity
