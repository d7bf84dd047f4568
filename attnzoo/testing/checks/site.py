"""Claims about what a site wishes for: honoured, refused, or without any effect, and never half of it."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.core import Head, Law, Rotation, watch
from attnzoo.core.card import WISHES
from attnzoo.core.tap import find_taps
from attnzoo.testing.claim import DRAWS, claim, refused, requires, same
from attnzoo.testing.strategies import Checkable, Scene

SIGMAS = 6.0
"""How far a mean may be from what is expected, in its standard deviations."""
DROP = 0.4


def seeded(seed: int, run: Callable[[], Tensor]) -> Tensor:
    """What a call gives from this seed of the global random numbers, which are then as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return run()


def _with(scene: Scene, **wishes: Any) -> Scene:
    return scene.at(replace(scene.site, **wishes))


def _shapes(component: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in component.state_dict().items()}


def _honoured(scene: Scene) -> frozenset[str]:
    """What is honoured: all by the projections around a head, by others what the card says."""
    return WISHES if issubclass(scene.component, Head) else frozenset(scene.card.honours)


@requires("tokens", wide=True, share=0.4)
def check_wishes(cls: Checkable, scene: Scene) -> None:
    """`qk_norm`, `scale_norm` and `rotary` are honoured, where the card says so, or refused with AZ317.

    `rotary` means the host's rotation where it brings one: by no angle it changes nothing, by others it does.
    """
    scene = scene.alone().roomy()
    site = scene.site
    if site.head_dim % 2:  # rotary positions turn pairs of channels
        scene = scene.at(replace(site, dim=2 * site.dim))
    plain = _with(scene, qk_norm=False, scale_norm=False, rotary=False)
    expected = plain.run(plain.build(jitter=0), plain.inputs())
    for wish in ("qk_norm", "scale_norm", "rotary"):
        wished = _with(plain, **{wish: True})
        if wish not in _honoured(scene):
            refused("AZ317", f"`{wish}`, which the card does not say is honoured,", wished.construct)
            continue
        out = wished.run(wished.build(jitter=0), wished.inputs())
        claim(not torch.allclose(out, expected), f"honours: {wish}", "the output is the same without it")
    if "rotary" in _honoured(scene):
        claimed = "honours: rotary, by the layout's rotation (`layout.turn`)"
        same(_turned(plain, 0.0), expected, f"{claimed}; by no angle")
        claim(not torch.allclose(_turned(plain, 1.0), expected), claimed, "the output is the same without it")


def _turned(scene: Scene, angle: float) -> Tensor:
    """What the scene gives where a host turns the token at place i of the grid by i times an angle."""
    site = scene.site
    places = torch.arange(math.prod(site.layout.grid), dtype=torch.float64)
    angles = (angle * places)[:, None].expand(-1, site.head_dim)
    rotation = Rotation(torch.cat([angles.sin(), angles.cos()], dim=-1))
    layout = replace(site.layout, rotation=rotation)
    turned = _with(scene, rotary=True, rotation=(1, site.head_dim), layout=layout)
    return turned.run(turned.build(jitter=0), turned.inputs())


@requires("mechanism", "pool", share=0.4)
def check_biases(cls: Checkable, scene: Scene) -> None:
    """`qkv_bias` and `proj_bias` add biases where the card says so, each its own, and have no effect elsewhere."""
    # all others off, so that a bias that listens to the wrong wish is seen
    base = _with(scene, qkv_bias=False, proj_bias=False)
    without, whole = _shapes(base.construct_whole()), base.build()
    added: dict[str, set[str]] = {}
    for wish in ("qkv_bias", "proj_bias"):
        with_ = _shapes(_with(base, **{wish: True}).construct_whole())
        added[wish] = set(with_) - set(without)
        kept = {name: with_.get(name) for name in without}
        claim(kept == without, f"`{wish}` adds biases and changes nothing else", "other parameters differ")
        if wish in _honoured(scene):
            claim(bool(added[wish]), f"honours: {wish}", "no parameter is added by it")
        else:
            claim(not added[wish], f"honours no {wish}", f"it adds {sorted(added[wish])}")
    if all(added.values()):
        called: list[str] = []
        for name, module in whole.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda *_, name=name: called.append(name))
        base.run(whole, base.inputs())
        last = f"{called[-1]}.bias" if called else ""
        claim(
            last not in added["qkv_bias"],
            "`qkv_bias` is about what comes first",
            f"it adds the last, `{last}`",
        )


