"""An associative memory: each token changes it by a local rule, and queries read it."""

import torch
from torch import Tensor, fx
from torch.nn import functional as F


def recalled(
    q: Tensor, k: Tensor, v: Tensor, there: Tensor, eta: Tensor | float, decay: float, rule: str, causal: bool
) -> Tensor:
    """S q of the memory S so far, or of the last one: (b h n e), by chunks of w tokens, exactly.

    A token makes λ S + η v kᵀ of S by the rule `hebb`, λ S + η (v - λ S k) kᵀ by `delta`, λ S + η v (k - λ Sᵀ v)ᵀ by
    `oja`.

    Args:
        q, k, v: (b h n d), (b h m d) and (b h m e); zero where there is no token.
        there: Whether a token exists, 1 or 0, (b 1 m).
        eta, decay, rule: η, λ and the rule by which tokens are written.
        causal: Whether memories so far are read, the last query being the last key's.
    """
    n, m, chunk = q.shape[2], k.shape[2], 32
    # what is too few stands in front, as if absent
    length = -(-(max(n, m) if causal else m) // chunk) * chunk
    k, v = (F.pad(t, (0, 0, length - m, 0)).split(chunk, dim=2) for t in (k, v))
    ages = F.pad(there, (length - m, 0)).split(chunk, dim=2)
    asks = F.pad(q, (0, 0, length - n, 0)).split(chunk, dim=2) if causal else ()
    ahead = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    memory, out = q.new_zeros(*q.shape[:2], q.shape[3], v[0].shape[3]), []  # Sᵀ
    for i, (key, value, age) in enumerate(zip(k, v, ages, strict=True)):
        age = age.cumsum(dim=-1)[..., None]  # (b 1 w 1), tokens of this chunk so far
        fade = (decay ** (age - age.mT).clamp(min=0)).masked_fill(ahead, 0.0)  # (b 1 w w)
        old, wrote, new = decay**age, key, value
        if rule != "hebb":  # what is written is an error, in which those of the chunk before it count
            on, wants, state = (key, value, memory) if rule == "delta" else (value, key, memory.mT)
            system, wants = eta * (on @ on.mT * fade).tril(-1), wants - old * (on @ state)
            error = torch.linalg.solve_triangular(system, wants, upper=False, unitriangular=True)
            wrote, new = (key, error) if rule == "delta" else (error, value)
        if causal:
            out.append(old * (asks[i] @ memory) + (asks[i] @ wrote.mT * fade) @ (eta * new))
        memory = old[:, :, -1:] * memory + (wrote * fade[:, :, -1:].mT).mT @ (eta * new)
    return torch.cat(out, dim=2)[:, :, length - n :] if causal else q @ memory


fx.wrap("recalled")  # symbolic tracing knows no lengths
