"""Weights of a composed model: taken from a base, written for timm. Nothing is ever unpickled."""

import os
import sys
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

from attnzoo.errors import RecipeError


def init_model(model: nn.Module, file: str | os.PathLike) -> dict[str, Any]:
    """Load a plain model's weights, or the model's own, into a composed model; new tensors keep their start.

    Args:
        model: A composed model.
        file: `.safetensors`, or a PyTorch file of tensors.

    Returns:
        A ledger: how many tensors were `copied`, which are `new`.

    Raises:
        RecipeError: AZ606, when the file cannot be read or does not fit.
    """
    try:
        if os.fspath(file).endswith(".safetensors"):
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, safetensors.SafetensorError, RuntimeError, ValueError, EOFError, ImportError) as error:
        raise RecipeError(
            "AZ606", f"cannot read weights from `{os.fspath(file)}`: {str(error).splitlines()[0]}"
        ) from None
    except Exception as error:  # torch names no type of its own for what it refuses to unpickle
        raise RecipeError("AZ606", f"`{os.fspath(file)}` is no file of tensors", why=str(error).splitlines()[0],
                          help="save weights with safetensors") from None  # fmt: skip
    # by timm's custom, what fits a checkpoint to a model stands in the module of the model's class
    state = sys.modules[type(model).__module__].checkpoint_filter_fn(state, model)
    own = model.state_dict()
    strange = sorted(state.keys() - own.keys())
    wrong = sorted(name for name in state.keys() & own.keys() if state[name].shape != own[name].shape)
    if strange or wrong:
        first = (wrong or strange)[0]
        detail = (
            f"`{first}` has shape {tuple(state[first].shape)}, the model wants {tuple(own[first].shape)}"
            if wrong
            else f"the model has no `{first}`"
        )
        raise RecipeError("AZ606", f"{len(strange) + len(wrong)} tensors of `{os.fspath(file)}` do not fit: {detail}",
                          help="the base in the recipe must be the model that the weights belong to")  # fmt: skip
    model.load_state_dict(state, strict=False)
    return {"copied": len(state), "new": sorted(own.keys() - state.keys())}


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write `config.json` and `model.safetensors`, from which `timm.create_model("local-dir:FOLDER")` builds it again.

    Args:
        model: A composed model.
        folder: Is made; must not hold a model already.

    Raises:
        RecipeError: AZ607, when the folder cannot be written or already holds a model.
    """
    folder = Path(folder)
    taken = [name for name in ("config.json", "model.safetensors") if (folder / name).exists()]
    if taken:
        raise RecipeError(
            "AZ607", f"`{folder}` already holds {' and '.join(taken)}", help="name another folder"
        )
    try:
        save_for_hf(model, str(folder), safe_serialization=True)
    except OSError as error:
        raise RecipeError(
            "AZ607", f"cannot write to `{folder}`: {(error.strerror or str(error)).lower()}"
        ) from None
