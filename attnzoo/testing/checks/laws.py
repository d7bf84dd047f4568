"""One check for each law. Laws hold for all parameters, so parameters are moved away from where they start.

The laws about the start are checked as initialised; with `start: identity` a fusion is held to fewer laws.
"""

import copy
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from attnzoo.core import Component, Head, Law, Mask, Tap, options_of, watch
from attnzoo.testing.claim import claim, requires, same
from attnzoo.testing.influence import changed, random_mask, some_kinds
from attnzoo.testing.strategies import Checkable, Scene

# Mechanisms and pools


def _rows(scene: Scene, most: bool) -> None:
    """Fail where weights are negative, do not sum to 1 (at most 1), or lie on keys that do not exist."""
    component, inputs = scene.build(), scene.inputs()
    for mask in [
        Mask(),
        random_mask(scene, scene.card.masks & {"keys"}),
        random_mask(scene, scene.card.masks),
    ]:
        seen: dict[str, Tensor] = {}
        with watch(component, "weights", seen.__setitem__):
            scene.run(component, inputs, mask)
        for name, weights in seen.items():
            tap = component.get_submodule(name)
            assert isinstance(tap, Tap)
            weights, over = weights.detach(), tap.over
            claim(
                bool((weights >= 0).all()), "weights are not negative", f"one is {float(weights.min()):.3g}"
            )
            sums = weights.sum(dim=over)
            across = scene.site.context_dim is not None and Law.LOCAL in scene.card.laws
            if across or not mask.free:  # a window may hold no key that exists
                sums = torch.where((weights == 0).all(dim=over), 1.0, sums)
            if most:
                beyond = float(sums.max()) - 1
                claim(beyond <= scene.tolerance, "rows sum to at most 1", f"one sums to {1 + beyond:.6g}")
            else:
                same(sums, torch.ones_like(sums), "rows of the weights sum to 1", scene.tolerance)
            if mask.keys is not None and tap.axes.split()[over] == "m":
                keys = mask.keys.reshape(scene.batch, *[1] * (weights.ndim - 2), -1)
                absent = ~keys.movedim(-1, over).expand(weights.shape)
                claim(
                    bool((weights[absent] == 0).all()),
                    "keys that do not exist have no weight",
                    "one has some",
                )


@requires("mechanism", "pool", law=Law.STOCHASTIC, large=True)
def check_stochastic(cls: Checkable, scene: Scene) -> None:
    """Rows of the tapped weights are non-negative, sum to 1, and are zero where a key does not exist."""
    _rows(scene, most=False)


@requires("mechanism", "pool", law=Law.SUBSTOCHASTIC, large=True)
def check_substochastic(cls: Checkable, scene: Scene) -> None:
    """Tapped weights are non-negative, sum to at most 1, and are zero for keys that do not exist."""
    _rows(scene, most=True)


@requires("mechanism", "pool", law=Law.PERMUTATION_EQUIVARIANT, large=True)
def check_permutation_equivariant(cls: Checkable, scene: Scene) -> None:
    """Permuting the grid tokens permutes the output, special tokens keep theirs; the order of a context has no say."""
    component, inputs = scene.build(), scene.inputs()
    p, n = scene.layout.prefix, scene.layout.length
    order = torch.cat([torch.arange(p), p + torch.randperm(n - p, generator=scene.generator(3))])
    expected = scene.run(component, inputs)
    permuted = scene.run(component, [inputs[0][:, order], *inputs[1:]])
    if expected.ndim == 2:
        same(permuted, expected, "permutation_equivariant, so a pool gives the same", scene.tolerance)
        return
    claimed = "permutation_equivariant, so permuted tokens give a permuted output"
    same(permuted, expected[:, order], claimed, scene.tolerance)
    if len(inputs) == 2:
        order = torch.randperm(scene.reads, generator=scene.generator(4))
        permuted = scene.run(component, [inputs[0], inputs[1][:, order]])
        same(
            permuted,
            expected,
            "permutation_equivariant, so the order of a context has no say",
            scene.tolerance,
        )


