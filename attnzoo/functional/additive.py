"""Additive scores wᵀ tanh(q_i + k_j) for all pairs, without the (n, m, a) tensor."""

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

ROWS = 16  # query rows at a time: the largest temporary is (b, h, 16, m, a)
LIMIT = {torch.float32: 20.0, torch.float64: 170.0}  # so that the product of two exponentials stays finite


def _rows(eq: Tensor, ek: Tensor, weight: Tensor) -> Tensor:
    """-2 wᵀ 1 / (1 + eq ek) for a few query rows: (b h r a), (b h m a), (h a) -> (b h r m)."""
    inner = torch.addcmul(eq.new_ones(()), eq[:, :, :, None], ek[:, :, None]).reciprocal()
    return -2 * torch.einsum("bhnma,ha->bhnm", inner, weight)


def additive_scores(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """wᵀ tanh(q_i + k_j) for every query i and key j.

    tanh x = 1 - 2 / (1 + e^{2x}) and e^{2(q + k)} = e^{2q} e^{2k}: two small exponentials instead of n m tanh, and
    a few query rows at a time. Exact unless |q| or |k| exceeds 20 (170 in float64), where it saturates. In training
    each piece is computed again in the backward pass instead of being kept.

    Args:
        q: Projected queries (b h n a).
        k: Projected keys (b h m a).
        weight: (h a).

    Returns:
        (b h n m), in the dtype of q.
    """
    dtype = q.dtype
    if dtype not in LIMIT:  # half precisions overflow
        q, k, weight = q.float(), k.float(), weight.float()
    limit = LIMIT[q.dtype]
    eq, ek = (2 * q.clamp(-limit, limit)).exp(), (2 * k.clamp(-limit, limit)).exp()
    keep_nothing = torch.is_grad_enabled() and q.shape[2] > ROWS and not torch.compiler.is_compiling()
    pieces = [
        checkpoint(_rows, piece, ek, weight, use_reentrant=False)
        if keep_nothing
        else _rows(piece, ek, weight)
        for piece in eq.split(ROWS, dim=2)
    ]
    return (torch.cat(pieces, dim=2) + weight.sum(dim=-1)[:, None, None]).to(dtype)


fx.wrap("additive_scores")  # symbolic tracing cannot follow a loop over a length it does not know
