"""Claims about masks: what is hidden has no influence, what is not has some, whatever the mask looks like."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from attnzoo.core import NO_MASK, Mask, watch
from attnzoo.core.mask import KINDS
from attnzoo.testing.claim import TOLERANCE, claim, refused, requires, same
from attnzoo.testing.influence import (
    ANY,
    FELT,
    allowed,
    chosen,
    copies,
    hard,
    influence,
    random_mask,
    some_kinds,
    tokens_of,
)
from attnzoo.testing.strategies import Checkable, Scene

TRIES = 3
"""So many parameters and inputs: beside a great weight a small one may be nothing."""


@requires("mechanism", "pool", mask="not all", share=0.4)
def check_unclaimed_masks_refused(cls: Checkable, scene: Scene) -> None:
    """A kind of mask that the card does not claim is refused with AZ402, alone and beside one that it claims."""
    ways = scene.ways()
    for kind in set(KINDS) - scene.card.masks:
        for kinds in ({kind}, {kind} | scene.card.masks):
            mask = random_mask(scene, kinds, heads=False)
            claimed = f"a mask of kind `{kind}`, which the card does not claim,"
            for way in ways:
                refused("AZ402", claimed, way, scene, mask)


@requires("mechanism", "pool", mask="some", share=0.4)
def check_masks_that_do_not_fit_refused(cls: Checkable, scene: Scene) -> None:
    """`keys` and `pairs` about other samples, heads, queries or keys are refused with AZ405, never stretched."""
    scene = scene.crowded()
    if scene.reads == 1:
        return
    ways = scene.ways()
    b, h, n, m = scene.batch, scene.site.heads, scene.layout.length, scene.reads
    shapes: dict[str, list[tuple[int, ...]]] = {
        "keys": [(b, m + 1), (b, m - 1), (b, 1), (1, m), (b + 1, m)],
        "pairs": [
            (b, 1, 1, m),
            (b, 1, n, 1),
            (b, 1, n + 1, m),
            (b, 1, n, m + 1),
            (b + 1, 1, n, m),
            (1, h + 1, n, m),
        ],
    }
    for kind in sorted(scene.card.masks & set(shapes)):
        for shape in shapes[kind]:
            if len(shape) == 4 and shape[2] == n == 1:
                continue
            mask = Mask(**{kind: torch.ones(shape, dtype=torch.bool)})  # type: ignore[arg-type]
            code = "AZ405 AZ402" if scene.card.one_head and len(shape) == 4 and shape[1] > 1 else "AZ405"
            claimed = f"`{kind}` of shape {shape} for {b} samples, {h} heads, {n} queries and {m} keys"
            for way in ways:
                refused(code, claimed, way, scene, mask)


def _hides(scene: Scene, kinds: frozenset[str]) -> None:
    """Fail where a token has influence on one that may not attend to it."""
    component, inputs = scene.build(), scene.inputs()
    mask = random_mask(scene, kinds)
    felt = influence(scene, component, inputs, mask)
    hidden = ~allowed(scene, mask)[..., tokens_of(scene)]
    worst = float(felt[hidden].max()) if hidden.any() else 0.0
    words = " and ".join(sorted(kinds))
    if not worst <= scene.tolerance:
        at = (felt * hidden).nan_to_num(torch.inf)
        sample, query, key = (int(i) for i in torch.unravel_index(at.argmax(), at.shape))
        key = tokens_of(scene)[key]
        happened = (
            f"in sample {sample} token {key}, which is hidden from token {query}, moves it by {worst:.2e}"
        )
        claim(False, f"masks: {words}, so what is hidden has no influence", happened)


@requires("mechanism", "pool", mask="keys", large=True)
def check_padding_invisible(cls: Checkable, scene: Scene) -> None:
    """What masked keys hold changes no other token's output, in any sample."""
    _hides(scene.crowded(), frozenset({"keys"}))
    _hides(scene, frozenset({"keys"}))


@requires("mechanism", mask="causal", large=True)
def check_causality(cls: Checkable, scene: Scene) -> None:
    """Under a causal mask no token has influence on those before it."""
    _hides(scene, frozenset({"causal"}))


