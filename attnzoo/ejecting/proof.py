"""That a file builds the model that it is of, before anybody gets it."""

from types import ModuleType
from typing import Any

from torch import nn

from attnzoo.errors import ZooError
from attnzoo.hosts.info import unallocated
from attnzoo.recipe import Composition


def prove(text: str, name: str, composition: Composition) -> None:
    """Build the model of a file on the meta device, and hold its tensors to those of the composed model.

    Args:
        text: The file.
        name: Of the function that builds the model.
        composition: The recipe.

    Raises:
        ZooError: AZ974, when the file fails, or builds another model.
    """
    module = ModuleType(name)
    try:
        exec(
            compile(text, f"{name}.py", "exec"), vars(module)
        )  # what we wrote, of sources that are installed here
        with unallocated():
            built, model = vars(module)[name](), composition.build()
    except Exception as error:
        raise _refused(composition, f"its file fails with {type(error).__name__}: {error}") from error
    own, its = _tensors(model), _tensors(built)
    if own != its:
        differing = [key for key in {**own, **its} if own.get(key) != its.get(key)]
        raise _refused(
            composition, f"in its file {', '.join(f'`{key}`' for key in differing[:3])} is another tensor"
        )


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
