"""Claims about cost: how operations and memory grow, with tokens, channels per head, and heads."""

import math
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from attnzoo.core import Head, evaluate, watch
from attnzoo.core.options import defaults_of
from attnzoo.errors import ZooError
from attnzoo.testing.claim import Inapplicable, claim, requires
from attnzoo.testing.strategies import Checkable, Scene, settings_of

SLACK = 0.15
"""By how much a measured power may exceed the claimed one: smaller terms are not yet negligible."""
POWERS = {"²": 2, "³": 3, "⁴": 4}


def degree(cost: str, letters: str) -> int:
    """The highest power of some letters in a cost on a card.

    Args:
        cost: Sum of products of shape letters: `n m c + n c²`. A logarithm is no power.
        letters: What grows: `nm` for tokens.
    """

    def of(term: str) -> int:
        return sum(
            POWERS.get(factor[1:], 1) for factor in term.split() if factor[0] in letters and "(" not in factor
        )

    return max(of(term) for term in cost.split("+"))


@dataclass
class _Spent:
    """What a forward cost: multiplications and numbers written, and the most numbers that were held at once."""

    work: float = 0.0
    held: int = 0
    most: int = 0

    def hold(self, storage: torch.UntypedStorage, numbers: int) -> None:
        """Count a new storage until it is freed.

        Args:
            storage: What was allocated.
            numbers: How many numbers it has room for.
        """
        self.held += numbers
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._free, numbers)

    def _free(self, numbers: int) -> None:
        self.held -= numbers


