"""Asks a plugin what it offers. What is wrong is told one by one, and takes nothing with it that is sound."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pluggy

from attnzoo.zoo import hookspecs
from attnzoo.zoo.blame import details, file_of, short
from attnzoo.zoo.contract import Breach, Kind, Unimportable, concrete, held
from attnzoo.zoo.registry import Entry

RECIPES = "attnzoo_recipes"


class Refusal(Exception):
    """Why a plugin, or something that it offers, is left out.

    Args:
        code: `AZ0nn`.
        reason: One line.
        details: A traceback, where there is one.
        name: What is left out; empty for the plugin or when it has no name.
    """

    def __init__(self, code: str, reason: str, details: str = "", name: str = ""):
        super().__init__(reason)
        self.code, self.reason, self.details, self.name = code, reason, details, name


@dataclass(frozen=True)
class Offer:
    """What one hook of a plugin offers.

    Args:
        entries: What can be taken.
        refusals: Why the rest cannot.
    """

    entries: list[Entry]
    refusals: list[Refusal]


def register(name: str, plugin: Any) -> None:
    """Hold a plugin's hooks to their specification.

    Args:
        name: Its name.
        plugin: Its module.

    Raises:
        Refusal: AZ002 no such hook, AZ003 a wrong signature, AZ004 another version.
    """
    api = getattr(plugin, "ATTNZOO_API", hookspecs.API)
    if api != hookspecs.API:
        reason = f"it was written for hooks of version {api!r}; this attnzoo has version {hookspecs.API}"
        raise Refusal("AZ004", reason)
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name)
    except pluggy.PluginValidationError as error:
        text = str(error).splitlines()[-1].strip()
        raise Refusal("AZ003", f"a hook has a wrong signature: {text}") from error
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = ", ".join(sorted(n for n in vars(hookspecs) if n.startswith("attnzoo_")))
        reason = f"it implements a hook that does not exist ({error}); the hooks are {known}"
        raise Refusal("AZ002", reason) from error


def components(plugin: Any, kind: Kind, name: str, version: str) -> Offer:
    """The mechanisms, or the fusions, that a plugin offers.

    Args:
        plugin: Its module.
        kind: What is asked for.
        name: The plugin's name.
        version: Version of its distribution.
    """

    def entry_of(value: Any) -> Iterator[Entry]:
        card = _card(value, kind)
        yield Entry(card.name, value, name, version, file_of(value), card)

    return _ask(plugin, kind.hook, entry_of)


def recipes(plugin: Any, name: str, version: str) -> Offer:
    """The recipes that a plugin offers.

    Args:
        plugin: Its module.
        name: The plugin's name.
        version: Version of its distribution.
    """

    def entries_of(value: Any) -> Iterator[Entry]:
        if not isinstance(value, Path):
            raise Refusal("AZ006", f"`{RECIPES}` returned {_name(value)}, which is no pathlib.Path")
        if not value.is_absolute() or not value.exists():
            why = "does not exist" if value.is_absolute() else "depends on the current folder"
            raise Refusal("AZ006", f"`{RECIPES}` returned the path `{value}`, which {why}")
        for file in sorted(value.glob("*.yaml")) if value.is_dir() else [value]:
            yield Entry(file.stem, file, name, version, str(file))

    return _ask(plugin, RECIPES, entries_of)


def _ask(plugin: Any, hook: str, entries_of: Callable[[Any], Iterable[Entry]]) -> Offer:
    """The entries of one hook; none when the plugin does not implement it."""
    found: list[Entry] = []
    refusals: list[Refusal] = []
    for value in _values(plugin, hook, refusals):
        try:
            found += entries_of(value)
        except KeyboardInterrupt:
            raise
        except Refusal as refusal:
            refusals.append(refusal)
        except BaseException as error:
            reason = f"`{hook}` returned {_name(value)}, which cannot be looked at: {short(error)}"
            refusals.append(Refusal("AZ006", reason, details(error)))
    counts = Counter(entry.name for entry in found)
    twice = [name for name, count in counts.items() if count > 1]
    refusals += [Refusal("AZ009", f"`{hook}` offers `{name}` more than once", name=name) for name in twice]
    return Offer([entry for entry in found if entry.name not in twice], refusals)


def _values(plugin: Any, hook: str, refusals: list[Refusal]) -> list[Any]:
    """What a hook returns; when it raises on the way, what came before."""
    function = getattr(plugin, hook, None)
    if function is None or not hasattr(function, f"{hookspecs.PROJECT}_impl"):
        return []
    values: list[Any] = []
    try:
        offered = function()
        if isinstance(offered, Iterable) and not isinstance(offered, str):
            values.extend(offered)
        else:
            refusals.append(Refusal("AZ006", f"`{hook}` returned {_name(offered)}, not a list"))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a plugin may not end the program
        refusals.append(Refusal("AZ005", f"`{hook}` raised {short(error)}", details(error)))
    return values


def _card(value: Any, kind: Kind) -> Any:
    """A copy of the card of a component that keeps the contract."""
    if isinstance(value, Unimportable):
        reason = f"`{value.where}` cannot be imported: {short(value.error)}"
        raise Refusal("AZ001", reason, details(value.error), value.name)
    if not concrete(value, kind.bases):
        wanted = " or ".join(base.__name__ for base in kind.bases)
        reason = f"`{kind.hook}` returned {_name(value)}, which is no concrete {wanted} class"
        raise Refusal("AZ006", reason)
    try:
        return held(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        breach = error if isinstance(error, Breach) else Breach("AZ013", f"raised {short(error)}")
        called = getattr(getattr(value, "card", None), "name", None)
        called = called if isinstance(called, str) else value.__name__
        reason = f"`{kind.hook}` returned `{value.__name__}`, which {breach.reason}"
        raise Refusal(breach.code, reason, details(error), called) from error


def _name(value: Any) -> str:
    return f"the class `{value.__name__}`" if isinstance(value, type) else f"a `{type(value).__name__}`"
