"""Weights of a composed model: taken from a file, written for timm. A file never runs code nor fills the memory."""

import argparse
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict, save_for_hf
from torch import Tensor, nn

from attnzoo.errors import RecipeError
from attnzoo.files import open_file
from attnzoo.recipe.loading import load
from attnzoo.recipe.made_with import made_with
from attnzoo.recipe.resolving import resolve

NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys of the weights in checkpoints, of timm's training script and others; the first that is there is taken."""
_GOOD = "a file of weights maps names to tensors: safetensors.torch.save_file(model.state_dict(), FILE) writes one"


def init_model(model: nn.Module, file: str | os.PathLike) -> dict[str, Any]:
    """Load a plain model's weights, or the model's own, into a composed model; new tensors keep their start.

    Args:
        model: A composed model.
        file: `.safetensors`, or a PyTorch file of tensors; checkpoints of timm's training script are understood.

    Returns:
        A ledger: how many tensors were `copied`, which are `new`.

    Raises:
        RecipeError: AZ606, when the file cannot be read or does not fit.
    """
    name, own = os.fspath(file), model.state_dict()
    state = _weights(_content(file, own), name)
    try:
        # by timm's custom, what fits a checkpoint to a model stands in the module of the model's class
        state = sys.modules[type(model).__module__].checkpoint_filter_fn(state, model)
    except Exception as error:  # it trusts names and shapes, and raises whatever comes of others
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise _misfit(
            f"the tensors of `{name}` do not fit", f"timm could not convert them: {reason}"
        ) from None
    strange = sorted(state.keys() - own.keys())
    wrong = sorted(key for key in state.keys() & own.keys() if not _alike(state[key], own[key]))
    if strange or wrong:
        first = (wrong or strange)[0]
        detail = (
            f"`{first}` is {_shown(state[first])}, the model wants {_shown(own[first])}"
            if wrong
            else f"the model has no `{first}`"
        )
        raise _misfit(f"{len(strange) + len(wrong)} tensors of `{name}` do not fit: {detail}")
    model.load_state_dict(state, strict=False)
    return {"copied": len(state), "new": sorted(own.keys() - state.keys())}


def _content(file: str | os.PathLike, own: Mapping[str, Tensor]) -> Any:
    """What a file holds.

    Raises:
        RecipeError: AZ606.
    """
    name = os.fspath(file)
    # a checkpoint also holds moments and averages of the weights, but no multitude of them
    most = 2**26 + 16 * sum(tensor.nbytes for tensor in own.values())
    try:
        with open_file(file, most=most) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on formats that are refused below
            if name.endswith(".safetensors"):
                return load_file(file)
            if zipfile.is_zipfile(stream):
                with zipfile.ZipFile(stream) as archive:
                    if sum(entry.file_size for entry in archive.infolist()) > most:
                        raise OSError(f"it unpacks to more than {most:,} bytes")
            stream.seek(0)
            # arguments of timm's script: plain values
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(stream, map_location="cpu", weights_only=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RecipeError("AZ606", f"cannot read weights from `{name}`: {reason}", help=_GOOD) from None
    except safetensors.SafetensorError as error:
        raise RecipeError("AZ606", f"`{name}` is no file of tensors", why=str(error), help=_GOOD) from None
    except Exception as error:  # torch names no type of its own for what it refuses to unpickle
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        why = (
            f"it holds `{found[1]}`, and objects are never unpickled, since that may run code"
            if found
            else ""
        )
        raise RecipeError("AZ606", f"`{name}` is no file of tensors", why=why, help=_GOOD) from None


def _weights(content: Any, name: str) -> dict[str, Tensor]:
    """The tensors by name, without the prefixes of wrappers.

    Raises:
        RecipeError: AZ606, when it is anything but ordinary tensors by name.
    """
    inner: Any = content
    if isinstance(content, Mapping):
        inner = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), content)
    if not isinstance(inner, Mapping):
        fault = f"it holds {_kind(content)}"
    elif not inner:
        fault = "it is empty"
    elif odd := [key for key in inner if not isinstance(key, str)]:
        fault = f"`{str(odd[0])[:40]}` is {_kind(odd[0])}, not a name"
    else:
        faults = {key: kind for key, value in inner.items() if (kind := _kind(value)) != "a tensor"}
        fault = "".join([f"`{key[:80]}` is {kind}" for key, kind in faults.items()][:1])
    if fault:
        raise RecipeError("AZ606", f"`{name}` is no file of tensors by name: {fault}", help=_GOOD)
    return clean_state_dict(dict(inner))


def _kind(value: Any) -> str:
    """What a value is, in words; `a tensor` for those that a model can be given."""
    if type(value) not in (Tensor, nn.Parameter):
        name = type(value).__name__
        return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
    if value.is_meta:
        return "a tensor without data, on the device `meta`"
    if value.is_quantized:
        return "a quantized tensor"
    if value.layout != torch.strided or value.is_nested:
        return "a sparse or nested tensor"
    return "a tensor"


def _alike(given: Tensor, own: Tensor) -> bool:
    """Whether shape and sort of number agree; the precision may differ."""
    return given.shape == own.shape and _sort(given.dtype) == _sort(own.dtype)


def _sort(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float"
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "int"


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _misfit(message: str, why: str = "") -> RecipeError:
    help = "the base in the recipe must be the model that the weights belong to"
    return RecipeError("AZ606", message, why=why, help=help)


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
    recipe = vars(model).get("_model_args", {}).get("recipe")
    # of a model that was loaded timm hands on the versions of where it came from
    here = {"made_with": made_with(resolve(load(recipe)).entries).model_dump(mode="json")} if recipe else {}
    try:
        save_for_hf(model, str(folder), model_args=here, safe_serialization=True)
    except OSError as error:
        raise RecipeError(
            "AZ607", f"cannot write to `{folder}`: {(error.strerror or str(error)).lower()}"
        ) from None
