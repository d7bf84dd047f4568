"""Concatenation and a projection back."""

import torch
from torch import nn

from attnzoo.core import Fusion, FusionCard, Law, Site, Start


class Concat(Fusion):
    """W [a_1; ...; a_k], W from k c to c channels, without bias."""

    card = FusionCard(
        name="concat",
        summary="The branches side by side, projected back: W [a₁; …; aₖ].",
        equation="W [a_1; …; a_k]",
        laws={Law.ADDITIVE, Law.IDENTITY_START, Law.TOKEN_LOCAL},
    )

    def __init__(self, site: Site, arity: int, *, start: Start = "free"):
        super().__init__(site, arity, start=start)
        self.merge_proj = nn.Linear(arity * site.dim, site.dim, bias=False)

    def merge(self, branches, x):
        return self.merge_proj(torch.cat(list(branches), dim=-1))
