"""A line of tokens cut into stretches that are as long as each other or one longer, and their means."""

import torch
from torch import Tensor, fx


def segments(t: Tensor, most: int) -> Tensor:
    """Which of the tokens of (b h n d) lie in which of at most `most` stretches.

    Returns:
        (r n), r the smaller one of `most` and n.
    """
    n = t.shape[2]
    r = min(most, n)
    first = torch.arange(r + 1, device=t.device) * n // r
    at = torch.arange(n, device=t.device)
    return (at >= first[:-1, None]) & (at < first[1:, None])


def segment_means(t: Tensor, most: int, share: Tensor | None = None) -> Tensor:
    """The mean of each of `segments`, (b h r d).

    Args:
        t: (b h n d).
        most: The most stretches.
        share: What each token counts in each mean, (b 1 r n), where some do not exist; None when all do.
    """
    n, r = t.shape[2], min(most, t.shape[2])
    if share is None and n % r == 0:
        return t.unflatten(2, (r, n // r)).mean(dim=3)
    if share is None:
        belongs = segments(t, most).to(t.dtype)
        share = belongs / belongs.sum(dim=-1, keepdim=True)
    return share @ t


for _name in ("segments", "segment_means"):
    fx.wrap(_name)  # symbolic tracing knows no lengths
