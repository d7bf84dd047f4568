"""Finds plugins, loads each on its own, gathers what they offer. A broken plugin never stops the others."""

import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from attnzoo.core import Fusion, Head, Intervention, Mechanism, Probe
from attnzoo.errors import PluginError
from attnzoo.version import VERSION
from attnzoo.zoo import builtin
from attnzoo.zoo.admission import Offer, Refusal, components, recipes, register
from attnzoo.zoo.blame import OURS, details, short
from attnzoo.zoo.contract import FUSION, INTERVENTION, MECHANISM, PROBE
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
        fatal: Whether the plugin, or what the reason speaks of, was left out.
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
        status: `loaded`, `in part` when some of what it offers was left out, `failed`, `switched off`, or `unfinished`
            while something else imports it.
        package: The top-level package that its entry point names.
    """

    name: str
    dist: str
    version: str
    seconds: float = 0.0
    status: str = "loaded"
    package: str = ""

    @property
    def works(self) -> bool:
        """Whether it was loaded, in whole or in part."""
        return self.status in ("loaded", "in part")


@dataclass
class Zoo:
    """What the plugins offer.

    Args:
        mechanisms: Mechanisms and heads by name.
        fusions: Fusions by name.
        probes: Probes by name.
        interventions: Interventions by name.
        recipes: Recipe files by name.
        providers: The plugins, built-in first.
        problems: What went wrong, plugin by plugin.
        unfinished: Modules of plugins that were just being imported, and are to be asked later.
    """

    mechanisms: Registry[type[Mechanism] | type[Head]] = field(default_factory=lambda: Registry("mechanism"))
    fusions: Registry[type[Fusion]] = field(default_factory=lambda: Registry("fusion"))
    probes: Registry[type[Probe]] = field(default_factory=lambda: Registry("probe"))
    interventions: Registry[type[Intervention]] = field(default_factory=lambda: Registry("intervention"))
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
        zoo._admit(OURS, VERSION, lambda: builtin, dist=OURS)
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
                zoo._admit(point.name, number, point.load, dist=dist, package=module.partition(".")[0])
        return zoo

    @property
    def outdated(self) -> bool:
        """Whether plugins that were unfinished are finished now."""
        return any(not _being_imported(module) for module in self.unfinished)

    @property
    def registries(self) -> "tuple[Registry[Any], ...]":
        """All that there is, by kind."""
        return self.mechanisms, self.fusions, self.probes, self.interventions, self.recipes

    @property
    def components(self) -> list[Entry]:
        """All mechanisms and fusions."""
        return [*self.mechanisms.values(), *self.fusions.values()]

    def _admit(
        self, name: str, number: str, load: Callable[[], Any], dist: str = "", package: str = ""
    ) -> None:
        """Load one plugin, ask its hooks, file what it offers; note what goes wrong instead of raising."""
        began = time.perf_counter()
        offers: list[tuple[Registry, Offer]] = []
        refusals: list[Refusal] = []
        try:
            self._refuse_taken(name)
            with redirect_stdout(sys.stderr):  # stdout belongs to the program, which may be writing JSON
                plugin = load()
                register(name, plugin)
                offers = [
                    (self.mechanisms, components(plugin, MECHANISM, name, number)),
                    (self.fusions, components(plugin, FUSION, name, number)),
                    (self.probes, components(plugin, PROBE, name, number)),
                    (self.interventions, components(plugin, INTERVENTION, name, number)),
                    (self.recipes, recipes(plugin, name, number)),
                ]
        except KeyboardInterrupt:
            raise
        except Refusal as refusal:
            refusals = [refusal]
        except BaseException as error:  # SystemExit too: a plugin may not end the program
            refusals = [Refusal("AZ001", f"its import failed with {short(error)}", details(error))]
        seconds = time.perf_counter() - began
        for registry, offer in offers:
            refusals += {refusal.reason: refusal for refusal in offer.refusals}.values()
            for refusal in offer.refusals:
                if refusal.name:
                    registry.refuse(refusal.name, name, refusal.reason)
        works = any(offer.entries for _, offer in offers)
        status = "in part" if refusals and works else "failed" if refusals else "loaded"
        self.providers.append(Provider(name, dist, number, seconds, status, package))
        self.problems += [Problem(name, r.code, r.reason, r.details) for r in refusals]
        for registry, offer in offers:
            for entry in offer.entries:
                self._file(registry, entry)
        for registry in self.registries if status == "failed" else ():
            registry.silent.append(name)
        self._restore_cards(name)
        if seconds > SLOW and status != "failed" and name != OURS:
            text = f"its import took {seconds:.1f} s; everything that uses attnzoo waits for it"
            self.problems.append(Problem(name, "AZ007", text, fatal=False))

    def _refuse_taken(self, name: str) -> None:
        """Two plugins of one name would make `plugin/name` ambiguous; nobody else may be called `attnzoo`."""
        for other in self.providers:
            if other.name == name and other.works:
                raise Refusal("AZ008", f"`{other.dist or name}` already provides a plugin called `{name}`")

    def _restore_cards(self, name: str) -> None:
        """Put back the cards that the plugin just loaded has changed."""
        for entry in [*self.components, *self.probes.values(), *self.interventions.values()]:
            if getattr(entry.value, "card", None) != entry.card:
                entry.value.card = replace(entry.card)
                text = f"it changed the card of `{entry.full_name}`, which was put back"
                self.problems.append(Problem(name, "AZ011", text, fatal=False))

    def _file(self, registry: Registry, entry: Entry) -> None:
        rivals = registry.add(entry, builtin=entry.plugin == OURS)
        if rivals:
            owners = " and ".join(f"`{rival.plugin}`" for rival in rivals)
            text = f"the {registry.kind} `{entry.name}` is also offered by {owners}; "
            text += f"write `{entry.full_name}` to mean this plugin's"
            self.problems.append(Problem(entry.plugin, "AZ012", text, fatal=False))


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


def loaded_components() -> list[Entry]:
    """The mechanisms and fusions of the zoo, if it was asked for; looking for a culprit loads nothing."""
    return _zoo.components if _zoo is not None else []


def when_loaded(callback: Callable[[], None]) -> None:
    """Call back now, or as soon as all plugins are imported; again when the unfinished ones are."""
    if not _loading:
        callback()
    if _loading or (_zoo is not None and _zoo.unfinished):
        _waiting.append(callback)
