"""Additive scores wᵀ tanh(q_i + k_j) for all pairs, without the (n, m, a) tensor."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

ROWS = 16  # query rows at a time where nothing is known of values: the largest temporary is (b, h, 16, m, a)
TILE = 2**18  # entries of a temporary otherwise, for each thread: it stays in a core's cache
LIMIT = {torch.float32: 20.0, torch.float64: 170.0}
"""Up to here the product of two exponentials neither overflows nor vanishes."""


def additive_scores(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """wᵀ tanh(q_i + k_j) for every query i and key j.

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
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and q.device.type == "cpu":
        scores = _fused(q, k, weight)
    else:
        scores = _Small.apply(q, k, weight) if _is_small(q, k) else _by_tanh(q, k, weight)
    return scores.to(dtype)


def _fused(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """The scores as one loop without a temporary, once it is compiled.

    In training by sigmoids, for a choice by values cannot be checkpointed.
    """

    def by_exponentials(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        r = 1 / (1 + (2 * q).exp()[:, :, :, None] * (2 * k).exp()[:, :, None])
        return weight.sum(dim=-1)[:, None, None] - 2 * (weight[:, None, None] * r).sum(dim=-1)

    def by_sigmoids(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        s = torch.sigmoid(2 * q[:, :, :, None] + 2 * k[:, :, None])
        return 2 * (weight[:, None, None] * s).sum(dim=-1) - weight.sum(dim=-1)[:, None, None]

    if torch.is_grad_enabled():
        return by_sigmoids(q, k, weight)
    small = torch.stack([q.abs().amax(), k.abs().amax()]).amax() <= LIMIT[q.dtype]
    return torch.cond(small, by_exponentials, by_sigmoids, (q, k, weight))


def _is_small(q: Tensor, k: Tensor) -> bool:
    """Whether no entry passes `LIMIT`; False wherever that is not to be known, or not for nothing.

    A graph that is being exported or traced holds for other values too; tensors without values (meta, fake,
    under vmap, empty) cannot be asked, and of an accelerator the question would wait for all that was launched before.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or q.device.type != "cpu":
        return False
    limit = LIMIT[q.dtype]
    try:
        return all(-limit <= value.item() <= limit for t in (q, k) for value in t.detach().aminmax())
    except RuntimeError:
        return False


def _by_tanh(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """The scores of entries of any size, some query rows at a time."""

    def scores(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("bhnma,ha->bhnm", torch.tanh(q[:, :, :, None] + k[:, :, None]), weight)

    pieces = q.split(ROWS, dim=2)
    if len(pieces) == 1:
        return scores(q, k, weight)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return torch.cat(
            [checkpoint(scores, piece, k, weight, use_reentrant=False) for piece in pieces], dim=2
        )
    return torch.cat([scores(piece, k, weight) for piece in pieces], dim=2)


class _Small(Function):
    """The scores of small entries: Σ_a w_a - 2 Σ_a w_a r_ija with r_ija = 1 / (1 + e^{2q_ia} e^{2k_ja})."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        total, w = weight.sum(dim=-1)[:, None, None], _by_sample(weight, q)
        scores = q.new_empty(*q.shape[:3], k.shape[2])
        flat = scores.flatten(0, 1)
        for at, i, j, r in _tiles(q, k):
            flat[at, i, j] = (r.flatten(1, 2) @ w[at]).view(r.shape[:3])
        return scores.mul_(-2).add_(total)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """∂ tanh = 4 r (1 - r); a gradient that has one itself goes by tanh."""
        q, k, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            learned = [t for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True) if needed]
            found = iter(torch.autograd.grad(_by_tanh(q, k, weight), learned, grads, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        g = grads[0].flatten(0, 1)
        dq, dk, dw = (
            torch.zeros_like(t) for t in (q.flatten(0, 1), k.flatten(0, 1), _by_sample(weight, q).mT)
        )
        for at, i, j, r in _tiles(q, k):
            part = g[at, i, j]
            dw[at] += part.flatten(1)[:, None] @ r.flatten(1, 2)
            r = torch.addcmul(r, r, r, value=-1, out=r)
            dq[at, i] += (part.flatten(0, 1)[:, None] @ r.flatten(0, 1)).view(r.shape[0], r.shape[1], -1)
            for row, gain in zip(r.unbind(1), part.unbind(1), strict=True):
                dk[at, j].addcmul_(row, gain[..., None])
        dq, dk = (4 * weight[:, None] * d.view_as(t) for d, t in ((dq, q), (dk, k)))
        dw = g.sum(dim=(1, 2))[:, None] - 2 * dw[:, 0]
        return dq, dk, dw.unflatten(0, q.shape[:2]).sum(dim=0)


def _by_sample(weight: Tensor, q: Tensor) -> Tensor:
    """The weight of each head of each sample, a column: (h a) to (b·h a 1)."""
    return weight.expand(len(q), -1, -1).flatten(0, 1)[..., None]


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Where in (b·h n m) a tile is, and its 1 / (1 + e^{2q} e^{2k}), (z i j a); each is written over the one before."""
    eq, ek = (2 * q).exp().flatten(0, 1), (2 * k).exp().flatten(0, 1)
    (samples, n, a), m = eq.shape, ek.shape[1]
    most = TILE * torch.get_num_threads()
    columns = min(m, max(1, most // a))
    rows = min(n, max(1, most // (a * columns)))
    several = min(samples, max(1, most // (a * columns * rows)))
    buffer, one = q.new_empty(several * rows * columns * a), q.new_ones(())
    starts = range(0, samples, several), range(0, n, rows), range(0, m, columns)
    for z, y, x in product(*starts):
        at, i, j = slice(z, z + several), slice(y, y + rows), slice(x, x + columns)
        left, right = eq[at, i, None], ek[at, None, j]
        shape = (left.shape[0], left.shape[1], right.shape[2], a)
        out = buffer[: left.shape[0] * left.shape[1] * right.shape[2] * a].view(shape)
        yield at, i, j, torch.addcmul(one, left, right, out=out).reciprocal_()


fx.wrap("additive_scores")  # symbolic tracing cannot follow a loop over a length it does not know
