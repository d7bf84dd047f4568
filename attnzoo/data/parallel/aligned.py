"""Two files: line 7 of one is the translation of line 7 of the other."""

import re
from collections.abc import Sequence
from pathlib import Path

from attnzoo.data.parallel.corpus import Corpus, Line
from attnzoo.data.parallel.text import LANGUAGE, lines_of, path_of
from attnzoo.errors import DataError, Place


def read_aligned(name: str) -> Corpus:
    """A corpus from two files of the same number of lines.

    Args:
        name: `aligned:FILE:FILE`, in UTF-8; the source comes first. Endings such as `.en` and `.es` name the languages.

    Raises:
        DataError: AZ709 when a file cannot be read, AZ710 when they are of unequal length, AZ711 when one is not
            UTF-8, AZ712 when the name has not two paths.
    """
    one, other = paths_of(name)
    lines = side_by_side(lines_of(one), lines_of(other), str(one), str(other))
    return Corpus(name, _languages(one, other), lines)


def paths_of(name: str) -> tuple[Path, Path]:
    """The two paths in a name.

    Args:
        name: As for `read_aligned`.

    Raises:
        DataError: AZ712 when there are not two.
    """
    parts = name.split(":")[1:]
    if len(parts) != 2:
        raise DataError(
            "AZ712",
            f"`{name}` names {len(parts)} file{'' if len(parts) == 1 else 's'}, not 2",
            why="a colon ends a path, so no path may hold one",
            help="write `aligned:FILE:FILE`; rename a file or folder that has a colon in its name",
        )
    one, other = (path_of(part, name) for part in parts)
    return one, other


def side_by_side(sources: Sequence[str], targets: Sequence[str], file: str, other: str) -> tuple[Line, ...]:
    """Lines of the same number together.

    Args:
        sources: Lines of the one file.
        targets: Lines of the other one.
        file: Name of the one.
        other: Name of the other.

    Raises:
        DataError: AZ710 when they are of unequal length.
    """
    common = min(len(sources), len(targets))
    if len(sources) != len(targets):
        longer, lines = (file, sources) if len(sources) > len(targets) else (other, targets)
        raise DataError(
            "AZ710",
            f"`{file}` has {len(sources):,} lines, `{other}` has {len(targets):,}",
            place=Place(longer, common + 1, 1, len(lines[common]), lines[common]),
            why="this line has no partner; where the first line is missing is not known, so no pair can be trusted",
        )
    return tuple(Line(sources[i], targets[i], f"{file}:{i + 1}") for i in range(common))


def _languages(one: Path, other: Path) -> tuple[str, str]:
    """From the endings of the files, or just what they are."""
    ends = one.suffix[1:], other.suffix[1:]
    return (
        ends if all(re.fullmatch(LANGUAGE, e) for e in ends) and len(set(ends)) == 2 else ("source", "target")
    )
