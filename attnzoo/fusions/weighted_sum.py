"""Sum with one learned weight per branch."""

import torch
from torch import nn

from attnzoo.core import Fusion, FusionCard, Law, Site, Start


class WeightedSum(Fusion):
    """Σ_i w_i a_i with learned scalars, 1 at first.

    With `start: identity` they are 1 for the first branch and 0 for the rest.
    """

    card = FusionCard(
        name="weighted_sum",
        summary="Sum of the branches with one learned weight each: Σ wᵢ aᵢ.",
        equation="Σ_i w_i a_i",
        laws={Law.ADDITIVE, Law.IDENTITY_START, Law.TOKEN_LOCAL},
    )

    def __init__(self, site: Site, arity: int, *, start: Start = "free"):
        super().__init__(site, arity)
        self.start_weights = [1.0] + [0.0 if start == "identity" else 1.0] * (arity - 1)
        self.weight = nn.Parameter(torch.empty(arity))
        self.init_weights()

    def init_weights(self) -> None:
        """The weights of the chosen start."""
        with torch.no_grad():
            for weight, value in zip(self.weight, self.start_weights, strict=True):
                weight.fill_(value)

    def no_weight_decay(self) -> set[str]:
        return {"weight"}

    def merge(self, branches, x):
        total = branches[0] * self.weight[0]
        for i in range(1, self.arity):
            total = total + branches[i] * self.weight[i]
        return total
