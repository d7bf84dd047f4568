"""What a layer's attention hands on to the next layer's: the skip between layers of Deep Head.

Cruz, Fernandez Decastro and Duval, "Deep Head". In figure 2 the merged heads are handed on, added and normalised; text
and code say other things, so every variant has a name. M is what the heads give, merged, before the output projection.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attnzoo.core import Mechanism, MultiHead, Site, Tap
from attnzoo.errors import RecipeError, ZooError

VARIANTS = {
    "none": "nothing is handed on",
    "merged": "R_l = LN(M_l + R_{l-1}), R_1 = M_1, before the output projection",
    "merged_raw": "R_l = LN(M_l + M_{l-1}): what the layer before made, not what it received",
    "merged_post": "as `merged`, after the output projection",
    "probs_pairmean": "P_l = (P_l + P_{l-1}) / 2, the weights of the layer before averaged over adjacent heads",
    "logits_pairmean": "L_l = L_l + L_{l-1}, the scores of the layer before averaged over adjacent heads",
    "cross": "as `merged`, in the attention of the decoder to the encoder",
    "encoder_stack": "the layers form several encoders, R_k = LN(E_k + R_{k-1})",
}
"""Every variant of the skip, with its equation."""


@dataclass(frozen=True)
class Skip:
    """What is handed on, and where.

    Args:
        use: One of `VARIANTS`.
        at: Names of the sites that take part, in their order.
        encoders: For `encoder_stack`: how many.
    """

    use: str = "none"
    at: tuple[str, ...] = ()
    encoders: int = 2

    def __bool__(self) -> bool:
        return self.use != "none"


@dataclass
class _Handed:
    """What a layer was handed, and then what it hands on."""

    value: Tensor | None


class _Slot(threading.local):
    """Of the layer that this thread computes; empty between layers."""

    now: _Handed | None = None


_slot = _Slot()


def carried(
    layer: Callable[..., Tensor], handed: Tensor | None, *args: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """What a layer gives, and what it hands on to the next.

    What is handed on belongs to one forward, so the host carries it from layer to layer. Only inside a layer, where
    taps have no arguments, it is in a slot of the thread.

    Args:
        layer: A layer, or whatever computes one.
        handed: What the layer before handed on; None before the first.
        args, options: What the layer takes.
    """
    outer, mine = _slot.now, _Handed(handed)
    _slot.now = mine
    try:
        return layer(*args, **options), mine.value
    finally:
        _slot.now = outer


def handed_on() -> Tensor | None:
    """What the layer before handed on; None where there is none."""
    return None if _slot.now is None else _slot.now.value


def _received() -> Tensor:
    """What the layer before handed on.

    Raises:
        ZooError: AZ410, when there is none.
    """
    value = handed_on()
    if value is None:
        raise ZooError(
            "AZ410",
            "a layer that takes up what the one before hands on was called without it",
            why="`skip:` carries a value from layer to layer beside the tokens, and the model's forward carries it",
            help="call the model, or compose with `skip: none`",
        )
    return value


def hand_on(value: Tensor) -> None:
    """Hand a value on to the next layer, where somebody carries it there."""
    if _slot.now is not None:
        _slot.now.value = value


class AddNorm(nn.Module):
    """R_l = LN(M_l + R_{l-1}); the first layer has nothing to add and no norm.

    Args:
        norm: LN; None for the first layer.
        raw: Whether M_l is handed on in the place of R_l.
    """

    def __init__(self, norm: nn.Module | None, raw: bool = False):
        super().__init__()
        self.norm, self.raw = norm, raw

    def forward(self, x: Tensor) -> Tensor:
        made = x if self.norm is None else self.norm(x + _received())
        hand_on(x if self.raw else made)
        return made

    def extra_repr(self) -> str:
        return "first" if self.norm is None else ""


class PairMean(Tap):
    """In the place of a tap: the mean with, or the sum with, what the layer before handed on.

    The layer before may have r times as many heads: each of ours gets the mean of r adjacent ones.

    Args:
        first: Whether there is no layer before.
        mean: Whether the mean of both is taken, which keeps the rows' sums; the sum otherwise.
        dropout: That of the tap.
    """

    def __init__(self, first: bool, mean: bool, dropout: float):
        super().__init__("b h n m", dropout)
        self.first, self.mean = first, mean

    @property
    def watched(self) -> bool:
        """True: without weights there is nothing to hand on."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            before, h = _received(), x.shape[1]
            pooled = before.unflatten(1, (h, before.shape[1] // h)).mean(dim=2)
            x = (x + pooled) / 2 if self.mean else x + pooled
        hand_on(x)
        return x


def install(
    skip: Skip,
    mechanisms: Sequence[Mechanism],
    layers: Sequence[nn.Module],
    dim: int,
    norm: Callable[[int], nn.Module],
) -> None:
    """Put the skip between layers.

    Args:
        skip: Which.
        mechanisms: Of the sites that take part, in their order.
        layers: What they are in; each has the places `attn_skip` (and `cross_skip`), after its attention, and `skip`,
            after the layer.
        dim: Width of the tokens, in channels.
        norm: Builds a normalisation layer for a width.
    """
    count = len(mechanisms)
    if skip.use == "encoder_stack":
        for i, layer in enumerate(layers[count // skip.encoders - 1 :: count // skip.encoders]):
            layer.skip = AddNorm(norm(dim) if i else None)
        return
    for i, (component, layer) in enumerate(zip(mechanisms, layers, strict=True)):
        if skip.use == "merged_post":
            place = "cross_skip" if getattr(layer, "cross", None) is component else "attn_skip"
            setattr(layer, place, AddNorm(norm(dim) if i else None))
        elif skip.use in ("probs_pairmean", "logits_pairmean"):
            owner, name = _tap(component, "weights" if skip.use == "probs_pairmean" else "scores")
            tap, mean = getattr(owner, name), skip.use == "probs_pairmean"
            setattr(owner, name, PairMean(i == 0, mean, tap.dropout))
        else:
            component.skip = AddNorm(norm(dim) if i else None, raw=skip.use == "merged_raw")  # type: ignore[assignment]


def check(skip: Skip, mechanisms: Sequence[tuple[Site, Mechanism]]) -> None:
    """Whether the skip can be put between these.

    Args:
        skip: Which.
        mechanisms: With their sites, in their order.

    Raises:
        RecipeError: AZ314, with the first that cannot hand on what it should, or take it up.
    """
    before: tuple[Site, int] | None = None
    if skip.use == "encoder_stack" and len(mechanisms) % skip.encoders:
        raise RecipeError(
            "AZ314",
            f"{len(mechanisms)} layers cannot form {skip.encoders} encoders of the same depth",
            help="choose a number of encoders that divides them",
        )
    for site, component in mechanisms:
        if skip.use in ("merged", "merged_raw", "cross") and not isinstance(component, MultiHead):
            raise RecipeError(
                "AZ314",
                f"`skip: {skip.use}` hands on merged heads; `{component.card.name}` at {site.name} has none",
                help="use `merged_post`, which every mechanism can, or another mechanism there",
            )
        if skip.use in ("probs_pairmean", "logits_pairmean"):
            name = "weights" if skip.use == "probs_pairmean" else "scores"
            owner, _ = _tap(component, name)
            if owner is None:
                raise RecipeError(
                    "AZ314",
                    f"`skip: {skip.use}` hands on the {name} of one map per head; "
                    f"`{component.card.name}` at {site.name} forms none, or several",
                    help="use `merged`, or `softmax` there",
                )
            heads = owner.tap_heads
            if before is not None and before[1] % heads:
                raise RecipeError(
                    "AZ314",
                    f"the {before[1]} heads at {before[0].name} cannot be averaged into the {heads} at {site.name}",
                    help="each layer's heads must divide those of the layer before",
                )
            before = site, heads
    inside = skip.use not in ("merged_post", "encoder_stack")
    anew, newest = (
        next((one for one in mechanisms if one[1].card.incremental == kind), None) for kind in (False, True)
    )
    if inside and anew and newest and anew[0].name.startswith("decoder"):
        raise RecipeError(
            "AZ314",
            f"in decoding `{anew[1].card.name}` at {anew[0].name} computes all tokens anew, and "
            f"`{newest[1].card.name}` at {newest[0].name} the newest only",
            why="neither can take up what the other hands on",
            help="use `merged_post`, or mechanisms there that all work in the same way",
        )


def _tap(component: nn.Module, name: str) -> tuple[Any, str]:
    """What holds the tap of a name, with the tap's attribute; (None, ...) where there is not one map per head."""
    owner: Any = component.inner if isinstance(component, MultiHead) else component
    tap = owner._modules.get(name)
    return (owner if type(tap) is Tap and tap.axes == "b h n m" else None), name