@requires("mechanism", mask="pairs", large=True)
def check_forbidden_pairs(cls: Checkable, scene: Scene) -> None:
    """A query does not depend on a token that no head may attend to, in any sample."""
    _hides(scene.crowded(), frozenset({"pairs"}))


@requires("mechanism", mask="two")
def check_masks_together(cls: Checkable, scene: Scene) -> None:
    """Masks of several kinds hold together: what one of them hides has no influence."""
    for kinds in some_kinds(scene, fewest=2, most=1):
        _hides(scene.crowded(), kinds)


@requires("mechanism", mask="pairs", share=0.4)
def check_masks_let_through(cls: Checkable, scene: Scene) -> None:
    """Under every combination of masks, what a query may attend to has influence, as it has without a mask."""
    scene = scene.crowded()
    if hard(scene):
        return
    for kinds in some_kinds(scene):
        mask, lost = random_mask(scene, kinds), torch.tensor(True)
        for stream in range(TRIES):
            component, inputs = scene.build(stream=stream), scene.inputs(stream)
            keys = Mask(mask.keys) if chosen(scene) else NO_MASK
            free = influence(scene, component, inputs, keys) > FELT
            seen = allowed(scene, mask, itself=False)[..., tokens_of(scene)] & free
            lost = lost & seen & (influence(scene, component, inputs, mask) <= ANY)
            if not lost.any():
                break
        words = " and ".join(sorted(kinds))
        claim(
            not lost.any(),
            f"masks: {words} hide only what they forbid",
            "a token that is allowed has no influence",
        )


@requires("mechanism", mask="pairs", share=0.4)
def check_every_pair_counts(cls: Checkable, scene: Scene) -> None:
    """Forbidding one pair, in one head of one sample, changes the output of that query and no other."""
    scene = scene.crowded()
    if hard(scene):
        return
    component, inputs = scene.build(), scene.inputs()
    mask = random_mask(scene, scene.card.masks)
    open_ = mask.dense(scene.layout.length, scene.reads)
    assert open_ is not None and mask.pairs is not None
    keys = mask.keys if chosen(scene) else None
    free, tokens = influence(scene, component, inputs, Mask(keys)) > FELT, tokens_of(scene)
    open_ = open_.expand(mask.pairs.shape)[..., tokens] & free[:, None]
    found = open_.nonzero()
    found = found[torch.randperm(len(found), generator=scene.generator(62))[:6]]
    many = copies(mask, 1 + len(found))
    pairs = mask.pairs.repeat(1 + len(found), 1, 1, 1)
    at = []
    for copy_, (b, h, i, j) in enumerate(found.tolist(), 1):
        pairs[copy_ * scene.batch + b, h, i, tokens[j]] = False
        at.append((b, i))
    with torch.no_grad():
        repeated = [x.repeat(1 + len(found), 1, 1) for x in inputs]
        out = scene.run(component, repeated, replace(many, pairs=pairs))
    out = out.reshape(1 + len(found), scene.batch, scene.layout.length, -1)
    moved = (out[1:] - out[:1]).abs().amax(dim=-1) / (1 + out[0].abs().max())
    for one, (b, h, i, j), (sample, query) in zip(moved, found.tolist(), at, strict=True):
        where = f"forbidding query {i} of head {h}, sample {b}, the key {tokens[j]}"
        claim(float(one[sample, query]) > ANY, f"{where} changes its output", "it changes nothing")
        one[sample, query] = 0
        claim(float(one.max()) <= TOLERANCE, f"{where} changes no other query's output", "it changes one")


@requires("head", mask="pairs")
def check_pairs_by_head(cls: Checkable, scene: Scene) -> None:
    """Pairs that differ by head are honoured in each, where heads do not talk to each other."""
    scene = scene.crowded()
    head, (q, k, v) = scene.build(bare=True), scene.heads()
    if scene.card.given:
        return
    layout, n, m = scene.head_layout(), scene.layout.length, scene.reads
    other_k, other_v = scene.heads(1)[1:]
    free = head(q, k, v, layout=layout)
    one = torch.arange(scene.site.heads).reshape(-1, 1, 1) == 0
    talk = head(q, torch.where(one, other_k, k), torch.where(one, other_v, v), layout=layout)
    if not torch.equal(talk[:, 1:], free[:, 1:]):
        return
    for kinds in some_kinds(scene, most=3):
        if "pairs" not in kinds:
            continue
        mask = random_mask(scene, kinds)
        dense = mask.dense(n, m)
        assert dense is not None
        before = head(q, k, v, mask=mask, layout=layout)
        for j in tokens_of(scene)[:4]:
            where = (torch.arange(m) == j)[:, None]
            after = head(
                q, torch.where(where, other_k, k), torch.where(where, other_v, v), mask=mask, layout=layout
            )
            hidden = ~dense.expand(scene.batch, scene.site.heads, n, m)[..., j]
            words = (
                f"masks: {' and '.join(sorted(kinds))}, so key {j} has no influence in heads that forbid it"
            )
            same(after[hidden], before[hidden], words)


