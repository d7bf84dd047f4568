"""A sequence task by its name."""

from collections.abc import Callable

from attnzoo.data.sequences.fitting import load_fitting
from attnzoo.data.sequences.markov import load_markov
from attnzoo.data.sequences.recall import load_recall
from attnzoo.data.sequences.regression import load_regression
from attnzoo.data.sequences.sequence_data import SequenceData
from attnzoo.data.sequences.switching import load_switching
from attnzoo.errors import DataError, did_you_mean

SEQUENCES: dict[str, Callable[[str, int], SequenceData]] = {
    "recall": load_recall,
    "markov": load_markov,
    "regression": load_regression,
    "switching": load_switching,
    "fitting": load_fitting,
}
"""Task -> what draws it."""


def is_sequences(name: str) -> bool:
    """Whether `load_sequences` knows the task, whatever its options."""
    return name.partition(":")[0] in SEQUENCES


def load_sequences(name: str, *, seed: int = 0) -> SequenceData:
    """A sequence task, drawn from a seed; needs no file and no network.

    Args:
        name: `recall`, `markov`, `regression`, `switching` or `fitting`, with options such as
            `recall:pairs=8,length=64`.
        seed: What it is drawn from; the same one gives the same sequences.

    Raises:
        DataError: AZ701 for an unknown task, AZ715 for options that are wrong or do not go together.
    """
    task = name.partition(":")[0]
    if task not in SEQUENCES:
        known = ", ".join(f"`{each}`" for each in SEQUENCES)
        hint = did_you_mean(task, list(SEQUENCES)) or f"the sequence tasks are {known}"
        raise DataError("AZ701", f"there is no data set `{name}`", help=hint)
    return SEQUENCES[task](name, seed)
