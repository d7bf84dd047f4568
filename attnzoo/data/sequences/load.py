"""A sequence task by its name."""

from collections.abc import Callable

from attnzoo.data.sequences.fitting import fitting_options, load_fitting
from attnzoo.data.sequences.markov import load_markov, markov_options
from attnzoo.data.sequences.recall import load_recall, recall_options
from attnzoo.data.sequences.regression import load_regression, regression_options
from attnzoo.data.sequences.sequence_data import SequenceData
from attnzoo.data.sequences.switching import load_switching, switching_options
from attnzoo.errors import DataError, did_you_mean

SEQUENCES: dict[str, Callable[[str, int], SequenceData]] = {
    "recall": load_recall,
    "markov": load_markov,
    "regression": load_regression,
    "switching": load_switching,
    "fitting": load_fitting,
}
"""Task -> what draws it."""
OPTIONS: dict[str, Callable[[str], object]] = {
    "recall": recall_options,
    "markov": markov_options,
    "regression": regression_options,
    "switching": switching_options,
    "fitting": fitting_options,
}
"""Task -> what reads the options in its name."""


def is_sequences(name: str) -> bool:
    """Whether `load_sequences` knows the task, whatever its options."""
    return name.partition(":")[0] in SEQUENCES


def check_sequences(name: str) -> None:
    """Refuse a name that `load_sequences` would refuse; nothing is drawn.

    Args:
        name: As for `load_sequences`.

    Raises:
        DataError: AZ701 for an unknown task, AZ715 for options that are wrong or do not go together.
    """
    task = name.partition(":")[0]
    if task not in OPTIONS:
        known = ", ".join(f"`{each}`" for each in OPTIONS)
        hint = did_you_mean(task, list(OPTIONS)) or f"the sequence tasks are {known}"
        raise DataError("AZ701", f"there is no data set `{name}`", help=hint)
    OPTIONS[task](name)


def load_sequences(name: str, *, seed: int = 0) -> SequenceData:
    """A sequence task, drawn from a seed; needs no file and no network.

    Args:
        name: `recall`, `markov`, `regression`, `switching` or `fitting`, with options such as
            `recall:pairs=8,length=64`.
        seed: What it is drawn from; the same one gives the same sequences.

    Raises:
        DataError: AZ701 for an unknown task, AZ715 for options that are wrong or do not go together.
    """
    check_sequences(name)
    return SEQUENCES[name.partition(":")[0]](name, seed)
