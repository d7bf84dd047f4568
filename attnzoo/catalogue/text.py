"""Paragraphs and tables as plain text and as HTML."""

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 100
"""Characters to a line."""


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Args:
        rows: Of equally many cells; the last cell of a row may take several lines.
        columns: Heads of the columns; none for a table of names and values.
    """

    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [row for row in (self.columns, *self.rows) if row]
        widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]) - 1)]
        out = []
        for *cells, last in lines:
            front = "".join(f"{cell:{width}}  " for cell, width in zip(cells, widths, strict=True))
            room = max(24, WIDTH - len(front))
            for line in textwrap.wrap(last, room, break_long_words=False, break_on_hyphens=False) or [""]:
                out.append(f"{front}{line}".rstrip())
                front = " " * len(front)
        return "\n".join(out)

    def html(self) -> str:
        """A table."""
        head = "".join(f"<th style='text-align:left'>{html.escape(name)}</th>" for name in self.columns)
        rows = [
            "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row)
            for row in self.rows
        ]
        body = "".join(f"<tr>{row}</tr>" for row in ([head] if head else []) + rows)
        return f"<table>{body}</table>"


@dataclass(frozen=True)
class Verbatim:
    """Text whose lines are its own.

    Args:
        text: It.
    """

    text: str

    def __str__(self) -> str:
        return self.text

    def html(self) -> str:
        """A block of code."""
        return f"<pre>{html.escape(self.text)}</pre>"


@dataclass(frozen=True, repr=False)
class Sheet:
    """A few lines for a person: it prints as text, and notebooks show it as HTML.

    Args:
        title: The first line.
        parts: Paragraphs, tables and code below it.
    """

    title: str
    parts: tuple[str | Table | Verbatim, ...] = ()

    def __str__(self) -> str:
        blocks = [self.title]
        for part in self.parts:
            blocks.append("\n".join(map(_wrapped, part.splitlines())) if isinstance(part, str) else str(part))
        return "\n\n".join(blocks)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        title = f"<b>{html.escape(self.title)}</b>"
        parts = [
            f"<p>{html.escape(part)}</p>" if isinstance(part, str) else part.html() for part in self.parts
        ]
        return "".join([title, *parts])


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False)