def _many(scene: Scene, copies: int, stream: int = 0) -> tuple[Scene, list[Tensor]]:
    """The scene with one sample, repeated."""
    one = replace(scene, batch=1)
    return replace(scene, batch=copies), [x.repeat(copies, 1, 1) for x in one.inputs(stream)]


@requires("mechanism", "pool", share=0.2)
def check_dropout_off(cls: Checkable, scene: Scene) -> None:
    """In eval mode dropout has no effect, and in training mode a probability of 0 has none."""
    component, inputs = scene.build(), scene.inputs()
    expected = scene.run(component, inputs)
    dropping = _with(scene, attn_drop=DROP, proj_drop=DROP)
    other = dropping.build()
    other.load_state_dict(component.state_dict())
    for watched in (False, True):
        claimed = f"in eval mode dropout has no effect (taps watched: {watched})"
        with watch(other, None, lambda name, seen: None) if watched else nullcontext():
            same(dropping.run(other, inputs), expected, claimed)
    same(scene.run(component.train(), inputs), expected, "a dropout of 0 has no effect in training mode")


@requires("mechanism", "pool", share=0.2)
def check_proj_drop(cls: Checkable, scene: Scene) -> None:
    """In training mode `proj_drop` makes each entry of the output zero with its probability and scales the others."""
    scene, inputs = _many(_with(scene, attn_drop=0.0, proj_drop=DROP), 40)
    component = scene.build()
    expected = scene.run(component, inputs, given=_repeated(scene))
    component.train()
    first, again, other = (
        seeded(seed, lambda: scene.run(component, inputs, given=_repeated(scene)))
        for seed in (scene.seed, scene.seed, scene.seed + 1)
    )
    same(first, again, "one seed gives one dropout", 0)
    zero, alive = first == 0, expected.abs() > 1e-9
    claimed = f"proj_drop: {DROP}, so entries are zero or scaled by 1 / (1 - p) in training mode"
    same(torch.where(zero, 0.0, first), torch.where(zero, 0.0, expected / (1 - DROP)), claimed)
    count, total = int((zero & alive).sum()), int(alive.sum())
    off = abs(count - DROP * total) / max(1e-9, (total * DROP * (1 - DROP)) ** 0.5)
    claim(off <= SIGMAS, f"proj_drop: {DROP} in training mode", f"{count} of {total} entries are zero")
    if total > 100:
        claim(not torch.equal(first, other), "every call drops other entries", "two seeds drop the same ones")
        alike = all(torch.equal(zero[0], z) for z in zero[1:4])
        claim(not alike, "every sample drops other entries", "all drop the same ones")


def _repeated(scene: Scene) -> dict[str, Tensor] | None:
    """The maps of one sample for all."""
    maps = replace(scene, batch=1).given
    return {name: m.repeat(scene.batch, *[1] * (m.ndim - 1)) for name, m in maps.items()} or None


@requires("mechanism", "pool", weights=True, share=0.2)
def check_attn_drop(cls: Checkable, scene: Scene) -> None:
    """In training mode `attn_drop` drops weights: other ones in every call and sample, the same from one seed."""
    scene = _with(scene.roomy(), attn_drop=DROP, proj_drop=0.0)
    claimed = {
        "drops weights": "the output is that of eval mode",
        "drops others in every call": "two seeds drop the same ones",
        "drops others in every sample": "all drop the same ones",
    }
    for watched in (False, True):
        words, waiting = f"attn_drop: {DROP} in training mode (taps watched: {watched})", set(claimed)
        for stream in range(DRAWS):
            expected, first, again, other = _dropped(scene, watched, stream)
            same(first, again, f"{words}: one seed gives one dropout", 0)
            alike = (
                torch.allclose(first, expected),
                torch.allclose(first, other),
                all(torch.allclose(first[0], first[i]) for i in range(1, 4)),
            )
            waiting &= {text for text, silent in zip(claimed, alike, strict=True) if silent}
            if not waiting:
                break
        for text in (text for text in claimed if text in waiting):
            claim(False, f"{words} {text}", claimed[text])