@requires("mechanism", law=Law.SHIFT_EQUIVARIANT)
def check_shift_equivariant(cls: Checkable, scene: Scene) -> None:
    """On a 1-D grid shifted tokens shift the output, beyond `reach()` of the ends; not `local`: on a ring."""
    scene, p = scene.alone().line(), scene.layout.prefix
    local = Law.LOCAL in scene.card.laws
    reach = scene.construct().reach() if local else 0
    scene = scene.with_layout((scene.layout.grid[0] + 2 * reach + 1,))
    component, x = scene.build(), scene.inputs()[0]
    moved = torch.cat([x[:, :p], x[:, p:].roll(1, dims=1)], dim=1)
    before, after = scene.run(component, [x])[:, p:], scene.run(component, [moved])[:, p:]
    before = before.roll(1, dims=1)
    inner = slice(reach + 1, before.shape[1] - reach) if local else slice(None)
    same(after[:, inner], before[:, inner], "shift_equivariant, so shifted tokens give a shifted output")


@requires("head", law=Law.LINEAR_IN_VALUES, large=True)
def check_linear_in_values(cls: Checkable, scene: Scene) -> None:
    """For fixed queries and keys the head is linear in the values."""
    head, (q, k, v), other = scene.build(bare=True), scene.heads(), scene.heads(1)[2]
    both = head(q, k, 2 * v - 3 * other, layout=scene.head_layout(), given=scene.given)
    apart = 2 * head(q, k, v, layout=scene.head_layout(), given=scene.given) - 3 * head(
        q, k, other, layout=scene.head_layout(), given=scene.given
    )
    same(
        both, apart, "linear_in_values, so a mixture of values gives the mixture of outputs", scene.tolerance
    )


@requires("mechanism", law=Law.LOCAL, large=True)
def check_local(cls: Checkable, scene: Scene) -> None:
    """A grid token has no influence beyond `reach()`; without geometry the grid is a sequence."""
    if scene.card.grid is None:
        scene = scene.line()
    scene = scene.alone()
    reach = scene.construct().reach()
    first, *rest = scene.layout.grid
    scene = scene.with_layout((first + reach + 1, *rest))
    component, x = scene.build(), scene.inputs()[0]
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


@requires("head", law=Law.BOUNDED, large=True)
def check_bounded(cls: Checkable, scene: Scene) -> None:
    """Along every direction the output lies between the least and the greatest value."""
    head, (q, k, v) = scene.build(bare=True), scene.heads()
    out = head(q, k, v, layout=scene.head_layout(), given=scene.given)
    d = v.shape[-1]
    directions = torch.cat([torch.eye(d, dtype=v.dtype), scene.random(d, 3, stream=8)], dim=1)
    low, high = (v @ directions).aminmax(dim=2, keepdim=True)
    seen = out @ directions
    beyond = float(torch.maximum(low - seen, seen - high).detach().max())
    claim(
        beyond <= 10 * scene.scale * scene.tolerance,
        "bounded, so outputs lie in the convex hull of the values",
        f"one is {beyond:.2e} outside",
    )


@requires("mechanism", "pool", law=Law.SILENT, large=True)
def check_silent(cls: Checkable, scene: Scene) -> None:
    """The output is zero, without a mask and under all that are claimed."""
    component, inputs = scene.build(), scene.inputs()
    for mask in (Mask(), random_mask(scene, scene.card.masks)):
        out = scene.run(component, inputs, mask).detach()
        claim(not out.any(), "silent, so the output is zero", f"it is up to {out.abs().max().item():.2e}")


def _alone(head: Head, these: slice) -> Head:
    """A copy that has some of the heads only, as a device has that holds these."""
    some, shared = copy.deepcopy(head), head.shared()
    for name, tensor in chain(some.named_parameters(), some.named_buffers()):
        if name in shared:
            continue
        leads = tensor.ndim > 0 and len(tensor) == head.heads
        words = f"heads_apart, so `{name}` has a leading head axis or is named by `shared()`"
        claim(leads, words, f"its shape is {tuple(tensor.shape)}, with {head.heads} heads")
        tensor.data = tensor.data[these]
    for part in some.modules():
        if isinstance(part, Component):
            part.heads = len(range(head.heads)[these])
    return some


