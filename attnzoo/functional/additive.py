"""Additive scores wᵀ tanh(q_i + k_j) for all pairs, without the (n, m, a) tensor."""

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

ROWS = 16  # query rows at a time: the largest temporary is (b, h, 16, m, a)
LIMIT = {torch.float32: 20.0, torch.float64: 170.0}
"""Up to here the product of two exponentials neither overflows nor vanishes."""


def _by_exponentials(eq: Tensor, ek: Tensor, weight: Tensor) -> Tensor:
    """wᵀ 1 / (1 + eq ek) for a few query rows: (b h r a), (b h m a), (h a) -> (b h r m)."""
    inner = torch.addcmul(eq.new_ones(()), eq[:, :, :, None], ek[:, :, None]).reciprocal()
    return torch.einsum("bhnma,ha->bhnm", inner, weight)


def _by_tanh(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """wᵀ tanh(q + k) for a few query rows: (b h r a), (b h m a), (h a) -> (b h r m)."""
    return torch.einsum("bhnma,ha->bhnm", torch.tanh(q[:, :, :, None] + k[:, :, None]), weight)


def _is_small(q: Tensor, k: Tensor) -> bool:
    """Whether no entry passes `LIMIT`; False wherever that is not to be known, or not for nothing.

    A graph that is being compiled, exported or traced holds for other values too; tensors without values (meta, fake,
    under vmap, empty) cannot be asked, and of an accelerator the question would wait for all that was launched before.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or q.device.type != "cpu":
        return False
    limit = LIMIT[q.dtype]
    try:
        return all(-limit <= value.item() <= limit for t in (q, k) for value in t.detach().aminmax())
    except RuntimeError:
        return False


def additive_scores(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """wᵀ tanh(q_i + k_j) for every query i and key j, a few query rows at a time.

    tanh x = 1 - 2 / (1 + e^{2x}) and e^{2(q + k)} = e^{2q} e^{2k}: where all entries are small, two small exponentials
    stand for n m tanh. In training each piece is computed again in the backward pass instead of being kept.

    Args:
        q: Projected queries (b h n a).
        k: Projected keys (b h m a).
        weight: (h a).

    Returns:
        (b h n m), in the dtype of q; half precisions are computed in float32.
    """
    dtype = q.dtype
    if dtype not in LIMIT:
        q, k, weight = q.float(), k.float(), weight.float()
    if _is_small(q, k):
        scores = _in_pieces(_by_exponentials, (2 * q).exp(), (2 * k).exp(), -2 * weight)
        scores = scores + weight.sum(dim=-1)[:, None, None]
    else:
        scores = _in_pieces(_by_tanh, q, k, weight)
    return scores.to(dtype)


def _in_pieces(rows: Callable[..., Tensor], q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    pieces = q.split(ROWS, dim=2)
    if len(pieces) == 1:
        return rows(q, k, weight)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return torch.cat([checkpoint(rows, piece, k, weight, use_reentrant=False) for piece in pieces], dim=2)
    return torch.cat([rows(piece, k, weight) for piece in pieces], dim=2)


fx.wrap("additive_scores")  # symbolic tracing cannot follow a loop over a length it does not know
