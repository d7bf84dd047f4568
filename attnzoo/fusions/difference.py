"""The first branch minus a learned share of the others.

Ye et al., "Differential Transformer", 2024, arXiv:2410.05258, §2.1, eq. 1: two maps subtracted to cancel noise.
"""

import math
from functools import reduce
from operator import add

import torch
from torch import nn

from attnzoo.core import Fusion, FusionCard, Law, Paper, Site, Start


class Difference(Fusion):
    """a_1 - λ Σ_{i>1} a_i, λ learned per channel.

    λ starts at 0.8 - 0.6 e^{-0.3 layer}, or at 0 with `start: identity`.
    """

    card = FusionCard(
        name="difference",
        summary="The first branch minus a learned share of the others: a₁ − λ Σ aᵢ.",
        equation="a_1 − λ ⊙ Σ_{i>1} a_i",
        paper=Paper("Differential Transformer", "Ye et al.", 2024, "arXiv:2410.05258", where="§2.1, eq. 1-3"),
        laws={Law.ADDITIVE, Law.IDENTITY_START, Law.TOKEN_LOCAL},
        arity=(2, None),
        fidelity="adapted",
        notes="λ is learned directly, not through the paper's exponentials, and acts on outputs of any mechanism.",
    )

    def __init__(self, site: Site, arity: int, *, start: Start = "free"):
        super().__init__(site, arity)
        self.start_share = 0.0 if start == "identity" else 0.8 - 0.6 * math.exp(-0.3 * site.layer)
        self.share = nn.Parameter(torch.empty(site.dim))
        self.init_weights()

    def init_weights(self) -> None:
        """λ of the chosen start."""
        nn.init.constant_(self.share, self.start_share)

    def no_weight_decay(self) -> set[str]:
        return {"share"}

    def merge(self, branches, x):
        return branches[0] - self.share * reduce(add, branches[1:])