@requires("head", law=Law.HEADS_APART)
def check_heads_apart(cls: Checkable, scene: Scene) -> None:
    """Some heads alone, with their own parameters and pairs, give what they give among all, under masks too."""
    scene = scene.crowded()
    head, (q, k, v), layout = scene.build(bare=True), scene.heads(), scene.head_layout()
    cut = 1 + scene.seed % (scene.site.heads - 1)
    for kinds in [frozenset(), *some_kinds(scene)]:
        mask = random_mask(scene, kinds) if kinds else Mask()
        whole = head(q, k, v, mask=mask, layout=layout, given=scene.given)
        for these in (slice(0, cut), slice(cut, scene.site.heads)):
            pairs = mask.pairs if mask.pairs is None or mask.pairs.shape[1] == 1 else mask.pairs[:, these]
            own, seen = (t[:, these] for t in (q, k, v)), replace(mask, pairs=pairs)
            claimed = "heads_apart, so some heads alone give what they give among all"
            try:
                some = _alone(head, these)(*own, mask=seen, layout=layout, given=scene.given)
            except RuntimeError as error:
                claim(False, claimed, f"they cannot: {str(error).splitlines()[0]}")
            same(some, whole[:, these], f"{claimed} (masks: {', '.join(sorted(kinds)) or 'none'})")


# Fusions


@requires("fusion", law=Law.SINGLE, start="free", large=True)
def check_single(cls: Checkable, scene: Scene) -> None:
    """One branch alone comes out as it is."""
    scene = replace(scene, arity=1)
    fusion, inputs = scene.build(), scene.inputs()
    same(scene.run(fusion, inputs), inputs[0], "single, so one branch comes out as it is")


@requires("fusion", law=Law.AGREE, start="free", large=True)
def check_agree(cls: Checkable, scene: Scene) -> None:
    """Branches that agree come out as they are."""
    fusion, (branch, *rest) = scene.build(), scene.inputs()
    same(
        scene.run(fusion, [branch] * scene.arity + rest[-1:]),
        branch,
        "agree, so equal branches come out as they are",
    )


@requires("fusion", law=Law.CONVEX, start="free", large=True)
def check_convex(cls: Checkable, scene: Scene) -> None:
    """Every element lies between the branches' least and greatest."""
    fusion, inputs = scene.build(), scene.inputs()
    out, branches = scene.run(fusion, inputs), torch.stack(inputs[:-1])
    low, high = branches.amin(dim=0), branches.amax(dim=0)
    beyond = float(torch.maximum(low - out, out - high).detach().max())
    claim(
        beyond <= 10 * scene.scale * scene.tolerance,
        "convex, so outputs lie between the branches",
        f"one is {beyond:.2e} outside",
    )


@requires("fusion", law=Law.SYMMETRIC, start="free", large=True)
def check_symmetric(cls: Checkable, scene: Scene) -> None:
    """The order of the branches has no say."""
    fusion, inputs = scene.build(), scene.inputs()
    same(
        scene.run(fusion, [*inputs[-2::-1], inputs[-1]]),
        scene.run(fusion, inputs),
        "symmetric, so order has no say",
    )


@requires("fusion", law=Law.ADDITIVE, start="free", large=True)
def check_additive(cls: Checkable, scene: Scene) -> None:
    """For fixed x the fusion is linear in its branches."""
    fusion, (*s, x), (*t, _) = scene.build(), scene.inputs(), scene.inputs(1)
    both = scene.run(fusion, [*(2 * a - 3 * b for a, b in zip(s, t, strict=True)), x])
    apart = 2 * scene.run(fusion, [*s, x]) - 3 * scene.run(fusion, [*t, x])
    same(both, apart, "additive, so a mixture of branches gives the mixture of outputs")


@requires("fusion", law=Law.NEUTRAL_ZERO, start="free", large=True)
def check_neutral_zero(cls: Checkable, scene: Scene) -> None:
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
def check_fair_start(cls: Checkable, scene: Scene) -> None:
    """As initialised it is the mean of its branches."""
    fusion, inputs = scene.build(jitter=0), scene.inputs()
    mean = torch.stack(inputs[:-1]).mean(dim=0)
    same(scene.run(fusion, inputs), mean, "fair_start, so at first the output is the mean of the branches")


@requires("fusion", law=Law.IDENTITY_START)
def check_identity_start(cls: Checkable, scene: Scene) -> None:
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
def check_token_local(cls: Checkable, scene: Scene) -> None:
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
