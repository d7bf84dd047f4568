"""Weights by squared dot products, z² / (1 + z²)."""

from typing import Literal

import torch
from torch import Tensor


def expressive_weights(
    z: Tensor, allowed: Tensor | None, norm: Literal["row", "none", "mean"] = "row", eps: float | None = None
) -> Tensor:
    """e = z² / (1 + z²), (b h n m), 0 for keys that are not allowed; divided by a sum, by a number, or by nothing.

    Gros, 2024, arXiv:2407.18601. Finite with finite gradients for z of any size.

    Args:
        z: Dot products (b h n m), not scaled.
        allowed: Boolean that broadcasts to z; None allows all.
        norm: `row` divides by Σ_j e_ij, `mean` by the number of keys that are allowed, `none` by nothing.
        eps: Of `row`: what is added to the sum. With None a row of zeros is the mean of what is allowed.
    """
    seen = torch.ones_like(z)
    if allowed is not None:
        z, seen = z.masked_fill(~allowed, 0.0), seen.masked_fill(~allowed, 0.0)  # e = 0, where -∞ gave 1
    size = z.detach().abs().clamp(min=1)  # z² may overflow; e does not depend on it
    root = z / size * (size**-2 + (z / size) ** 2).rsqrt()  # √e, with the sign of z
    weights = root.square()
    if norm == "mean":
        weights = weights / seen.sum(dim=-1, keepdim=True).clamp(min=1)
    elif norm == "row":
        if eps is None:
            # relative to the largest, since small squares vanish; A does not depend on it
            largest = root.detach().abs().amax(dim=-1, keepdim=True)
            some = largest > 0
            weights = torch.where(some, (root / torch.where(some, largest, 1.0)).square(), seen)
        total = weights.sum(dim=-1, keepdim=True) + (eps or 0.0)
        weights = weights / torch.where(total > 0, total, 1.0)  # 0 where nothing may be attended to
    return weights
