"""Training methods that a recipe names: what each makes of a model."""

from torch import nn

from attnzoo.methods import dual_cross
from attnzoo.train.settings import Settings

METHODS = {"dual_cross": dual_cross}
"""What a method makes of a model. It is the model, with classifiers of its own; called with `targets`, it gives what is
minimised of each example, and without them log-probabilities."""


def with_method(model: nn.Module, settings: Settings) -> nn.Module:
    """The model as the method of a run wants it.

    Args:
        model: As the recipe composes it.
        settings: Of the run.

    Raises:
        ZooError: AZ326, when the method does not fit the model.
    """
    return model if settings.method is None else METHODS[settings.method](model)
