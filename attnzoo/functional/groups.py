"""Attention within groups of the tokens of a plane, to which special tokens belong everywhere."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from attnzoo.core import Mask, Tap
from attnzoo.functional.einops import rearrange
from attnzoo.functional.softmax import masked_softmax
from attnzoo.functional.windows import unwindows, windows


class Groups(NamedTuple):
    """A plane as r groups of w = i j places: windows, or with `strided` tokens as far apart as possible.

    Args:
        grid: How many rows and columns of tokens there are, (y, x).
        sides: How many rows and columns a group has, (i, j); they need not divide the grid.
        shift: By how many rows and columns windows are shifted, around the edges; those at an edge fall apart there.
        strided: Whether a group takes every ⌈y / i⌉-th row and every ⌈x / j⌉-th column.
        least: How many windows there are at least, along each side; others than the plane needs lie beyond it.
    """

    grid: tuple[int, int]
    sides: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    strided: bool = False
    least: tuple[int, int] = (1, 1)

    @property
    def filled(self) -> tuple[int, int]:
        """Rows and columns with those that fill up the last groups."""
        (y, x), (i, j), (least_y, least_x) = self.grid, self.sides, self.least
        return max(-(-y // i), least_y) * i, max(-(-x // j), least_x) * j

    @property
    def plain(self) -> bool:
        """Whether they are windows as they lie, no more than the plane needs."""
        return not (self.strided or any(self.shift)) and self.least == (1, 1)

    def cut(self, t: Tensor) -> Tensor:
        """(... y*x e) -> (... r w e); places without a token are filled up with zeros."""
        if self.plain:
            return windows(t, self.grid, self.sides)
        (y, x), (below, beside) = self.grid, self.filled
        t = t.unflatten(-2, self.grid)
        if (y, x) != (below, beside):
            t = F.pad(t, (0, 0, 0, beside - x, 0, below - y))
        if self.strided:
            i, j = self.sides
            return rearrange(t, "... (i y) (j x) e -> ... (y x) (i j) e", i=i, j=j)
        t = t.roll((-self.shift[0], -self.shift[1]), (-3, -2))
        return windows(t.flatten(-3, -2), self.filled, self.sides)

    def join(self, t: Tensor, heads: bool = False) -> Tensor:
        """The inverse of `cut`, (... r w e) -> (... y*x e); `heads` as `unwindows` has it."""
        if self.plain:
            return unwindows(t, self.grid, self.sides, heads)
        (y, x), (i, j), (below, _) = self.grid, self.sides, self.filled
        if self.strided:
            t = rearrange(t, "... (y x) (i j) e -> ... (i y) (j x) e", y=below // i, i=i, j=j)
        else:
            t = unwindows(t, self.filled, self.sides).unflatten(-2, self.filled).roll(self.shift, (-3, -2))
        return t[..., :y, :x, :].flatten(-3, -2)

    def parts(self, device: torch.device) -> Tensor:
        """Which part of its group a token belongs to, (y*x 1): those across an edge are others; 0 is for no token."""
        rows, columns = (
            (torch.arange(side, device=device) < shift).long()
            for side, shift in zip(self.grid, self.shift, strict=True)
        )
        return (1 + 2 * rows[:, None] + columns).flatten()[:, None]

    def weights(self, scores: Tensor, taps: Sequence[Tap], allowed: Tensor | None) -> Tensor:
        """softmax(scores), group by group (b h r w s), seen through taps.

        Args:
            scores: By group (b h r w s).
            taps: Those that see the scores and the weights of the grid tokens, (b h x s).
            allowed: Boolean that broadcasts to the scores; None allows all.
        """
        if allowed is not None:
            r, w, s = scores.shape[2:]
            allowed = self.join(allowed.expand(-1, -1, r, w, s))
        return self.cut(taps[1](masked_softmax(taps[0](self.join(scores)), allowed)))


def attend_in_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    groups: Groups,
    mask: Mask,
    prefix: int,
    taps: Sequence[Tap],
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / √d + bias) v: grid tokens read their group and all special tokens, which read everything.

    Args:
        q: Queries of the special tokens, then of the grid (b h n d).
        k: Their keys (b h n d).
        v: Their values (b h n d).
        groups: How the grid is cut.
        mask: Who may attend to whom; all kinds.
        prefix: p, how many special tokens there are.
        taps: Those that see the scores and the weights of the grid tokens, (b h x p+w).
        bias: Added to the scores within a group, (h w w); nothing is added to those of special tokens.
    """
    p = prefix
    near_q = groups.cut(q[:, :, p:])  # (b h r w d)
    near_k, near_v = (with_special(groups.cut(t[:, :, p:]), t, p) for t in (k, v))  # (b h r p+w d)
    allowed = seen_in_groups(q, groups, mask, p)
    bias = None if bias is None else F.pad(bias, (p, 0))[None, :, None]
    out = read_in_groups(near_q, near_k, near_v, groups=groups, taps=taps, allowed=allowed, bias=bias)
    if not p:
        return out
    drop = taps[1].dropout if taps[1].training else 0.0
    return torch.cat([special_rows(q[:, :, :p], k, v, mask, drop), out], dim=2)


