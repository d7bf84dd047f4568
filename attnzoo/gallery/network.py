"""A network small enough to be trained in seconds, with any component in its one block."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.alone.build import create
from attnzoo.core import Fusion, Pool
from attnzoo.data.digits import load_digits
from attnzoo.hosts.given import stand_ins
from attnzoo.zoo import Entry

PATCH, SIDE, DIM, HEADS = 2, 14, 32, 4
"""Pixels of a patch, tokens along an edge of the image, channels, heads."""
BRANCHES = ("softmax", "neighborhood")
"""What a fusion is drawn and trained with: one branch that sees everything, one that sees neighbours."""
GRIDS = {1: (SIDE * SIDE,), 3: (4, 7, 7)}
"""How 196 tokens lie for what needs another grid than a plane."""
CLASSES = 10
SEED = 0


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, enlarged, as the network takes them.

    Args:
        images: Standardised, (b 1 y x).
        labels: Classes (b).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@cache
def digits() -> tuple[Digits, Digits]:
    """scikit-learn's digits in 28 × 28 pixels: those to train on, and a fifth to test on."""
    data = load_digits(PATCH * SIDE)
    mean, std = data.mean[0] * 255, data.std[0] * 255
    train, test = (
        Digits((split.images[:, :1].float() - mean) / std, split.labels) for split in (data.train, data.test)
    )
    return train, test


def spec_of(entry: Entry) -> str | dict[str, Any]:
    """What `attnzoo.create` builds of a component: itself, or a fusion of two branches."""
    if issubclass(entry.value, Fusion):
        return {"fuse": entry.full_name, "of": list(BRANCHES)}
    return entry.full_name


class DigitNetwork(nn.Module):
    """Patches, learnt positions, one block with the component, the mean of the tokens, a classifier.

    x' = x + component(norm(x)), x'' = x' + mlp(norm(x')). A pool stands at the end, in the place of the mean. What
    reads from a context is given the tokens of a second image, whose class the network is to name.

    Args:
        entry: A mechanism, pool or fusion of the zoo.

    Raises:
        ZooError: What `attnzoo.create` refuses.
    """

    def __init__(self, entry: Entry):
        super().__init__()
        card = entry.value.card
        self.pools = issubclass(entry.value, Pool)
        self.reads = getattr(card, "context_grid", None) is not None or getattr(card, "context", 0) == "beside"
        wanted = getattr(card, "grid", None)
        self.grid = GRIDS.get(wanted, (SIDE, SIDE))
        self.given = dict(getattr(card, "given", {}))
        context = {"context_dim": DIM, "context_grid": self.grid} if self.reads else {}
        self.patches = nn.Conv2d(1, DIM, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(SIDE * SIDE, DIM))
        self.norm = nn.LayerNorm(DIM)
        self.component = create(spec_of(entry), DIM, HEADS, grid=self.grid, **context)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES))

    def tokens(self, images: Tensor) -> Tensor:
        """What the component is given, (b n c).

        Args:
            images: (b 1 y x).
        """
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.norm(x + self.mlp(x)) if self.pools else self.norm(x)

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The maps that the component asks for, (b *grid) each: the brightness of the patches.

        Args:
            images: (b 1 y x).
        """
        maps = stand_ins(F.avg_pool2d(images, PATCH), self.given)
        return {name: values.reshape(len(images), *self.grid) for name, values in maps.items()}

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Scores of classes, (b classes).

        Args:
            images: (b 1 y x).
            others: Those that are read from, where the component reads from a context.
        """
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        if self.pools:
            return self.head(self.component(self.norm(x + self.mlp(x)), **self.maps(images)))
        context = (self.tokens(others),) if self.reads else ()
        x = x + self.component(self.norm(x), *context, **self.maps(images))
        return self.head((x + self.mlp(x)).mean(dim=1))
