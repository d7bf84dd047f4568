"""Shapes drawn from a seed: ten classes that need no file, no network and little training."""

import torch
from torch import Tensor

from attnzoo.data.chance import Chance, step_seeds
from attnzoo.data.images import ImageData, Images, statistics

CLASSES = ("circle", "ring", "square", "frame", "diamond", "triangle", "cross", "saltire", "bar", "pillar")
TRAIN, TEST = 5_000, 1_000
CHUNK = 500  # images drawn at once


def load_synthetic(seed: int = 0, size: int | None = None) -> ImageData:
    """Draw them.

    Args:
        seed: Of position, size, colours and noise.
        size: Rows and columns; 32 when null.
    """
    side = size or 32
    train, test = (_draw(seed, number, count, side) for number, count in enumerate((TRAIN, TEST)))
    return ImageData("synthetic", CLASSES, *statistics(train.images), (3, side, side), train, test)


def _draw(seed: int, number: int, count: int, side: int) -> Images:
    labels = torch.arange(count) % len(CLASSES)
    seeds = step_seeds(seed, number, torch.arange(count))
    drawn = [_chunk(s, label, side) for s, label in zip(seeds.split(CHUNK), labels.split(CHUNK), strict=True)]
    return Images(labels, torch.cat(drawn))


def _chunk(seeds: Tensor, labels: Tensor, side: int) -> Tensor:
    """uint8 (b 3 y x): a shape of one colour on a ground of another, and noise of ±24 grey levels."""
    b, chance = len(seeds), Chance(seeds)
    draw = chance.uniform(9)
    radius = side * (0.22 + 0.16 * draw[:, 0])
    x, y = (radius + draw[:, i] * (side - 2 * radius) for i in (1, 2))
    pixels = torch.arange(side) + 0.5
    u = ((pixels - x[:, None]) / radius[:, None])[:, None, :]
    v = ((pixels - y[:, None]) / radius[:, None])[:, :, None]
    inside = _shapes(u, v)[labels, torch.arange(b)]
    ground = draw[:, 3:6] * 255
    colour = (ground + 80 + draw[:, 6:9] * 95) % 255  # 80 to 175 levels away, around the circle of 255
    flat = torch.where(inside[:, None], colour[:, :, None, None], ground[:, :, None, None])
    noise = (chance.uniform(3 * side * side) - 0.5) * 48
    return (flat + noise.view(b, 3, side, side)).round_().clamp_(0, 255).to(torch.uint8)


def _shapes(u: Tensor, v: Tensor) -> Tensor:
    """bool (10 b y x): every class's shape around (0, 0), at most 1 away along an axis."""
    across, down = u.abs() + 0 * v, v.abs() + 0 * u
    far, near = torch.maximum(across, down), torch.minimum(across, down)
    round_ = u * u + v * v
    return torch.stack(
        (
            round_ <= 1,
            (round_ <= 1) & (round_ >= 0.36),
            far <= 0.85,
            (far <= 0.85) & (far >= 0.5),
            across + down <= 1.1,
            (down <= 0.9) & (across <= (v + 0.9) / 1.8),
            (far <= 1) & (near <= 0.28),
            (far <= 0.85) & (far - near <= 0.35),
            (across <= 1) & (down <= 0.35),
            (down <= 1) & (across <= 0.35),
        )
    )
