"""Finds plugins, loads each on its own, and gathers what they offer. A broken plugin never stops the others."""

import inspect
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

import attnzoo

from attnzoo.core import Fusion, FusionCard, Head, Mechanism
from attnzoo.core.card import Card
from attnzoo.zoo import builtin, hookspecs
from attnzoo.zoo.registry import Entry, Registry

GROUP = "attnzoo"
ALLOW, DENY = "ATTNZOO_PLUGINS", "ATTNZOO_DISABLE_PLUGINS"
SLOW = 1.0  # seconds; an import that takes longer is worth a word


@dataclass(frozen=True)
class Problem:
    """What is wrong with a plugin.

    Args:
        plugin: Its name.
        code: `AZ0nn`.
        reason: One line.
        details: A traceback, where there is one.
        fatal: Whether the plugin was left out.
    """

    plugin: str
    code: str
    reason: str
    details: str = ""
    fatal: bool = True


@dataclass(frozen=True)
class Provider:
    """A plugin that was found.

    Args:
        name: Name of its entry point.
        dist: Its distribution.
        version: Version of the distribution.
        seconds: How long its import took.
        status: `loaded`, `failed` or `switched off`.
    """

    name: str
    dist: str
    version: str
    seconds: float = 0.0
    status: str = "loaded"


@dataclass
class Zoo:
    """What the plugins offer.

    Args:
        mechanisms: Mechanisms and heads by name.
        fusions: Fusions by name.
        recipes: Recipe files by name.
        providers: The plugins, built-in first.
        problems: What went wrong, plugin by plugin.
    """

    mechanisms: Registry[type[Mechanism] | type[Head]] = field(default_factory=lambda: Registry("mechanism"))
    fusions: Registry[type[Fusion]] = field(default_factory=lambda: Registry("fusion"))
    recipes: Registry[Path] = field(default_factory=lambda: Registry("recipe"))
    providers: list[Provider] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def of(cls, plugins: Iterable[tuple[str, Any]] = (), points: Iterable[EntryPoint] = ()) -> "Zoo":
        """A zoo of the built-ins, of plugins at hand, and of plugins to be imported.

        Args:
            plugins: Names and modules (or other objects with hooks).
            points: Entry points; each is loaded on its own.
        """
        zoo = cls()
        zoo._admit("attnzoo", attnzoo.__version__, lambda: builtin, dist="attnzoo")
        for name, plugin in plugins:
            zoo._admit(name, "", lambda plugin=plugin: plugin)
        for point in sorted(points, key=lambda p: (p.dist.name if p.dist else "", p.name)):
            dist, number = (point.dist.name, point.dist.version) if point.dist else ("", "")
            if _switched_off(point.name, dist):
                zoo.providers.append(Provider(point.name, dist, number, status="switched off"))
            else:
                zoo._admit(point.name, number, point.load, dist=dist)
        return zoo

    def _admit(self, name: str, number: str, load: Callable[[], Any], dist: str = "") -> None:
        """Load one plugin, ask its hooks, file what it offers; note what goes wrong instead of raising."""
        began = time.perf_counter()
        problem: Problem | None = None
        offers: list[tuple[Registry, list[Entry]]] = []
        try:
            plugin = load()
            _register(name, plugin)
            offers = [
                (self.mechanisms, self._ask(name, number, plugin, "attnzoo_mechanisms", (Mechanism, Head), Card)),
                (self.fusions, self._ask(name, number, plugin, "attnzoo_fusions", (Fusion,), FusionCard)),
                (self.recipes, self._ask_recipes(name, number, plugin)),
            ]
        except KeyboardInterrupt:
            raise
        except _Refusal as refusal:
            problem = Problem(name, refusal.code, refusal.reason, refusal.details)
        except BaseException as error:  # SystemExit too: a plugin may not end the program
            problem = Problem(name, "AZ001", f"its import failed with {_short(error)}", traceback.format_exc())
        seconds = time.perf_counter() - began
        self.providers.append(Provider(name, dist, number, seconds, "failed" if problem else "loaded"))
        if problem:
            self.problems.append(problem)
            return
        for registry, entries in offers:
            for entry in entries:
                self._file(registry, entry)
        if seconds > SLOW and name != "attnzoo":
            text = f"its import took {seconds:.1f} s; everything that uses attnzoo waits for it"
            self.problems.append(Problem(name, "AZ007", text, fatal=False))

    def _file(self, registry: Registry, entry: Entry) -> None:
        rivals = registry.add(entry, builtin=entry.plugin == "attnzoo")
        if rivals:
            owners = " and ".join(f"`{rival.plugin}`" for rival in rivals)
            text = (
                f"the {registry.kind} `{entry.name}` is also offered by {owners}; write `{entry.full_name}` to mean "
                f"this plugin's"
            )
            self.problems.append(Problem(entry.plugin, "AZ012", text, fatal=False))

    def _ask(self, name: str, number: str, plugin: Any, hook: str, bases: tuple[type, ...], card: type) -> list[Entry]:
        entries = []
        for value in _call(plugin, hook):
            if not (inspect.isclass(value) and issubclass(value, bases)) or inspect.isabstract(value):
                wanted = " or ".join(base.__name__ for base in bases)
                raise _Refusal("AZ006", f"`{hook}` returned {_name(value)}, which is no concrete {wanted} class")
            if not isinstance(getattr(value, "card", None), card):
                raise _Refusal("AZ006", f"`{hook}` returned `{value.__name__}`, which has no `card = {card.__name__}(...)`")
            entries.append(Entry(value.card.name, value, name, number, inspect.getsourcefile(value) or ""))
        return entries

    def _ask_recipes(self, name: str, number: str, plugin: Any) -> list[Entry]:
        entries = []
        for value in _call(plugin, "attnzoo_recipes"):
            if not isinstance(value, (str, Path)) or not Path(value).exists():
                raise _Refusal("AZ006", f"`attnzoo_recipes` returned {_name(value)}, which is no path of a file or folder")
            path = Path(value)
            for file in sorted(path.glob("*.yaml")) if path.is_dir() else [path]:
                entries.append(Entry(file.stem, file, name, number, str(file)))
        return entries


