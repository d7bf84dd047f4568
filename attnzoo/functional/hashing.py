"""Locality-sensitive hashing of tokens: in which order they stand by their buckets, and how often two meet.

Andoni et al., "Practical and Optimal LSH for Angular Distance", 2015, arXiv:1509.02897.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import Mask
from attnzoo.functional.einops import einsum
from attnzoo.functional.tokens import picked


def hashed_order(q: Tensor, directions: Tensor, mask: Mask, more: int) -> Tensor:
    """Positions by bucket and position, (b h k n+more); what does not exist, and what fills up, comes last.

    Args:
        q: What is hashed, (b h n d).
        directions: Of each round, (k d e); a bucket for each, and one for its opposite.
        mask: Says which tokens exist.
        more: Places that fill up the last chunk.
    """
    n = q.shape[2]
    turned = einsum(q, directions.to(q.dtype), "b h n d, k d e -> b h k n e")
    buckets = torch.cat([turned, -turned], dim=-1).argmax(dim=-1)
    most = 2 * directions.shape[2]
    if mask.keys is not None:
        buckets = buckets.masked_fill(~mask.keys[:, None, None], most)
    buckets = F.pad(buckets, (0, more), value=most)
    return (buckets * (n + more) + torch.arange(n + more, device=q.device)).argsort(dim=-1)


def meetings(order: Tensor, at: Tensor, near: Tensor) -> Tensor:
    """In how many rounds the token of a place (b h k r c) reads that of another (b h k r w): (b h k r c w).

    Args:
        order: Tokens by their places in each round, (b h k n).
        at: The same by chunks, (b h k r c).
        near: Tokens that a chunk reads: those of the chunk before it and its own, (b h k r w).
    """
    places, (r, c) = order.argsort(dim=-1), at.shape[3:]
    number = torch.zeros((), device=order.device, dtype=order.dtype)
    for chunk in (places // c).unbind(dim=2):  # of each token in one round, (b h n+more)
        mine, theirs = (picked(chunk[..., None], t.flatten(2)).reshape(t.shape) for t in (at, near))
        mine, theirs = mine[..., None], theirs[..., None, :]
        number = number + ((theirs == mine) | (theirs == (mine - 1) % r))
    return number


def existing_places(at: Tensor, mask: Mask, n: int) -> Tensor:
    """Which of the positions (b h k r 1 w) hold a token that exists.

    Args:
        at: Positions, from 0; from n on nothing is there.
        mask: Says which tokens exist.
        n: Number of tokens.
    """
    if mask.keys is None:
        return at < n
    keys = F.pad(mask.keys, (0, 1))  # nothing lies beyond
    return keys.gather(1, at.clamp(max=n).flatten(1)).reshape(at.shape)
