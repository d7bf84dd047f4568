"""Distances along a line of tokens: their sines and cosines, and what a query has for each as what it has by key."""

import torch
from torch import Tensor, fx
from torch.nn import functional as F


def distances(q: Tensor) -> Tensor:
    """n - 1, ..., 0, ..., 1 - n: by how much a key of n lies before a query of (b h n d)."""
    n = q.shape[2]
    return torch.arange(n - 1, -n, -1, device=q.device)


def sinusoids(q: Tensor, c: int) -> Tensor:
    """s_r, the sines and cosines of r 10000^{-2i/c}, for each of `distances`: (2n-1 c).

    Dai et al., "Transformer-XL", 2019, arXiv:1901.02860, §3.3.

    Args:
        q: Queries (b h n d).
        c: How many channels s_r has.
    """
    r, even = distances(q)[:, None], torch.arange(0, c, 2, device=q.device)
    exact = torch.promote_types(q.dtype, torch.float32)  # angles lose digits in half precision
    angles = r.to(exact) * 10_000.0 ** (-even.to(exact) / c)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :c].to(q.dtype)


def by_pair(t: Tensor) -> Tensor:
    """What query i has for each of `distances`, (b h n 2n-1), as what it has for key j, (b h n n)."""
    n = t.shape[2]
    # entry n - 1 - i + j of row i is, with a further column, at place (2n - 1) i + (n - 1) + j of all
    line = F.pad(t, (0, 1)).flatten(2)[..., n - 1 : -1]
    return line.unflatten(2, (n, 2 * n - 1))[..., :n]


for _name in ("distances", "sinusoids"):
    fx.wrap(_name)  # symbolic tracing knows no lengths
