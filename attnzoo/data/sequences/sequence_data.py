"""What a data set of single sequences is: tokens or vectors, and what is asked at some of their positions."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

IGNORE = -100
"""The target of a token sequence where nothing is asked; of a regression it is NaN."""
TRAIN, TEST = 0, 1
"""The sides' numbers, as `step_seeds` takes them: no sequence of one is drawn like one of the other."""


@dataclass(frozen=True)
class Sequences(ABC):
    """One side of a data set; all its sequences are equally long."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of sequences."""

    @abstractmethod
    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, new tensors on the CPU.

        Args:
            indices: int64 (b,), from 0 to len(self) - 1.

        Returns:
            Inputs int64 (b n), tokens, or float32 (b n e), vectors. Targets int64 (b n), -100 where nothing is asked,
            or float32 (b n o), NaN where nothing is asked.
        """


@dataclass(frozen=True)
class InMemory(Sequences):
    """A side that is held in memory.

    Args:
        inputs: int64 (count n) or float32 (count n e).
        targets: int64 (count n) or float32 (count n o).
        kinds: int64 (count n), which subtask each question belongs to, -1 where nothing is asked; null without
            subtasks.
    """

    inputs: Tensor
    targets: Tensor
    kinds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs.index_select(0, indices), self.targets.index_select(0, indices)


@dataclass(frozen=True)
class SequenceData:
    """Sequences to train and to test on.

    Args:
        name: As `load_sequences` takes it.
        vocab: Number of tokens; null where inputs are vectors.
        width: Numbers per input vector; null where inputs are tokens.
        outputs: Number of classes, or of numbers per target vector.
        regression: Whether targets are vectors.
        length: Tokens per sequence.
        train: What is trained on.
        test: What is tested on.
        notes: What a person should know about how it was made.
        words: A readable text for each token.
        kinds: Names of the subtasks; none without.
        causal: Whether the answers stand further on in the inputs, so that a model that looks ahead would see them.
    """

    name: str
    vocab: int | None
    width: int | None
    outputs: int
    regression: bool
    length: int
    train: InMemory
    test: InMemory
    notes: tuple[str, ...] = ()
    words: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = ()
    causal: bool = False
