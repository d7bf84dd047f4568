"""What goes wrong, said so that a person can mend it. Standard library only.

Library code raises a `ZooError`; it carries one or more `Diagnostic`s (code, sentence, place, why, help).
Only the command line draws them in colour; `str(error)` is the same text without colour.
"""

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Place:
    """A spot in a text, where lines and columns count from 1, or in data, which has keys.

    Args:
        file: Path or name of the text, as the user wrote it.
        line: Line of the spot.
        column: Column of the spot.
        width: How many characters are meant.
        text: The line itself, to be shown; empty when unknown.
        keys: Of data that never was a text: the way to the spot, `host.model.depth`; the line then counts values.
    """

    file: str
    line: int = 1
    column: int = 1
    width: int = 1
    text: str = ""
    keys: str | None = None

    def __str__(self) -> str:
        if self.keys is not None:
            return f"{_visible(self.file)}: {_visible(self.keys)}".removesuffix(": ")
        return f"{_visible(self.file)}:{self.line}:{self.column}"

    def as_dict(self) -> dict:
        """The spot as data, for `--json`."""
        where: dict = {"line": self.line, "column": self.column}
        return {"file": self.file} | ({"keys": self.keys} if self.keys is not None else where)


@dataclass(frozen=True)
class Diagnostic:
    """One fault: what is wrong, where, why it is wrong and what to do about it; or a note, which refuses nothing.

    Args:
        code: `AZnnn`; `docs/errors.md` has a section for each. A note has none.
        message: One sentence, lower case, names in backticks.
        place: Where in the user's text, if anywhere.
        why: The rule that is broken, when it is not obvious.
        help: The next step.
    """

    code: str
    message: str
    place: Place | None = None
    why: str = ""
    help: str = ""

    def __post_init__(self) -> None:
        # they quote what was written, which may be made to rule a terminal
        for name in ("message", "why", "help"):
            object.__setattr__(self, name, _visible(getattr(self, name)))

    def lines(self) -> list[str]:
        """The fault as plain text, compiler style."""
        out = [f"error[{self.code}]: {self.message}" if self.code else f"note: {self.message}"]
        if self.place is not None:
            number = str(self.place.line)
            pad = " " * len(number)
            out.append(f"{pad}--> {self.place}")
            if self.place.text:
                shown, column = _clip(self.place.text, self.place.column)
                out.append(f"{pad} |")
                out.append(f"{number} | {shown}")
                out.append(f"{pad} | {' ' * (column - 1)}{'^' * max(1, min(self.place.width, 60))}")
        if self.why:
            out.append(f"  = why:  {self.why}")
        if self.help:
            out.append(f"  = help: {self.help}")
        return out

    def as_dict(self) -> dict:
        """The fault as data, for `--json`."""
        return {
            "code": self.code,
            "message": self.message,
            "place": self.place.as_dict() if self.place else None,
            "why": self.why,
            "help": self.help,
        }


