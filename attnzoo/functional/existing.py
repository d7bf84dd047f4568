"""Means, maxima and norms of those who exist; what others hold has no say, and the mean of nobody is zero."""

import torch
from torch import Tensor, nn

from attnzoo.core import Mask
from attnzoo.functional.einops import rearrange


def existing(tokens: Tensor, mask: Mask) -> Tensor:
    """Which tokens exist, (b n): what `mask.keys` says, or all.

    Args:
        tokens: Those that the mask speaks of, (b n c).
        mask: Who may attend to whom.
    """
    return torch.ones_like(tokens[..., 0], dtype=torch.bool) if mask.keys is None else mask.keys


def masked_mean(t: Tensor, there: Tensor | None, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Mean over some axes of the entries that exist; zero where there are none.

    Args:
        t: Any shape.
        there: Boolean that broadcasts to t and is as long along the axes `dim`; None when all exist.
        dim: The axes.
        keepdim: Whether they stay, with one entry.
    """
    if there is None:
        return t.mean(dim=dim, keepdim=keepdim)
    return t.masked_fill(~there, 0.0).sum(dim=dim, keepdim=keepdim) / there.sum(
        dim=dim, keepdim=keepdim
    ).clamp(min=1)


def masked_max(t: Tensor, there: Tensor | None, dim: int) -> Tensor:
    """The largest entry along an axis of those that exist; zero where there are none.

    Args:
        t: Any shape.
        there: Boolean that broadcasts to t and is as long along the axis `dim`; None when all exist.
        dim: The axis.
    """
    if there is None:
        return t.amax(dim=dim)
    most = t.masked_fill(~there, float("-inf")).amax(dim=dim)
    return most.masked_fill(~there.any(dim=dim), 0.0)


def mean_token(t: Tensor, mask: Mask) -> Tensor:
    """The mean of the tokens that exist, (... 1 c); zero where there are none.

    Args:
        t: Tokens (b n c), or inside the heads (b h n c).
        mask: Who may attend to whom among them.
    """
    there = None if mask.keys is None else mask.keys.reshape(t.shape[0], *[1] * (t.ndim - 3), -1, 1)
    return masked_mean(t, there, -2, keepdim=True)


def masked_group_norm(norm: nn.GroupNorm, x: Tensor, there: Tensor | None = None) -> Tensor:
    """γ (x - μ) / √(σ² + ε) + β; μ and σ² of a group of channels are over all tokens of a sample that exist.

    Args:
        norm: Has the groups, γ, β and ε.
        x: Tokens (b n c).
        there: Which of them exist, (b n); None when all do. Those that do not are normalised by the others' μ and σ².

    Returns:
        (b n c), in the dtype of x; half precisions are computed in float32.
    """
    if there is None:
        return torch.group_norm(x.mT, norm.num_groups, norm.weight, norm.bias, norm.eps).mT
    groups = rearrange(x, "b n (g d) -> b g n d", g=norm.num_groups)
    groups = groups.to(torch.promote_types(x.dtype, torch.float32))  # sums lose digits in half precision
    there = there[:, None, :, None]
    number, hidden = there.sum(dim=2, keepdim=True).clamp(min=1) * groups.shape[-1], ~there
    off = groups - groups.masked_fill(hidden, 0.0).sum(dim=(2, 3), keepdim=True) / number
    variance = off.masked_fill(hidden, 0.0).square().sum(dim=(2, 3), keepdim=True) / number
    normed = rearrange(off * (variance + norm.eps).rsqrt(), "b g n d -> b n (g d)")
    return (normed * norm.weight + norm.bias).to(x.dtype)
