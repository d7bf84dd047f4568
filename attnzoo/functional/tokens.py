"""Tokens, chosen by what they are or by their places."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import Layout
from attnzoo.errors import ZooError

Tokens = Literal["all", "answer", "prefix", "grid", "last"] | Sequence[int]
"""`all`; the `prefix` (class token, registers); those of the `grid`; the `last`; `answer`: the first of the prefix,
from which a class is read, or all where there is no prefix; or places, from 0, or from -1 backwards."""


def chosen_tokens(
    tokens: Tokens, layout: Layout, count: int, device: torch.device | None = None
) -> Bool[Tensor, "n"]:
    """Which tokens are meant.

    Args:
        tokens: What somebody said.
        layout: How all of them are arranged.
        count: How many there are here, n; the last n, where a sequence is continued.
        device: Where the answer is wanted.

    Raises:
        ZooError: AZ921, for a place that there is not.
    """
    length = max(count, layout.length)
    there = torch.zeros(length, dtype=torch.bool, device=device)
    if isinstance(tokens, str):
        first = layout.prefix
        there[
            {
                "all": slice(None),
                "answer": slice(1 if first else None),
                "prefix": slice(first),
                "grid": slice(first, None),
                "last": slice(-1, None),
            }[tokens]
        ] = True
    elif strange := [place for place in tokens if not -length <= place < length]:
        raise ZooError(
            "AZ921",
            f"there is no token {strange[0]}",
            why=f"there are {length}, which count from 0: {layout}",
        )
    else:
        there[list(tokens)] = True
    return there[length - count :]


def on_tokens(
    maps: Any, layout: Layout, count: int = 1, device: torch.device | None = None
) -> Float[Tensor, "#k n"]:
    """Maps brought to the grid of the tokens, each token the nearest entry; 0 for the prefix.

    Args:
        maps: Numbers of the form of the grid, at any size: (y x) for one map, (k y x) for several.
        layout: How the tokens are arranged.
        count: How many maps there should be, k, where there is not one for all.
        device: Where the answer is wanted.

    Raises:
        ZooError: AZ921, when they have not the form of the grid, or are of another number.
    """
    try:
        read = torch.as_tensor(maps, device=device).float()
    except (TypeError, ValueError, RuntimeError, OverflowError):  # unequal lengths, words, too large
        read = torch.empty(())
    axes = len(layout.grid)
    number = len(read) if read.ndim == axes + 1 else 1
    if read.ndim not in (axes, axes + 1) or not read.numel() or number not in (1, count):
        several = f", or of {count} with {axes + 1}" if count > 1 else ""
        raise ZooError(
            "AZ921",
            f"numbers for tokens come as one map with {axes} axes{several}; these have the shape {tuple(read.shape)}",
            why=f"tokens are arranged as {layout}",
        )
    fitted = F.interpolate(read.reshape(1, number, *read.shape[-axes:]), size=layout.grid)  # nearest
    return F.pad(fitted[0].flatten(1), (layout.prefix, 0))


def picked(t: Tensor, index: Tensor) -> Tensor:
    """Rows of (... n e) by their index (... m), as (... m e).

    Args:
        t: (... n e).
        index: Whole numbers below n, (... m).
    """
    line = t.flatten(0, -2)
    first = torch.arange(0, line.shape[0], t.shape[-2], device=t.device)  # of each, in one line of all rows
    at = index.flatten(0, -2) + first[:, None]
    return line.index_select(0, at.flatten()).unflatten(0, index.shape)
