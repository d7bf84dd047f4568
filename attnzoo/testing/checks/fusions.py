"""Claims about fusions: what branches are handed, how many there may be, and how γ lets the others in."""

from dataclasses import replace

import torch

from attnzoo.core import Fusion, options_of
from attnzoo.testing.claim import claim, refused, requires, same
from attnzoo.testing.strategies import Checkable, Scene


@requires("fusion")
def check_split(cls: Checkable, scene: Scene) -> None:
    """What a fusion hands each branch has the shape that the branch's site asks for, at both levels."""
    fusion, (*branches, x) = scene.build(), scene.inputs()
    for i, (seen, branch) in enumerate(zip(fusion.split(x, fusion.head_axis), branches, strict=True)):
        shapes = f"{tuple(branch.shape)}"
        claim(
            seen.shape == branch.shape,
            f"branch {i + 1} sees x as {shapes}, as its site says",
            f"{tuple(seen.shape)}",
        )


@requires("fusion", share=0)
def check_arity_refused(cls: Checkable, scene: Scene) -> None:
    """A number of branches that the card does not allow is refused with AZ312."""
    fewest, most = cls.card.arity  # type: ignore[union-attr]
    for arity in [fewest - 1] + ([] if most is None else [most + 1]):
        claimed = f"arity: {fewest} to {most or 'any'}, so a number of {arity} branches"
        refused("AZ312", claimed, replace(scene, arity=arity).construct)


def _gated(scene: Scene, gamma: float) -> Fusion:
    """The fusion with `start: identity` and every γ of this value; otherwise as built."""
    fusion = scene.build()
    with torch.no_grad():
        fusion.gamma.fill_(gamma)
    return fusion


@requires("fusion", where=lambda card: card.arity[1] != 1)
def check_gamma(cls: Checkable, scene: Scene) -> None:
    """With `start: identity` and γ the output is a + γ (r - a), channel by channel; r is the merge, or it beside a."""
    if "start" not in options_of(cls).model_fields:
        return
    scene = replace(scene.roomy(), options={**scene.options, "start": "identity"})
    if getattr(scene.build(), "gamma", None) is None:
        return  # it starts so by its own weights
    inputs = scene.inputs()
    first, zero, one = inputs[0], _gated(scene, 0.0), _gated(scene, 1.0)
    same(scene.run(zero, inputs), first, "with γ = 0 the output is the first branch", 0)
    whole = scene.run(one, inputs)
    merged = one.merge(inputs[:-1], inputs[-1])
    reached = [bool(torch.allclose(whole, target, rtol=0, atol=1e-9)) for target in (merged, merged + first)]
    claim(
        any(reached),
        "with γ = 1 the output is the merge, or the merge beside the first branch",
        "it is neither",
    )
    some = _gated(scene, 0.0)
    gamma = scene.random(*some.gamma.shape, stream=4)
    with torch.no_grad():
        some.gamma.copy_(gamma)
    out = scene.run(some, inputs)
    same(out, first + gamma * (whole - first), "the output is a + γ (r - a), channel by channel")
    weight = scene.random(*out.shape, stream=5)
    (found,) = torch.autograd.grad((out * weight).sum(), some.gamma)
    expected = ((whole - first) * weight).flatten(0, -2).sum(dim=0)
    same(found, expected, "the gradient of γ is that of a + γ (r - a)")


@requires("fusion")
def check_every_branch_counts(cls: Checkable, scene: Scene) -> None:
    """Every token of every branch has influence on the output of its sample, and on no other sample."""
    scene = replace(scene.roomy(), batch=max(2, scene.batch))
    if scene.card.hard_routing or scene.options.get("start") == "identity":
        return
    fusion, inputs = scene.build(), scene.inputs()
    expected = scene.run(fusion, inputs)
    for i in range(scene.arity):
        other = list(inputs)
        other[i] = inputs[i].clone()
        other[i][0, ..., scene.seed % scene.layout.length, :] += 1
        moved = (scene.run(fusion, other) - expected).detach().abs().flatten(1).amax(dim=1)
        claim(float(moved[0]) > 1e-12, f"branch {i + 1} has influence on the output", "it has none")
        claim(
            float(moved[1:].max()) == 0, f"branch {i + 1} has influence on its own sample", "on others, too"
        )
