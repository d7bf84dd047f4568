"""Linear attention under a causal mask, by chunks: no sum is kept for each token."""

import torch
from torch import Tensor, fx
from torch.nn import functional as F


def causal_sums(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Σ_{j ≤ i} q_i·k_j v_j for each query i, the last query being where the last key is.

    Pairs are formed within chunks; t chunks hand on states (r e), so memory is n r e / w instead of the n r e of all
    prefix sums, and linear in the tokens.

    Args:
        q: (b h n r).
        k: (b h m r).
        v: (b h m e).
        chunk: w, in tokens; with w = r the states are as large as the tokens.
    """
    n, m = q.shape[2], k.shape[2]
    length = -(-max(n, m) // chunk) * chunk
    # (b h t w ·); what is too few stands in front, as zeros
    q, k, v = (F.pad(x, (0, 0, length - x.shape[2], 0)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    states = F.pad((k.mT @ v).cumsum(dim=2), (0, 0, 0, 0, 1, -1))  # of the chunks before
    return ((q @ k.mT).tril() @ v + q @ states).flatten(2, 3)[:, :, length - n :]


def stabilised_sums(q: Tensor, k: Tensor, log: Tensor, v: Tensor, eps: float, chunk: int) -> Tensor:
    """Σ_{j ≤ i} q_iᵀ (k_j exp(log_j - c_i) + ε) v_j for each query i, c_i the greatest log of the keys up to i.

    Args:
        q, k, log, v: (b h n r), (b h m r), (b h m 1) and (b h m e).
        eps: ε.
        chunk: w, how many tokens form pairs; between chunks, t of them, states (r e) are handed on.
    """
    n, m, low = q.shape[2], k.shape[2], torch.finfo(log.dtype).min
    length = -(-max(n, m) // chunk) * chunk
    # (b h t w ·); what is too few stands in front, as if absent
    q, k, v = (F.pad(x, (0, 0, length - x.shape[2], 0)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    log = F.pad(log[..., 0], (length - m, 0), value=low)
    c = log.cummax(dim=2).values.unflatten(2, (-1, chunk))
    log, last = log.unflatten(2, (-1, chunk)), c[..., -1]
    ahead = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    scale = (log[..., None, :] - c[..., None]).masked_fill(ahead, -torch.inf).exp()  # (b h t w w)
    rest = eps * q.sum(dim=-1, keepdim=True)
    inside = (q @ k.mT * scale + rest.masked_fill(ahead, 0.0)) @ v
    states = (k * (log - last[..., None]).exp()[..., None]).mT @ v  # (b h t r e), in units of exp(last)
    step = 1
    while step < states.shape[2]:  # each has its own and `step` - 1 before; then twice as many
        fade = (last[..., :-step] - last[..., step:]).exp()[..., None, None]
        states = torch.cat([states[:, :, :step], states[:, :, step:] + fade * states[:, :, :-step]], dim=2)
        step *= 2
    before, units = F.pad(states, (0, 0, 0, 0, 1, -1)), F.pad(last, (1, -1), value=low)
    sums = F.pad(v.sum(dim=3).cumsum(dim=2), (0, 0, 1, -1))[..., None, :]
    outside = (q @ before) * (units[..., None] - c).exp()[..., None] + rest * sums
    return (inside + outside).flatten(2, 3)[:, :, length - n :]


for _name in ("causal_sums", "stabilised_sums"):
    fx.wrap(_name)  # symbolic tracing knows no lengths
