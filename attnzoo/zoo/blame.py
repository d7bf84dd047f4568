"""Whose fault an error is: a traceback leads through the component that raised it."""

import linecache
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from attnzoo.errors import Place, PluginError, ZooError
from attnzoo.zoo.registry import Entry

OURS = "attnzoo"
"""Name of the built-in plugin, and of its package. A fault of a built-in is ours: its traceback is shown."""


def short(error: BaseException) -> str:
    """An error as one line: its type, and the first line of what it says."""
    try:
        text = str(error)
    except Exception:  # a plugin's own exception may fail at that, too
        text = ""
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text.strip() else type(error).__name__


def place_in(error: BaseException, package: str) -> Place | None:
    """The innermost line of a package that an error went through, or the line that is no Python.

    Args:
        error: The error.
        package: Name of a top-level package or module.
    """
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return Place(error.filename, error.lineno, error.offset or 1, text=(error.text or "").rstrip())
    lines = [(frame, line) for frame, line in _frames(error) if _package(frame) == package]
    if not lines:
        return None
    frame, line = lines[-1]
    file = frame.f_code.co_filename
    text = linecache.getline(file, line).rstrip()
    start = len(text) - len(text.lstrip())
    return Place(file, line, start + 1, len(text) - start, text)


@dataclass(frozen=True)
class Blame:
    """Who raised an error.

    Args:
        error: The error.
        entry: The mechanism or fusion, or one of its plugin where `known` is false.
        known: Whether it is this component and not just this plugin.
        place: Line of the plugin's code.
    """

    error: BaseException
    entry: Entry
    known: bool
    place: Place | None

    @property
    def where(self) -> str:
        """File and line, or the empty string."""
        return f"{self.place.file}:{self.place.line}" if self.place else ""

    def as_error(self) -> PluginError:
        """The error for people."""
        who = f"`{self.entry.full_name}`" if self.known else f"the plugin `{self.entry.plugin}`"
        check = self.entry.full_name if self.known else f"--plugin {self.entry.plugin}"
        return PluginError(
            "AZ013",
            f"{who} failed with {short(self.error)}",
            place=self.place,
            help=f"this is a fault of the plugin; `attnzoo check {check}` shows more",
        )


def blame(error: BaseException, entries: Iterable[Entry]) -> Blame | None:
    """Who raised an error, if it was a plugin: the innermost component of one on the way to it.

    An interrupt is the user's, and a bug of a built-in is ours.

    Args:
        error: What was raised.
        entries: The mechanisms and fusions that may have been asked.
    """
    if isinstance(error, KeyboardInterrupt):
        return None
    foreign = [entry for entry in entries if entry.plugin != OURS]
    owners = {entry.value: entry for entry in foreign}
    packages = {entry.value.__module__.partition(".")[0]: entry for entry in foreign}
    packages.pop(OURS, None)
    own = [entry for frame, _ in _frames(error) if (entry := owners.get(_class_of(frame)))]
    near = [entry for frame, _ in _frames(error) if (entry := packages.get(_package(frame)))]
    if not own and not near:
        return blame(error.__cause__, foreign) if error.__cause__ is not None else None
    entry = (own or near)[-1]
    known = bool(own) or sum(other.plugin == entry.plugin for other in foreign) == 1
    return Blame(error, entry, known, place_in(error, entry.value.__module__.partition(".")[0]))


@contextmanager
def blaming(entries: Iterable[Entry]) -> Iterator[None]:
    """Whatever a plugin raises becomes a fault of the plugin; what nobody is to blame for passes.

    Args:
        entries: The mechanisms and fusions that may be asked.

    Raises:
        PluginError: AZ013.
    """
    try:
        yield
    except BaseException as error:  # SystemExit too: a plugin may not end the program
        found = None if isinstance(error, ZooError) else blame(error, entries)
        if found is None:
            raise
        raise found.as_error() from error


def details(error: BaseException) -> str:
    """The traceback as text."""
    return "".join(traceback.format_exception(error))


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Frames and lines from where the error was caught to where it was raised."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _class_of(frame: FrameType) -> Any:
    """The class whose method runs in a frame, judged by its first argument."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if isinstance(first, type) else type(first)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def file_of(cls: type) -> str:
    """The file in which a class is defined; empty when there is none."""
    return getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
