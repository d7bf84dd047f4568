"""That a file builds the model that it is of, before anybody gets it."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.errors import ZooError
from attnzoo.hosts.info import unallocated
from attnzoo.recipe import Composition


def prove(text: str, name: str, composition: Composition) -> None:
    """Build and run the model of a file on the meta device, and hold its tensors to those of the composed model.

    Args:
        text: The file.
        name: Of the function that builds the model.
        composition: The recipe.

    Raises:
        ZooError: AZ974, when the file fails, or builds another model.
    """
    module = ModuleType(name)
    try:
        exec(compile(text, f"{name}.py", "exec"), vars(module))  # ours, of sources that are installed here
        with unallocated():
            own = composition.build()
            its = vars(module)[name]()
            forward = _forward(composition)
            shape = _shape(forward, own)
            same = shape is None or forward(its).shape == shape
    except Exception as error:
        raise _refused(composition, f"its file fails with {type(error).__name__}: {error}") from error
    wanted, found = _tensors(own), _tensors(its)
    differing = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if differing or not same:
        what = ", ".join(f"`{key}`" for key in differing[:3]) or "what it gives"
        raise _refused(composition, f"in its file {what} is not as in the zoo's model")


def _forward(composition: Composition) -> Callable[[nn.Module], Tensor]:
    """A forward of one sample, on the device on which things are made."""
    sample, named = composition.info.sample(), {}
    for name, kind in composition.given.items():
        whole = (1, *sample[0].shape[2:])
        named[name] = torch.zeros(whole, dtype=torch.long if kind == "labels" else None)
    for name, shape in getattr(composition.info, "inputs", {}).items():
        named[name] = torch.zeros(1, *shape)

    def forward(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.eval()(*sample, **named)

    return forward


def _shape(forward: Callable[[nn.Module], Tensor], model: nn.Module) -> torch.Size | None:
    """Of what a model gives; None of one that looks at numbers, which are not there on the meta device."""
    try:
        return forward(model).shape
    except Exception:
        return None


def _tensors(model: nn.Module) -> dict[str, Any]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()}


def _refused(composition: Composition, why: str) -> ZooError:
    plugins = sorted({entry.full_name for entry in composition.entries if entry.plugin != "attnzoo"})
    help = f"tell who wrote {', '.join(f'`{name}`' for name in plugins)}; " if plugins else ""
    return ZooError(
        "AZ974",
        f"`{composition.loaded.name}` cannot be ejected",
        why=" ".join(why.split())[:300],
        help=f"{help}names that are made while a program runs, by `globals()` or `exec`, are not found in sources",
    )
