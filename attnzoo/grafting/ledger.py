"""The ledger of a graft: where every tensor of the donor went, and where every tensor of the graft comes from."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["copied", "reshaped", "new", "dropped"]
KINDS: tuple[Kind, ...] = ("copied", "reshaped", "new", "dropped")
"""Same name or another, and the same numbers in the same shape; rows or columns of the donor's, or another shape; not
of the donor; without a place in the graft."""
_BLOCK = re.compile(r"blocks\.(\d+)\.(.*)")


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Row(_Frozen):
    """One tensor, or one tensor's way from the donor into the graft. A tensor that goes to several places has several.

    Args:
        kind: What became of it.
        donor: Its name in the donor; null for a new one.
        donor_shape: Its shape there.
        graft: Its name in the graft; null for a dropped one.
        graft_shape: Its shape there.
    """

    kind: Kind
    donor: str | None = None
    donor_shape: tuple[int, ...] | None = None
    graft: str | None = None
    graft_shape: tuple[int, ...] | None = None


class Donor(_Frozen):
    """What builds the donor again.

    Args:
        name: What it is called: in timm, or by its recipe.
        architecture: Its name in timm.
        arguments: Of `timm.create_model`.
        pretrained_cfg: timm's description of its weights.
        sha256: Of its names and tensors, `attnzoo.train.checkpoint.fingerprint`.
    """

    name: str
    architecture: str
    arguments: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    sha256: str


class Ledger(_Frozen):
    """What became of every tensor.

    Args:
        donor: What builds the donor again.
        recipe: Name of the recipe that was put into it.
        rows: Of the donor's tensors in their order, then the new ones.
        difference: Largest difference between the first logits of graft and donor on one image of noise, both in eval
            mode; 0 says that they are equal bit for bit, null that they cannot be compared.
        notes: What a person should know.
    """

    donor: Donor
    recipe: str
    rows: tuple[Row, ...]
    difference: float | None
    notes: tuple[str, ...] = Field(default=())

    def counts(self) -> dict[Kind, int]:
        """How many tensors there are of each kind: of the graft, and for `dropped` of the donor."""
        names = {kind: {row.graft or row.donor for row in self.rows if row.kind == kind} for kind in KINDS}
        return {kind: len(found) for kind, found in names.items()}

    def held(self) -> dict[str, str]:
        """The donor's tensors that the graft holds as they are: name in the donor to name in the graft, the first."""
        found: dict[str, str] = {}
        for row in self.rows:
            if row.kind == "copied" and row.donor is not None and row.graft is not None:
                found.setdefault(row.donor, row.graft)
        return found

    def groups(self) -> list["Group"]:
        """The rows in short: blocks of which all is alike are one group, what is outside the blocks another."""
        outside: dict[Kind, list[Row]] = {}
        blocks: dict[int, dict[Kind, list[tuple[str, Row]]]] = {}
        for row in self.rows:
            found = _BLOCK.fullmatch(row.graft or row.donor or "")
            if found:
                blocks.setdefault(int(found[1]), {}).setdefault(row.kind, []).append((found[2], row))
            else:
                outside.setdefault(row.kind, []).append(row)
        groups = [
            Group(
                "outside the blocks",
                kind,
                tuple(row.graft or row.donor or "" for row in rows),
                _numbers(rows),
            )
            for kind, rows in sorted(outside.items(), key=lambda item: KINDS.index(item[0]))
        ]
        for numbers in _runs(blocks):
            first, last = numbers[0], numbers[-1]
            where = f"blocks.{first}" if first == last else f"blocks.{first} … blocks.{last}"
            for kind, pairs in sorted(blocks[first].items(), key=lambda item: KINDS.index(item[0])):
                rows = [row for number in numbers for _, row in blocks[number][kind]]
                names = tuple(dict.fromkeys(name for name, _ in pairs))
                groups.append(Group(where, kind, names, _numbers(rows), len(numbers)))
        return groups


@dataclass(frozen=True)
class Group:
    """Tensors of one kind in one part of the graft.

    Args:
        where: The part.
        kind: What became of them.
        names: Of one block's, without its number.
        numbers: How many numbers are in them, over all blocks.
        blocks: How many blocks are alike.
    """

    where: str
    kind: Kind
    names: tuple[str, ...]
    numbers: int
    blocks: int = 1

    @property
    def tensors(self) -> int:
        """How many tensors there are, over all blocks."""
        return len(self.names) * self.blocks


def _numbers(rows: Sequence[Row]) -> int:
    shapes = {row.graft or row.donor: row.graft_shape or row.donor_shape or () for row in rows}
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _runs(blocks: Mapping[int, Mapping[Kind, Sequence[tuple[str, Row]]]]) -> Iterator[list[int]]:
    """Numbers of neighbouring blocks in which all is alike."""
    run: list[int] = []
    for number in sorted(blocks):
        if run and _pattern(blocks[number]) != _pattern(blocks[run[-1]]):
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def _pattern(block: Mapping[Kind, Sequence[tuple[str, Row]]]) -> Counter:
    return Counter(
        (kind, name, row.donor_shape, row.graft_shape) for kind, pairs in block.items() for name, row in pairs
    )
