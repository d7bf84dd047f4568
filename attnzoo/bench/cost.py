"""FLOPs of a model, counted on the meta device: nothing is allocated and no kernel escapes the count."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def flops(model: nn.Module, image: tuple[int, int, int]) -> dict[str, int]:
    """FLOPs (two per multiply-add) of one forward on one picture, by module path; the whole model under the empty path.

    Matrix products, convolutions and attention kernels are counted; Fourier transforms and element-wise work are not.

    Args:
        model: On any device; a meta copy is counted.
        image: Channels, rows, columns, in pixels.
    """
    ghost = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        ghost(torch.empty(1, *image, device="meta"))
    root = type(model).__name__
    totals = {path: sum(by_op.values()) for path, by_op in counter.get_flop_counts().items()}
    return {
        path.removeprefix(root).removeprefix("."): total for path, total in totals.items() if path != "Global"
    } | {"": totals.get("Global", 0)}
