"""Steps that mix each image with a partner from its batch, and the labels by the same shares.

The partner is the image at the same place from the end, as in timm, so it depends on the batch; the shares depend on
the image's own seed.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from attnzoo.core import PositiveFloat
from attnzoo.data.chance import Chance, integers
from attnzoo.data.effects import inside
from attnzoo.data.geometry import Frame


class Mixer(ABC):
    """A way to mix two images."""

    rank = 3

    @abstractmethod
    def shares(self, images: Tensor, chance: Chance) -> Tensor:
        """float32 (b y x), each image's own share of every pixel; the partner has the rest."""


class Mixup(Mixer):
    """The same share everywhere, Beta(alpha, alpha); Zhang et al., arXiv:1710.09412.

    Args:
        alpha: Of the Beta distribution; small means little is mixed.
    """

    def __init__(self, frame: Frame, *, alpha: PositiveFloat = 0.8):
        self.alpha = alpha

    def shares(self, images: Tensor, chance: Chance) -> Tensor:
        own = chance.beta(self.alpha)
        return own[:, None, None].expand(-1, *images.shape[2:])


class Cutmix(Mixer):
    """A box of the partner, whose area before it is cut at the edges is 1 - Beta(alpha, alpha); arXiv:1905.04899.

    Args:
        alpha: Of the Beta distribution.
    """

    def __init__(self, frame: Frame, *, alpha: PositiveFloat = 1.0):
        self.alpha = alpha

    def shares(self, images: Tensor, chance: Chance) -> Tensor:
        side = (1 - chance.beta(self.alpha)).sqrt()
        middle = chance.uniform(2)
        rows, columns = (
            inside(integers(middle[:, i : i + 1], n) - length // 2, length, n)
            for i, n in enumerate(images.shape[2:])
            for length in [(side * n).long()[:, None]]
        )
        return (~(rows[:, :, None] & columns[:, None, :])).float()


def mixed(
    images: Tensor, labels: Tensor, mixers: list[Mixer], chance: Chance, classes: int
) -> tuple[Tensor, Tensor]:
    """Each image mixed by one of the mixers, chosen with equal chance.

    Args:
        images: float32 (b c y x).
        labels: int64 (b,).
        mixers: At least one.
        chance: The batch's random numbers.
        classes: Number of classes.

    Returns:
        Images (b c y x), and targets (b classes) of which each row sums to 1.
    """
    chosen = integers(chance.uniform(1), len(mixers))[:, :, None]
    own = torch.ones_like(images[:, 0])
    for number, mixer in enumerate(mixers):
        own = torch.where(chosen == number, mixer.shares(images, chance), own)
    targets = torch.nn.functional.one_hot(labels, classes).float()
    share = own.mean(dim=(1, 2))[:, None]
    return torch.lerp(images.flip(0), images, own[:, None]), torch.lerp(targets.flip(0), targets, share)
