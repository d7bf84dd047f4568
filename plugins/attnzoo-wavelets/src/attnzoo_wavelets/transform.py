"""The orthonormal Haar transform, for any number of dimensions and any side length.

Haar, "Zur Theorie der orthogonalen Funktionensysteme", 1910; Mallat, "A Theory for Multiresolution Signal
Decomposition", 1989, for the pyramid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

HALF = 0.5**0.5


def split(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """One step along one dimension: (a + b) / √2 and (a - b) / √2 of each pair of neighbours.

    The last token of an odd side has no partner; it joins the sums as it is: the step stays orthonormal.

    Args:
        x: Any shape.
        dim: Which dimension, counted from the front; its side is s.

    Returns:
        Sums, with a side of ⌈s / 2⌉, and differences, with a side of ⌊s / 2⌋.
    """
    pairs = x.shape[dim] // 2
    a, b = x.narrow(dim, 0, 2 * pairs).unflatten(dim, (pairs, 2)).unbind(dim + 1)
    alone = x.narrow(dim, 2 * pairs, x.shape[dim] - 2 * pairs)
    return torch.cat([(a + b) * HALF, alone], dim), (a - b) * HALF


def join(low: Tensor, high: Tensor, dim: int) -> Tensor:
    """The inverse of `split`.

    Args:
        low: The sums.
        high: The differences.
        dim: Which dimension, counted from the front.
    """
    pairs = high.shape[dim]
    paired, alone = low.narrow(dim, 0, pairs), low.narrow(dim, pairs, low.shape[dim] - pairs)
    both = torch.stack([(paired + high) * HALF, (paired - high) * HALF], dim + 1).flatten(dim, dim + 1)
    return torch.cat([both, alone], dim)


def analyse(x: Tensor, dims: Sequence[int], levels: int) -> tuple[Tensor, list[list[Tensor]]]:
    """The Haar pyramid.

    Args:
        x: Any shape.
        dims: Dimensions to transform, counted from the front.
        levels: Number of resolutions.

    Returns:
        The coarsest approximation, and for each level, finest first, its 2^len(dims) - 1 bands of details.
    """
    details = []
    for _ in range(levels):
        bands = [x]
        for dim in dims:
            bands = [part for band in bands for part in split(band, dim)]
        x, *finer = bands
        details.append(finer)
    return x, details


def synthesise(coarse: Tensor, details: Sequence[Sequence[Tensor]], dims: Sequence[int]) -> Tensor:
    """The inverse of `analyse`.

    Args:
        coarse: The coarsest approximation.
        details: Bands of details for each level, finest first.
        dims: The transformed dimensions, in the same order.
    """
    for finer in reversed(details):
        bands = [coarse, *finer]
        for dim in reversed(dims):
            bands = [join(low, high, dim) for low, high in zip(bands[::2], bands[1::2], strict=True)]
        coarse = bands[0]
    return coarse