def _dropped(scene: Scene, watched: bool, stream: int) -> list[Tensor]:
    """What four equal samples give: in eval mode, in training mode twice from one seed, and once from another."""
    scene, inputs = _many(scene, 4, stream)
    component, given = scene.build(stream=stream), _repeated(scene)
    outs = [scene.run(component, inputs, given=given)]
    component.train()
    with watch(component, None, lambda name, seen: None) if watched else nullcontext():
        for seed in (scene.seed, scene.seed, scene.seed + 1):
            outs.append(seeded(seed, lambda: scene.run(component, inputs, given=given)))
    return outs


def _plain(card: Any) -> bool:
    """Whether the card tells weights of all pairs in a head that is linear in the values."""
    return card.tapped("weights") == {"weights": "b h n m"} and Law.BOUNDED in card.laws


@requires("head", law=Law.LINEAR_IN_VALUES, where=_plain, share=0.2)
def check_attn_drop_rate(cls: Checkable, scene: Scene) -> None:
    """With `attn_drop` p the output is that of eval mode on average, and varies as p / (1 - p) Σ wⱼ² vⱼ² says."""
    copies = 600
    scene = replace(scene, batch=1, site=replace(scene.site, attn_drop=DROP))
    head, seen = scene.build(bare=True), list[Tensor]()
    q, k, v = scene.heads()
    where = {"layout": scene.head_layout(), "given": scene.given}
    with watch(head, "weights", lambda name, tensor: seen.append(tensor)):
        mean = head(q, k, v, **where)
    variance = DROP / (1 - DROP) * (seen[0] ** 2 @ v**2)
    head.train()
    q, k, v = (t.repeat(copies, 1, 1, 1) for t in (q, k, v))
    where["given"] = {name: m.repeat(copies, *[1] * (m.ndim - 1)) for name, m in scene.given.items()}
    for watched in (False, True):
        with watch(head, None, lambda name, tensor: None) if watched else nullcontext():
            outs = seeded(scene.seed, lambda: head(q, k, v, **where))
        words = f"attn_drop: {DROP} (taps watched: {watched})"
        off = (outs.mean(dim=0) - mean[0]).abs() / (variance[0] / copies).sqrt().clamp(min=1e-12)
        most = float(off.detach().max())
        claim(most <= SIGMAS, f"{words}: the mean is that of eval mode", f"{most:.1f} sigma off")
        ratio = float((outs.var(dim=0).sum() / variance.sum()).detach())
        claim(
            0.75 < ratio < 1.35,
            f"{words}: weights are dropped once, with p",
            f"the variance is {ratio:.2f} times",
        )


@requires("mechanism", "pool", weights=True, share=0.4)
def check_taps_before_dropout(cls: Checkable, scene: Scene) -> None:
    """In training mode taps show weights before dropout: what eval mode shows."""
    scene = _with(scene, attn_drop=DROP)
    component, inputs = scene.build(), scene.inputs()
    shown: list[list[Tensor]] = []
    firsts = list(find_taps(component, "weights"))[:1]  # a second map may come after a dropped one
    for training in (False, True):
        component.train(training)
        seen: list[Tensor] = []

        def look(name: str, weights: Tensor, seen: list[Tensor] = seen) -> None:
            if name in firsts:
                seen.append(weights)

        with watch(component, "weights", look):
            scene.run(component, inputs)
        shown.append(seen)
    for a, b in zip(*shown, strict=True):
        same(b, a, "taps show weights before dropout")
