"""Finds plugins, loads each on its own, gathers what they offer. A broken plugin never stops the others."""

import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

import attnzoo
from attnzoo.core import Card, Fusion, FusionCard, Head, Mechanism, Pool, options_of
from attnzoo.errors import PluginError
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
        status: `loaded`, `failed`, `switched off`, or `unfinished` while something else imports it.
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
        unfinished: Modules of plugins that were just being imported, and are to be asked later.
    """

    mechanisms: Registry[type[Mechanism] | type[Head]] = field(default_factory=lambda: Registry("mechanism"))
    fusions: Registry[type[Fusion]] = field(default_factory=lambda: Registry("fusion"))
    recipes: Registry[Path] = field(default_factory=lambda: Registry("recipe"))
    providers: list[Provider] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

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
        for dist, number, point in sorted((*_distribution(p), p) for p in points):
            module = point.value.partition(":")[0].strip()  # `point.module` raises for what is no module
            if _switched_off(point.name, dist):
                zoo.providers.append(Provider(point.name, dist, number, status="switched off"))
            elif _being_imported(module):
                zoo.providers.append(Provider(point.name, dist, number, status="unfinished"))
                zoo.unfinished.append(module)
            else:
                zoo._admit(point.name, number, point.load, dist=dist)
        return zoo

    @property
    def outdated(self) -> bool:
        """Whether plugins that were unfinished are finished now."""
        return any(not _being_imported(module) for module in self.unfinished)

    def _admit(self, name: str, number: str, load: Callable[[], Any], dist: str = "") -> None:
        """Load one plugin, ask its hooks, file what it offers; note what goes wrong instead of raising."""
        began = time.perf_counter()
        problem: Problem | None = None
        offers: list[tuple[Registry, list[Entry]]] = []
        try:
            self._refuse_taken(name)
            with redirect_stdout(sys.stderr):  # stdout belongs to the program, which may be writing JSON
                plugin = load()
                _register(name, plugin)
                offers = [
                    (
                        self.mechanisms,
                        self._ask(name, number, plugin, "attnzoo_mechanisms", (Mechanism, Head, Pool), Card),
                    ),
                    (self.fusions, self._ask(name, number, plugin, "attnzoo_fusions", (Fusion,), FusionCard)),
                    (self.recipes, self._ask_recipes(name, number, plugin)),
                ]
        except KeyboardInterrupt:
            raise
        except _Refusal as refusal:
            problem = Problem(name, refusal.code, refusal.reason, refusal.details)
        except BaseException as error:  # SystemExit too: a plugin may not end the program
            problem = Problem(
                name, "AZ001", f"its import failed with {_short(error)}", traceback.format_exc()
            )
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

    def _refuse_taken(self, name: str) -> None:
        """Two plugins of one name would make `plugin/name` ambiguous; nobody else may be called `attnzoo`."""
        for other in self.providers:
            if other.name == name and other.status == "loaded":
                raise _Refusal("AZ008", f"`{other.dist or name}` already provides a plugin called `{name}`")

    def _file(self, registry: Registry, entry: Entry) -> None:
        rivals = registry.add(entry, builtin=entry.plugin == "attnzoo")
        if rivals:
            owners = " and ".join(f"`{rival.plugin}`" for rival in rivals)
            text = f"the {registry.kind} `{entry.name}` is also offered by {owners}; "
            text += f"write `{entry.full_name}` to mean this plugin's"
            self.problems.append(Problem(entry.plugin, "AZ012", text, fatal=False))

    def _ask(
        self, name: str, number: str, plugin: Any, hook: str, bases: tuple[type, ...], card: type
    ) -> list[Entry]:
        entries = []
        for value in _call(plugin, hook):
            if not _concrete(value, bases):
                wanted = " or ".join(base.__name__ for base in bases)
                raise _Refusal(
                    "AZ006", f"`{hook}` returned {_name(value)}, which is no concrete {wanted} class"
                )
            if not isinstance(getattr(value, "card", None), card):
                raise _Refusal(
                    "AZ006",
                    f"`{hook}` returned `{value.__name__}`, which has no `card = {card.__name__}(...)`",
                )
            try:
                options_of(value)
            except Exception as error:
                text = f"`{hook}` returned `{value.__name__}`, whose options cannot be read: {_short(error)}"
                raise _Refusal("AZ006", text, traceback.format_exc()) from error
            entries.append(Entry(value.card.name, value, name, number, _file_of(value)))
        return _distinct(hook, entries)

    def _ask_recipes(self, name: str, number: str, plugin: Any) -> list[Entry]:
        entries = []
        for value in _call(plugin, "attnzoo_recipes"):
            if not isinstance(value, Path):
                raise _Refusal(
                    "AZ006", f"`attnzoo_recipes` returned {_name(value)}, which is no pathlib.Path"
                )
            if not value.is_absolute() or not value.exists():
                why = "does not exist" if value.is_absolute() else "depends on the current folder"
                raise _Refusal("AZ006", f"`attnzoo_recipes` returned the path `{value}`, which {why}")
            for file in sorted(value.glob("*.yaml")) if value.is_dir() else [value]:
                entries.append(Entry(file.stem, file, name, number, str(file)))
        return _distinct("attnzoo_recipes", entries)


class _Refusal(Exception):
    """Why a plugin is left out."""

    def __init__(self, code: str, reason: str, details: str = ""):
        super().__init__(reason)
        self.code, self.reason, self.details = code, reason, details


def _register(name: str, plugin: Any) -> None:
    """Hold a plugin's hooks to their specification."""
    api = getattr(plugin, "ATTNZOO_API", hookspecs.API)
    if api != hookspecs.API:
        raise _Refusal(
            "AZ004", f"it was written for hooks of version {api!r}; this attnzoo has version {hookspecs.API}"
        )
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name)
    except pluggy.PluginValidationError as error:
        raise _Refusal(
            "AZ003", f"a hook has a wrong signature: {str(error).splitlines()[-1].strip()}"
        ) from error
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = ", ".join(sorted(n for n in vars(hookspecs) if n.startswith("attnzoo_")))
        raise _Refusal(
            "AZ002", f"it implements a hook that does not exist ({error}); the hooks are {known}"
        ) from error


