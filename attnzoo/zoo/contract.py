"""What a component must be, asked of every class that is offered: its base, its card, what it claims and gives back.

The only file that lists the base classes and asks a component what it claims.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from attnzoo.core import (
    Card,
    Family,
    Fusion,
    FusionCard,
    Head,
    InstrumentCard,
    Intervention,
    Mechanism,
    Pool,
    Probe,
    Site,
    options_of,
)
from attnzoo.errors import Place, PluginError
from attnzoo.zoo.blame import OURS, short
from attnzoo.zoo.registry import Entry


@dataclass(frozen=True)
class Kind:
    """A kind of component.

    Args:
        hook: The hook that offers it.
        bases: What its classes derive from.
        card: What their cards are.
    """

    hook: str
    bases: tuple[type, ...]
    card: type


MECHANISM = Kind("attnzoo_mechanisms", (Mechanism, Head, Pool), Card)
FUSION = Kind("attnzoo_fusions", (Fusion,), FusionCard)
PROBE = Kind("attnzoo_probes", (Probe,), InstrumentCard)
INTERVENTION = Kind("attnzoo_interventions", (Intervention,), InstrumentCard)


@dataclass(frozen=True)
class Unimportable:
    """A file with a component that could not be imported.

    Args:
        name: What the component is called: a built-in has its file's name.
        where: The file, and the line if it is known.
        error: What its import raised.
    """

    name: str
    where: str
    error: BaseException


class Breach(Exception):
    """What is wrong with a component, in words that follow its name.

    Args:
        code: `AZ0nn`.
        reason: One line, such as `has no card`.
    """

    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


def concrete(value: Any, bases: tuple[type, ...]) -> bool:
    """Whether this is a class that can be built."""
    return inspect.isclass(value) and issubclass(value, bases) and not inspect.isabstract(value)


def kind_of(cls: type) -> Kind:
    """What a class of a component is offered as."""
    return next(kind for kind in (FUSION, PROBE, INTERVENTION, MECHANISM) if issubclass(cls, kind.bases))


def held(cls: type) -> Any:
    """A copy of the card of a class that keeps the contract.

    Args:
        cls: A concrete component.

    Raises:
        Breach: AZ006 no card, AZ011 a card that says what a card cannot say, or `claims` that give something else.
        Exception: whatever the class raises.
    """
    copy = card_of(cls)
    try:
        options = options_of(cls).model_fields.values()
    except Exception as error:
        raise Breach("AZ006", f"has options that cannot be read: {short(error)}") from error
    if kind_of(cls) is MECHANISM and not any(option.is_required() for option in options):
        _claimed(cls, {}, copy.name)
    return copy


def card_of(cls: type) -> Any:
    """A copy of the card of a class.

    Args:
        cls: A concrete component.

    Raises:
        Breach: AZ006 no card, AZ011 a card that says what a card cannot say.
    """
    wanted = kind_of(cls).card
    card = getattr(cls, "card", None)
    if not isinstance(card, wanted):
        raise Breach("AZ006", f"has no `card = {wanted.__name__}(...)`")
    return sound(card, wanted)


def sound(card: Any, kind: Any) -> Any:
    """A card built anew from what a card says, and thereby held to everything a card is held to.

    Raises:
        Breach: AZ011.
    """
    try:
        copy = kind(**{field.name: getattr(card, field.name) for field in fields(kind) if field.init})
        if kind is Card and not isinstance(copy.family, Family):
            raise ValueError(f"its family is {copy.family!r}, which is none")
        if type(card) is not kind or copy != card:
            raise ValueError(f"it is no plain {kind.__name__}")
        for derived in vars(kind).values():
            if isinstance(derived, property):
                derived.__get__(copy)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise Breach("AZ011", f"has a card that cannot be: {error}".splitlines()[0]) from error
    return copy


def claimed(entry: Entry, options: Mapping[str, Any]) -> Card:
    """What a mechanism claims under these options.

    Args:
        entry: A mechanism or head.
        options: Its options, as given.

    Raises:
        Breach: AZ011, when that is no sound card of this name.
        Exception: whatever the class raises.
    """
    return _claimed(entry.value, options, entry.name)


def _claimed(cls: Any, options: Mapping[str, Any], name: str) -> Card:
    card = cls.card_for(**options)
    if not isinstance(card, Card):
        raise Breach("AZ011", f"claims {_what(card)} instead of a Card")
    if sound(card, Card).name != name:
        raise Breach("AZ011", f"claims to be called `{card.name}`")
    return card


def sites_of(entry: Entry, site: Site, arity: int) -> list[Site]:
    """What a fusion tells each of its branches of its place.

    Args:
        entry: A fusion.
        site: Where it is put.
        arity: Number of branches.

    Raises:
        Breach: AZ014, when that is no site for each.
        Exception: whatever the class raises.
    """
    sites = entry.value.sites(site, arity)
    if not isinstance(sites, list) or len(sites) != arity or not all(isinstance(s, Site) for s in sites):
        raise Breach("AZ014", f"gives {_what(sites)} for `sites`, which is a list of {arity} sites")
    return sites


def built(entry: Entry, *given: Any, **options: Any) -> Any:
    """A component, built.

    Args:
        entry: Its class.
        given: The site, and for a fusion the number of branches.
        options: Its options.

    Raises:
        Breach: AZ014, when its constructor gives back something else.
        Exception: whatever the class raises.
    """
    component = entry.value(*given, **options)
    if not isinstance(component, entry.value):
        raise Breach("AZ014", f"gives {_what(component)} when it is built")
    if type(component.card) is not type(entry.card) or component.card.name != entry.name:
        raise Breach("AZ011", "changes its card when it is built")
    return component


def output_breach(component: nn.Module, given: tuple[Any, ...], out: Any) -> str:
    """What is wrong with what a component gives back; empty when it is a tensor like the tokens that it was given.

    Args:
        component: A mechanism, head or fusion.
        given: Its positional arguments: tokens, queries, or branches and tokens.
        out: What it gave back.
    """
    tokens = given[1] if isinstance(component, Fusion) else given[0]
    due = tokens[:, 0] if isinstance(component, Pool) else tokens
    if isinstance(out, Tensor) and (out.shape, out.dtype) == (due.shape, due.dtype):
        return ""
    return f"gives back {_what(out)} where {_what(due)} is due"


def initialised(model: nn.Module, entries: Iterable[Entry]) -> None:
    """Ask the components of plugins in a model for what hosts ask: special initialisation, and names for weight decay.

    Args:
        model: A model, or a mechanism alone.
        entries: The mechanisms and fusions that may be in it.

    Raises:
        Breach: AZ014, when the names are none.
        Exception: whatever a component raises.
    """
    owners = _owners(entries)
    for module in model.modules():
        if type(module) in owners:
            module.init_weights()  # type: ignore[operator]
            names = module.no_weight_decay()  # type: ignore[operator]
            if not isinstance(names, set | frozenset | list | tuple) or not all(
                isinstance(n, str) for n in names
            ):
                raise Breach("AZ014", f"gives {_what(names)} for `no_weight_decay`, which is a set of names")


def _owners(entries: Iterable[Entry]) -> dict[type, Entry]:
    """The components of plugins, by class."""
    return {entry.value: entry for entry in entries if entry.plugin != OURS}


@contextmanager
def watching(
    model: nn.Module, entries: Iterable[Entry], places: Mapping[str, Place] = MappingProxyType({})
) -> Iterator[None]:
    """Hold every component of a plugin in a model to what it must give back.

    Args:
        model: A model, or a mechanism alone.
        entries: The mechanisms and fusions that may be in it.
        places: Where they stand in a recipe, by full name.

    Raises:
        PluginError: AZ014, from the forward.
    """
    owners = _owners(entries)

    def refuse(component: nn.Module, wrong: str) -> None:
        name = owners[type(component)].full_name
        help = f"this is a fault of the plugin; `attnzoo check {name}` shows more"
        raise PluginError("AZ014", f"`{name}` {wrong}", place=places.get(name), help=help)

    def look(component: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        if wrong := output_breach(component, given, out):
            refuse(component, wrong)

    def look_before_dropout(component: nn.Module, _drop: nn.Module, given: tuple[Any, ...]) -> None:
        if not isinstance(given[0], Tensor):  # which dropout would trip over, in words of its own
            refuse(component, f"gives back {_what(given[0])}, which is no tensor")

    with ExitStack() as hooks:
        for module in model.modules():
            if type(module) in owners:
                hooks.enter_context(module.register_forward_hook(look))
                if isinstance(module, Mechanism | Pool):
                    before = partial(look_before_dropout, module)
                    hooks.enter_context(module.proj_drop.register_forward_pre_hook(before))
        yield


def _what(value: Any) -> str:
    """A value in words: `2 × 65 × 64 float32`, `None`, `a dict`."""
    if isinstance(value, Tensor):
        shape = " × ".join(map(str, value.shape)) or "one number"
        return f"{shape} {str(value.dtype).removeprefix('torch.')}"
    return "None" if value is None else f"a {type(value).__name__}"
