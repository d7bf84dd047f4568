"""Each branch works on its own heads."""

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.core import Fusion, FusionCard, Law, Site
from attnzoo.errors import RecipeError


class HeadSplit(Fusion):
    """[a_1; ...; a_k]: the heads (on tokens: the channels) are dealt to the branches in equal parts.

    Args:
        site: Where it is.
        arity: Number of branches; must divide the heads.

    Raises:
        RecipeError: AZ312, when the branches do not divide the heads.
    """

    card = FusionCard(
        name="head_split",
        summary="Each branch works on its own heads: [a₁; …; aₖ].",
        equation="[a_1; …; a_k]",
        laws={Law.SINGLE, Law.ADDITIVE, Law.TOKEN_LOCAL},
        notes="It has no `start`: no branch alone is as wide as the result.",
    )

    def __init__(self, site: Site, arity: int):
        super().__init__(site, arity)

    @classmethod
    def sites(cls, site: Site, arity: int) -> list[Site]:
        cls._check_arity(arity)
        if site.heads % arity:
            raise RecipeError(
                "AZ312",
                f"`head_split` cannot deal {site.heads} heads to {arity} branches",
                help="the number of branches must divide the number of heads",
            )
        return [replace(site, dim=site.dim // arity, heads=site.heads // arity)] * arity

    def split(self, x: Tensor, axis: int) -> list[Tensor]:
        size = x.shape[axis] // self.arity
        return [x.narrow(axis, i * size, size) for i in range(self.arity)]

    def merge(self, branches, x):
        return torch.cat(list(branches), dim=self.head_axis)
