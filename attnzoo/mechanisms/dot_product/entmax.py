"""Entmax attention: weights that are exactly zero for keys whose scores lie too far below the others.

Peters, Niculae and Martins, "Sparse Sequence-to-Sequence Models", 2019, arXiv:1905.05702, §3, eq. 5 and Algorithm 2;
sparsemax: Martins and Astudillo, 2016, arXiv:1602.02068.
"""

from typing import Literal

import torch
from torch import Tensor

from attnzoo.core import Card, Family, Head, Law, Paper, Site


def threshold(z: Tensor, power: int) -> Tensor:
    """τ with Σ_j [z_j - τ]₊^power = 1, by sorting: (... m) -> (... 1).

    For the k largest alone τ_k follows from sums; the right k is the number of those with τ_k ≤ z_k.

    Args:
        z: Numbers from -1 to 0, of which one is 0.
        power: 2 for entmax with α = 1.5, 1 for sparsemax.
    """
    z = z.sort(dim=-1, descending=True).values
    k = torch.ones_like(z).cumsum(dim=-1)
    mean = z.cumsum(dim=-1) / k
    if power == 1:
        tau = mean - 1 / k
    else:
        spread = z.square().cumsum(dim=-1) - k * mean.square()  # Σ (z - mean)²
        tau = mean - ((1 - spread).clamp(min=0) / k).sqrt()
    support = (tau <= z).sum(dim=-1, keepdim=True)
    return tau.gather(-1, support - 1)


def masked_entmax(scores: Tensor, allowed: Tensor | None, power: int) -> Tensor:
    """p_j = [z_j - τ]₊^power over the last axis, z = scores / power; entries that are not allowed get 0.

    Args:
        scores: (... m).
        allowed: Boolean that broadcasts to the scores; None allows all.
        power: As for `threshold`.
    """
    z = scores.to(torch.promote_types(scores.dtype, torch.float32)) / power
    if allowed is not None:
        z = z.masked_fill(~allowed, torch.finfo(z.dtype).min)  # finite, so that rows of none stay so
    z = z - z.detach().amax(dim=-1, keepdim=True)
    tau = threshold(z.detach().clamp(min=-1), power)  # what is farther below never takes part
    # a step of Newton's, which changes τ by rounding alone and gives it its gradient: ∂τ/∂z_j = s_j / Σ s, s = p^{2-α}
    over = (z - tau).clamp(min=0)
    slope = (over if power == 2 else (over > 0).to(z.dtype)).detach().sum(dim=-1, keepdim=True)
    tau = tau + (over.pow(power).sum(dim=-1, keepdim=True) - 1) / (power * slope)
    p = (z - tau).clamp(min=0).pow(power).to(scores.dtype)
    return p if allowed is None else p.masked_fill(~allowed, 0.0)


class Entmax(Head):
    """α-entmax(q kᵀ / √d) v: p_j = [(α - 1) z_j - τ]₊^{1/(α - 1)}, with τ such that p sums to 1; exact, by sorting.

    Args:
        site: Where the head is put.
        alpha: `1.5`, p_j = [z_j / 2 - τ]₊², or `2`, sparsemax, p_j = [z_j - τ]₊, which is sparser still.
    """

    card = Card(
        name="entmax",
        family=Family.DOT_PRODUCT,
        summary="Sparse weights in the place of a softmax: exact 1.5-entmax, or sparsemax.",
        equation="p v\np_ij = [z_ij / 2 − τ_i]₊²,  Σ_j p_ij = 1\nz = q kᵀ / √d",
        paper=Paper(
            "Sparse Sequence-to-Sequence Models",
            "Peters, Niculae and Martins",
            2019,
            "arXiv:1905.05702",
            where="§3, eq. 5, Algorithm 2",
        ),
        time="n m c + n m log(m)",
        memory="h n m",
        params="0",
        flops="4 * n * m * c",
        hard_routing=True,
        masks={"keys", "causal", "pairs"},
        context=True,
        incremental=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={
            Law.STOCHASTIC,
            Law.PERMUTATION_EQUIVARIANT,
            Law.LINEAR_IN_VALUES,
            Law.BOUNDED,
            Law.HEADS_APART,
        },
        notes="A key whose weight is zero gets no gradient. Rows are sorted, so it is slower than softmax, and keeps "
        "no key from being read. α is not learned.",
    )

    def __init__(self, site: Site, *, alpha: Literal["1.5", "2"] = "1.5"):
        super().__init__(site)
        self.power = {"1.5": 2, "2": 1}[alpha]

    def attend(self, q, k, v, *, mask, layout):
        scores = self.scores((q * q.shape[-1] ** -0.5) @ k.mT)
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        return self.weights(masked_entmax(scores, allowed, self.power)) @ v