class _Meter(TorchDispatchMode):
    """Counts every operation: products as PyTorch counts them, transforms as n log n, the rest by what they write."""

    def __init__(self) -> None:
        super().__init__()
        self.spent, self.strange = _Spent(), set[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet, tensors = func._overloadpacket, [t for t in _flat(out) if isinstance(t, Tensor)]
        owned = {t.untyped_storage()._cdata for t in _flat([args, kwargs]) if isinstance(t, Tensor)}
        new = {t.untyped_storage()._cdata: t for t in tensors if t.untyped_storage()._cdata not in owned}
        sizes = {t.untyped_storage(): t.untyped_storage().nbytes() // t.element_size() for t in new.values()}
        if packet in flop_registry:
            self.spent.work += flop_registry[packet](*args, **(kwargs or {}), out_val=out) / 2
        elif "fft" in func.__name__:
            self.spent.work += sum(t.numel() * math.log2(max(2, t.numel())) for t in tensors)
        elif func.namespace not in ("aten", "prim", "prims"):
            self.strange.add(func.__name__)
        else:
            self.spent.work += sum(sizes.values())
        for storage, numbers in sizes.items():
            self.spent.hold(storage, numbers)
        return out


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [one for part in value for one in _flat(part)]
    return [one for part in value.values() for one in _flat(part)] if isinstance(value, dict) else [value]


@lru_cache(maxsize=256)  # time and memory are of the same forwards
def _measure(scene: Scene, prefix: int, tokens: int, heads: int, head_dim: int) -> _Spent:
    """What one forward costs, taps watched; of a head without projections.

    Raises:
        Inapplicable: When it calls an operation whose cost is not known.
    """
    dims = scene.card.grid if isinstance(scene.card.grid, int) else 1
    grid = {1: (tokens,), 2: (16, tokens // 16), 3: (8, 8, tokens // 64)}[dims]
    many = replace(scene, batch=1, site=replace(scene.site, heads=heads, dim=heads * head_dim)).with_layout(
        grid, prefix
    )
    bare = issubclass(many.component, Head)
    component, meter = many.build(torch.float32, bare=bare), _Meter()
    inputs = [t.float() for t in many.heads()] if bare else many.inputs(dtype=torch.float32)
    where: dict[str, Any] = {"layout": many.head_layout(), "given": many.given} if bare else {}
    with torch.no_grad(), watch(component, None, lambda name, seen: None), meter:
        component(*inputs, **where) if bare else many.run(component, inputs)
    if meter.strange:
        raise Inapplicable(f"unmeasured: nobody knows what {', '.join(sorted(meter.strange))} costs")
    return meter.spent


GROWTHS: dict[str, tuple[str, tuple[int, int, int], tuple[int, int, int]]] = {
    "tokens": ("nm", (256, 2, 4), (512, 2, 4)),
    "channels per head": ("cd", (512, 2, 4), (512, 2, 8)),
    "heads": ("ch", (512, 2, 4), (512, 4, 4)),
}
"""Which letters grow, and from which tokens, heads and channels per head to which; tokens are many beside channels."""


def _measured(scene: Scene) -> dict[str, list[_Spent]]:
    """What forwards of both sizes cost, by what grows; empty where they cannot be built.

    There are special tokens only where it cannot be without.
    """
    for prefix in (0, 1):
        with suppress(ZooError):
            return {
                name: [_measure(scene, prefix, *size) for size in sizes]
                for name, (_, *sizes) in GROWTHS.items()
            }
    return {}


def _grows(cls: Checkable, scene: Scene, what: str, cost: Callable[[_Spent], float]) -> None:
    """Fail where something grows faster than the card says, under any setting without numbers."""
    tried = 0
    for options in settings_of(cls):
        if any(type(value) in (int, float) for value in options.values()):
            continue  # numbers change cost by a factor, not a power
        one = replace(scene, options=options)
        if not (measured := _measured(one.alone())):
            continue  # options that do not go together, or with such a site
        tried += 1
        claimed = getattr(one.card, what)
        for name, (small, big) in measured.items():
            power, most = math.log2(cost(big) / max(1.0, cost(small))), degree(claimed, GROWTHS[name][0])
            text = f"{what}: `{claimed}`, so it grows at most with the power {most} of the {name} (options: {options})"
            claim(
                power <= most + SLACK,
                text,
                f"when they double it grows {2**power:.2f} times, power {power:.2f}",
            )
    if not tried:
        raise Inapplicable("unmeasured: no setting of the options could be built for many tokens")


@requires("mechanism", "pool", share=0)
def check_time(cls: Checkable, scene: Scene) -> None:
    """Operations grow no faster than `time` claims, with tokens, channels per head and heads; taps are watched.

    Tokens are many beside channels: of `n m c` and projections that cost `n c²`, the first decides.
    """
    _grows(cls, scene, "time", lambda spent: spent.work)


@requires("mechanism", "pool", share=0)
def check_memory(cls: Checkable, scene: Scene) -> None:
    """What a forward holds at once, at its peak, grows no faster than `memory` claims; taps are watched."""
    _grows(cls, scene, "memory", lambda spent: spent.most)


@requires("mechanism", "pool", where=lambda card: card.params, share=0.4)
def check_params(cls: Checkable, scene: Scene) -> None:
    """There are as many parameters as the formula says; of a head without the projections around it."""
    counted = sum(p.numel() for p in scene.construct().parameters())
    _equals(scene, "params", scene.card.params, counted)


@requires("mechanism", "pool", where=lambda card: card.flops, wide=True, share=0.4)
def check_flops(cls: Checkable, scene: Scene) -> None:
    """PyTorch counts as many FLOPs as the formula says, of one sample, without a mask, on the meta device.

    A product over one token, channel or head is none to it, so there are more of each.
    """
    one = replace(scene.crowded().roomy(), batch=1)
    # a parameter that a module is handed, as where a batch of one is repeated, is none that the counter can follow
    component = one.construct().eval().requires_grad_(False).to("meta")
    counter = FlopCounterMode(display=False)
    maps = {name: given.to("meta") for name, given in one.given.items()}
    with torch.no_grad(), counter:
        if isinstance(component, Head):
            component(*(t.float().to("meta") for t in one.heads()), layout=one.head_layout(), given=maps)
        else:
            one.run(component, [t.to("meta") for t in one.inputs(dtype=torch.float32)], given=maps)
    _equals(one, "flops", one.card.flops, counter.get_total_flops())


def _equals(scene: Scene, what: str, formula: str, counted: int) -> None:
    try:
        said = evaluate(formula, scene.site, {**defaults_of(scene.component), **scene.options})
    except ValueError as error:
        claim(False, f"{what}: `{formula}`", str(error))
    claim(said == counted, f"{what}: `{formula}`, here {said:,}", f"there are {counted:,}")
