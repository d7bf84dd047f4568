"""Models whose attention is what a test says."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.core import Here, InstrumentCard, Intervention


@dataclass(kw_only=True, eq=False)
class Looks(Intervention):
    """A ← what was planted.

    Args:
        maps: Broadcasts to (b h n m).
    """

    card = InstrumentCard("looks", "Attention that a test plants.")
    maps: Any

    def edit_weights(self, weights: Tensor, here: Here) -> Tensor:
        return self.maps.to(weights).expand_as(weights)


@contextmanager
def looking(model: nn.Module, *maps: Tensor, at: str = "blocks.*"):
    """The model with these weights, those of each head in turn, (n m) each; of all heads where there is one."""
    with attnzoo.intervene(model, Looks(at=at, maps=torch.stack(maps))):
        yield model


def uniform(n: int) -> Tensor:
    """Everybody looks at everything alike, (n n)."""
    return torch.full((n, n), 1 / n)


def shifted(n: int, by: int) -> Tensor:
    """Everybody looks at the token so many before itself, (n n), the first ones at the first."""
    return torch.eye(n)[(torch.arange(n) - by).clamp(min=0)]


def sink(n: int, at: int = 0) -> Tensor:
    """Everybody looks at one token, (n n)."""
    return torch.eye(n)[at].expand(n, n)