class _Refusal(Exception):
    """Why a plugin is left out."""

    def __init__(self, code: str, reason: str, details: str = ""):
        super().__init__(reason)
        self.code, self.reason, self.details = code, reason, details


def _register(name: str, plugin: Any) -> None:
    """Hold a plugin's hooks to their specification."""
    api = getattr(plugin, "ATTNZOO_API", hookspecs.API)
    if api != hookspecs.API:
        raise _Refusal("AZ004", f"it was written for hooks of version {api!r}; this attnzoo has version {hookspecs.API}")
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name)
    except pluggy.PluginValidationError as error:
        raise _Refusal("AZ003", f"a hook has a wrong signature: {str(error).splitlines()[-1].strip()}") from error
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = ", ".join(sorted(n for n in vars(hookspecs) if n.startswith("attnzoo_")))
        raise _Refusal("AZ002", f"it implements a hook that does not exist ({error}); the hooks are {known}") from error


def _call(plugin: Any, hook: str) -> Sequence[Any]:
    """What one hook of one plugin returns; nothing when it does not implement the hook."""
    function = getattr(plugin, hook, None)
    if function is None or not hasattr(function, f"{hookspecs.PROJECT}_impl"):
        return []
    try:
        return list(function())
    except KeyboardInterrupt:
        raise
    except TypeError as error:
        raise _Refusal("AZ006", f"`{hook}` did not return a list: {error}", traceback.format_exc()) from error
    except BaseException as error:
        raise _Refusal("AZ005", f"`{hook}` raised {_short(error)}", traceback.format_exc()) from error


def _short(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _name(value: Any) -> str:
    return f"the class `{value.__name__}`" if inspect.isclass(value) else f"a `{type(value).__name__}`"


def _switched_off(name: str, dist: str) -> bool:
    """What the environment says: an allow-list (empty: none at all) and a deny-list, of plugin or distribution names."""
    both = {name, dist}
    allowed = os.environ.get(ALLOW)
    if allowed is not None and not both & {word.strip() for word in allowed.split(",")}:
        return True
    return bool(both & {word.strip() for word in os.environ.get(DENY, "").split(",") if word.strip()})


_zoo: Zoo | None = None
_waiting: list[Callable[[], None]] | None = None


def load_zoo() -> Zoo:
    """The zoo of this environment: built-ins and installed plugins, read once."""
    global _zoo, _waiting
    if _zoo is None:
        _waiting = []
        try:
            _zoo = Zoo.of(points=entry_points(group=GROUP))
        finally:
            waiting, _waiting = _waiting, None
        for callback in waiting:
            callback()
    return _zoo


def when_loaded(callback: Callable[[], None]) -> None:
    """Call back now, or, while plugins are being imported, as soon as they are."""
    if _waiting is None:
        callback()
    else:
        _waiting.append(callback)
