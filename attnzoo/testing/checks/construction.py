"""Claims about how a component is made, copied, saved and initialised."""

import copy
import inspect
import itertools
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.core import Fusion, Head, Mask, MultiHead, Pool, options_of
from attnzoo.core.options import option_texts
from attnzoo.errors import RecipeError, ZooError
from attnzoo.testing.claim import Inapplicable, claim, requires, same
from attnzoo.testing.influence import random_mask
from attnzoo.testing.strategies import Checkable, Scene, card_of, settings_of


@requires("mechanism", "pool", "fusion", share=0.4)
def check_builds(cls: Checkable, scene: Scene) -> None:
    """It builds at every site; only options other than the defaults may be refused, with a RecipeError."""
    try:
        component = scene.build()
    except RecipeError as error:
        plain = not scene.options and scene.site.context_dim is None
        claim(not plain, "default options build everywhere", f"it was refused: {error.code}")
        raise
    if isinstance(component, MultiHead):
        component = component.inner
    if issubclass(cls, Head | Fusion | Pool):
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


@requires("mechanism", "pool", "fusion", share=0)
def check_options(cls: Checkable, scene: Scene) -> None:
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


def _traits(scene: Scene) -> tuple[Any, list[Tensor]] | None:
    """What an option can change: the card and names and shapes, numbers as built, and outputs; None if refused."""
    try:
        fresh, component = scene.construct(), scene.build()
        inputs = scene.inputs()
        with torch.no_grad():
            outs = [scene.run(component, inputs)]
            if "causal" in getattr(scene.card, "masks", ()):
                outs.append(scene.run(component, inputs, Mask(causal=True)))
    except ZooError:
        return None
    state = fresh.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    words = (card_of(scene.component, scene.options), shapes, sorted(fresh.no_weight_decay()))
    return words, [*state.values(), *outs]


