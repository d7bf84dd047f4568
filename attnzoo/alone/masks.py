"""What callers hand over as a mask, as a `Mask`."""

from dataclasses import replace

import torch
from torch import Tensor, fx

from attnzoo.core import NO_MASK, Card, Mask
from attnzoo.errors import UnsupportedMask


def mask_of(mask: Mask | Tensor | None, causal: bool, card: Card, b: int, n: int, m: int) -> Mask:
    """A mask as its caller means it.

    Args:
        mask: A `Mask`; or a boolean in which True means may attend: keys (b m), pairs (n m), (b n m) or (b h n m).
        causal: Whether later keys are hidden too.
        card: What is claimed: a mask of two axes is of the kind that can be honoured, where only one can.
        b, n, m: Samples, queries, keys.

    Raises:
        UnsupportedMask: AZ405 for what is no boolean tensor, has another shape, or could be keys as well as pairs.
    """
    if not isinstance(causal, bool):
        raise UnsupportedMask(
            "AZ405", f"`causal` is True or False, not {causal!r}", help="hand a whole mask as `mask=`"
        )
    if mask is None:
        return Mask(causal=True) if causal else NO_MASK
    if isinstance(mask, Mask):
        return replace(mask, causal=True) if causal else mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        what = f"of {mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise UnsupportedMask(
            "AZ405",
            f"a mask is a Mask or a boolean tensor; this is {what}",
            why="True means may attend; numbers could mean anything",
            help="compare first: mask = lengths[:, None] > torch.arange(n)",
        )
    if mask.ndim == 2:
        return _of_two_axes(mask, causal, card, b, n, m)
    if mask.ndim == 3:
        return Mask(pairs=mask[:, None], causal=causal)
    if mask.ndim == 4:
        return Mask(pairs=mask, causal=causal)
    raise _misshapen(mask, b, n, m)


def _of_two_axes(mask: Tensor, causal: bool, card: Card, b: int, n: int, m: int) -> Mask:
    if "keys" in card.masks and "pairs" not in card.masks:
        return Mask(keys=mask, causal=causal)
    if "pairs" in card.masks and "keys" not in card.masks:
        return Mask(pairs=mask[None, None], causal=causal)
    keys, pairs = tuple(mask.shape) == (b, m), tuple(mask.shape) == (n, m)
    if keys and pairs:
        raise UnsupportedMask(
            "AZ405",
            f"a mask of shape {tuple(mask.shape)} could be about {b} samples or about {n} queries",
            why="there are as many samples as queries",
            help="say which: mask=Mask(keys=mask), or mask=Mask(pairs=mask[None, None])",
        )
    if keys:
        return Mask(keys=mask, causal=causal)
    if pairs:
        return Mask(pairs=mask[None, None], causal=causal)
    raise _misshapen(mask, b, n, m)


def _misshapen(mask: Tensor, b: int, n: int, m: int) -> UnsupportedMask:
    return UnsupportedMask(
        "AZ405",
        f"a mask of shape {tuple(mask.shape)} was given; {b} samples, {n} queries and {m} keys want ({b}, {m}) for "
        f"keys, or ({n}, {m}), ({b}, {n}, {m}) or ({b}, heads, {n}, {m}) for pairs",
        why="a mask that is stretched to fit would speak of other tokens than was meant",
    )


def bare(x: Tensor, *others: object) -> Tensor:
    """The tokens, once it is certain that nothing else was handed to a graph that torch.fx traced.

    Raises:
        UnsupportedMask: AZ402, when there is a mask, a layout, or whatever else.
    """
    for other in others:
        if isinstance(other, Tensor) or not (other is None or other is False or other == {}):
            raise UnsupportedMask(
                "AZ402",
                "a module traced by torch.fx takes no masks, layouts or maps",
                help="use torch.export, or trace with concrete_args",
            )
    return x


fx.wrap("bare")
