"""The data side of a run: which examples a step sees, what is learnt from them, how good a model is on the others.

The loop knows tasks alone: images (`image_task.py`), pairs of sequences (`pair_task.py`), single sequences
(`sequence_task.py`).
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from attnzoo.data import load_images
from attnzoo.data.parallel import Tokens, load_pairs
from attnzoo.data.sequences import load_sequences
from attnzoo.recipe import Loaded
from attnzoo.recipe.schema import Seq2SeqHost
from attnzoo.train import sampler
from attnzoo.train.settings import Kind, Settings, kind_of

Inputs = tuple[Tensor, ...]
"""What a model is given, in order; examples come first in every shape."""


class Task(ABC):
    """The data of a run and what is asked of a model there.

    Nothing here has a state: every answer follows from the settings, the data and the arguments.

    Args:
        loaded: The recipe.
        settings: How to train.
        data: What `load_data` gives.
    """

    kind: ClassVar[Kind]

    def __init__(self, loaded: Loaded, settings: Settings, data: Any):
        self.settings, self.data = settings, data
        self.loaded = self.fit(loaded)

    def __len__(self) -> int:
        """How many examples there are to train on."""
        return len(self.data.train)

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return sampler.steps_per_epoch(len(self), self.settings.batch_size)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know before the first step."""
        return ()

    @abstractmethod
    def fit(self, loaded: Loaded) -> Loaded:
        """The recipe with what the data decide; what agrees already is left as it is.

        Args:
            loaded: The recipe.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a run must know of its data when they are gone, as JSON; it goes into every checkpoint."""

    def batch(self, epoch: int, step: int) -> Tensor:
        """The examples of a step, over all processes, int64 (b,).

        Args:
            epoch: From 0.
            step: Within the epoch, from 0.
        """
        return sampler.batch(
            len(self), self.settings.batch_size, seed=self.settings.seed, epoch=epoch, step=step
        )

    @abstractmethod
    def prepare(self, epoch: int, indices: Tensor) -> tuple[Inputs, Tensor]:
        """What a model is given and what it shall answer, on the CPU.

        Args:
            epoch: From 0.
            indices: Of the examples, int64 (b,).
        """

    def units(self, indices: Tensor) -> int:
        """What the summed losses of training examples are divided by: the examples, or what is asked in them.

        Args:
            indices: Of the examples, int64 (b,).
        """
        return len(indices)

    @abstractmethod
    def losses(self, model: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        """What is minimised, and logged as the training loss: a sum over the units of each example, (b,).

        Label smoothing is in it; what mechanisms add to be minimised is not.

        Args:
            model: The model, or what wraps it.
            inputs: From `prepare`, on the model's device.
            targets: From `prepare`, on the model's device.
        """

    @abstractmethod
    def tally(
        self, model: nn.Module, *, device: torch.device | str = "cpu", rank: int = 0, world: int = 1
    ) -> Tensor:
        """Sums over the test side, float64 on the CPU, which add up over processes. The model keeps its mode.

        Args:
            model: The model.
            device: Where it is.
            rank: Of this process; it looks at every `world`-th example.
            world: How many processes there are.
        """

    @abstractmethod
    def figures(self, tally: Tensor) -> dict[str, float]:
        """`test_loss`, `test_accuracy` and what else the log shall say of an epoch.

        Args:
            tally: Sums over all processes.
        """


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
    from attnzoo.train.image_task import ImageTask  # here, because they are made from this file's `Task`
    from attnzoo.train.pair_task import PairTask
    from attnzoo.train.sequence_task import SequenceTask

    tasks: dict[Kind, type[Task]] = {"images": ImageTask, "pairs": PairTask, "sequences": SequenceTask}
    data = load_data(settings, loaded) if data is None else data
    return tasks[kind_of(loaded, settings)](loaded, settings, data)