def _differ(a: tuple[Any, list[Tensor]] | None, b: tuple[Any, list[Tensor]] | None) -> bool:
    if a is None or b is None:
        return a is not b
    return a[0] != b[0] or any(not torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@requires("mechanism", "pool", "fusion", share=0)
def check_options_matter(cls: Checkable, scene: Scene) -> None:
    """Every value of every option changes something, whatever the others are: the card, parameters, or an output."""
    settings = settings_of(cls)
    base = scene.roomy(6)
    if issubclass(cls, Fusion):  # which may know how deep it is, and count branches and channels
        arity = min(4, cls.card.arity[1] or 4)
        site = replace(base.site, heads=arity, dim=24, depth=24)
        bases = [replace(base, site=replace(site, layer=layer), arity=arity) for layer in (1, 2, 3)]
    else:
        bases = [base.at(replace(base.site, heads=2, dim=32))]
    names = sorted({name for setting in settings for name in setting})
    traits: dict[int, Any] = {}

    def of(i: int) -> Any:
        if i not in traits:
            traits[i] = [_traits(replace(base, options=settings[i])) for base in bases]
        return traits[i]

    for name in names:
        groups: dict[str, list[tuple[Any, int]]] = {}
        for i, setting in enumerate(settings):
            rest = repr({k: v for k, v in sorted(setting.items()) if k != name})
            groups.setdefault(rest, []).append((setting.get(name, "its default"), i))
        pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for members in groups.values():
            for (a, i), (b, j) in itertools.combinations(members, 2):
                pairs.setdefault((repr(a), repr(b)), []).append((i, j))
        for (a, b), among in pairs.items():
            matters = any(_differ(x, y) for i, j in among for x, y in zip(of(i), of(j), strict=True))
            claim(
                matters,
                f"`{name}: {a}` is not `{name}: {b}`",
                "nothing differs, whatever the other options are",
            )


@requires("mechanism", "pool", "fusion", share=0.2)
def check_pickles(cls: Checkable, scene: Scene) -> None:
    """A pickled, a deep-copied and a state-dict copy give the same output."""
    component, inputs = scene.build(), scene.inputs()
    expected = scene.run(component, inputs)
    try:
        pickled = pickle.loads(pickle.dumps(component))  # noqa: S301 - what was pickled on this very line
        copied = copy.deepcopy(component)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise AssertionError(f"claimed: it pickles and deep-copies; but {error}") from error
    same(scene.run(pickled, inputs), expected, "a pickled copy gives the same output", 0)
    same(scene.run(copied, inputs), expected, "a deep copy gives the same output", 0)
    fresh = _other(scene).build()
    try:
        fresh.load_state_dict(component.state_dict())
    except RuntimeError as error:
        raise AssertionError(f"claimed: a state dict loads into another copy; but {error}") from error
    same(scene.run(fresh, inputs), expected, "the state dict holds everything that matters", 0)


def _other(scene: Scene) -> Scene:
    """The same scene with other random numbers."""
    return replace(scene, seed=scene.seed + 1)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value: itself, or inside lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


@requires("mechanism", "pool", "fusion", share=0.4)
def check_tensors_registered(cls: Checkable, scene: Scene) -> None:
    """No tensor is a plain attribute, before and after a forward: `.to()` and the state dict would miss it."""
    component = scene.build()
    for when in ("built", "run"):
        if when == "run":
            scene.run(component.train(), scene.inputs())
        for path, module in component.named_modules():
            for name, value in vars(module).items():
                if name in ("_parameters", "_buffers", "_modules"):
                    continue
                full = f"{path}.{name}" if path else name
                claim(
                    next(_tensors(value), None) is None,
                    "tensors are parameters or buffers, so that `.to()` and the state dict know them",
                    f"`{full}` is a plain attribute once it is {when}",
                )


@requires("mechanism", "pool", "fusion", share=0.4)
def check_parameters_train(cls: Checkable, scene: Scene) -> None:
    """Parameters require gradients: what does not learn is a buffer."""
    for name, parameter in scene.construct().named_parameters():
        claim(parameter.requires_grad, "parameters learn; what does not is a buffer", f"`{name}` is frozen")


@requires("mechanism", "pool", "fusion", share=0.2)
def check_moves(cls: Checkable, scene: Scene) -> None:
    """It runs on another device than the CPU: what it makes in a forward is where its tokens are."""
    masks = None if issubclass(cls, Fusion) else random_mask(scene, scene.card.masks)
    component, inputs = scene.build().to("meta"), [x.to("meta") for x in scene.inputs()]
    claimed = "it runs on any device (here PyTorch's `meta`, which has shapes and no numbers)"
    given = {name: m.to("meta") for name, m in scene.given.items()}
    try:
        if masks is None:
            out = scene.run(component, inputs)
        else:
            keys, pairs = (None if m is None else m.to("meta") for m in (masks.keys, masks.pairs))
            out = scene.run(component, inputs, replace(masks, keys=keys, pairs=pairs), given or None)
    except NotImplementedError as error:
        text = str(error).splitlines()[0]
        raise Inapplicable(f"it looks at numbers, which `meta` has not: {text}") from error
    except RuntimeError as error:
        if "data-dependent" in str(error) or "meta tensors" in str(error):
            raise Inapplicable("it looks at numbers, which `meta` has not") from error
        raise AssertionError(f"claimed: {claimed}; but {str(error).splitlines()[0]}") from error
    claim(out.device.type == "meta", claimed, f"the output is on `{out.device}`")


@requires("mechanism", "pool", "fusion", share=0.4)
def check_no_weight_decay(cls: Checkable, scene: Scene) -> None:
    """`no_weight_decay()` names parameters of the component."""
    component = scene.construct()
    unknown = set(component.no_weight_decay()) - set(dict(component.named_parameters()))
    claim(not unknown, "`no_weight_decay` names own parameters", f"{sorted(unknown)} are none")


def settings_of_process() -> dict[str, Any]:
    """What a component shares with everybody in the process and must leave alone."""
    return {
        "the default dtype": torch.get_default_dtype(),
        "gradients on or off": torch.is_grad_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the number of threads": torch.get_num_threads(),
        "the precision of products": torch.get_float32_matmul_precision(),
        "Python's random numbers": random.getstate(),
    }


def unmoved(before: dict[str, Any], what: str) -> None:
    """Fail unless the process is as it was.

    Args:
        before: What `settings_of_process` returned.
        what: Who must leave it alone.
    """
    for name, value in settings_of_process().items():
        claim(value == before[name], f"{what} leaves {name} as it was", "it changed")


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """The global random numbers of PyTorch and Python start from this seed; afterwards they are as they were."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


@requires("mechanism", "pool", "fusion", share=0.4)
def check_construction_seeds(cls: Checkable, scene: Scene) -> None:
    """A constructor draws from the global random numbers, and neither seeds them nor changes settings of PyTorch."""
    states = []
    for seed in (scene.seed + 1, scene.seed + 2):
        with drawn_from(seed):
            before = settings_of_process()
            if issubclass(cls, Fusion):
                cls(scene.site, scene.arity, **scene.options)
            else:
                cls(scene.site, **scene.options)  # type: ignore[call-arg]
            states.append(torch.get_rng_state())
            unmoved(before, "a constructor")
    claim(
        not torch.equal(*states),
        "a constructor leaves the seed of the global random numbers alone",
        "from two seeds it ends in the same state: it sets its own",
    )


@requires("mechanism", "pool", "fusion", share=0.4)
def check_init_survives_host(cls: Checkable, scene: Scene) -> None:
    """What a constructor initialises specially outlives a host's own initialisation, by `init_weights`."""
    from timm.models.vision_transformer import init_weights_vit_timm, named_apply

    component, other = scene.construct(), _other(scene).construct()
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
        # what nn.Linear draws from by itself: uniform, and so is its largest entry
        bound = owner.in_features**-0.5
        largest = float(parameter.abs().max())
        special = (
            parameter.numel() >= 16 and not 0.5 * bound <= largest <= 1.001 * bound
        )  # of a few, chance decides
        ratio = float(after[name].detach().abs().max()) / largest if largest else 0.0
        claim(
            not special or 0.2 < ratio < 5,
            claimed,
            f"the host changed the scale of `{name}` {ratio:.2g} times",
        )
