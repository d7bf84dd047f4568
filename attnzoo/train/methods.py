"""Training methods that a recipe names: what each makes of a model."""

from dataclasses import replace

from torch import nn

from attnzoo.errors import RecipeError, ZooError
from attnzoo.methods import dual_cross
from attnzoo.recipe import Loaded
from attnzoo.recipe.schema import Train

METHODS = {"dual_cross": dual_cross}
"""What a method makes of a model. It is the model, with classifiers of its own; called with `targets`, it gives what is
minimised of each example, and without them log-probabilities."""


def with_method(model: nn.Module, loaded: Loaded, train: Train) -> nn.Module:
    """The model as the method of a training wants it: itself, without one.

    Args:
        model: As the recipe composes it.
        loaded: The recipe.
        train: How it is trained.

    Raises:
        RecipeError: AZ326, when the method does not fit the model.
    """
    if train.method is None:
        return model
    try:
        return METHODS[train.method](model)
    except ZooError as error:
        place = loaded.source.value_place(("train", "method"))
        raise RecipeError.of([replace(fault, place=place) for fault in error.diagnostics]) from None
