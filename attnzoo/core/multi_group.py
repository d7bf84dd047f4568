"""A linear layer that is learned as a sum of grouped branches, and folds into one matrix."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.errors import OptionError


class MultiGroup(nn.Module):
    """Σ_g γ_g ⊙ (W_g x) + γ ⊙ x + β, g = 1, 2, 4, ..., `most`: W_g is of g diagonal blocks, the mean of all at first.

    That is W x + β, and so it is computed. The branches stand for convolutions with a batch norm each, which in eval
    mode is γ and β; nothing here depends on other samples. Tan et al., "FMViT", 2023, arXiv:2311.05707.

    Args:
        dim: Channels of the inputs (... dim).
        out: Channels of the outputs (... out).
        most: The most blocks of a branch, a power of two that divides both.
        identity: Whether x itself is a branch, with γ; it keeps the channels.
        bias: Whether there is β.

    Raises:
        OptionError: AZ214, when `most` is no power of two or does not divide, or the branch x is of another width.
    """

    def __init__(self, dim: int, out: int, most: int = 4, identity: bool = False, bias: bool = True):
        super().__init__()
        if most < 1 or most.bit_count() > 1 or dim % most or out % most:
            raise OptionError(
                f"{most} groups: no power of two that divides {dim} and {out} channels",
                help="choose one of 1, 2, 4, ... that divides both",
            )
        if identity and dim != out:
            raise OptionError(
                f"{dim} channels cannot be a branch of {out} as they are", help="leave `identity` out"
            )
        groups = [2**i for i in range(most.bit_length())]
        # as PyTorch's convolutions
        blocks = [(2 * torch.rand(g, out // g, dim // g) - 1) * (g / dim) ** 0.5 for g in groups]
        self.blocks = nn.ParameterList(blocks)  # (g out/g dim/g)
        start = torch.full((out,), 1 / (len(groups) + identity))
        self.scales = nn.ParameterList(start.clone() for _ in groups)  # γ_g
        self.own = nn.Parameter(start) if identity else None  # γ
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None  # β

    def matrix(self) -> Tensor:
        """W, Σ_g diag(γ_g) W_g and diag(γ), (out dim)."""
        branches = [] if self.own is None else [torch.diag_embed(self.own)]
        for blocks, scale in zip(self.blocks, self.scales, strict=True):
            diagonal = torch.diag_embed(blocks.movedim(0, -1)).permute(2, 0, 3, 1)  # (g out/g g dim/g)
            branches.append(scale[:, None] * diagonal.flatten(2).flatten(0, 1))
        return sum(branches[1:], branches[0])

    def forward(self, x: Tensor) -> Tensor:
        """(... dim) -> (... out)."""
        return F.linear(x, self.matrix(), self.bias)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """One layer that gives the same."""
        weight = self.matrix()
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=any(p.requires_grad for p in self.parameters()))
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)


def fold(model: nn.Module) -> nn.Module:
    """Make one layer of every `MultiGroup` inside a module, in place; what it gives stays the same.

    Args:
        model: Any module; a `MultiGroup` itself is not changed, its layer is returned.
    """
    if isinstance(model, MultiGroup):
        return model.fold()
    folded: dict[nn.Module, nn.Linear] = {}
    for name, part in list(model.named_modules(remove_duplicate=False)):
        if isinstance(part, MultiGroup):  # one that is used in two places stays one
            folded[part] = folded.get(part) or part.fold()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, folded[part])
    return model
