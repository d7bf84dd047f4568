"""Named windows into mechanisms: for looking (probes) and for reaching in (interventions)."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.errors import ZooError, did_you_mean

KINDS = ("scores", "weights", "gate", "shares", "state")
"""The closed list of kinds: before normalisation, after it, channel or value gates, fusion, recurrent state."""
POSITIONS = "nmrwk"
"""Axes that count what attends or is attended to: tokens, slots or agents, tokens of a window, branches."""


def kind_of(name: str) -> str:
    """What a tap of this name shows: `weights` for `weights` and for `weights_agents`."""
    return name.partition("_")[0]


class Tap(nn.Identity):
    """A named observable. Idle taps cost nothing; a forward hook may read the tensor or replace it.

    Args:
        axes: Its axes in the shape letters, such as `b h n m`. What weights are normalised over is the last axis among
            n, m, r, w and k.
        dropout: Probability with which an entry is dropped in training, after the hooks have seen it.
    """

    of_all_heads = False
    """Whether what stands here needs the weights of all heads at once, so that devices cannot hold some each."""

    def __init__(self, axes: str, dropout: float = 0.0):
        super().__init__()
        self.axes, self.dropout = axes, dropout

    def __call__(self, x: Tensor) -> Tensor:
        seen = super().__call__(x)
        return F.dropout(seen, self.dropout) if self.dropout and self.training else seen

    @property
    def watched(self) -> bool:
        """Whether anybody looks. Mechanisms ask, to take a fused path when nobody does."""
        return bool(
            self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        )

    @property
    def over(self) -> int:
        """Index of the axis that is normalised over; -1 when no axis counts positions."""
        axes = self.axes.split()
        return max((i for i, axis in enumerate(axes) if axis in POSITIONS), default=-1)

    def extra_repr(self) -> str:
        return self.axes

    def __getstate__(self) -> dict[str, Any]:
        hooks = OrderedDict(
            (k, hook) for k, hook in self._forward_hooks.items() if not getattr(hook, "passing", False)
        )
        return self.__dict__ | {"_forward_hooks": hooks}


def find_taps(module: nn.Module, kind: str | None = None) -> dict[str, Tap]:
    """The taps inside a module, by their full names.

    Args:
        module: Where to look.
        kind: Keep only the taps of this kind (`weights`); None keeps all.
    """
    taps = {full: part for full, part in module.named_modules() if isinstance(part, Tap)}
    if kind is None:
        return taps
    return {full: tap for full, tap in taps.items() if kind_of(full.rpartition(".")[2]) == kind}


@contextmanager
def watch(
    module: nn.Module, kind: str | None, see: Callable[[str, Tensor], Tensor | None]
) -> Iterator[dict[str, Tap]]:
    """Look through taps while the block runs; the hooks are always removed, from copies made meanwhile too.

    Args:
        module: The mechanism or model.
        kind: Which kind of taps (`weights`), or None for all.
        see: Called with the tap's full name and the tensor; a tensor that it returns takes the place of the observed
            one.

    Raises:
        ZooError: AZ406, when there is no such kind of tap.
    """
    if kind is not None and kind not in KINDS:
        raise ZooError(
            "AZ406", f"taps are never called `{kind}`", help=did_you_mean(kind, KINDS) or ", ".join(KINDS)
        )
    taps = find_taps(module, kind)
    handles = [tap.register_forward_hook(_Look(full, see)) for full, tap in taps.items()]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


class _Look:
    """A hook of `watch`. It is neither copied nor pickled: a copy of a watched module is watched by nobody."""

    passing = True

    def __init__(self, full: str, see: Callable[[str, Tensor], Tensor | None]):
        self.full, self.see = full, see

    def __call__(self, _module: nn.Module, _args: tuple, out: Tensor) -> Tensor | None:
        return self.see(self.full, out)
