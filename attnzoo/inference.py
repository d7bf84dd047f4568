"""A finished model for inference on a CPU: weights packed for oneDNN, GELU inside the product, no autograd.

What PyTorch's Linear does in single precision is left to MKL, which takes a slow path on some processors. oneDNN's
product of packed weights is the same arithmetic in another order of summation.
"""

import copy
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.errors import ZooError

__all__ = ["accelerate"]


class PackedLinear(nn.Linear):
    """A Linear whose weights lie as oneDNN wants them, beside the plain ones; what they are follows the plain ones.

    Where oneDNN cannot take over, because somebody wants gradients, or in other precisions, it is a Linear as ever.
    """

    gelu = False
    """Whether the result goes through GELU."""
    _packed: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        wants_gradients = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if (
            input.dtype is not torch.float32
            or input.device.type != "cpu"
            or wants_gradients
            or not input.numel()
        ):
            out = super().forward(input)
            return F.gelu(out) if self.gelu else out
        after: tuple = ("gelu", [], "none") if self.gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(input, self._weights(), self.bias, *after)

    def _weights(self) -> Tensor:
        """The packed weights; packed again when the plain ones have changed or moved."""
        now = (self.weight.data_ptr(), self.weight._version)
        packed = self._packed
        if packed is None or packed[0] != now:
            packed = now, torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
            self._packed = packed  # one assignment: threads see the old ones or the new ones
        return packed[1]

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: the packed weights are made again from the plain ones."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def accelerate(model: nn.Module) -> nn.Module:
    """A copy of a finished model that is faster on a CPU and gives the same to rounding (about 1e-6).

        fast = attnzoo.accelerate(model)
        fast(images)

    Every `nn.Linear` computes with packed weights, MLPs of timm with the exact GELU inside the first product.
    Parameters ask for no gradient, and the copy is in eval mode. The state dict is that of the model, and loading
    another one into the copy works. The packed weights take as much memory again as those of the Linears.

    Args:
        model: Any module with weights in single precision on the CPU: a composed model, one of timm's, a mechanism.

    Raises:
        ZooError: AZ413, with the reason, for what would not become faster.
    """
    if reason := _reason(model):
        raise ZooError("AZ413", f"this model cannot be accelerated: {reason[0]}", help=reason[1])
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(fast.modules()):
        if type(module) is nn.Linear:
            module.__class__ = PackedLinear  # hooks and names stay
        if type(module) is Mlp and _plain_gelu(module):
            module.fc1.gelu = True  # type: ignore[assignment]
            module.act = nn.Identity()
    return fast


def _plain_gelu(mlp: Mlp) -> bool:
    """Whether the exact GELU follows the first product directly and nobody looks at what lies between."""
    between = (mlp.fc1, mlp.act)
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in between)
    first = type(mlp.fc1) in (nn.Linear, PackedLinear)
    return first and type(mlp.act) is nn.GELU and mlp.act.approximate == "none" and not hooked


def _reason(model: nn.Module) -> tuple[str, str] | None:
    """Why nothing would be gained, and what to do."""
    tensors = [*model.parameters(), *model.buffers()]
    devices = {t.device.type for t in tensors}
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    if not torch.backends.mkldnn.is_available():
        return (
            "this PyTorch was built without oneDNN",
            "use a build with it: torch.backends.mkldnn.is_available()",
        )
    if devices - {"cpu"}:
        where = ", ".join(sorted(devices))
        return f"it is on {where}, and oneDNN computes on the CPU", "move it first: model.cpu()"
    if dtypes - {torch.float32}:
        named = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return (
            f"its weights are {named}, and packed weights are in single precision",
            "convert it: model.float()",
        )
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        return "it is accelerated already", "use it as it is"
    if not any(type(module) is nn.Linear for module in model.modules()):
        return "it has no `nn.Linear`, and only these become faster", "use it as it is"
    return None
