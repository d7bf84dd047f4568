"""Windows of neighbours on a grid, and attention to them by tiles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import Component, Layout, Mask, OptionError
from attnzoo.functional.einops import rearrange
from attnzoo.functional.softmax import dot_product_attention

TILE = 64
"""So many neighbouring queries look at their keys together."""


def each(value: Any, axes: int) -> list[Any]:
    """An option of all dimensions of a grid, or a list with one for each: one for each.

    Args:
        value: A list, or anything else for all.
        axes: How many dimensions there are.
    """
    return list(value) if isinstance(value, list) else [value] * axes


@dataclass(frozen=True)
class Windows:
    """Windows along one dimension. Tokens with equal index modulo the dilation form a group.

    Inside a group, queries of one stride share the window of their leader. A window always holds `window` keys: it is
    shifted, not cut, at the ends (causal windows are cut).

    Args:
        length: Tokens along the dimension.
        window: Side of the window, in tokens of a group; the whole group where that is shorter.
        stride: Neighbouring queries that share a window.
        dilation: Step between the tokens of a group.
        causal: Whether a window ends with its query.
    """

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    @property
    def ways(self) -> int:
        """How many ways there are from a token to those that it may see, in tokens of a group."""
        near = min(self.window, -(-self.length // self.dilation))
        return near if self.causal else 2 * near - 1

    def bounds(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """First place of a token's window in its group, and the one after its last."""
        a, group = i // self.dilation, i % self.dilation
        members = (self.length - group + self.dilation - 1) // self.dilation  # tokens in the group of i
        side = members.clamp(max=self.window)
        if self.causal:
            leader = torch.minimum(a // self.stride * self.stride + self.stride - 1, members - 1)
            return (leader - side + 1).clamp(min=0), a + 1
        leader = torch.minimum(a // self.stride * self.stride + self.stride // 2, members - 1)
        start = torch.minimum((leader - side // 2).clamp(min=0), members - side)
        return start, start + side

    def seen(self, device: torch.device) -> Bool[Tensor, "n n"]:
        """Who sees whom."""
        i = torch.arange(self.length, device=device)
        (start, end), a, group = self.bounds(i), i // self.dilation, i % self.dilation
        return (group[:, None] == group) & (a >= start[:, None]) & (a < end[:, None])

    def tiles(self, tile: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Neighbouring queries of a group with all keys that one of them sees, for r tiles.

        Args:
            tile: Queries of a tile, w.
            device: Where.

        Returns:
            Queries (r w) and whether they exist; keys (r m), and who sees whom (r w m). What does not exist is 0.
        """
        most = -(-self.length // self.dilation)  # tokens of the largest group
        chunks = -(-most // tile)
        at = torch.arange(self.dilation * chunks * tile, device=device).unflatten(0, (-1, tile))
        group, a = at // (chunks * tile), at % (chunks * tile)
        queries = a * self.dilation + group
        there = queries < self.length
        start, end = self.bounds(queries.clamp(max=self.length - 1))
        first = torch.where(there, start, most).amin(dim=1, keepdim=True)
        reach = min(most, self.window + tile + self.stride - 2)
        key = first + torch.arange(reach, device=device)
        keys = key * self.dilation + group[:, :1]
        seen = (key[:, None] >= start[..., None]) & (key[:, None] < end[..., None])
        seen = seen & there[..., None] & (keys < self.length)[:, None]
        return torch.where(there, queries, 0), there, torch.where(keys < self.length, keys, 0), seen


def windows_along(
    grid: Sequence[int],
    window: int | list[int],
    stride: int | list[int] = 1,
    dilation: int | list[int] = 1,
    causal: bool | list[bool] = False,
) -> list[Windows]:
    """The windows of `neighborhood` along each dimension; an option is one for all, or a list.

    Args:
        grid: Sides, in tokens.
        window, stride, dilation, causal: As for `Windows`.

    Raises:
        OptionError: AZ214, for a list of another length than the grid has dimensions, or a stride longer than the
            window.
    """
    given = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    for name, value in given.items():
        if len(each(value, len(grid))) != len(grid):
            raise OptionError(
                f"`neighborhood`: {name} {value} for a {len(grid)}-D grid",
                help=f"give a list of {len(grid)}, or one for all",
            )
    sides = [Windows(*one) for one in zip(grid, *(each(t, len(grid)) for t in given.values()), strict=True)]
    for side in sides:
        if side.stride > side.window:
            raise OptionError(
                f"`neighborhood`: a stride of {side.stride} is longer than the window of {side.window}",
                why="queries that share a window must lie inside it",
                help=f"choose a stride from 1 to {side.window}",
            )
    return sides


def neighbours(sides: Sequence[Windows], layout: Layout, device: torch.device) -> Bool[Tensor, "1 1 n n"]:
    """Who sees whom: the conjunction over dimensions; special tokens see all and are seen by all.

    Args:
        sides: The windows of each dimension.
        layout: How the tokens lie.
        device: Where.
    """
    seen = torch.ones(layout.length, layout.length, dtype=torch.bool, device=device)
    grid = reduce(torch.kron, [windows.seen(device) for windows in sides])  # row-major, as tokens are
    seen[layout.prefix :, layout.prefix :] = grid
    return seen[None, None]


def by_way(table: Tensor, sides: Sequence[Windows], layout: Layout) -> Float[Tensor, "h n n"]:
    """What a table holds for the way from each token to each other, in tokens of a group; nothing for special ones.

    Args:
        table: By rows, columns, ... of the way, (h ...): the way to oneself is in the middle, or last where windows are
            causal. Ways beyond its ends are those at the ends.
        sides: The windows of each dimension.
        layout: How the tokens lie.
    """
    for axis, windows in enumerate(sides):  # (h rows columns), (h y y columns), (h y y x x)
        at, entries = torch.arange(windows.length, device=table.device), table.shape[1 + 2 * axis]
        oneself = entries - 1 if windows.causal else entries // 2
        way = at // windows.dilation
        way = (way - way[:, None] + oneself).clamp(0, entries - 1)
        table = table[(slice(None),) * (1 + 2 * axis) + (way,)]
    axes = range(1, table.ndim)
    square = table.permute(0, *axes[::2], *axes[1::2]).reshape(len(table), math.prod(layout.grid), -1)
    return F.pad(square, (layout.prefix, 0, layout.prefix, 0))


def tile_side(sides: Sequence[Windows]) -> int:
    """Queries of a tile along a dimension."""
    return round(TILE ** (1 / len(sides)))


def tiles_save(sides: Sequence[Windows]) -> bool:
    """Whether tiles form fewer than half of all pairs."""
    tile, pairs = tile_side(sides), 1
    for one in sides:
        most = -(-one.length // one.dilation)
        pairs *= one.dilation * -(-most // tile) * tile * min(most, one.window + tile + one.stride - 2)
    return 2 * pairs < math.prod([one.length for one in sides]) ** 2


def tiled_attention(
    component: Component,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    layout: Layout,
    sides: Sequence[Windows],
) -> Tensor:
    """Attention of tokens to their windows, and of special tokens to all, without a tensor of all pairs.

    Tiles of neighbouring queries look together at the keys that one of them sees, under a small mask.

    Args:
        component: Whose dropout of weights holds; its taps are not looked at.
        q, k, v: (b h n d) each.
        mask: Keys and causal.
        layout: How the tokens lie.
        sides: The windows of each dimension.
    """
    p, b = layout.prefix, q.shape[0]
    cut = [windows.tiles(tile_side(sides), q.device) for windows in sides]
    queries, there, keys, seen = cut[0]
    for side, (more, more_there, more_keys, more_seen) in zip(layout.grid[1:], cut[1:], strict=True):
        # (r w), (s x) -> (r s, w x), row by row
        queries = rearrange(queries[:, None, :, None] * side + more[:, None], "r s w x -> (r s) (w x)")
        there = rearrange(there[:, None, :, None] & more_there[:, None], "r s w x -> (r s) (w x)")
        keys = rearrange(keys[:, None, :, None] * side + more_keys[:, None], "r s m o -> (r s) (m o)")
        seen = rearrange(
            seen[:, None, :, None, :, None] & more_seen[:, None, :, None],
            "r s w x m o -> (r s) (w x) (m o)",
        )
    r, w = queries.shape
    asked, found = queries + p, F.pad(keys + p, (p, 0))  # special tokens are seen by all
    found[:, :p] = torch.arange(p, device=q.device)
    seen = F.pad(seen, (p, 0), value=True)[None].expand(b, -1, -1, -1)
    if mask.keys is not None:
        seen = seen & mask.keys[:, found][:, :, None]
    if mask.causal:
        seen = seen & (found[:, None] <= asked[..., None])
    places = zip((q, k, v), (asked, found, found), strict=True)
    asks, reads, gives = [
        rearrange(t[:, :, at.flatten()], "b h (r w) d -> (b r) h w d", r=r) for t, at in places
    ]
    out = dot_product_attention(
        component, asks, reads, gives, Mask(pairs=rearrange(seen, "b r w m -> (b r) 1 w m"))
    )
    out = rearrange(out, "(b r) h w d -> b h (r w) d", b=b)
    place = torch.where(there, queries, layout.length - p).flatten()  # each token is in one tile
    back = torch.empty(layout.length - p + 1, dtype=torch.long, device=q.device)
    back = back.scatter(0, place, torch.arange(r * w, device=q.device))[:-1]
    grid = out[:, :, back]
    if p == 0:
        return grid
    allowed = mask.dense(q.shape[2], k.shape[2], q.device)
    own = Mask() if allowed is None else Mask(pairs=allowed[:, :, :p])
    return torch.cat([dot_product_attention(component, q[:, :, :p], k, v, own), grid], dim=2)
