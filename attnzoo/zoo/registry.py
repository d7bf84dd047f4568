"""Names and what they stand for, with who provides it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from attnzoo.errors import Place, RecipeError, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One thing on offer.

    Args:
        name: Its own name.
        value: The thing.
        plugin: Name of the plugin that provides it; `attnzoo` for the built-ins.
        version: Version of the plugin's distribution.
        file: Where it is defined.
        card: Of a component: a copy of its card, as it was when it was taken.
    """

    name: str
    value: T
    plugin: str
    version: str
    file: str
    card: Any = field(default=None, repr=False)

    @property
    def full_name(self) -> str:
        """`plugin/name`, which is never ambiguous."""
        return f"{self.plugin}/{self.name}"


class Registry(Mapping[str, Entry[T]]):
    """What is on offer, by name. `plugin/name` works always, a bare name when one provider alone claims it.

    Args:
        kind: What the entries are, in the singular: `mechanism`.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._bare: dict[str, Entry[T]] = {}
        self._full: dict[str, Entry[T]] = {}
        self.conflicts: dict[str, list[Entry[T]]] = {}
        self._refused: dict[str, tuple[str, str]] = {}  # name, bare and full, to its plugin and a reason
        self.silent: list[str] = []  # plugins that could not be asked what they offer

    def add(self, entry: Entry[T], builtin: bool = False) -> list[Entry[T]]:
        """Add an entry; built-ins keep their bare name against everybody.

        Returns:
            The entries that already claim this name; empty when there is no conflict.
        """
        if entry.full_name in self._full:
            return [self._full[entry.full_name]]
        self._full[entry.full_name] = entry
        if self._refused.get(entry.name, ("",))[0] == "attnzoo":  # a name of ours, though its file is broken
            return []
        rivals = self.conflicts.get(entry.name) or (
            [self._bare[entry.name]] if entry.name in self._bare else []
        )
        if rivals and not builtin:
            if rivals[0].plugin != "attnzoo":
                self._bare.pop(entry.name, None)
            self.conflicts[entry.name] = [*rivals, entry]
            return rivals
        self._bare[entry.name] = entry
        return []

    def refuse(self, name: str, plugin: str, reason: str) -> None:
        """Remember why something that is offered was left out, so that whoever asks for it is told.

        Args:
            name: Its own name.
            plugin: Who offers it.
            reason: What is wrong with it.
        """
        for called in (name, f"{plugin}/{name}"):
            self._refused.setdefault(called, (plugin, reason))

    def knows(self, name: str) -> bool:
        """Whether `find` has more to say of a name than that there is no such thing."""
        return name in self or name in self.conflicts or name in self._refused

    def __getitem__(self, name: str) -> Entry[T]:
        return self._full[name] if "/" in name else self._bare[name]

    def __iter__(self) -> Iterator[str]:
        """Bare names, then full names of entries without a bare one, each sorted."""
        yield from sorted(self._bare)
        yield from sorted(
            full for full, entry in self._full.items() if self._bare.get(entry.name) is not entry
        )

    def __len__(self) -> int:
        return len(self._full)

    def find(self, name: str, at: Place | None = None) -> Entry[T]:
        """The entry called so.

        Args:
            name: Bare or full name.
            at: Where the name was written, for the error.

        Raises:
            RecipeError: AZ201 unknown (AZ204 for a recipe), AZ202 ambiguous, AZ205 on offer but left out.
        """
        if name in self:
            return self[name]
        rivals = self.conflicts.get(name, [])
        if rivals:
            owners = " and ".join(f"`{rival.plugin}`" for rival in rivals)
            full = " or ".join(f"`{rival.full_name}`" for rival in rivals)
            raise RecipeError(
                "AZ202",
                f"the {self.kind} `{name}` is offered by {owners}",
                place=at,
                help=f"write {full}",
            )
        if name in self._refused:
            plugin, reason = self._refused[name]
            raise RecipeError(
                "AZ205",
                f"the {self.kind} `{name}` of the plugin `{plugin}` could not be loaded",
                place=at,
                why=reason,
                help="`attnzoo doctor --verbose` shows more",
            )
        hint = did_you_mean(name, list(self))
        listing = f"`attnzoo list {self.kind}s` shows all {len(self)}"
        if self.silent:
            plugins = ", ".join(f"`{plugin}`" for plugin in self.silent)
            listing += f"; it may belong to {plugins}, which could not be loaded: `attnzoo doctor` says why"
        raise RecipeError(
            "AZ204" if self.kind == "recipe" else "AZ201",
            f"there is no {self.kind} called `{name}`",
            place=at,
            help=f"{hint} {listing}".strip(),
        )
