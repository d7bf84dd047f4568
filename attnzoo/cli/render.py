"""All that is drawn: the only file that knows rich."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from attnzoo.cli.output import stdout
from attnzoo.errors import Diagnostic, ZooError


def console(err: bool = False) -> Console:
    """A console; colours only on a terminal, `NO_COLOR` honoured. Piped output is wide enough for every table."""
    stream = sys.stderr if err else stdout()
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
    stdout().write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


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


@contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What `attnzoo.train` reports: a bar on a terminal, a line now and then otherwise.

    Args:
        quiet: Draw nothing.
    """
    if quiet:
        yield lambda event: None
    elif console().is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
        with Progress(*columns, console=console(), transient=True) as bar:
            task = bar.add_task("", total=None, figures="")

            def draw(event: dict[str, Any]) -> None:
                if event["event"] == "note":
                    bar.console.print(Text(event["text"], style="dim"))
                elif event["event"] == "step":
                    text = f"epoch {event['epoch']}"
                    bar.update(task, description=text, completed=event["step"], total=event["steps"],
                               figures=escape(_figures(event)))  # fmt: skip

            yield draw
    else:
        yield _lines()


def _lines(every: float = 10.0) -> Callable[[dict[str, Any]], None]:
    """Reports as plain lines, the first and the last epoch and not much more often than `every` seconds."""
    shown = -every
    step: dict[str, Any] = {}

    def line(event: dict[str, Any]) -> None:
        nonlocal shown, step
        if event["event"] == "note":
            say(event["text"])
        elif event["event"] == "step":
            step = event
        elif step["seconds"] - shown >= every or step["step"] == step["steps"]:
            shown = step["seconds"]
            say(f"epoch {event['epoch']}  step {step['step']}/{step['steps']}  {_figures(step | event)}")

    return line


def _figures(event: dict[str, Any]) -> str:
    accuracy = event["test_accuracy"]
    shown = [f"loss {event['train_loss']:.4f}", f"{event['images_per_second']:,.0f} {event['examples']}/s"]
    if accuracy is not None:
        shown.insert(1, f"accuracy {100 * accuracy:.2f} %")
    return "  ".join([*shown, f"{duration(event['left'])} left"])


def duration(value: float) -> str:
    """A long time for people: `1 h 05 min`, `3 min 20 s`, `12 s`."""
    minutes, rest = divmod(round(value), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


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
