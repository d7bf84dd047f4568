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
from attnzoo.data.images import Split
from attnzoo.errors import ZooError
from attnzoo.hosts.given import stand_ins
from attnzoo.zoo import Entry

PATCH, DIM, HEADS, CLASSES = 2, 32, 4, 10
"""Pixels of a patch, channels, heads, classes."""
BRANCHES = ("softmax", "neighborhood")
"""What a fusion is drawn and trained with: one branch that sees everything, one that sees neighbours."""
PLACES = ((14, 0), (14, 1), (16, 0), (16, 1))
"""Tokens along an edge of the image and class tokens; the first that a component can be put into."""
LINES = {1: (196,), 3: (4, 7, 7)}
"""How 196 tokens lie for what needs another grid than a plane."""
STEPS, LONGER, BATCH, RATE, SEED = 150, 3, 8, 1e-2, 0
"""Of training: steps, how many times as many where the answer comes through the component alone, images of a step, the
highest learning rate; the seed of everything."""


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
def digits(side: int) -> tuple[Digits, Digits]:
    """scikit-learn's digits: those to train on, and a fifth to test on.

    Args:
        side: Tokens along an edge: 14 for 28 × 28 pixels.
    """
    data = load_digits(PATCH * side)
    mean, std = data.mean[0] * 255, data.std[0] * 255

    def half(split: Split) -> Digits:
        images, labels = split.batch(torch.arange(len(split)))
        return Digits((images[:, :1].float() - mean) / std, labels)

    return half(data.train), half(data.test)


def spec_of(entry: Entry) -> str | dict[str, Any]:
    """What `attnzoo.create` builds of a component: itself, or a fusion of two branches.

    Args:
        entry: A mechanism, pool or fusion of the zoo.
    """
    if issubclass(entry.value, Fusion):
        return {"fuse": entry.full_name, "of": list(BRANCHES)}
    return entry.full_name


def reads_context(entry: Entry) -> bool:
    """Whether a component is about two streams, so that it is shown with a context; others read their own tokens.

    Args:
        entry: A mechanism, pool or fusion of the zoo.
    """
    card = entry.value.card
    return getattr(card, "context_grid", None) is not None or getattr(card, "context", False) == "beside"


class DigitNetwork(nn.Module):
    """Patches, learnt positions, one block with the component, the means of the four quarters, a classifier.

    x' = x + component(norm(x)), x'' = x' + mlp(x'). A class token takes the place of the means, where the component
    needs one, and so does a pool. What reads from a context reads the digit there: its own tokens are blank, so that
    the answer comes through it alone.

    Args:
        entry: A mechanism, pool or fusion of the zoo.
        side: Tokens along an edge of the image.
        prefix: Number of class tokens, 0 or 1.

    Raises:
        ZooError: What `attnzoo.create` refuses.
    """

    def __init__(self, entry: Entry, side: int = 14, prefix: int = 0):
        super().__init__()
        card = entry.value.card
        self.pools, self.reads = issubclass(entry.value, Pool), reads_context(entry)
        self.side, self.prefix = side, prefix
        self.grid: tuple[int, ...] = LINES.get(getattr(card, "grid", None), (side, side))  # type: ignore[arg-type]
        self.given = dict(getattr(card, "given", {}))
        context: dict[str, Any] = {"context_dim": DIM, "context_grid": self.grid} if self.reads else {}
        self.patches = nn.Conv2d(1, DIM, PATCH, PATCH)
        self.positions = nn.Parameter(torch.randn(side * side, DIM))
        self.register = nn.Parameter(torch.randn(prefix, DIM))
        self.norm = nn.LayerNorm(DIM)
        self.component = create(spec_of(entry), DIM, HEADS, grid=self.grid, prefix=prefix or None, **context)
        self.mlp = nn.Sequential(
            nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)
        )
        width = DIM if self.pools or prefix else 4 * DIM
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def embed(self, images: Tensor) -> Tensor:
        """Tokens of images, (b n c).

        Args:
            images: (b 1 y x).
        """
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return torch.cat([self.register.expand(len(x), -1, -1), x], dim=1)

    def takes(self, images: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """What the component is given: its tokens and the context (b n c), and maps by name.

        Args:
            images: (b 1 y x).
        """
        x = self.embed(torch.zeros_like(images) if self.reads else images)
        tokens: tuple[Tensor, ...] = (self.norm(x + self.mlp(x) if self.pools else x),)
        if self.reads:
            tokens += (self.norm(self.embed(images)[:, self.prefix :]),)
        maps = stand_ins(F.avg_pool2d(images, PATCH), self.given)
        return tokens, {name: values.reshape(len(images), *self.grid) for name, values in maps.items()}

    def forward(self, images: Tensor) -> Tensor:
        """Scores of classes, (b classes).

        Args:
            images: (b 1 y x).
        """
        tokens, maps = self.takes(images)
        mixed = self.component(*tokens, **maps)
        if self.pools:
            return self.head(mixed)
        x = self.embed(torch.zeros_like(images) if self.reads else images) + mixed
        x = x + self.mlp(x)
        if self.prefix:
            return self.head(x[:, 0])
        quarters = F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (self.side, self.side)), 2)
        return self.head(quarters.flatten(1))


def network_for(entry: Entry) -> DigitNetwork:
    """The network with a component, at the first of `PLACES` where it can be; initialised by `SEED`.

    Args:
        entry: A mechanism, pool or fusion of the zoo.

    Raises:
        ZooError: Why it can be at none; what was said at the first.
    """
    first: ZooError | None = None
    for side, prefix in PLACES:
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(SEED)
                network = DigitNetwork(entry, side, prefix)
                with torch.no_grad():
                    network.eval()(digits(side)[0].images[:1])
            return network
        except ZooError as error:
            first = first or error
    assert first is not None
    raise first


def steps_for(network: DigitNetwork) -> int:
    """How long it is trained: longer, where all that it knows of the digit comes through the component."""
    return STEPS * (LONGER if network.pools or network.reads or network.prefix else 1)


def train(network: DigitNetwork, steps: int) -> float:
    """Train it on digits, with AdamW and one cycle of the learning rate.

    Args:
        network: It; ends in eval mode.
        steps: Of `BATCH` images each.

    Returns:
        The share of test images that it names rightly.
    """
    training, test = digits(network.side)
    optimiser = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=max(steps, 1), pct_start=0.3)
    order = torch.Generator().manual_seed(SEED)
    network.train()
    with torch.random.fork_rng(devices=[]):  # what draws in training draws the same each time
        torch.default_generator.manual_seed(SEED)
        for _ in range(steps):
            chosen = torch.randint(0, len(training), (BATCH,), generator=order)
            loss = F.cross_entropy(network(training.images[chosen]), training.labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            right = sum(
                int((network(images).argmax(dim=-1) == labels).sum())
                for images, labels in zip(test.images.split(32), test.labels.split(32), strict=True)
            )
    return right / len(test)
