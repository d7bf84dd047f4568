"""One check for each law. Laws hold for all parameters, so parameters are moved away from where they start.

The laws about the start are checked as initialised; with `start: identity` a fusion is held to fewer laws.
"""

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.core import Family, Law, Mask, options_of, watch
from attnzoo.errors import RecipeError
from attnzoo.testing.checks import TOLERANCE, changed, claim, random_mask, requires, same
from attnzoo.testing.strategies import Component, Scene

PARTIAL = (Family.LOCAL, Family.SPARSE)
"""Families whose queries see some keys only, as under the law `local`: a mask may leave them nothing."""

# Mechanisms


def _weights(scene: Scene, mask: Mask) -> list[Tensor]:
    """What the taps called `weights` show."""
    component, seen = scene.build(), []
    with watch(component, "weights", lambda name, tensor: seen.append(tensor)):
        scene.run(component, scene.inputs(), mask)
    return seen


def _rows(scene: Scene, most: bool) -> None:
    keys = scene.card.masks & {"keys"}
    for mask in [Mask(), random_mask(scene, keys)] if keys else [Mask()]:
        for weights in _weights(scene, mask):
            weights = weights.detach()
            sums = weights.sum(dim=-1)
            if mask.keys is not None and (
                scene.card.family in PARTIAL or Law.LOCAL in scene.card.laws
            ):  # a window may hold no key that exists
                sums = torch.where((weights == 0).all(dim=-1), 1.0, sums)
            claim(
                bool((weights >= 0).all()), "weights are not negative", f"one is {float(weights.min()):.3g}"
            )
            if most:
                claim(
                    bool((sums <= 1 + TOLERANCE).all()),
                    "rows sum to at most 1",
                    f"one sums to {float(sums.max()):.6g}",
                )
            else:
                same(sums, torch.ones_like(sums), "rows of the weights sum to 1")
            if mask.keys is not None:
                absent = ~mask.keys.reshape(scene.batch, *[1] * (weights.ndim - 2), -1).expand(weights.shape)
                claim(
                    bool((weights[absent] == 0).all()),
                    "keys that do not exist have no weight",
                    "one has some",
                )


@requires("mechanism", law=Law.STOCHASTIC)
def check_stochastic(cls: Component, scene: Scene) -> None:
    """Rows of the tapped weights are non-negative, sum to 1, and are zero where a key does not exist."""
    _rows(scene, most=False)


@requires("mechanism", law=Law.SUBSTOCHASTIC)
def check_substochastic(cls: Component, scene: Scene) -> None:
    """Tapped weights are non-negative, sum to at most 1, and are zero for keys that do not exist."""
    _rows(scene, most=True)


@requires("mechanism", law=Law.PERMUTATION_EQUIVARIANT)
def check_permutation_equivariant(cls: Component, scene: Scene) -> None:
    """Permuting the grid tokens permutes the output; special tokens keep their places and their outputs."""
    component, (x,) = scene.build(), scene.inputs()
    p, n = scene.layout.prefix, x.shape[1]
    order = torch.cat([torch.arange(p), p + torch.randperm(n - p, generator=scene.generator(3))])
    permuted = scene.run(component, [x[:, order]])
    same(
        permuted,
        scene.run(component, [x])[:, order],
        "permutation_equivariant, so permuted tokens give a permuted output",
    )


@requires("mechanism", law=Law.SHIFT_EQUIVARIANT)
def check_shift_equivariant(cls: Component, scene: Scene) -> None:
    """On a 1-D grid shifted tokens shift the output, beyond `reach()` of the ends; not `local`: on a ring."""
    scene, p = scene.line(), scene.layout.prefix
    local = Law.LOCAL in scene.card.laws
    reach = scene.construct().reach() if local else 0
    scene = scene.with_layout((scene.layout.grid[0] + 2 * reach + 1,))
    component, (x,) = scene.build(), scene.inputs()
    moved = torch.cat([x[:, :p], x[:, p:].roll(1, dims=1)], dim=1)
    before, after = scene.run(component, [x])[:, p:], scene.run(component, [moved])[:, p:]
    before = before.roll(1, dims=1)
    inner = slice(reach + 1, before.shape[1] - reach) if local else slice(None)
    same(after[:, inner], before[:, inner], "shift_equivariant, so shifted tokens give a shifted output")