def _call(plugin: Any, hook: str) -> Sequence[Any]:
    """What one hook of one plugin returns; nothing when it does not implement the hook."""
    function = getattr(plugin, hook, None)
    if function is None or not hasattr(function, f"{hookspecs.PROJECT}_impl"):
        return []
    try:
        offered = function()
        values = list(offered) if isinstance(offered, Iterable) and not isinstance(offered, str) else None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _Refusal("AZ005", f"`{hook}` raised {_short(error)}", traceback.format_exc()) from error
    if values is None:
        raise _Refusal("AZ006", f"`{hook}` returned {_name(offered)}, not a list")
    return values


def _concrete(value: Any, bases: tuple[type, ...]) -> bool:
    return inspect.isclass(value) and issubclass(value, bases) and not inspect.isabstract(value)


def _file_of(cls: type) -> str:
    return getattr(sys.modules.get(cls.__module__), "__file__", None) or ""


def _distinct(hook: str, entries: list[Entry]) -> list[Entry]:
    """The entries, unless two have one name."""
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise _Refusal("AZ009", f"`{hook}` offers `{name}` more than once")
    return entries


def _short(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _name(value: Any) -> str:
    return f"the class `{value.__name__}`" if inspect.isclass(value) else f"a `{type(value).__name__}`"


def _distribution(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution of an entry point; empty where they cannot be read."""
    try:
        return (str(point.dist.name), str(point.dist.version)) if point.dist else ("", "")
    except Exception:  # whatever broken metadata makes importlib raise
        return "", ""


def _being_imported(module: str) -> bool:
    """Whether an import of this module has begun and not ended: it cannot be asked for its hooks yet."""
    return getattr(getattr(sys.modules.get(module), "__spec__", None), "_initializing", False)


def _switched_off(name: str, dist: str) -> bool:
    """What the environment says: an allow-list (empty: none) and a deny-list, of plugins or distributions."""
    both = {name, dist}
    allowed = os.environ.get(ALLOW)
    if allowed is not None and not both & {word.strip() for word in allowed.split(",")}:
        return True
    return bool(both & {word.strip() for word in os.environ.get(DENY, "").split(",") if word.strip()})


_zoo: Zoo | None = None
_loading = False
_waiting: list[Callable[[], None]] = []


def load_zoo() -> Zoo:
    """The zoo of this environment: built-ins and installed plugins, read once.

    Raises:
        PluginError: AZ010, when a plugin asks for the zoo while it is itself being imported.
    """
    global _zoo, _loading
    if _loading:
        raise PluginError(
            "AZ010",
            "the zoo was asked for while its plugins are being imported",
            help="compose and look things up inside functions, not when a module is imported",
        )
    if _zoo is None or _zoo.outdated:
        _loading = True
        try:
            _zoo = Zoo.of(points=entry_points(group=GROUP))
        finally:
            _loading = False
        waiting = list(_waiting)
        _waiting.clear()
        for callback in waiting:
            when_loaded(callback)
    return _zoo


def when_loaded(callback: Callable[[], None]) -> None:
    """Call back now, or as soon as all plugins are imported; again when the unfinished ones are."""
    if not _loading:
        callback()
    if _loading or (_zoo is not None and _zoo.unfinished):
        _waiting.append(callback)
