"""What is wrong with a recipe's `train:`, all at once and with places, before anything is read or built.

The checks are those of training itself: of the data's name, of the augmentation, of the optimiser.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from attnzoo.data import Step, check_images, check_steps
from attnzoo.data.parallel import check_pairs
from attnzoo.data.sequences import check_sequences
from attnzoo.errors import Diagnostic, RecipeError, ZooError
from attnzoo.recipe import Composition, Loaded, build, resolve
from attnzoo.recipe.source import MAX_FAULTS, Loc
from attnzoo.train.methods import with_method
from attnzoo.train.optimizer import check_optimizer
from attnzoo.train.settings import Kind, kind_of

NAMES: dict[Kind, Callable[[str], None]] = {
    "images": check_images,
    "pairs": check_pairs,
    "sequences": check_sequences,
}
"""Kind of data to what refuses a name."""


def checked(loaded: Loaded) -> Composition:
    """A recipe as `resolve` gives it, its `train:` checked as well.

    Args:
        loaded: The recipe.

    Raises:
        RecipeError: what is wrong with it, all at once.
    """
    faults, composition, train = train_faults(loaded), None, loaded.recipe.train
    try:
        composition = resolve(loaded)
        if train.method is not None:
            with_method(build(composition, {"device": "meta"}), loaded, train)
    except RecipeError as error:
        faults = [*error.diagnostics, *faults]
    if composition is None or faults:
        raise RecipeError.of(faults[:MAX_FAULTS])
    return composition


def train_faults(loaded: Loaded) -> list[Diagnostic]:
    """What is wrong with what a recipe says of its training.

    Args:
        loaded: The recipe.
    """
    source = loaded.source
    found = []
    for loc, error in _errors(loaded):
        at = source.key_place if "with" in loc else source.value_place
        found += [replace(fault, place=at(("train", *loc))) for fault in error.diagnostics]
    return found


def _errors(loaded: Loaded) -> Iterator[tuple[Loc, ZooError]]:
    """Errors that training would raise, each with its spot below `train`."""
    train = loaded.recipe.train
    if "data" in train.model_fields_set:
        try:
            NAMES[kind_of(loaded, train)](train.data)
        except ZooError as error:
            yield ("data",), error
    steps = [Step.model_validate(step.model_dump(by_alias=True)) for step in train.augment]
    for loc, fault in check_steps(steps):
        yield ("augment", *loc), fault
    try:
        check_optimizer(train.optimizer)
    except ZooError as error:
        yield ("optimizer", "use"), error
