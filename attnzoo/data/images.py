"""What a data set of images is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.data.chance import step_seeds


@dataclass(frozen=True)
class Split(ABC):
    """One side of a data set.

    Args:
        labels: int64 (n,).
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels, both new tensors on the CPU.

        Args:
            indices: int64 (b,), from 0 to len(self) - 1.

        Returns:
            uint8 (b c y x) and int64 (b,).
        """


@dataclass(frozen=True)
class Images(Split):
    """A side that is held in memory.

    Args:
        labels: int64 (n,).
        images: uint8 (n c y x).
        size: Rows and columns that `batch` resizes to; as they are when null.
    """

    images: Tensor
    size: int | None = None

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = self.images.index_select(0, indices)  # many times faster than [indices]
        return images if self.size is None else resized(images, self.size), self.labels[indices]


@dataclass(frozen=True)
class ImageData:
    """Images with labels, to train and to test on.

    Args:
        name: As `load_images` takes it.
        classes: Name of each label.
        mean: Mean by channel, of 1.
        std: Standard deviation by channel, of 1.
        image: Channels, rows and columns of an image.
        train: What is trained on.
        test: What is tested on.
        notes: What a person should know about how it was made.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image: tuple[int, int, int]
    train: Split
    test: Split
    notes: tuple[str, ...] = ()


def resized(images: Tensor, size: int) -> Tensor:
    """Images of another size: bilinear with antialiasing, rounded.

    Args:
        images: uint8 (b c y x).
        size: Rows and columns.
    """
    if images.shape[-2:] == (size, size):
        return images
    floats = torch.nn.functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return floats.round_().clamp_(0, 255).to(torch.uint8)


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel, of 1, over all pixels.

    Args:
        images: uint8 (n c y x).
    """
    pixels = images.transpose(0, 1).flatten(1).double() / 255
    return tuple(pixels.mean(dim=1).tolist()), tuple(pixels.std(dim=1, correction=0).clamp(min=1e-3).tolist())


def held_out(labels: Tensor, seed: int) -> Tensor:
    """Which samples are tested on: a fifth of every class, at least one, chosen by the seed.

    Args:
        labels: int64 (n,).
        seed: The choice's.

    Returns:
        bool (n,).
    """
    order = step_seeds(seed, 0, torch.arange(len(labels)))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        chosen[members[order[members].argsort()[: max(1, len(members) // 5)]]] = True
    return chosen
