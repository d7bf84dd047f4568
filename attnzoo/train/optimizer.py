"""timm's optimisers by name."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from attnzoo.errors import RunError, did_you_mean
from attnzoo.recipe.schema import Optimizer


def check_optimizer(chosen: Optimizer) -> None:
    """Refuse a name that timm does not know.

    Args:
        chosen: What a recipe says.

    Raises:
        RunError: AZ806.
    """
    # the state of `kron` is nested, and no checkpoint holds it
    names = [name for name in map(str, list_optimizers()) if not name.startswith("kron")]
    if chosen.use not in names:
        raise RunError(
            "AZ806",
            f"timm has no optimiser called `{chosen.use}`",
            help=did_you_mean(chosen.use, names) or "adamw is one",
        )


def make_optimizer(model: nn.Module, chosen: Optimizer) -> torch.optim.Optimizer:
    """The optimiser that a recipe names, for a model's parameters.

    Args:
        model: What is trained.
        chosen: What the recipe says.

    Raises:
        RunError: AZ806, when timm has none of that name, or cannot make it here with these settings.
    """
    check_optimizer(chosen)
    options: Any = {"betas": tuple(chosen.betas)} if chosen.betas else {}
    options |= {"eps": chosen.eps} if chosen.eps else {}
    try:
        return create_optimizer_v2(
            model, chosen.use, lr=chosen.lr, weight_decay=chosen.weight_decay, **options
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            "AZ806",
            f"timm cannot make the optimiser `{chosen.use}`: {reason}",
            help="look at `train.optimizer`",
        ) from None
