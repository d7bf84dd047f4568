"""The greatest entries along an axis."""

import torch
from torch import Tensor


def greatest(shares: Tensor, active: int) -> Tensor:
    """1 for the greatest entries of the last axis, 0 for the others; ties are broken as PyTorch's topk does.

    Args:
        shares: (... k).
        active: How many are chosen; at most k.
    """
    return torch.zeros_like(shares).scatter(-1, shares.topk(active, dim=-1).indices, 1.0)


def first_greatest(scores: Tensor, count: int) -> Tensor:
    """Which entries of the last axis are the greatest, of equal ones those that come first: boolean, (... k).

    Args:
        scores: (... k).
        count: How many are chosen; all where there are fewer.
    """
    best = scores.topk(min(count, scores.shape[-1]), dim=-1, sorted=False)
    last = best.values.amin(dim=-1, keepdim=True)
    above, level = scores > last, scores == last
    return above | (level & (level.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))
