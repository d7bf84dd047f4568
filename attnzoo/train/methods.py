"""Training methods that a recipe names: what each makes of a model."""

from dataclasses import replace
from typing import Any

from torch import nn

from attnzoo.errors import RecipeError, ZooError
from attnzoo.methods import dual_cross
from attnzoo.recipe import Composition, Loaded
from attnzoo.recipe.composing import build
from attnzoo.recipe.schema import Train

METHODS = {"dual_cross": dual_cross}
"""What a method makes of a model. It is the model, with classifiers of its own; called with `targets`, it gives what is
minimised of each example, and without them log-probabilities."""


def learner(recipe: Loaded | Composition, train: Train, **options: Any) -> nn.Module:
    """The model of a recipe as its training method wants it: itself, without a method.

    Args:
        recipe: The recipe, or what it was resolved to.
        train: How it is trained.
        options: As `build` takes them: `device`, `dtype`.

    Raises:
        RecipeError: AZ326, when the method does not fit the model; those of `build`.
    """
    model = build(recipe, options)
    if train.method is None:
        return model
    try:
        return METHODS[train.method](model)
    except ZooError as error:
        loaded = recipe.loaded if isinstance(recipe, Composition) else recipe
        place = loaded.source.value_place(("train", "method"))
        raise RecipeError.of([replace(fault, place=place) for fault in error.diagnostics]) from None
