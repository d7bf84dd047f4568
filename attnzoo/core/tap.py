"""Named windows into mechanisms: for looking (probes) and for reaching in (interventions)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from attnzoo.errors import ZooError, did_you_mean

NAMES = ("scores", "weights", "gate", "shares", "state")
"""The closed list of tap names: before normalisation, after it, channel or value gates, fusion, recurrent state."""


class Tap(nn.Identity):
    """A named observable. Idle taps cost nothing; a forward hook may read the tensor or replace it.

    Args:
        axes: Its axes in the shape letters, such as `b h n m`.
    """

    def __init__(self, axes: str):
        super().__init__()
        self.axes = axes

    @property
    def watched(self) -> bool:
        """Whether anybody looks. Mechanisms ask, to take a fused path when nobody does."""
        return bool(
            self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        )

    def extra_repr(self) -> str:
        return self.axes


def find_taps(module: nn.Module, name: str | None = None) -> dict[str, Tap]:
    """The taps inside a module, by their full names.

    Args:
        module: Where to look.
        name: Keep only the taps called so (`weights`); None keeps all.
    """
    taps = {full: part for full, part in module.named_modules() if isinstance(part, Tap)}
    return (
        taps if name is None else {full: tap for full, tap in taps.items() if full.rpartition(".")[2] == name}
    )


@contextmanager
def watch(
    module: nn.Module, name: str | None, see: Callable[[str, Tensor], Tensor | None]
) -> Iterator[dict[str, Tap]]:
    """Look through taps while the block runs; the hooks are always removed.

    Args:
        module: The mechanism or model.
        name: Which taps (`weights`), or None for all.
        see: Called with the tap's full name and the tensor; a tensor that it returns takes the place of the observed
            one.

    Raises:
        ZooError: AZ406, when there is no tap of that name anywhere.
    """
    if name is not None and name not in NAMES:
        raise ZooError(
            "AZ406", f"taps are never called `{name}`", help=did_you_mean(name, NAMES) or ", ".join(NAMES)
        )
    taps = find_taps(module, name)

    def hook(full: str):
        return lambda _module, _args, out: see(full, out)

    handles = [tap.register_forward_hook(hook(full)) for full, tap in taps.items()]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
