"""A line of tokens: cut into blocks, which may overlap, or into chunks with the places around them; what is close."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.functional.einops import rearrange


def in_blocks(t: Tensor, length: int, stride: int) -> Tensor:
    """Blocks of l tokens, from every s-th on, (b h n e) -> (b h r l e), filled up with zeros, or False, at the end.

    Args:
        t: What the tokens have, (b h n e).
        length: l, in tokens.
        stride: s, in tokens; r = ⌈n / s⌉.
    """
    return F.pad(t, (0, 0, 0, -t.shape[2] % stride + length - stride)).unfold(2, length, stride).mT


def with_places(blocks: Tensor) -> Tensor:
    """With the place of each token in its block, i / l, as one more channel, (b h r l d) -> (b h r l d+1)."""
    place = torch.arange(blocks.shape[3], dtype=blocks.dtype, device=blocks.device)[:, None] / blocks.shape[3]
    return torch.cat([blocks, place.expand(*blocks.shape[:-1], 1)], dim=-1)


def close(allowed: Tensor, window: int) -> Tensor:
    """Who sees whom less than w away: broadcasts to (b h n n).

    Args:
        allowed: Who sees whom at all, boolean that broadcasts to (b h n n).
        window: w, in tokens.
    """
    at = torch.arange(allowed.shape[3], device=allowed.device)
    return allowed & ((at[:, None] - at).abs() < window)


def in_chunks(t: Tensor, at: Tensor) -> Tensor:
    """(b h n e), filled up in front with zeros, as (b h g t c e): the c tokens of t chunks of g interleaved lines.

    Args:
        t: What the tokens have, (b h n e).
        at: Where those of each chunk are, (g t c), as `around_chunks` says; only its shape is looked at.
    """
    g, chunks, c = at.shape
    t = F.pad(t, (0, 0, g * chunks * c - t.shape[2], 0))
    return rearrange(t, "b h (t c g) e -> b h g t c e", g=g, c=c)


def in_a_line(t: Tensor, like: Tensor) -> Tensor:
    """The inverse of `in_chunks`, (b h g t c e) -> (b h n e).

    Args:
        t: What the tokens of the chunks have, (b h g t c e).
        like: Has as many tokens as there shall be, (b h n ...).
    """
    t = rearrange(t, "b h g t c e -> b h (t c g) e")
    return t[:, :, t.shape[2] - like.shape[2] :]


def around_chunks(q: Tensor, k: Tensor, window: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Where the queries of each chunk are among the keys, (g t c), and keys around the chunk, (g t s); -1 is none.

    Args:
        q: Queries (b h n d), the last of which is where the last key is.
        k: Keys (b h m d).
        window: How many keys of its line are around a query, to each side.
        dilation: g; tokens with equal index modulo g form a line.
    """
    n, m = q.shape[2], k.shape[2]
    window = min(window, -(-m // dilation))
    chunk = max(1, min(-(-n // dilation), max(window, 16)))
    total = -(-n // (chunk * dilation)) * chunk * dilation
    at = torch.arange(m - total, m, device=q.device)
    at = rearrange(at, "(t c g) -> g t c", c=chunk, g=dilation).contiguous()  # it is an index
    seen = at[..., :1] + dilation * torch.arange(-window, chunk + window, device=q.device)
    return at, torch.where((seen >= 0) & (seen < m), seen, -1)
