"""How good a model is on a split: loss, accuracy with an interval, and both by class."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.core.card import Given
from attnzoo.data import Split
from attnzoo.hosts.given import stand_ins

Z95 = 1.959963984540054
"""Standard deviations that hold 95 % of a normal distribution, on both sides."""
NOTHING_ELSE: Mapping[str, Sequence[int]] = {}
"""A model takes images alone."""


@dataclass(frozen=True)
class ClassScore:
    """One row of the table by class.

    Args:
        name: Of the class.
        images: How many there are.
        correct: How many were recognised.
        loss: Mean cross-entropy, in nats.
    """

    name: str
    images: int
    correct: int
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """A model on a split.

    Args:
        images: How many images there are.
        correct: How many were recognised.
        loss: Mean cross-entropy, in nats.
        classes: The same by class.
    """

    images: int
    correct: int
    loss: float
    classes: tuple[ClassScore, ...]

    @classmethod
    def of(cls, tally: Tensor, names: Sequence[str]) -> "Evaluation":
        """From the sums of `tally`.

        Args:
            tally: Images, hits and summed loss of each class, (classes 3).
            names: Of the classes.
        """
        rows = [
            (name, int(n), int(hits), loss)
            for name, (n, hits, loss) in zip(names, tally.tolist(), strict=True)
        ]
        scores = tuple(ClassScore(name, n, hits, loss / n if n else 0.0) for name, n, hits, loss in rows)
        images = sum(n for _, n, _, _ in rows)
        total = math.fsum(loss for *_, loss in rows)
        return cls(images, sum(hits for _, _, hits, _ in rows), total / max(1, images), scores)

    @property
    def accuracy(self) -> float:
        """Share of the images that were recognised."""
        return self.correct / max(1, self.images)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the accuracy lies with 95 % confidence, by Wilson's score."""
        return wilson(self.correct, self.images)

    def as_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        return {"accuracy": self.accuracy, "interval": list(self.interval)} | asdict(self)


def wilson(hits: int, of: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Args:
        hits: How often it happened.
        of: In how many trials.
        z: Half width, in standard deviations.
    """
    if not of:
        return 0.0, 1.0
    share, extra = hits / of, z * z / of
    middle = share + extra / 2
    half = z * math.sqrt(share * (1 - share) / of + extra / (4 * of))
    return max(0.0, (middle - half) / (1 + extra)), min(1.0, (middle + half) / (1 + extra))


@torch.no_grad()
def tally(
    model: nn.Module,
    split: Split,
    transform: Callable[[Tensor], Tensor],
    classes: int,
    inputs: Mapping[str, Sequence[int] | Given] = NOTHING_ELSE,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
) -> Tensor:
    """Images, hits and summed loss of each class, (classes 3), float64 on the CPU. The model keeps its mode.

    Args:
        model: From images (b c y x) to logits (b classes).
        split: Images with labels.
        transform: From bytes to what the model wants.
        classes: How many there are.
        inputs: What the model takes beside images, by name; `stand_ins` of the images stand for it.
        batch_size: Images at once.
        device: Where the model is.
        rank: Of this process; it looks at every `world`-th image.
        world: How many processes there are.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(classes, 3, dtype=torch.float64)
    for indices in torch.arange(rank, len(split), world).split(batch_size):
        images, labels = split.batch(indices)
        x = transform(images).to(device)
        logits = model(x, **stand_ins(x, inputs)).float().cpu()
        hits = (logits.argmax(dim=1) == labels).double()
        losses = F.cross_entropy(logits, labels, reduction="none").double()
        sums.index_add_(0, labels, torch.stack([torch.ones_like(hits), hits, losses], dim=1))
    model.train(was_training)
    return sums


def evaluate(
    model: nn.Module,
    split: Split,
    transform: Callable[[Tensor], Tensor],
    names: Sequence[str],
    **options: Any,
) -> Evaluation:
    """A model on a split.

    Args:
        model: From images (b c y x) to logits (b classes).
        split: Images with labels.
        transform: From bytes to what the model wants: `attnzoo.data.evaluation(...)`.
        names: Of the classes.
        options: As for `tally`.
    """
    return Evaluation.of(tally(model, split, transform, len(names), **options), names)
