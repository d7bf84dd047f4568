"""Checks: plain functions, one claim each. A failure says what was claimed and what happened.

A check takes a class and a scene; `requires` says to which cards it applies.
"""

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attnzoo.core import NO_MASK, Card, Fusion, Head, KVCache, Law, Layout, Mask, MultiHead, options_of, watch
from attnzoo.core.mask import KINDS
from attnzoo.core.options import option_texts
from attnzoo.core.tap import KINDS as TAPS
from attnzoo.core.tap import find_taps, kind_of
from attnzoo.errors import RecipeError, ZooError
from attnzoo.testing.strategies import SMALL, Component, Scene, settings_of

TOLERANCE = 1e-10
"""Of float64, relative to the largest number."""


class Inapplicable(Exception):
    """A check has nothing to say in this case; the reason is the message."""


@dataclass(frozen=True)
class Requirement:
    """To which components, cards and option settings a check applies.

    Args:
        kinds: Of `mechanism` (heads with their projections are mechanisms), `head`, `fusion`.
        card: What the card must claim under the options.
        options: What the options must be.
        once: Whether one scene is enough.
    """

    kinds: tuple[str, ...]
    card: Callable[[Any], bool] = lambda card: True
    options: Callable[[dict[str, Any]], bool] = lambda options: True
    once: bool = False

    def fits(self, card: Any, options: dict[str, Any]) -> bool:
        """Whether a check applies under these options."""
        return self.card(card) and self.options(options)


Check = Callable[[Component, Scene], None]


def requires(
    *kinds: str,
    mask: str | None = None,
    context: bool | None = None,
    grid: bool | None = None,
    weights: bool | None = None,
    incremental: bool | None = None,
    law: Law | None = None,
    start: str | None = None,
    wide: bool = False,
    once: bool = False,
) -> Callable[[Check], Check]:
    """Says to which cards a check applies; None asks for nothing.

    Args:
        kinds: Of `mechanism`, `head`, `fusion`.
        mask: A kind of mask that must be claimed; `some`, any of them; `not all`, a kind that is not.
        context: Whether cross-attention must be claimed.
        grid: Whether geometry must be needed.
        weights: Whether weights must be formed.
        incremental: Whether cached decoding must be claimed.
        law: A law that must be claimed.
        start: Of fusions: what `start` must be, where there is such an option.
        wide: Leaves out options of 1 (a window of one token), under which parameters may rightly have no say.
        once: Whether one scene is enough.
    """

    def card(card: Any) -> bool:
        if mask == "some" and not card.masks:
            return False
        if mask == "not all" and not set(KINDS) - card.masks:
            return False
        if mask in KINDS and mask not in card.masks:
            return False
        wanted = {"context": context, "incremental": incremental}
        return (
            all(value is None or getattr(card, name) == value for name, value in wanted.items())
            and (grid is None or (card.grid is not None) == grid)
            and (weights is None or bool(card.tapped("weights")) == weights)
            and (law is None or law in card.laws)
        )

    def options(options: dict[str, Any]) -> bool:
        if start is not None and options.get("start", "free") != start:
            return False
        return not (wide and any(type(value) is int and value == SMALL[-1] for value in options.values()))

    def decorate(check: Check) -> Check:
        check.requirement = Requirement(kinds, card, options, once)  # type: ignore[attr-defined]
        return check

    return decorate


def claim(holds: bool, claimed: str, happened: str) -> None:
    """Fail unless it holds.

    Args:
        holds: Whether it does.
        claimed: What should be.
        happened: What is.

    Raises:
        AssertionError: With both sentences.
    """
    if not holds:
        raise AssertionError(f"claimed: {claimed}; but {happened}")


