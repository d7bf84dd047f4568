"""All that is drawn: the only file that knows rich."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from attnzoo.errors import Diagnostic, ZooError


def console(err: bool = False) -> Console:
    """A console; colours only on a terminal, `NO_COLOR` honoured. Piped output is wide enough for every table."""
    stream = sys.stderr if err else sys.stdout
    return Console(
        file=stream, highlight=False, soft_wrap=not stream.isatty(), width=None if stream.isatty() else 160
    )


def say(text: str = "", style: str = "") -> None:
    """One line, as it is: no markup is read in it."""
    console().print(Text(text, style=style))


def say_next(*commands: str) -> None:
    """The line with which every command ends."""
    line = Text("next: ", style="dim")
    line.append(" · ".join(commands), style="bold")
    console().print(line)


def say_json(data: Any) -> None:
    """Data for programs."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (), title: str = ""
) -> None:
    """A table; columns named in `right` are numbers. Cells are plain text."""
    drawn = Table(
        box=box.SIMPLE_HEAD, title=escape(title) or None, title_justify="left", pad_edge=False, expand=False
    )
    for name in columns:
        drawn.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console().print(drawn, soft_wrap=False)


def show_error(error: ZooError, as_json: bool = False) -> None:
    """All faults, compiler style on stderr; as data on stdout with `--json`."""
    if as_json:
        say_json({"errors": [diagnostic.as_dict() for diagnostic in error.diagnostics]})
        return
    out = console(err=True)
    for position, diagnostic in enumerate(error.diagnostics):
        if position:
            out.print()
        _draw(out, diagnostic)
    if len(error.diagnostics) > 1:
        out.print(Text(f"\n{len(error.diagnostics)} faults", style="bold"))


def _draw(out: Console, diagnostic: Diagnostic) -> None:
    first, *rest = diagnostic.lines()
    head, _, message = first.partition(": ")
    line = Text(head, style="bold red")
    line.append(f": {message}", style="bold")
    out.print(line)
    for text in rest:
        label, equals, tail = text.partition(": ")
        if text.startswith("  = "):
            out.print(Text.assemble(("  = ", "blue"), (label[4:], "bold"), equals, tail))
        else:
            style = "red" if set(text.partition("|")[2].strip()) == {"^"} else ""
            out.print(Text(text, style=style or "default"))


def count(number: float) -> str:
    """1234567 as `1.23 M`."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale:
            return (
                f"{number / scale:.3g} {unit}" if number / scale < 1000 else f"{number / scale:,.0f} {unit}"
            )
    return f"{number:.0f}"


def spaced(number: int) -> str:
    """121786 as `121 786`."""
    return f"{number:,}".replace(",", " ")


def share(part: float, whole: float) -> str:
    """The difference to a whole in per cent: `+2.3 %`."""
    return f"{100 * (part - whole) / whole:+.1f} %" if whole else ""


def seconds(value: float) -> str:
    """A duration for people."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
