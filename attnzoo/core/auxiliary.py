"""What mechanisms add to a loss in training: one seam for every training loop."""

import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from attnzoo.core.component import Component
from attnzoo.core.fusion import Fusion


class AuxiliaryLosses:
    """What the components of a model add to the loss of the forwards that were looked at."""

    def __init__(self) -> None:
        self._shown: dict[tuple[int, str, str], list[Tensor]] = {}
        self._sources: dict[str, Component | Fusion] = {}

    def by_component(self) -> dict[str, Tensor]:
        """The losses, each a number, by the full name of the component; the mean over its forwards."""
        found: dict[str, list[Tensor]] = {}
        for thread, name in dict.fromkeys((thread, name) for thread, name, _ in self._shown):
            source = self._sources[name]
            shown = {tap: self._shown.get((thread, name, tap), []) for tap in wanted_by(source)}
            for tensors in zip(*shown.values(), strict=True):
                loss = source.auxiliary(**dict(zip(shown, tensors, strict=True)))
                if loss is not None:
                    found.setdefault(name, []).append(loss)
        return {name: torch.stack(losses).mean(dim=0) for name, losses in found.items()}

    def mean(self) -> Tensor | float:
        """The mean over the components that add something; 0 when none does."""
        losses = list(self.by_component().values())
        return torch.stack(losses).mean() if losses else 0.0


def wanted_by(component: Component | Fusion) -> tuple[str, ...]:
    """The taps of which a component's `auxiliary` is made: the names of its parameters."""
    return tuple(inspect.signature(component.auxiliary).parameters)


@contextmanager
def auxiliary_losses(model: nn.Module) -> Iterator[AuxiliaryLosses]:
    """Collect what the components of a model add to the loss, from the forwards inside the block.

        with attnzoo.auxiliary_losses(model) as extra:
            loss = criterion(model(images), labels)
        loss = loss + 0.01 * extra.mean()
        loss.backward()

    Nothing is kept on the model. The backward pass belongs behind the block: with gradient checkpointing it runs
    forwards of its own.

    Args:
        model: Whatever holds components whose card names an `auxiliary` loss; without any the mean is 0.
    """
    losses = AuxiliaryLosses()

    def see(name: str, tap: str, _module: nn.Module, _args: tuple, out: Tensor) -> None:
        losses._shown.setdefault((threading.get_ident(), name, tap), []).append(out)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, Component | Fusion) and module.card.auxiliary:
                losses._sources[name] = module
                for tap in wanted_by(module):
                    hook = partial(see, name, tap)
                    hooks.enter_context(module.get_submodule(tap).register_forward_hook(hook))
        yield losses
