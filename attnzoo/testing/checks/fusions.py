"""Claims about fusions: what branches are handed, how many there may be, masks, and how γ lets the others in."""

from dataclasses import replace

import torch

from attnzoo.core import (
    Card,
    Family,
    Fused,
    FusedHeads,
    Fusion,
    Head,
    Mechanism,
    MultiHead,
    Site,
    options_of,
)
from attnzoo.core.mask import KINDS
from attnzoo.testing.claim import claim, refused, requires, same
from attnzoo.testing.influence import allowed, changed, random_mask, some_kinds
from attnzoo.testing.strategies import Checkable, Scene, outputs


class _Plain(Head):
    """Softmax attention, as a branch."""

    card = Card(
        name="plain",
        family=Family.DOT_PRODUCT,
        summary="A branch.",
        masks={*KINDS},
        context=True,
        incremental=True,
    )

    def attend(self, q, k, v, *, mask, layout):
        scores, seen = q @ k.mT, mask.dense(q.shape[2], k.shape[2])
        if seen is None:
            return scores.softmax(dim=-1) @ v
        scores = scores.masked_fill(~seen, -torch.inf)
        empty = ~seen.any(dim=-1, keepdim=True)
        return (scores.masked_fill(empty, 0.0).softmax(dim=-1) @ v).masked_fill(empty, 0.0)


def fused_tokens(scene: Scene) -> Mechanism:
    """The fusion of plain attention as often as it has branches, at its level, moved away from where it starts."""

    def fusion(site: Site, arity: int) -> Fusion:
        return scene.component(site, arity, **scene.options)  # type: ignore[call-arg, return-value]

    def branch(place: Site) -> MultiHead:
        return MultiHead(place, _Plain(place))

    fused: Mechanism
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(scene.seed)
        if scene.inside:
            fused = MultiHead(scene.site, FusedHeads(scene.site, fusion, [_Plain] * scene.arity))
        else:
            fused = Fused(scene.site, fusion, [branch] * scene.arity)
    with torch.no_grad():
        for parameter in fused.double().parameters():
            parameter.add_(scene.random(*parameter.shape, stream=6), alpha=0.3)
    return fused.eval()


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


@requires("fusion", share=0.4)
def check_fused_masks(cls: Checkable, scene: Scene) -> None:
    """What masks hide from branches of plain attention is hidden from what is merged; other kinds are refused."""
    scene = scene.with_layout((5,))
    fused, x = fused_tokens(scene), scene.random(scene.batch, scene.layout.length, scene.site.dim, stream=1)
    for kind in set(KINDS) - scene.card.masks:
        refused(
            "AZ402",
            f"masks: no {kind}, so a mask of that kind",
            fused,
            x,
            mask=random_mask(scene, {kind}),
            layout=scene.layout,
        )
    for kinds in [frozenset({kind}) for kind in KINDS if kind in scene.card.masks] + some_kinds(scene, 2):
        mask = random_mask(scene, kinds, heads=False)
        before, j = fused(x, mask=mask, layout=scene.layout), scene.seed % x.shape[1]
        where = (torch.arange(x.shape[1]) == j).expand(x.shape[:2])
        moved = (fused(changed(x, where, scene), mask=mask, layout=scene.layout) - before).detach().abs()
        hidden = ~allowed(scene, mask)[:, :, j]
        beyond = float(moved.amax(dim=-1).masked_fill(~hidden, 0.0).max())
        claim(
            beyond <= 1e-12,
            f"masks: {', '.join(sorted(kinds))}, so what is hidden has no influence",
            f"token {j} changes one by {beyond:.2e}",
        )


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
    merged = one.merge(outputs(one, inputs), inputs[-1])
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
