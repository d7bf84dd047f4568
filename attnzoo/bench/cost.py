"""FLOPs of a model, counted on the meta device: nothing is allocated and no kernel escapes the count."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attnzoo.core.component import NOTHING


def flops(
    model: nn.Module, sample: Sequence[Tensor], given: Mapping[str, Tensor] = NOTHING
) -> dict[str, int]:
    """FLOPs (two per multiply-add) of one forward, by module path; the whole model under the empty path.

    Matrix products, convolutions and attention kernels are counted; Fourier transforms and element-wise work are not.

    Args:
        model: On any device; a meta copy is counted.
        sample: What the model takes; only the shapes count.
        given: The maps that it takes, by name.
    """
    ghost = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        ghost(*(t.to("meta") for t in sample), **{name: t.to("meta") for name, t in given.items()})
    root = type(model).__name__
    totals = {path: sum(by_op.values()) for path, by_op in counter.get_flop_counts().items()}
    return {
        path.removeprefix(root).removeprefix("."): total for path, total in totals.items() if path != "Global"
    } | {"": totals.get("Global", 0)}
