"""Names and what they stand for, with who provides it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

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
    """

    name: str
    value: T
    plugin: str
    version: str
    file: str

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

    def add(self, entry: Entry[T], builtin: bool = False) -> list[Entry[T]]:
        """Add an entry; built-ins keep their bare name against everybody.

        Returns:
            The entries that already claim this name; empty when there is no conflict.
        """
        if entry.full_name in self._full:
            return [self._full[entry.full_name]]
        self._full[entry.full_name] = entry
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
            RecipeError: AZ201 unknown (AZ204 for a recipe), AZ202 ambiguous.
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
        hint = did_you_mean(name, list(self))
        listing = f"`attnzoo list {self.kind}s` shows all {len(self)}"
        raise RecipeError(
            "AZ204" if self.kind == "recipe" else "AZ201",
            f"there is no {self.kind} called `{name}`",
            place=at,
            help=f"{hint} {listing}".strip(),
        )