def _visible(text: str) -> str:
    """The text with a dot for every character that does not show, or changes how others show."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "·" for c in text)


def _clip(text: str, column: int, width: int = 100) -> tuple[str, int]:
    """A long line cut around the column, all of it visible, and the column in the cut line."""
    text = _visible(text)
    start = max(0, column - width // 2) if len(text) > width else 0
    return text[start : start + width], column - start


PLUGIN = ("AZ0", "AZ215")
"""How the codes of faults of plugins begin."""


class ZooError(Exception):
    """A fault of the input, with everything a person needs to mend it.

    Args:
        code: `AZnnn`.
        message: One sentence.
        place: Where in the user's text.
        why: The broken rule.
        help: The next step.
    """

    def __init__(self, code: str, message: str, *, place: Place | None = None, why: str = "", help: str = ""):
        self.diagnostics: tuple[Diagnostic, ...] = (Diagnostic(code, message, place, why, help),)
        super().__init__(code, message)

    @classmethod
    def of(cls, diagnostics: Iterable[Diagnostic]) -> Self:
        """All faults of a text together, in the order of the text; those of another file after them."""
        found = list(diagnostics)
        files = list(dict.fromkeys(d.place.file for d in found if d.place))
        ordered = sorted(
            found,
            key=lambda d: (
                (files.index(d.place.file), d.place.line, d.place.column) if d.place else (-1, 0, 0)
            ),
        )
        return _rebuild(cls, tuple(ordered))

    @property
    def exit_code(self) -> int:
        """How the command line ends: 3 when plugins alone are at fault, 2 otherwise."""
        return 3 if all(fault.code.startswith(PLUGIN) for fault in self.diagnostics) else 2

    @property
    def code(self) -> str:
        """The code of the first fault."""
        return self.diagnostics[0].code

    def __str__(self) -> str:
        blocks = ["\n".join(d.lines()) for d in self.diagnostics]
        return "\n\n".join(blocks)

    def __reduce__(self):
        return _rebuild, (type(self), self.diagnostics)


def _rebuild(cls: type["ZooError"], diagnostics: tuple[Diagnostic, ...]) -> Any:
    """An error with these faults, past a constructor that may want something else."""
    error = cls.__new__(cls)
    Exception.__init__(error, diagnostics[0].code, diagnostics[0].message)
    error.diagnostics = diagnostics
    return error


class PluginError(ZooError):
    """A plugin is at fault (AZ0xx)."""


class RecipeError(ZooError):
    """A recipe is at fault (AZ1xx text, AZ2xx names and options, AZ3xx composing)."""


class LayoutMismatch(ZooError):
    """Tokens do not fit their layout (AZ401), or what was prepared for (AZ403 too many, AZ408 another number)."""


class UnsupportedMask(ZooError):
    """A mechanism was handed a mask that it cannot honour (AZ402), or a mask that is none (AZ405)."""


class UnsupportedContext(ZooError):
    """A mechanism without cross-attention was handed a context (AZ404)."""


class MissingMap(ZooError):
    """A mechanism was not handed the map on the grid that its card names, or one that does not fit (AZ409)."""


class UnsupportedArgument(ZooError):
    """Something that `nn.MultiheadAttention` takes and a mechanism in its place cannot (AZ411)."""


class OptionError(RecipeError):
    """Options of a component that contradict each other, or its site (AZ214). Raise it in a constructor.

    Args:
        message: One sentence that names both.
        why: The broken rule.
        help: What to write instead.
    """

    def __init__(self, message: str, *, why: str = "", help: str = ""):
        super().__init__("AZ214", message, why=why, help=help)


class UnknownArgument(RecipeError, TypeError):
    """A keyword argument that nothing takes; a `TypeError` as for any other function."""


class CheckError(ZooError):
    """A conformance run was asked for something that does not exist (AZ5xx)."""


class DataError(ZooError):
    """A data set, or what is to be done to its images, is at fault (AZ7xx)."""


class RunError(ZooError):
    """A run, its settings or its checkpoints are at fault, or the disk they lie on (AZ8xx)."""


class VersionWarning(UserWarning):
    """A plugin is here in another version than a model or a run was made with."""


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """`` did you mean `x`? `` for the nearest candidate, or the empty string.

    Args:
        word: What was written.
        candidates: What may be written.
    """
    word, lowered = word.lower(), {c.lower(): c for c in candidates}
    slips = [candidate for candidate in lowered if _one_slip(word, candidate)]
    close = difflib.get_close_matches(word, slips or lowered, n=1, cutoff=0 if slips else 0.6)
    return f"did you mean `{lowered[close[0]]}`?" if close else ""


def _one_slip(one: str, other: str) -> bool:
    """Whether a letter was left out, added, changed or swapped; of short words difflib sees little."""
    if abs(len(one) - len(other)) > 1:
        return False
    start = len(os.path.commonprefix([one, other]))
    one, other = one[start:], other[start:]
    end = len(os.path.commonprefix([one[::-1], other[::-1]]))
    one, other = one[: len(one) - end], other[: len(other) - end]
    return max(len(one), len(other)) <= 1 or (len(one) == 2 and one == other[::-1])
