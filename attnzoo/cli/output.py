"""Standard output belongs to answers: while a verb runs, what anybody else writes there reaches standard error.

Plugins print, their libraries do, and so do processes that they start. In the program itself (not where a verb is
called from Python) the answers get a copy of file 1 of their own, and file 1 becomes standard error for good: what C
libraries keep back is only written when the process ends.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import TextIO

from attnzoo.errors import ZooError


class Unwritable(ZooError):
    """Standard output takes no more, as on a full disk (AZ602)."""


class Answers(TextIOWrapper):
    """A file whose faults are told as such; that nobody reads any more is left to who wrote."""

    def write(self, text: str) -> int:
        with _told():
            return super().write(text)

    def flush(self) -> None:
        with _told():
            super().flush()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        text = f"cannot write to standard output: {(error.strerror or str(error)).lower()}"
        raise Unwritable("AZ602", text, help="look at where it leads") from None


_own: TextIO | None = None


def stdout() -> TextIO:
    """Where answers are written."""
    return _own or sys.stdout


def reserve() -> None:
    """Keep standard output for answers from now on."""
    global _own
    if _own is not None:
        return
    if sys.stdout is None:  # closed by whoever started us; file 1 may be anything by now
        _own = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return
    sys.stdout.flush()
    _own = Answers(open(os.dup(1), "wb"), encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
    try:
        os.dup2(2, 1)
    except OSError:  # standard error is closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    if _own.isatty() and not (os.isatty(0) or os.isatty(1) or os.environ.get("COLUMNS")):
        # who asks for the width of the terminal asks these
        os.environ["COLUMNS"] = str(os.get_terminal_size(_own.fileno()).columns)


def close() -> None:
    """Let go of standard output; what cannot be written any more is dropped."""
    if _own is not None:
        with suppress(OSError, Unwritable):
            _own.close()