@requires("mechanism", "pool", mask="keys", share=0.4)
def check_full_keys_change_nothing(cls: Checkable, scene: Scene) -> None:
    """A mask in which all keys exist equals no mask."""
    component, inputs = scene.build(), scene.inputs()
    masked = scene.run(component, inputs, Mask(keys=torch.ones(inputs[-1].shape[:2], dtype=torch.bool)))
    same(masked, scene.run(component, inputs), "a mask under which all keys exist equals no mask")


@requires("mechanism", mask="pairs", share=0.4)
def check_full_pairs_change_nothing(cls: Checkable, scene: Scene) -> None:
    """A mask that allows all pairs equals no mask, and pairs are the same written once or for each sample and head."""
    component, inputs = scene.build(), scene.inputs()
    n, m = scene.layout.length, scene.reads
    h = 1 if scene.card.one_head else scene.site.heads
    full = Mask(pairs=torch.ones(1, 1, n, m, dtype=torch.bool))
    same(
        scene.run(component, inputs, full),
        scene.run(component, inputs),
        "a mask that allows all pairs equals none",
    )
    pairs = random_mask(replace(scene, batch=1), {"pairs"}, heads=False).pairs
    assert pairs is not None
    expected = scene.run(component, inputs, Mask(pairs=pairs))
    for shape in ((scene.batch, 1, n, m), (1, h, n, m), (scene.batch, h, n, m)):
        written = scene.run(component, inputs, Mask(pairs=pairs.expand(shape).clone()))
        same(written, expected, f"pairs written as {shape} are the same as pairs written once")


@requires("mechanism", "pool", mask="some", share=0.2)
def check_masks_as_views(cls: Checkable, scene: Scene) -> None:
    """How a mask lies in memory has no say: transposed, strided or expanded."""
    component, inputs = scene.build(), scene.inputs()
    for kinds in some_kinds(scene):
        mask = random_mask(scene, kinds)
        expected = scene.run(component, inputs, mask)
        for view in (
            lambda m: m.transpose(-1, -2).contiguous().transpose(-1, -2),
            lambda m: m.repeat_interleave(2, dim=-1)[..., ::2],
        ):
            keys, pairs = (None if m is None else view(m) for m in (mask.keys, mask.pairs))
            lying = scene.run(component, inputs, replace(mask, keys=keys, pairs=pairs))
            same(lying, expected, "how a mask lies in memory has no say")
        once = replace(
            mask,
            keys=None if mask.keys is None else mask.keys[:1].expand(mask.keys.shape),
            pairs=None if mask.pairs is None else mask.pairs[:1, :1].expand(mask.pairs.shape),
        )
        whole = replace(
            once,
            keys=None if once.keys is None else once.keys.contiguous(),
            pairs=None if once.pairs is None else once.pairs.contiguous(),
        )
        same(
            scene.run(component, inputs, once),
            scene.run(component, inputs, whole),
            "an expanded mask is a mask",
        )


