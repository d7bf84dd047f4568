"""Element-wise maximum."""

from functools import reduce

import torch

from attnzoo.core import Fusion, FusionCard, Law


class Max(Fusion):
    """max_i a_i, element by element; where branches are equal the gradient is shared."""

    card = FusionCard(
        name="max",
        summary="Element-wise maximum of the branches.",
        equation="max_i(a_i)",
        laws={Law.SINGLE, Law.AGREE, Law.CONVEX, Law.SYMMETRIC, Law.IDENTITY_START, Law.TOKEN_LOCAL},
        hard_routing=True,
        notes="Each element hands its gradient to the branch that is largest there.",
    )

    def merge(self, branches, x):
        return reduce(torch.maximum, branches)
