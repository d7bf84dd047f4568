"""The data side of a run: which examples a step sees, what is learnt from them, how good a model is on the others.

The loop knows tasks alone; `kinds.py` lists them.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnzoo.recipe import Loaded
from attnzoo.train import sampler
from attnzoo.train.settings import Kind, Settings

Inputs = tuple[Tensor, ...]
"""What a model is given, in order; examples come first in every shape."""


class Task(ABC):
    """The data of a run and what is asked of a model there.

    Nothing here has a state: every answer follows from the settings, the data and the arguments.

    Args:
        loaded: The recipe.
        settings: How to train.
        data: What `kinds.load_data` gives.
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