def read_in_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    groups: Groups,
    taps: Sequence[Tap],
    allowed: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / √d + bias) v, group by group: PyTorch's kernel while nobody watches, explicit otherwise.

    Args:
        q: Queries by group (b h r w d).
        k: The keys that each group reads (b h r s d).
        v: Their values (b h r s d).
        groups: How the grid is cut.
        taps: Those that see the scores and the weights of the grid tokens, (b h x s).
        allowed: Boolean that broadcasts to (b h r w s); None allows all.
        bias: Added to the scores, broadcasts to (b h r w s).

    Returns:
        What the grid tokens receive, (b h x d).
    """
    scores, weights = taps
    if not (scores.watched or weights.watched):
        out = _fused(q, k, v, bias, allowed, weights.dropout if weights.training else 0.0)
        return groups.join(out, heads=True)
    shown = (q * q.shape[-1] ** -0.5) @ k.mT
    shown = shown if bias is None else shown + bias.to(shown.dtype)
    return groups.join(groups.weights(shown, taps, allowed) @ v)


def filled_up(
    parts: Iterable[Tensor], there: Tensor, groups: Groups, bias: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Projections by group where tokens of zero fill up the plane: beyond it they are the biases, and all exist.

    Args:
        parts: Queries, keys, ... (b r w c).
        there: Which places hold a token that exists, (b r w 1).
        groups: How the plane is cut.
        bias: Those of all parts, one after the other; None for none.
    """
    inside = torch.ones(groups.grid[0] * groups.grid[1], 1, dtype=torch.bool, device=there.device)
    beyond, parts = ~groups.cut(inside), list(parts)
    if bias is not None:
        parts = [t + beyond * own for t, own in zip(parts, bias.chunk(len(parts)), strict=True)]
    return parts, there | beyond


def special_rows(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float = 0.0) -> Tensor:
    """What the first tokens receive of all tokens: softmax(q kᵀ / √d) v, (b h p d).

    Args:
        q: Their queries (b h p d).
        k: Keys of all tokens (b h n d).
        v: Values of all tokens (b h n d).
        mask: Who may attend to whom, of all tokens.
        dropout: Of weights.
    """
    p, n = q.shape[2], k.shape[2]
    allowed = _of_first(mask, p).dense(p, n, q.device)
    if mask.causal:
        first = torch.ones(p, n, dtype=torch.bool, device=q.device).tril()
        allowed = first if allowed is None else allowed & first
    if allowed is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    some = allowed.any(
        dim=-1, keepdim=True
    )  # an empty row is opened, so that no kernel meets one, and then zero
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | ~some, dropout_p=dropout)
    return torch.where(some, out, 0.0)


def _of_first(mask: Mask, rows: int) -> Mask:
    """The mask of the first queries, without its causal part."""
    return Mask(keys=mask.keys, pairs=None if mask.pairs is None else mask.pairs[:, :, :rows])


def seen_in_groups(q: Tensor, groups: Groups, mask: Mask, prefix: int) -> Tensor | None:
    """Who may attend to whom in a group, with the special tokens before: broadcasts to (b h r w p+w); None for all."""
    if groups.filled == groups.grid and not any(groups.shift) and mask.free:
        return None
    p, n = prefix, q.shape[2]
    parts = groups.cut(groups.parts(q.device))[..., 0]  # (r w)
    allowed = F.pad(parts[:, :, None] == parts[:, None], (p, 0), value=True)[None, None]
    if mask.free:
        return allowed
    rows = groups.cut(torch.arange(p, n, device=q.device)[:, None])  # (r w 1)
    keys = torch.cat([torch.arange(p, device=q.device).expand(len(rows), p), rows[..., 0]], dim=1)[:, None]
    if mask.keys is not None:
        allowed = allowed & mask.keys[:, None][..., keys]
    if mask.pairs is not None:
        allowed = allowed & mask.pairs[:, :, rows, keys]
    return allowed & (keys <= rows) if mask.causal else allowed


def with_special(near: Tensor, t: Tensor, p: int) -> Tensor:
    """The special tokens before those of each group, (b h r p+w d)."""
    if not p:
        return near
    return torch.cat([t[:, :, None, :p].expand(-1, -1, near.shape[2], -1, -1), near], dim=3)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, allowed: Tensor | None, dropout: float
) -> Tensor:
    """softmax(q kᵀ / √d + bias) v, groups beside heads, (b h r w d): by PyTorch's kernel, or in as few passes."""
    h, r = q.shape[1:3]
    some = None
    if allowed is not None:
        some = allowed.any(dim=-1, keepdim=True)  # an empty row is opened, and then zero
        allowed = allowed | ~some
    if bias is not None and bias.requires_grad and q.device.type == "cpu":
        # whose kernel has no gradient for a bias: PyTorch would take this way with more passes
        scores = ((q * q.shape[-1] ** -0.5) @ k.mT).add_(bias)
        if allowed is not None:  # added too, which takes no pass over the scores backward
            scores = scores.add_(torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, -torch.inf))
        out = F.dropout(scores.softmax(dim=-1), dropout) @ v
        return out if some is None else torch.where(some, out, 0.0)
    added = allowed
    if bias is not None:
        bias = bias.to(q.dtype)
        added = bias if allowed is None else torch.where(allowed, bias, float("-inf"))
    if added is not None:
        added = added.expand(-1, h, r, -1, -1).flatten(1, 2)
    q, k, v = (t.flatten(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=dropout).unflatten(1, (h, r))
    return out if some is None else torch.where(some, out, 0.0)


for _name in ("seen_in_groups", "special_rows", "_fused"):
    fx.wrap(_name)  # symbolic tracing cannot ask for a device
