"""Claims about taps: they show what is applied, all of it, once, and looking changes nothing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.core import NO_MASK, Card, Fusion, Law, Mask, Tap, watch
from attnzoo.core.tap import KINDS, find_taps, kind_of
from attnzoo.testing.claim import DRAWS, TOLERANCE, claim, requires, same
from attnzoo.testing.influence import random_mask, some_kinds
from attnzoo.testing.strategies import Checkable, Scene


def seen_by(
    component: nn.Module, scene: Scene, inputs: list[Tensor], mask: Mask = NO_MASK
) -> dict[str, list[Tensor]]:
    """Everything that every tap sees in one forward."""
    seen: dict[str, list[Tensor]] = {name: [] for name in find_taps(component)}
    with watch(component, None, lambda name, tensor: seen[name].append(tensor)):
        scene.run(component, inputs, mask)
    return seen


def with_tap(
    component: nn.Module, scene: Scene, inputs: list[Tensor], tap: str, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """The output when what a tap shows is replaced."""
    with watch(component, None, lambda name, tensor: change(tensor) if name == tap else None):
        return scene.run(component, inputs)


@requires("mechanism", "pool", "fusion", share=0.4)
def check_taps(cls: Checkable, scene: Scene) -> None:
    """Taps have known names, fire exactly once, under every mask, and show the axes that they and the card declare."""
    if scene.arity == 1 and scene.options.get("start") == "identity":
        return  # one branch from which to start is the result: nothing is merged
    component, inputs = scene.build(), scene.inputs()
    sizes = {"b": scene.batch, "n": scene.layout.length, "m": scene.reads, "c": scene.site.dim}
    if scene.inside:
        sizes |= {"h": scene.site.heads, "d": scene.site.head_dim}
    if isinstance(scene.card, Card) and scene.card.grid is not None:
        del sizes["n"], sizes["m"]  # of windows, perhaps
    masks = [NO_MASK] if isinstance(component, Fusion) else [NO_MASK, random_mask(scene, scene.card.masks)]
    for name, seen in ((n, s) for mask in masks for n, s in seen_by(component, scene, inputs, mask).items()):
        last, tap = name.rpartition(".")[2], component.get_submodule(name)
        assert isinstance(tap, Tap)
        if (
            heads := getattr(component.get_submodule(name.rpartition(".")[0]), "tap_heads", None)
        ) is not None:
            sizes["h"] = heads
        claim(kind_of(last) in KINDS, f"taps are called {', '.join(KINDS)}", f"one is called `{name}`")
        claim(len(seen) == 1, f"the tap `{name}` fires once in a forward", f"it fires {len(seen)} times")
        axes = tap.axes.split()
        if scene.inside and axes[0] == "b":  # a fusion is written for (... n c)
            axes = ["b", "h", *("d" if axis == "c" else axis for axis in axes[1:])]
        shape = tuple(seen[0].shape)
        fits = len(axes) == len(shape)
        claim(fits, f"the tap `{name}` has axes `{tap.axes}`", f"it shows a tensor of shape {shape}")
        fits = all(size == sizes.get(axis, size) for axis, size in zip(axes, shape, strict=True))
        claim(fits, f"the tap `{name}` has axes `{tap.axes}`", f"it shows a tensor of shape {shape}")
    if isinstance(scene.card, Card):
        found = {name.rpartition(".")[2]: tap.axes for name, tap in find_taps(component).items()}
        claim(found == dict(scene.card.taps), f"the taps are {dict(scene.card.taps)}", f"there are {found}")


@requires("mechanism", "pool", "fusion", wide=True, share=0.4)
def check_taps_live(cls: Checkable, scene: Scene) -> None:
    """Replacing what a tap shows changes the output: it is what is used."""
    scene = scene.roomy()

    def other(seen: Tensor) -> Tensor:
        return seen + scene.random(*seen.shape, stream=7)

    waiting = list(find_taps(scene.build()))
    for stream in range(DRAWS):
        component, inputs = scene.build(stream=stream), scene.inputs(stream)
        expected = scene.run(component, inputs)
        outs = {name: with_tap(component, scene, inputs, name, other) for name in waiting}
        waiting = [name for name, out in outs.items() if torch.allclose(out, expected, rtol=0, atol=1e-9)]
        if not waiting:
            return
    claim(False, f"the tap `{waiting[0]}` shows what is used", "replacing what it shows changes nothing")


@requires("mechanism", "pool", "fusion", share=0.4)
def check_taps_transparent(cls: Checkable, scene: Scene) -> None:
    """Replacing what taps show by the same changes neither the output nor its gradients; what they show has one."""
    scene = scene.roomy()
    component, inputs = scene.build(), [x.requires_grad_() for x in scene.inputs()]
    if not find_taps(component):
        return
    shown: dict[str, Tensor] = {}

    def keep(name: str, seen: Tensor) -> Tensor:
        shown[name] = seen.clone()
        return shown[name]

    expected = scene.run(component, inputs)
    with watch(component, None, keep):
        out = scene.run(component, inputs)
    same(out, expected, "replacing what taps show by the same changes nothing")
    weight = scene.random(*out.shape, stream=5)
    wanted = [*inputs, *component.parameters()]
    before = torch.autograd.grad((expected * weight).sum(), wanted, allow_unused=True)
    learned = {
        name: seen for name, seen in shown.items() if seen.requires_grad
    }  # what is frozen depends on nothing
    after = torch.autograd.grad((out * weight).sum(), [*wanted, *learned.values()], allow_unused=True)
    for a, b in zip(after, before, strict=False):
        none = torch.zeros(1) if b is None else torch.zeros_like(b)
        same(none if a is None else a, none if b is None else b, "replacing by the same changes no gradient")
    for name, gradient in zip(learned, after[len(wanted) :], strict=True):
        claim(gradient is not None, f"what the tap `{name}` shows has a gradient", "it has none")


@requires("mechanism", "pool", weights=True, wide=True, share=0.2)
def check_every_weight_is_used(cls: Checkable, scene: Scene) -> None:
    """Every head and row of tapped weights is used: changing it alone changes the output, of its sample alone."""
    scene = scene.crowded().roomy()
    taps = find_taps(scene.build(), "weights")
    shown = seen_by(scene.build(), scene, scene.inputs())
    waiting = [
        (name, at) for name, tap in taps.items() for at in _some(shown[name][0].shape[: tap.over], scene)
    ]
    for stream in range(DRAWS):
        component, inputs = scene.build(stream=stream), scene.inputs(stream)
        expected = scene.run(component, inputs)
        waiting = [place for place in waiting if not _used(component, scene, inputs, expected, *place)]
        if not waiting:
            return
    name, at = waiting[0]
    claim(False, f"the tap `{name}` shows what is used", f"at {_where(taps[name], at)} it is not")


def _where(tap: Tap, at: tuple[int, ...]) -> str:
    return ", ".join(f"{axis} = {i}" for axis, i in zip(tap.axes.split(), at, strict=False))


def _used(
    component: nn.Module, scene: Scene, inputs: list[Tensor], expected: Tensor, name: str, at: tuple[int, ...]
) -> bool:
    """Whether the output is another when weights are, at this place alone; nothing but its sample and row may be."""
    tap, sizes = find_taps(component)[name], torch.Size(())

    def change(seen: Tensor) -> Tensor:
        nonlocal sizes
        sizes, other = seen.shape, seen.clone()
        other[at] = other[at] + scene.random(*other[at].shape, stream=8).abs()
        return other

    out = with_tap(component, scene, inputs, name, change)
    moved, where = (out - expected).detach().abs().flatten(1).amax(dim=1), _where(tap, at)
    used = float(moved[at[0]]) > 1e-12
    moved[at[0]] = 0
    claim(float(moved.max()) <= TOLERANCE, f"`{name}` at {where} is used there", "in other samples too")
    axes = tap.axes.split()
    row = axes.index("n") if "n" in axes and axes.index("n") < tap.over else None
    if row is not None and out.ndim == 3 and sizes[row] == out.shape[1]:
        others = [i for i in range(out.shape[1]) if i != at[row]]
        same(out[:, others], expected[:, others], f"`{name}` at {where} is what that query receives")
    return used


def _some(shape: torch.Size, scene: Scene) -> list[tuple[int, ...]]:
    """Some places in a tensor of this shape; each index of each axis is met."""
    most, random = max(shape), scene.generator(9)
    start = [int(torch.randint(0, size, (1,), generator=random)) for size in shape]
    return [tuple((s + i) % size for s, size in zip(start, shape, strict=True)) for i in range(min(most, 8))]


def _plain(card: Any) -> bool:
    return card.tapped("weights") == {"weights": "b h n m"} and Law.LINEAR_IN_VALUES in card.laws


@requires("head", law=Law.BOUNDED, where=_plain)
def check_uniform_weights_average(cls: Checkable, scene: Scene) -> None:
    """Where weights of all pairs are averages of values, uniform ones in their place give the mean of the values."""
    head, (q, k, v) = scene.build(bare=True), scene.heads()
    with watch(head, "weights", lambda name, seen: torch.full_like(seen, 1 / seen.shape[-1])):
        out = head(q, k, v, layout=scene.head_layout(), given=scene.given)
    same(
        out,
        v.mean(dim=2, keepdim=True).expand(q.shape),
        "weights that are uniform give the mean of the values",
    )


@requires("mechanism", "pool", "fusion", share=0.4)
def check_watching_changes_nothing(cls: Checkable, scene: Scene) -> None:
    """The output is the same whether taps are watched or not, without a mask and under those that are claimed."""
    component, inputs = scene.build(), scene.inputs()
    if not find_taps(component):
        return
    masks = [NO_MASK]
    if not isinstance(component, Fusion):
        masks += [random_mask(scene, kinds) for kinds in some_kinds(scene)]
    for mask in masks:
        idle = scene.run(component, inputs, mask)
        with watch(component, None, lambda name, seen: None):
            same(
                scene.run(component, inputs, mask),
                idle,
                f"watching changes nothing (mask: {', '.join(mask.kinds) or 'none'})",
            )
