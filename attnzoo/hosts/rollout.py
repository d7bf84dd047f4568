"""Attention rollout while a forward runs, for the components that ask where the layers before them looked.

Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020, arXiv:2005.00928, §3. `attnzoo.lab.rollout` makes
the same of maps that were collected.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Layout, MultiHead, Tap
from attnzoo.core.card import ROLLOUT
from attnzoo.errors import ZooError
from attnzoo.hosts.skip import hand_on, handed_on


def asks(card: Card) -> bool:
    """Whether a component asks for the rollout of the layers before it."""
    return ROLLOUT in card.given


def one_map(card: Card) -> str:
    """Name of the tap that shows the one map of a component, token by token; empty where there is none, or several."""
    tapped = card.tapped("weights")
    return next(iter(tapped)) if [*tapped.values()] == ["b h n m"] else ""


def rolled(weights: Tensor, before: Tensor | None) -> Tensor:
    """Ŝ_i = S̄_i Ŝ_{i-1}, (b n n): S̄_i = (S_i + E) / 2, whose rows sum to 1.

    As in `attnzoo.lab.rollout`, signed weights count by their absolute values, and rows are divided by their sum: where
    those of the weights do not sum to 1, these do.

    Args:
        weights: Of layer i, (b h n n); S_i is their mean over heads.
        before: Ŝ_{i-1}; None for the first layer.

    Returns:
        Without gradient, in single precision at least.
    """
    s = weights.detach()
    s = s.to(torch.promote_types(s.dtype, torch.float32)).abs().mean(dim=1)
    s = s + torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    s = s / s.sum(dim=-1, keepdim=True)
    if before is None:
        return s
    if not torch.amp.is_autocast_available(s.device.type):
        return s @ before
    with torch.autocast(s.device.type, enabled=False):  # half precision would tie what is not equal
        return s @ before


fx.wrap("rolled")  # of one node in a graph


class Rolling(Tap):
    """In the place of a layer's tap of weights: hands on the rollout up to this layer. The weights stay as they are.

    What counts is what hooks made of the weights, before dropout.

    Args:
        first: Whether there is no layer before.
        dropout: That of the tap.
    """

    of_all_heads = True

    def __init__(self, first: bool, dropout: float):
        super().__init__("b h n m", dropout)
        self.first = first

    @property
    def watched(self) -> bool:
        """True: without weights there is nothing to hand on."""
        return True

    def __call__(self, x: Tensor) -> Tensor:
        seen = nn.Identity.__call__(self, x)
        before = None if self.first else handed_on()
        if self.first or before is not None:  # a layer that is called on its own is in no rollout
            hand_on(rolled(seen, before))
        return F.dropout(seen, self.dropout) if self.dropout and self.training else seen


def install(mechanisms: Sequence[Any], others: Sequence[Any] = ()) -> int:
    """Let the layers before the last one that asks hand on the rollout.

    Args:
        mechanisms: Of all layers, in their order.
        others: Components behind all layers.

    Returns:
        How many layers hand on, from the first.
    """
    asking = [i for i, one in enumerate([*mechanisms, *others]) if asks(one.card)]
    count = min(max(asking, default=0), len(mechanisms))
    for i, component in enumerate(mechanisms[:count]):
        owner = component.inner if isinstance(component, MultiHead) else component
        name = one_map(owner.card)
        setattr(owner, name, Rolling(i == 0, getattr(owner, name).dropout))
    return count


def class_row(rollout: Tensor | None, layout: Layout) -> Tensor:
    """How much the class token, the first of all, looks at each grid token, (b *grid).

    Args:
        rollout: Of the layers before, (b n n).
        layout: How the tokens are arranged.

    Raises:
        ZooError: AZ410, when nothing was handed on.
    """
    if rollout is None:
        raise ZooError(
            "AZ410",
            "a component that asks for the rollout of the layers before was called without them",
            why="the model's forward carries the rollout from layer to layer beside the tokens",
            help="call the model",
        )
    return rollout[:, 0, layout.prefix :].unflatten(1, layout.grid)