@requires("head", law=Law.LINEAR_IN_VALUES)
def check_linear_in_values(cls: Component, scene: Scene) -> None:
    """For fixed queries and keys the head is linear in the values."""
    head, (q, k, v), other = scene.build(bare=True), scene.heads(), scene.heads(1)[2]
    both = head(q, k, 2 * v - 3 * other, layout=scene.layout)
    apart = 2 * head(q, k, v, layout=scene.layout) - 3 * head(q, k, other, layout=scene.layout)
    same(both, apart, "linear_in_values, so a mixture of values gives the mixture of outputs")


@requires("mechanism", law=Law.LOCAL)
def check_local(cls: Component, scene: Scene) -> None:
    """A grid token has no influence beyond `reach()`; without geometry the grid is a sequence."""
    if scene.card.grid is None:
        scene = scene.line()
    reach = scene.construct().reach()
    first, *rest = scene.layout.grid
    scene = scene.with_layout((first + reach + 1, *rest))
    component, (x,) = scene.build(), scene.inputs()
    p, coords = scene.layout.prefix, scene.layout.coords()
    j = scene.seed % len(coords)
    far = (coords - coords[j]).abs().amax(dim=-1) > reach
    where = (torch.arange(x.shape[1]) == p + j).expand(x.shape[:2])
    before, after = scene.run(component, [x])[:, p:], scene.run(component, [changed(x, where, scene)])[:, p:]
    same(
        after[:, far],
        before[:, far],
        f"local with a reach of {reach}, so grid token {j} has no influence beyond",
    )


@requires("head", law=Law.BOUNDED)
def check_bounded(cls: Component, scene: Scene) -> None:
    """Along every direction the output lies between the least and the greatest value."""
    head, (q, k, v) = scene.build(bare=True), scene.heads()
    out = head(q, k, v, layout=scene.layout)
    d = v.shape[-1]
    directions = torch.cat([torch.eye(d, dtype=v.dtype), scene.random(d, 3, stream=8)], dim=1)
    low, high = (v @ directions).aminmax(dim=2, keepdim=True)
    seen = out @ directions
    beyond = float(torch.maximum(low - seen, seen - high).detach().max())
    claim(
        beyond <= 1e-9,
        "bounded, so outputs lie in the convex hull of the values",
        f"one is {beyond:.2e} outside",
    )


# Fusions


@requires("fusion", law=Law.SINGLE, start="free")
def check_single(cls: Component, scene: Scene) -> None:
    """One branch alone comes out as it is."""
    scene = replace(scene, arity=1)
    fusion, inputs = scene.build(), scene.inputs()
    same(scene.run(fusion, inputs), inputs[0], "single, so one branch comes out as it is")


@requires("fusion", law=Law.AGREE, start="free")
def check_agree(cls: Component, scene: Scene) -> None:
    """Branches that agree come out as they are."""
    fusion, (branch, *rest) = scene.build(), scene.inputs()
    same(
        scene.run(fusion, [branch] * scene.arity + rest[-1:]),
        branch,
        "agree, so equal branches come out as they are",
    )


@requires("fusion", law=Law.CONVEX, start="free")
def check_convex(cls: Component, scene: Scene) -> None:
    """Every element lies between the branches' least and greatest."""
    fusion, inputs = scene.build(), scene.inputs()
    out, branches = scene.run(fusion, inputs), torch.stack(inputs[:-1])
    low, high = branches.amin(dim=0), branches.amax(dim=0)
    beyond = float(torch.maximum(low - out, out - high).detach().max())
    claim(beyond <= 1e-9, "convex, so outputs lie between the branches", f"one is {beyond:.2e} outside")


@requires("fusion", law=Law.SYMMETRIC, start="free")
def check_symmetric(cls: Component, scene: Scene) -> None:
    """The order of the branches has no say."""
    fusion, inputs = scene.build(), scene.inputs()
    same(
        scene.run(fusion, [*inputs[-2::-1], inputs[-1]]),
        scene.run(fusion, inputs),
        "symmetric, so order has no say",
    )


@requires("fusion", law=Law.ADDITIVE, start="free")
def check_additive(cls: Component, scene: Scene) -> None:
    """For fixed x the fusion is linear in its branches."""
    fusion, (*s, x), (*t, _) = scene.build(), scene.inputs(), scene.inputs(1)
    both = scene.run(fusion, [*(2 * a - 3 * b for a, b in zip(s, t, strict=True)), x])
    apart = 2 * scene.run(fusion, [*s, x]) - 3 * scene.run(fusion, [*t, x])
    same(both, apart, "additive, so a mixture of branches gives the mixture of outputs")


