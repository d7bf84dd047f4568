"""How a check says what was claimed, and to which components it applies."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.core import Law
from attnzoo.core.mask import KINDS
from attnzoo.errors import ZooError
from attnzoo.testing.strategies import SMALL, Checkable, Scene

TOLERANCE = 1e-10
"""Of float64, relative to the largest number."""

DRAWS = 32
"""So many parameters and inputs are tried before something counts as silent; behind a rectifier much is, at times."""

Check = Callable[[Checkable, Scene], None]


class Inapplicable(Exception):
    """A check has nothing to say in this case; the reason is the message."""


@dataclass(frozen=True)
class Requirement:
    """To which components, cards and option settings a check applies, and how often it is tried.

    Args:
        kinds: Of `mechanism` (heads with their projections are mechanisms), `head`, `tokens` (mechanisms that are no
            heads), `pool`, `fusion`.
        card: What the card must claim under the options.
        options: What the options must be.
        share: Share of the usual number of scenes, for what is costly; 0 is one scene.
        large: Whether it must hold for inputs of up to 1000 too.
    """

    kinds: tuple[str, ...]
    card: Callable[[Any], bool] = lambda card: True
    options: Callable[[dict[str, Any]], bool] = lambda options: True
    share: float = 1.0
    large: bool = False

    def fits(self, card: Any, options: dict[str, Any]) -> bool:
        """Whether a check applies under these options."""
        return self.card(card) and self.options(options)


def requires(
    *kinds: str,
    mask: str | None = None,
    context: bool | None = None,
    weights: bool = False,
    incremental: bool | None = None,
    law: Law | None = None,
    start: str | None = None,
    where: Callable[[Any], bool] = lambda card: True,
    wide: bool = False,
    share: float = 1.0,
    large: bool = False,
) -> Callable[[Check], Check]:
    """Says to which cards a check applies; None asks for nothing.

    Args:
        kinds: Of `mechanism`, `head`, `tokens`, `pool`, `fusion`.
        mask: A kind of mask that must be claimed; `some`, any of them; `two`, more than one; `not all`, a kind that is
            not.
        context: Whether cross-attention must be claimed.
        weights: Whether weights must be formed.
        incremental: Whether cached decoding must be claimed.
        law: A law that must be claimed.
        start: Of fusions: what `start` must be, where there is such an option.
        where: Anything else that must hold of the card.
        wide: Leaves out options of 1 (a window of one token), under which parameters may rightly have no say.
        share: Share of the usual number of scenes, for what is costly; 0 is one scene.
        large: Whether it must hold for inputs of up to 1000 too.
    """
    masks: dict[str | None, Callable[[Any], bool]] = {
        None: lambda card: True,
        "some": lambda card: bool(card.masks),
        "two": lambda card: len(card.masks) > 1,
        "not all": lambda card: bool(set(KINDS) - card.masks),
    }
    wanted = {"context": context, "incremental": incremental}

    def card(card: Any) -> bool:
        return (
            masks.get(mask, lambda card: mask in card.masks)(card)
            and all(value is None or bool(getattr(card, name)) == value for name, value in wanted.items())
            and (not weights or bool(card.tapped("weights")))
            and (law is None or law in card.laws)
            and where(card)
        )

    def options(options: dict[str, Any]) -> bool:
        if start is not None and options.get("start", "free") != start:
            return False
        return not (wide and any(type(value) is int and value == SMALL[-1] for value in options.values()))

    def decorate(check: Check) -> Check:
        check.requirement = Requirement(kinds, card, options, share, large)  # type: ignore[attr-defined]
        return check

    return decorate


def claim(holds: bool, claimed: str, happened: str) -> None:
    """Fail unless it holds.

    Args:
        holds: Whether it does.
        claimed: What should be.
        happened: What is.

    Raises:
        AssertionError: With both sentences.
    """
    if not holds:
        raise AssertionError(f"claimed: {claimed}; but {happened}")


def same(a: Tensor, b: Tensor, claimed: str, tolerance: float = TOLERANCE) -> None:
    """Fail unless two tensors agree.

    Args:
        a: Any shape.
        b: The same shape.
        claimed: What should be.
        tolerance: Largest difference, relative to the largest number of b.
    """
    claim(a.shape == b.shape, claimed, f"the shapes are {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() and not torch.equal(a, b):
        difference = float((a - b).detach().abs().max())
        scale = 1 + float(b.detach().abs().max())
        claim(difference <= tolerance * scale, claimed, f"they differ by {difference:.2e}")


def refused(code: str, what: str, call: Callable[..., Any], *args: Any, **more: Any) -> None:
    """Fail unless a call is refused.

    Args:
        code: Of the error that must be raised; others may be named after it, with a space between.
        what: What should be refused.
        call: What is called.
        args, more: Its arguments.
    """
    claimed = f"{what} is refused with {code.replace(' ', ' or ')}"
    try:
        call(*args, **more)
    except ZooError as error:
        claim(error.code in code.split(), claimed, f"{error.code} was raised")
    except Exception as error:
        text = str(error).splitlines() or [""]
        claim(False, claimed, f"Python or PyTorch raised {type(error).__name__}: {text[0]}")
    else:
        claim(False, claimed, "it was taken")
