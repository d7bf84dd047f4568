"""Kinds of data: how each is loaded, and the task that a model has there."""

from typing import Any, cast

from attnzoo.data import load_images
from attnzoo.data.parallel import Tokens, load_pairs
from attnzoo.data.sequences import load_sequences
from attnzoo.recipe import Loaded
from attnzoo.recipe.schema import Seq2SeqHost
from attnzoo.train.image_task import ImageTask
from attnzoo.train.pair_task import PairTask
from attnzoo.train.sequence_task import SequenceTask
from attnzoo.train.settings import Kind, Settings, kind_of
from attnzoo.train.task import Task

TASKS: dict[Kind, type[Task]] = {"images": ImageTask, "pairs": PairTask, "sequences": SequenceTask}


def load_data(settings: Settings, loaded: Loaded) -> Any:
    """The data of a run.

    Args:
        settings: They name the data.
        loaded: The recipe.

    Raises:
        DataError: AZ7xx.
        RunError: AZ814, when the recipe is for data of another kind; nothing is read then.
    """
    kind = kind_of(loaded, settings)
    if kind == "images":
        return load_images(settings.data, root=settings.data_root, size=settings.size)
    if kind == "sequences":
        return load_sequences(settings.data)
    return load_pairs(
        settings.data,
        root=settings.data_root,
        tokens=Tokens.model_validate(settings.tokens.model_dump()),
        max_length=cast(Seq2SeqHost, loaded.recipe.host).max_length,
    )


def task_of(loaded: Loaded, settings: Settings, data: Any = None) -> Task:
    """The task of a recipe and its settings.

    Args:
        loaded: The recipe.
        settings: How to train.
        data: What `load_data` gives; loaded when null.

    Raises:
        DataError: AZ7xx, what is wrong with the data.
        RunError: AZ806 settings that do not go with the data, AZ814 a recipe for data of another kind.
    """
    data = load_data(settings, loaded) if data is None else data
    return TASKS[kind_of(loaded, settings)](loaded, settings, data)
