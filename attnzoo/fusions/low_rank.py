"""Low-rank bilinear pooling with the Hadamard product (MLB).

Kim et al., "Hadamard Product for Low-rank Bilinear Pooling", ICLR 2017, arXiv:1610.04325, §3, eq. 3-5.
"""

from functools import reduce
from operator import mul
from typing import Literal

import torch
from torch import nn

from attnzoo.core import Fusion, FusionCard, Law, Paper, PositiveInt, Site, Start


class LowRank(Fusion):
    """P (σ(U_1 a_1) ⊙ ... ⊙ σ(U_k a_k)) + b, with U_i to `rank` channels and P back.

    Args:
        site: Where it is; `site.dim` is the number of channels that it is given.
        arity: Number of branches.
        rank: Width between U and P, in channels; as many as the branches have when null.
        activation: σ before the product: `tanh` as in the paper's final model, or `none`, which is bilinear.
        start: `free` merges at once; `identity` equals the first branch bit for bit before training.
    """

    card = FusionCard(
        name="low_rank",
        summary="Low-rank bilinear pooling: P (σ(U₁ a₁) ⊙ … ⊙ σ(Uₖ aₖ)) + b.",
        equation="P (tanh(U_1 a_1) ⊙ … ⊙ tanh(U_k a_k)) + b",
        paper=Paper(
            "Hadamard Product for Low-rank Bilinear Pooling",
            "Kim et al.",
            2017,
            "arXiv:1610.04325",
            where="§3, eq. 3-5",
        ),
        laws={Law.IDENTITY_START, Law.TOKEN_LOCAL},
    )

    def __init__(
        self,
        site: Site,
        arity: int,
        *,
        rank: PositiveInt | None = None,
        activation: Literal["tanh", "none"] = "tanh",
        start: Start = "free",
    ):
        super().__init__(site, arity, start=start)
        self.activation = torch.tanh if activation == "tanh" else nn.Identity()
        self.down = nn.ModuleList(nn.Linear(site.dim, rank or site.dim) for _ in range(arity))
        self.up = nn.Linear(rank or site.dim, site.dim)

    def merge(self, branches, x):
        factors = (self.activation(down(branch)) for down, branch in zip(self.down, branches, strict=True))
        return self.up(reduce(mul, factors))