def same(a: Tensor, b: Tensor, claimed: str, tolerance: float = TOLERANCE) -> None:
    """Fail unless two tensors agree.

    Args:
        a: Any shape.
        b: The same shape.
        claimed: What should be.
        tolerance: Largest difference, relative to the largest number of b.
    """
    claim(a.shape == b.shape, claimed, f"the shapes are {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() and not torch.equal(a, b):
        difference = float((a - b).detach().abs().max())
        scale = 1 + float(b.detach().abs().max())
        claim(difference <= tolerance * scale, claimed, f"they differ by {difference:.2e}")


def random_mask(scene: Scene, kinds: frozenset[str], heads: int = 1) -> Mask:
    """A mask of these kinds; every query may attend to itself and the first key of a sample always exists.

    Args:
        scene: Where.
        kinds: Of `keys`, `pairs`, `causal`.
        heads: Number of heads that `pairs` tells apart.
    """
    n, random = scene.layout.length, scene.generator(50)
    keys = torch.rand(scene.batch, n, generator=random) < 0.6
    keys[:, 0] = True
    pairs = (torch.rand(scene.batch, heads, n, n, generator=random) < 0.6) | torch.eye(n, dtype=torch.bool)
    return Mask(
        keys=keys if "keys" in kinds else None,
        pairs=pairs if "pairs" in kinds else None,
        causal="causal" in kinds,
    )


def changed(x: Tensor, where: Tensor, scene: Scene) -> Tensor:
    """x with other content where a boolean (b n) says so."""
    return torch.where(where[..., None], 3 * scene.random(*x.shape, stream=60), x)


# Construction


@requires("mechanism", "fusion")
def check_builds(cls: Component, scene: Scene) -> None:
    """It builds at every site; only options other than the defaults may be refused, with a RecipeError."""
    try:
        component = scene.build()
    except RecipeError as error:
        claim(bool(scene.options), "default options build everywhere", f"it was refused: {error.code}")
        raise
    if isinstance(component, MultiHead):
        component = component.inner
    if issubclass(cls, Head | Fusion):
        claim(
            isinstance(component, cls),
            "the constructor builds a component",
            f"a {type(component).__name__} came out",
        )
    for name, parameter in component.named_parameters():
        claim(
            bool(parameter.isfinite().all()), "parameters are initialised", f"`{name}` holds NaN or infinity"
        )
    claim(component.card == scene.card, "`card` of an instance is `claims` of its options", "they differ")


@requires("mechanism", "fusion", once=True)
def check_options(cls: Component, scene: Scene) -> None:
    """Options are keyword-only, annotated, described under `Args:`, and validated."""
    given = [p for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"]
    place = [p.name for p in given if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    wanted = ["site", "arity"] if issubclass(cls, Fusion) else ["site"]
    claim(
        place == wanted,
        f"a constructor takes {', '.join(wanted)}, then keyword-only options",
        f"it takes {place}",
    )
    texts = option_texts(cls)
    for parameter in given[len(wanted) :]:
        name, typed = parameter.name, parameter.annotation is not inspect.Parameter.empty
        claim(typed, "options are annotated", f"`{name}` is not")
        claim(bool(texts.get(name)), "options are described under `Args:`", f"`{name}` is not")
    model = options_of(cls)
    for setting in settings_of(cls):
        model.model_validate(setting)
    try:
        model.model_validate({**settings_of(cls)[0], "no_such_option": 1})
    except ValueError:
        return
    claim(False, "unknown options are refused", "one was taken")


@requires("mechanism", "fusion")
def check_pickles(cls: Component, scene: Scene) -> None:
    """A pickled, a deep-copied and a state-dict copy give the same output."""
    component, inputs = scene.build(), scene.inputs()
    expected = scene.run(component, inputs)
    try:
        pickled = pickle.loads(pickle.dumps(component))  # noqa: S301 - what was pickled on this very line
        copied = copy.deepcopy(component)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(f"claimed: it pickles and deep-copies; but {error}") from error
    same(scene.run(pickled, inputs), expected, "a pickled copy gives the same output", 0)
    same(scene.run(copied, inputs), expected, "a deep copy gives the same output", 0)
    fresh = replace(scene, seed=scene.seed + 1).build()
    try:
        fresh.load_state_dict(component.state_dict())
    except RuntimeError as error:
        raise AssertionError(f"claimed: a state dict loads into another copy; but {error}") from error
    same(scene.run(fresh, inputs), expected, "the state dict holds everything that matters", 0)


@requires("mechanism", "fusion")
def check_no_weight_decay(cls: Component, scene: Scene) -> None:
    """`no_weight_decay()` names parameters of the component."""
    component = scene.construct()
    unknown = set(component.no_weight_decay()) - set(dict(component.named_parameters()))
    claim(not unknown, "`no_weight_decay` names own parameters", f"{sorted(unknown)} are none")


# Shape and numbers


@requires("mechanism", "fusion")
def check_output(cls: Component, scene: Scene) -> None:
    """The output has the shape and dtype of the tokens, in float32, float64 and bfloat16, and is finite."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        inputs = scene.inputs(dtype=dtype)
        out, shape = scene.run(scene.build(dtype), inputs), inputs[-1].shape
        claim(out.shape == shape, f"the output is {tuple(shape)}, as x is", f"it is {tuple(out.shape)}")
        claim(out.dtype == dtype, f"tokens in {dtype} give an output in {dtype}", f"it is in {out.dtype}")
        claim(bool(out.isfinite().all()), "the output is finite", f"it is not, in {dtype}")


@requires("mechanism", "fusion")
def check_large_inputs(cls: Component, scene: Scene) -> None:
    """The output is finite for |x| up to 1000, in float32."""
    inputs = [(1e3 * x.sign() if scene.seed % 2 else 1e3 * x.tanh()).float() for x in scene.inputs()]
    out = scene.run(scene.build(torch.float32), inputs)
    claim(bool(out.isfinite().all()), "the output is finite for |x| up to 1000", "it holds NaN or infinity")


# Masks


@requires("mechanism", mask="not all")
def check_unclaimed_masks_refused(cls: Component, scene: Scene) -> None:
    """A kind of mask that the card does not claim is refused with AZ402."""
    component, inputs = scene.build(), scene.inputs()
    for kind in KINDS:
        if kind in scene.card.masks:
            continue
        claimed = f"a mask of kind `{kind}`, which the card does not claim, is refused with AZ402"
        try:
            scene.run(component, inputs, random_mask(scene, frozenset({kind})))
        except ZooError as error:
            claim(error.code == "AZ402", claimed, f"{error.code} was raised")
        else:
            claim(False, claimed, "it was taken")


@requires("mechanism", mask="keys")
def check_padding_invisible(cls: Component, scene: Scene) -> None:
    """What masked keys hold changes no other token's output."""
    component, (x,) = scene.build(), scene.inputs()
    keys = torch.rand(x.shape[:2], generator=scene.generator(51)) < 0.6
    keys[:, scene.seed % x.shape[1]] = True
    before = scene.run(component, [x], Mask(keys=keys))
    after = scene.run(component, [changed(x, ~keys, scene)], Mask(keys=keys))
    same(after[keys], before[keys], "masks: keys, so padding is invisible to tokens that exist")


@requires("mechanism", mask="keys")
def check_full_keys_change_nothing(cls: Component, scene: Scene) -> None:
    """A mask in which all keys exist equals no mask."""
    component, (x,) = scene.build(), scene.inputs()
    masked = scene.run(component, [x], Mask(keys=torch.ones(x.shape[:2], dtype=torch.bool)))
    same(masked, scene.run(component, [x]), "a mask under which all keys exist equals no mask")


@requires("mechanism", mask="causal")
def check_causality(cls: Component, scene: Scene) -> None:
    """Under a causal mask, changing the tokens from j on changes no output before j."""
    component, (x,) = scene.build(), scene.inputs()
    j = scene.seed % x.shape[1]
    later = torch.arange(x.shape[1]).expand(x.shape[:2]) >= j
    for mask in (Mask(causal=True), random_mask(scene, scene.card.masks)):
        before = scene.run(component, [x], mask)
        after = scene.run(component, [changed(x, later, scene)], mask)
        same(
            after[:, :j],
            before[:, :j],
            f"masks: causal, so outputs before token {j} do not depend on it or later ones",
        )


@requires("mechanism", mask="pairs")
def check_forbidden_pairs(cls: Component, scene: Scene) -> None:
    """A query does not depend on a token that it may not attend to."""
    component, (x,) = scene.build(), scene.inputs()
    n = x.shape[1]
    i, j = scene.seed % n, scene.seed // n % n
    if i == j:
        j = (i + 1) % n
    pairs = torch.ones(scene.batch if scene.seed % 2 else 1, 1, n, n, dtype=torch.bool)
    pairs[:, :, i, j] = i == j
    where = (torch.arange(n) == j).expand(x.shape[:2])
    before = scene.run(component, [x], Mask(pairs=pairs))
    after = scene.run(component, [changed(x, where, scene)], Mask(pairs=pairs))
    if i != j:
        same(
            after[:, i],
            before[:, i],
            f"masks: pairs, so query {i} does not depend on token {j}, which is forbidden",
        )


def _empty(scene: Scene) -> list[Mask]:
    """Masks of the claimed kinds under which queries of the first sample may attend to nothing."""
    n, masks = scene.layout.length, []
    if "keys" in scene.card.masks:
        keys = torch.ones(scene.batch, n, dtype=torch.bool)
        keys[0] = False
        masks.append(Mask(keys=keys))
    if "pairs" in scene.card.masks:
        pairs = torch.ones(scene.batch, 1, n, n, dtype=torch.bool)
        pairs[0, :, scene.seed % n] = False
        masks.append(Mask(pairs=pairs))
    return masks


@requires("head", mask="some")
def check_empty_rows_are_zero(cls: Component, scene: Scene) -> None:
    """A query that may attend to nothing gets exactly zeros, whether taps are watched or not."""
    head, (q, k, v) = scene.build(bare=True), scene.heads()
    n = scene.layout.length
    for mask in _empty(scene):
        allowed = mask.dense(n, n).expand(scene.batch, 1, n, n)  # type: ignore[union-attr]
        empty = ~allowed.any(dim=-1)[:, 0]
        for watched in (False, True):
            with watch(head, None, lambda name, seen: None) if watched else nullcontext():
                out = head(q, k, v, mask=mask, layout=scene.layout).transpose(1, 2)[empty]
            claimed = (
                f"a query that may attend to nothing (mask: {mask.kinds[0]}, watched: {watched}) gets zeros"
            )
            claim(bool((out == 0).all()), claimed, "it gets something else")


@requires("mechanism", mask="some")
def check_empty_rows_are_finite(cls: Component, scene: Scene) -> None:
    """A query that may attend to nothing makes neither outputs nor gradients NaN or infinite."""
    component, (x,) = scene.build(), scene.inputs()
    for mask in _empty(scene):
        x.requires_grad_().grad = None
        component.zero_grad()
        out = scene.run(component, [x], mask)
        claimed = f"queries that may attend to nothing (mask: {mask.kinds[0]}) leave everything finite"
        claim(bool(out.isfinite().all()), claimed, "the output holds NaN or infinity")
        (out * scene.random(*out.shape, stream=5)).sum().backward()
        for name, tensor in chain([("x", x)], component.named_parameters()):
            finite = tensor.grad is None or bool(tensor.grad.isfinite().all())
            claim(finite, claimed, f"the gradient of `{name}` holds NaN or infinity")


# Gradients


@requires("mechanism", "fusion", wide=True)
def check_gradients(cls: Component, scene: Scene) -> None:
    """Every parameter, x and every branch receives a finite gradient, not always zero."""
    scene = scene.roomy()
    component = scene.build()
    fusion = isinstance(component, Fusion)
    names = [f"branch {i + 1}" for i in range(scene.arity)] if fusion else ["x"]
    waiting = {name for name, _ in component.named_parameters()} | set(names)
    for stream in range(3):
        inputs = [x.requires_grad_() for x in scene.inputs(stream)]
        component.zero_grad()
        out = scene.run(component, inputs)
        (out * scene.random(*out.shape, stream=5)).sum().backward()
        for name, tensor in chain(zip(names, inputs, strict=False), component.named_parameters()):
            if tensor.grad is not None:
                claim(bool(tensor.grad.isfinite().all()), "gradients are finite", f"that of `{name}` is not")
                if tensor.grad.any():
                    waiting.discard(name)
        if not waiting:
            return
    if fusion and scene.card.hard_routing:
        waiting -= set(names)
    claim(
        not waiting,
        "everything learns",
        f"{', '.join(sorted(f'`{name}`' for name in waiting))} got no gradient",
    )


@requires("mechanism", "fusion")
def check_gradcheck(cls: Component, scene: Scene) -> None:
    """Gradients with respect to inputs and parameters equal finite differences, in float64."""
    component, inputs = scene.build(), [x.requires_grad_() for x in scene.inputs()]
    names, values = (
        zip(*component.named_parameters(), strict=True)
        if any(True for _ in component.parameters())
        else ((), ())
    )

    def run(*tensors: Tensor) -> Tensor:
        inner, parameters = (
            list(tensors[: len(inputs)]),
            dict(zip(names, tensors[len(inputs) :], strict=True)),
        )
        if isinstance(component, Fusion):
            return functional_call(component, parameters, (inner[:-1], inner[-1]))
        return functional_call(component, parameters, (inner[0],), {"layout": scene.layout})

    try:
        torch.autograd.gradcheck(run, (*inputs, *values), fast_mode=True, atol=1e-4)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        raise AssertionError(f"claimed: gradients equal finite differences; but {text}") from error


# Hosts


@requires("mechanism", "fusion")
def check_eval_deterministic(cls: Component, scene: Scene) -> None:
    """In eval mode the same tokens give the same output, and are left as they were."""
    component, inputs = scene.build(), scene.inputs()
    before = [x.clone() for x in inputs]
    first = scene.run(component, inputs).clone()
    for x, kept in zip(inputs, before, strict=True):
        same(x, kept, "inputs are left as they were", 0)
    same(scene.run(component, inputs), first, "in eval mode the same tokens give the same output", 0)


@requires("mechanism", "fusion")
def check_train_equals_eval(cls: Component, scene: Scene) -> None:
    """Without dropout, training mode gives what eval mode gives."""
    component, inputs = scene.build(), scene.inputs()
    trained = scene.run(component.train(), inputs)
    same(trained, scene.run(component.eval(), inputs), "without dropout, training mode equals eval mode")


@requires("mechanism", "fusion")
def check_no_global_randomness(cls: Component, scene: Scene) -> None:
    """In eval mode a forward neither reads nor moves PyTorch's global random numbers."""
    component, inputs = scene.build(), scene.inputs()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        before = torch.get_rng_state()
        first = scene.run(component, inputs)
        moved = not torch.equal(before, torch.get_rng_state())
        claim(not moved, "a forward in eval mode leaves the global random state alone", "it moved it")
        torch.default_generator.manual_seed(1)
        same(scene.run(component, inputs), first, "in eval mode the global random state has no say", 0)


@requires("mechanism", "fusion")
def check_init_survives_host(cls: Component, scene: Scene) -> None:
    """What a constructor initialises specially outlives a host's own initialisation, by `init_weights`."""
    from timm.models.vision_transformer import init_weights_vit_timm, named_apply

    component, other = scene.construct(), replace(scene, seed=scene.seed + 1).construct()
    before = {name: parameter.detach().clone() for name, parameter in component.named_parameters()}
    fixed = {name for name, parameter in other.named_parameters() if torch.equal(parameter, before[name])}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(scene.seed)
        named_apply(init_weights_vit_timm, nn.Sequential(component))
    after = dict(component.named_parameters())
    claimed = "special initialisation survives the host's, because it lives in `init_weights`"
    for name in fixed:
        same(after[name].detach(), before[name], f"{claimed} (`{name}`)", 0)
    for name, parameter in before.items():
        owner = component.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, nn.Linear) or not name.endswith("weight") or name in fixed:
            continue
        bound = (
            owner.in_features**-0.5
        )  # what nn.Linear draws from by itself: uniform, and so is its largest entry
        largest = float(parameter.abs().max())
        special = largest > 1.001 * bound or (parameter.numel() >= 16 and largest < 0.5 * bound)
        ratio = float(after[name].detach().abs().max()) / largest if largest else 0.0
        claim(
            not special or 0.2 < ratio < 5,
            claimed,
            f"the host changed the scale of `{name}` {ratio:.2g} times",
        )


# Geometry


@requires("mechanism", grid=True)
def check_wrong_layout_refused(cls: Component, scene: Scene) -> None:
    """A mechanism that needs geometry refuses tokens that do not fit the layout, with AZ401."""
    component, (x,) = scene.build(), scene.inputs()
    first, *rest = scene.layout.grid
    for wrong in (
        Layout((first + 1, *rest), scene.layout.prefix),
        Layout(scene.layout.grid, scene.layout.prefix + 1),
    ):
        claimed = f"{x.shape[1]} tokens in a layout of {wrong} are refused with AZ401"
        try:
            component(x, layout=wrong)
        except ZooError as error:
            claim(error.code == "AZ401", claimed, f"{error.code} was raised")
        except RuntimeError as error:
            claim(False, claimed, f"PyTorch raised {str(error).splitlines()[0]}")
        else:
            claim(False, claimed, "they were taken")


@requires("mechanism", grid=False)
def check_geometry_ignored(cls: Component, scene: Scene) -> None:
    """A mechanism that needs no geometry gives the same output however the grid is arranged."""
    component, (x,) = scene.build(), scene.inputs()
    line = scene.line().layout
    for layout in (line, Layout((1, *line.grid), line.prefix), Layout((*line.grid, 1), line.prefix)):
        same(
            component(x, layout=layout),
            scene.run(component, [x]),
            "grid: None, so the arrangement of the grid has no say",
        )


@requires("mechanism", "fusion")
def check_batch_independent(cls: Component, scene: Scene) -> None:
    """A sample alone gives what it gives in a batch, in eval and in training mode."""
    scene = replace(scene, batch=max(2, scene.batch))
    component, inputs = scene.build(), scene.inputs()
    for training in (False, True):
        component.train(training)
        together = scene.run(component, inputs)
        i = scene.seed % scene.batch
        alone = scene.run(component, [x[i : i + 1] for x in inputs])
        mode = "training" if training else "eval"
        same(alone, together[i : i + 1], f"a sample alone gives what it gives in a batch, in {mode} mode")


# Context


def _across(scene: Scene) -> tuple[Any, Tensor, Tensor, Scene]:
    """A component that reads from a context, x (b n c), a context (b m e), the scene; n is not m, c is not e."""
    m = scene.layout.length
    n = m + 1 if scene.seed % 2 or m == 1 else m - 1
    site = replace(
        scene.site, layout=Layout((n,)), context_dim=scene.site.dim + 1, context_layout=scene.layout
    )
    across = replace(scene, site=site)
    x = scene.random(scene.batch, n, scene.site.dim, stream=1)
    context = scene.random(scene.batch, m, scene.site.dim + 1, stream=2)
    return across.build(), x, context, across


@requires("mechanism", context=True)
def check_context(cls: Component, scene: Scene) -> None:
    """It reads from a context of another length and width, and the context matters."""
    component, x, context, scene = _across(scene)
    out = component(
        x, context.requires_grad_(), layout=scene.layout, context_layout=scene.site.context_layout
    )
    claim(
        out.shape == x.shape,
        f"with a context the output is {tuple(x.shape)}, as x",
        f"it is {tuple(out.shape)}",
    )
    claim(bool(out.isfinite().all()), "with a context the output is finite", "it holds NaN or infinity")
    (out * scene.random(*out.shape, stream=5)).sum().backward()
    read = context.grad is not None and bool(context.grad.any())
    claim(read, "context: True, so the context matters", "its gradient is zero")
    for name, tensor in chain([("context", context)], component.named_parameters()):
        finite = tensor.grad is None or bool(tensor.grad.isfinite().all())
        claim(finite, "gradients are finite", f"that of `{name}` is not")


@requires("mechanism", context=True, mask="keys")
def check_context_padding_invisible(cls: Component, scene: Scene) -> None:
    """What masked keys of a context hold changes nothing."""
    component, x, context, scene = _across(scene)
    keys = torch.rand(context.shape[:2], generator=scene.generator(51)) < 0.6
    keys[:, scene.seed % context.shape[1]] = True
    where = {"mask": Mask(keys=keys), "layout": scene.layout, "context_layout": scene.site.context_layout}
    before = component(x, context, **where)
    after = component(x, changed(context, ~keys, scene), **where)
    same(after, before, "masks: keys, so padding of the context is invisible")


@requires("mechanism", context=False)
def check_context_refused(cls: Component, scene: Scene) -> None:
    """A mechanism that does not claim cross-attention refuses a context with AZ404."""
    component, (x,) = scene.build(), scene.inputs()
    claimed = "context: False, so a context is refused with AZ404"
    try:
        component(x, scene.random(*x.shape, stream=1), layout=scene.layout)
    except ZooError as error:
        claim(error.code == "AZ404", claimed, f"{error.code} was raised")
    else:
        claim(False, claimed, "it was taken")


# Taps


def _seen(
    component: nn.Module, scene: Scene, inputs: list[Tensor], mask: Mask = NO_MASK
) -> dict[str, list[Tensor]]:
    """Everything that every tap sees in one forward."""
    seen: dict[str, list[Tensor]] = {name: [] for name in find_taps(component)}
    with watch(component, None, lambda name, tensor: seen[name].append(tensor)):
        scene.run(component, inputs, mask)
    return seen


@requires("mechanism", "fusion")
def check_taps(cls: Component, scene: Scene) -> None:
    """Taps have known names, fire exactly once, and show the axes that they and the card declare."""
    if scene.arity == 1 and scene.options.get("start") == "identity":
        return  # one branch from which to start is the result: nothing is merged
    component, inputs = scene.build(), scene.inputs()
    sizes = {"b": scene.batch, "n": scene.layout.length, "m": scene.layout.length, "c": scene.site.dim}
    for name, seen in _seen(component, scene, inputs).items():
        last, tap = name.rpartition(".")[2], component.get_submodule(name)
        claim(kind_of(last) in TAPS, f"taps are called {', '.join(TAPS)}", f"one is called `{name}`")
        claim(len(seen) == 1, f"the tap `{name}` fires once in a forward", f"it fires {len(seen)} times")
        axes = tap.axes.split()
        if isinstance(component, Fusion) and scene.inside and "n" in axes:
            axes = [axes[0], "h", *axes[1:]]  # a fusion is written for (... n c)
        shape = tuple(seen[0].shape)
        fits = len(axes) == len(shape)
        claim(fits, f"the tap `{name}` has axes `{tap.axes}`", f"it shows a tensor of shape {shape}")
        fits = all(size == sizes.get(axis, size) for axis, size in zip(axes, shape, strict=True))
        claim(fits, f"the tap `{name}` has axes `{tap.axes}`", f"it shows a tensor of shape {shape}")
    if isinstance(scene.card, Card):
        found = {name.rpartition(".")[2]: tap.axes for name, tap in find_taps(component).items()}
        claim(found == dict(scene.card.taps), f"the taps are {dict(scene.card.taps)}", f"there are {found}")


@requires("mechanism", "fusion", wide=True)
def check_taps_live(cls: Component, scene: Scene) -> None:
    """Replacing what a tap shows changes the output: it is what is used."""
    scene = scene.roomy()
    component, inputs = scene.build(), scene.inputs()
    expected = scene.run(component, inputs)
    for name in find_taps(component):

        def replaced(full: str, seen: Tensor, name: str = name) -> Tensor | None:
            return seen + scene.random(*seen.shape, stream=7) if full == name else None

        with watch(component, None, replaced):
            out = scene.run(component, inputs)
        changes = not torch.allclose(out, expected, rtol=0, atol=1e-9)
        claim(changes, f"the tap `{name}` shows what is used", "replacing what it shows changes nothing")


@requires("mechanism", "fusion")
def check_watching_changes_nothing(cls: Component, scene: Scene) -> None:
    """The output is the same whether taps are watched or not, without a mask and under all claimed kinds."""
    component, inputs = scene.build(), scene.inputs()
    if not find_taps(component):
        return
    masks = [NO_MASK] if isinstance(component, Fusion) else [NO_MASK, random_mask(scene, scene.card.masks)]
    for mask in masks:
        idle = scene.run(component, inputs, mask)
        with watch(component, None, lambda name, seen: None):
            same(
                scene.run(component, inputs, mask),
                idle,
                f"watching changes nothing (mask: {', '.join(mask.kinds) or 'none'})",
            )


# Decoding


@requires("head", incremental=True)
def check_incremental(cls: Component, scene: Scene) -> None:
    """Token by token, with cached keys and values, gives the rows of the full pass under a causal mask."""
    scene = scene.line().with_layout((scene.line().layout.grid[0],), prefix=0)
    component, (x,) = scene.build(), scene.inputs()
    full = scene.run(component, [x], Mask(causal=True))
    cache, rows = KVCache(), []
    for i in range(x.shape[1]):
        rows.append(component.step(x[:, i : i + 1], cache, mask=Mask(causal=True), layout=Layout((i + 1,))))
    same(torch.cat(rows, dim=1), full, "incremental, so cached decoding equals the full pass")


# Cost


@requires("mechanism", once=True)
def check_cost(cls: Component, scene: Scene) -> None:
    """From 512 to 1024 tokens, taps watched, the FLOP count grows no faster than `time` claims."""
    from torch.utils.flop_counter import FlopCounterMode

    counted = False
    for options in settings_of(cls):
        if any(type(value) is int for value in options.values()):
            continue  # numbers change cost by a factor, not a power
        flops = []
        for n in (512, 1024):
            dims = cls.card.grid if isinstance(cls.card.grid, int) else 1  # type: ignore[union-attr]
            grid = {1: (n,), 2: (16, n // 16), 3: (8, 8, n // 64)}[dims]
            many = replace(
                scene, options=options, batch=1, site=replace(scene.site, heads=2, dim=8)
            ).with_layout(grid, 0)
            component, inputs = many.build(torch.float32), many.inputs(dtype=torch.float32)
            counter = FlopCounterMode(display=False)
            with torch.no_grad(), watch(component, None, lambda name, seen: None), counter:
                many.run(component, inputs)
            flops.append(counter.get_total_flops())
        if not flops[0]:
            continue
        counted = True
        growth, card = math.log2(flops[1] / flops[0]), many.card
        claimed = f"time: `{card.time}`, so cost grows at most with n^{card.growth} (options: {options})"
        claim(growth <= card.growth + 0.15, claimed, f"from 512 to 1024 tokens it grows with n^{growth:.2f}")
    if not counted:
        raise Inapplicable("PyTorch counts no FLOPs of these operations")