@requires("mechanism", "pool", mask="some", share=0.2)
def check_masks_forgotten(cls: Checkable, scene: Scene) -> None:
    """A second mask of the same shape counts for itself, and so does the same mask once it was changed in place."""
    scene = scene.crowded()
    inputs = scene.inputs()
    claimed = "a mask holds for one call: nothing of it is kept"
    for kinds in some_kinds(scene):
        if kinds == {"causal"}:
            continue
        component = scene.build()
        first, second = random_mask(scene, kinds), random_mask(scene, kinds, stream=51)
        fresh = copy.deepcopy(component)
        scene.run(component, inputs, first)
        same(scene.run(component, inputs, second), scene.run(fresh, inputs, second), claimed, 0)
        fresh = scene.build()
        for part, other in ((first.keys, second.keys), (first.pairs, second.pairs)):
            if part is not None and other is not None:
                part.copy_(other)
        changed_ = scene.run(component, inputs, first)
        same(changed_, scene.run(fresh, inputs, first), f"{claimed} (it was changed in place)", 0)
        component, fresh = scene.build(), scene.build()
        scene.run(component, inputs, first)
        same(scene.run(component, inputs), scene.run(fresh, inputs), f"{claimed} (then without a mask)", 0)


def _empty(scene: Scene) -> Iterator[Mask]:
    """Masks of the claimed kinds under which queries of the first sample may attend to nothing."""
    n, m = scene.layout.length, scene.reads
    keys = torch.ones(scene.batch, m, dtype=torch.bool)
    keys[0] = False
    pairs = torch.ones(scene.batch, 1, n, m, dtype=torch.bool)
    pairs[0, :, scene.seed % n] = False
    for kinds in some_kinds(scene):
        if kinds != {"causal"}:
            yield Mask(
                keys=keys if "keys" in kinds else None,
                pairs=pairs if "pairs" in kinds else None,
                causal="causal" in kinds,
            )


@requires("head", mask="some")
def check_empty_rows_are_zero(cls: Checkable, scene: Scene) -> None:
    """A query that may attend to nothing gets exactly zeros, whether taps are watched or not."""
    head, (q, k, v) = scene.build(bare=True), scene.heads()
    n, m = scene.layout.length, scene.reads
    for mask in _empty(scene):
        dense = mask.dense(n, m)
        assert dense is not None
        empty = ~dense.expand(scene.batch, 1, n, m).any(dim=-1)[:, 0]
        for watched in (False, True):
            with watch(head, None, lambda name, seen: None) if watched else nullcontext():
                out = head(q, k, v, mask=mask, layout=scene.head_layout(), given=scene.given).transpose(1, 2)[
                    empty
                ]
            words = f"masks: {' and '.join(mask.kinds)}; watched: {watched}"
            claim(
                bool((out == 0).all()),
                f"a query that may attend to nothing ({words}) gets zeros",
                "it gets more",
            )


@requires("mechanism", "pool", mask="some", share=0.4)
def check_empty_rows_are_finite(cls: Checkable, scene: Scene) -> None:
    """A query that may attend to nothing makes neither outputs nor gradients NaN or infinite."""
    component, inputs = scene.build(), scene.inputs()
    for mask in _empty(scene):
        for x in inputs:
            x.requires_grad_().grad = None
        component.zero_grad()
        out = scene.run(component, inputs, mask)
        claimed = (
            f"queries that may attend to nothing (masks: {' and '.join(mask.kinds)}) leave everything finite"
        )
        claim(bool(out.isfinite().all()), claimed, "the output holds NaN or infinity")
        (out * scene.random(*out.shape, stream=5)).sum().backward()
        for name, tensor in chain([("x", inputs[0]), ("context", inputs[-1])], component.named_parameters()):
            finite = tensor.grad is None or bool(tensor.grad.isfinite().all())
            claim(finite, claimed, f"the gradient of `{name}` holds NaN or infinity")


@requires("mechanism", "pool", mask="keys", share=0.4)
def check_padding_gets_no_gradient(cls: Checkable, scene: Scene) -> None:
    """Masked keys get no gradient from tokens that exist."""
    component, inputs = scene.build(), scene.inputs()
    mask = random_mask(scene, {"keys"})
    assert mask.keys is not None
    source = inputs[-1].requires_grad_()
    out = scene.run(component, inputs, mask)
    weight: Tensor = scene.random(*out.shape, stream=5)
    if len(inputs) == 1 and out.ndim == 3:
        weight = weight * mask.keys[..., None]  # a token is its own query
    (gradient,) = torch.autograd.grad((out * weight).sum(), source)
    leak = float(gradient[~mask.keys].abs().max()) if (~mask.keys).any() else 0.0
    claim(leak <= TOLERANCE, "masks: keys, so padding gets no gradient", f"it gets {leak:.2e}")