@requires("fusion", law=Law.NEUTRAL_ZERO, start="free")
def check_neutral_zero(cls: Component, scene: Scene) -> None:
    """A further branch of zeros changes nothing."""
    more = replace(scene, arity=scene.arity + 1)
    fusion, wider, inputs = scene.build(), more.build(), scene.inputs()
    kept = fusion.state_dict()
    wider.load_state_dict(
        {k: kept[k] if k in kept and kept[k].shape == v.shape else v for k, v in wider.state_dict().items()}
    )
    zero = torch.zeros_like(inputs[0])
    same(
        more.run(wider, [*inputs[:-1], zero, inputs[-1]]),
        scene.run(fusion, inputs),
        "neutral_zero, so zeros add nothing",
    )


@requires("fusion", law=Law.FAIR_START, start="free")
def check_fair_start(cls: Component, scene: Scene) -> None:
    """As initialised it is the mean of its branches."""
    fusion, inputs = scene.build(jitter=0), scene.inputs()
    mean = torch.stack(inputs[:-1]).mean(dim=0)
    same(scene.run(fusion, inputs), mean, "fair_start, so at first the output is the mean of the branches")


@requires("fusion", law=Law.IDENTITY_START)
def check_identity_start(cls: Component, scene: Scene) -> None:
    """With `start: identity` it is at first branch 1 bit for bit; after one step every branch learns."""
    claim("start" in options_of(cls).model_fields, "identity_start", "there is no option `start`")
    scene = replace(scene, options={**scene.options, "start": "identity"})
    fusion = scene.build(jitter=0)
    inputs = [x.requires_grad_() for x in scene.inputs()]
    claimed = "identity_start, so at first the output is the first branch, bit for bit"
    same(scene.run(fusion, inputs), inputs[0], claimed, 0)
    small = scene.build(torch.float32, jitter=0), scene.inputs(dtype=torch.float32)
    same(scene.run(*small), small[1][0], f"{claimed}, in float32", 0)
    if scene.card.hard_routing:
        return
    weight = scene.random(*inputs[-1].shape, stream=5)
    (scene.run(fusion, inputs) * weight).sum().backward()
    parameters = list(fusion.parameters())
    if parameters:
        torch.optim.SGD(parameters, lr=0.1).step()
    for x in inputs:
        x.grad = None
    (scene.run(fusion, inputs) * weight).sum().backward()
    for i, branch in enumerate(inputs[:-1]):
        learns = branch.grad is not None and bool(branch.grad.any())
        claim(
            learns,
            "identity_start, so every branch learns after one step",
            f"branch {i + 1} gets no gradient",
        )


@requires("fusion", law=Law.TOKEN_LOCAL)
def check_token_local(cls: Component, scene: Scene) -> None:
    """A token of the output depends on that token of the inputs only."""
    fusion, inputs = scene.build(), scene.inputs()
    n = scene.layout.length
    j = scene.seed % n
    others = [i for i in range(n) if i != j]
    moved = [x.clone() for x in inputs]
    for x, other in zip(moved, scene.inputs(1), strict=True):
        x[..., j, :] = other[..., j, :]
    before, after = scene.run(fusion, inputs), scene.run(fusion, moved)
    same(after[..., others, :], before[..., others, :], f"token_local, so token {j} changes no other token")


@requires("fusion")
def check_split(cls: Component, scene: Scene) -> None:
    """What a fusion hands each branch has the shape that the branch's site asks for, at both levels."""
    fusion, (*branches, x) = scene.build(), scene.inputs()
    for i, (seen, branch) in enumerate(zip(fusion.split(x, fusion.head_axis), branches, strict=True)):
        shapes = f"{tuple(branch.shape)}"
        claim(
            seen.shape == branch.shape,
            f"branch {i + 1} sees x as {shapes}, as its site says",
            f"{tuple(seen.shape)}",
        )


@requires("fusion", once=True)
def check_arity_refused(cls: Component, scene: Scene) -> None:
    """A number of branches that the card does not allow is refused with AZ312."""
    fewest, most = cls.card.arity  # type: ignore[union-attr]
    for arity in [fewest - 1] + ([] if most is None else [most + 1]):
        claimed = f"arity: {fewest} to {most or 'any'}, so {arity} branches are refused with AZ312"
        try:
            replace(scene, arity=arity).construct()
        except RecipeError as error:
            claim(error.code == "AZ312", claimed, f"{error.code} was raised")
        else:
            claim(False, claimed, "they were taken")
