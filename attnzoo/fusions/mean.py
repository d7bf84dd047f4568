"""Arithmetic mean."""

from functools import reduce
from operator import add

from attnzoo.core import Fusion, FusionCard, Law


class Mean(Fusion):
    """Σ_i a_i / k."""

    card = FusionCard(
        name="mean",
        summary="Mean of the branches: Σ aᵢ / k.",
        equation="1/k Σ_i a_i",
        laws={
            Law.SINGLE,
            Law.AGREE,
            Law.CONVEX,
            Law.SYMMETRIC,
            Law.ADDITIVE,
            Law.FAIR_START,
            Law.IDENTITY_START,
            Law.TOKEN_LOCAL,
        },
    )

    def merge(self, branches, x):
        return reduce(add, branches) / self.arity
