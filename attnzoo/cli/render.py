"""All that is drawn: the only file that knows rich.

On a terminal lines are broken between words only, and a table drops columns that find no room and names them; what is
piped is whole, one row to a line.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from attnzoo.cli.output import stdout
from attnzoo.errors import Diagnostic, ZooError

GLUE = "\N{NO-BREAK SPACE}"
"""A space at which no line is broken, as in `121 786` and `2.1 M`; written as a plain one."""
JOINER = "\N{WORD JOINER}"
"""Between two letters of a name in a script without spaces: no line is broken there; not written."""
GAP = 2
"""Cells between two columns."""
ENDLESS = 1_000_000
"""Width of what is no terminal, in cells."""


def console(err: bool = False) -> Console:
    """A console; colours only on a terminal, `NO_COLOR` honoured. What is piped has lines of any length."""
    stream = sys.stderr if err else stdout()
    return Console(file=stream, highlight=False, width=None if stream.isatty() else ENDLESS)


def piped() -> bool:
    """Whether answers go to something other than a terminal."""
    return not stdout().isatty()


def say(text: str = "", style: str = "") -> None:
    """A paragraph, broken between words where it is too long; no markup is read in it."""
    out = console()
    for line in wrap(text, out.width):
        _put(out, (line, style))


def warn(text: str) -> None:
    """A paragraph on stderr."""
    out = console(err=True)
    for line in wrap(text, out.width):
        _put(out, (line, "yellow"))


def say_text(text: str) -> None:
    """A text as it stands in a file: its lines are its own."""
    out = console()
    for line in text.splitlines():
        _put(out, line)


def say_next(*commands: str) -> None:
    """The line with which every command ends; a command to a line where they do not fit beside each other."""
    out, label = console(), "next: "
    if cell_len(label + " · ".join(commands)) <= out.width:
        commands = (" · ".join(commands),)
    lines = [line for one in commands for line in wrap(" " * len(label) + one, out.width, hang=2)]
    _put(out, (label, "dim"), (lines[0].lstrip(" "), "bold"))
    for line in lines[1:]:
        _put(out, (line, "bold"))


def say_json(data: Any) -> None:
    """Data for programs; numbers that JSON has no word for (NaN, infinity) are null."""
    text = json.dumps(_finite(data), indent=2, ensure_ascii=False, default=str, allow_nan=False)
    stdout().write(text + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        name: Its head.
        rank: 0 is always shown; of the others the highest rank is the first to go where there is no room.
        right: Whether it holds numbers.
        wrap: Narrowest width, in cells, at which its words may stand on several lines; with 0 a cell is one line.
    """

    name: str
    rank: int = 0
    right: bool = False
    wrap: int = 0

    def widths(self, cells: Sequence[str]) -> tuple[int, int]:
        """The least and the natural width, in cells; a word and the head always fit."""
        head, natural = cell_len(self.name), max(map(cell_len, cells), default=0)
        words = max(map(_longest, cells), default=0)
        least = max(words, min(natural, self.wrap)) if self.wrap else natural
        return max(head, least), max(head, natural)


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    title: str = "",
    above: Mapping[int, str] = MappingProxyType({}),
) -> None:
    """A table as wide as the terminal allows.

    Columns that find no room are named below it. Where not even those of rank 0 stand beside each other, each row
    becomes a list of all its cells.

    Args:
        columns: What the table has.
        rows: Cells of plain text.
        title: A line above it.
        above: Lines above rows, by the number of the row.
    """
    out = console()
    rows = [[_clean(cell) for cell in row] for row in rows]
    sizes = [column.widths([row[i] for row in rows]) for i, column in enumerate(columns)]
    if title:
        _put(out, (title, "bold"))
    shown = _shown(columns, [least for least, _ in sizes], out.width)
    if shown:
        widths = _spread([sizes[i] for i in shown], out.width)
        _grid(out, [columns[i] for i in shown], [[row[i] for i in shown] for row in rows], widths, above)
        lost = ", ".join(column.name for i, column in enumerate(columns) if i not in shown)
        if lost:
            pipe = _glued("`| less -S`")
            say(
                f"left out at {out.width} columns: {lost} · a wider terminal, {pipe} or --json shows them",
                "dim",
            )
    else:
        for number, row in enumerate(rows):
            _part(out, above.get(number))
            for line in wrap(_whole(row[0]), out.width) if row[0] else []:
                _put(out, (line, "bold"))
            others = [
                (column.name, cell if column.wrap else _whole(cell))
                for column, cell in list(zip(columns, row, strict=True))[1:]
                if cell
            ]
            _facts(out, others, indent=2)
    _put(out)


def facts(pairs: Sequence[tuple[str, str]], indent: int = 0) -> None:
    """What is known of one thing: a name and a text to a line, the text below where it finds no room beside.

    Args:
        pairs: Names and texts.
        indent: Of all lines, in cells.
    """
    _facts(console(), [(name, _clean(text)) for name, text in pairs], indent)


def _facts(out: Console, pairs: Sequence[tuple[str, str]], indent: int) -> None:
    label = max((cell_len(name) for name, _ in pairs), default=0)
    beside = out.width - indent - label - GAP
    for name, text in pairs:
        below = _longest(text) > beside
        lines = wrap(text, out.width - indent - GAP if below else beside)
        margin = " " * (indent + (GAP if below else label + GAP))
        first = "" if below else _padded("", label - cell_len(name) + GAP) + lines.pop(0)
        _put(out, (" " * indent + name, "bold"), first)
        for line in lines:
            _put(out, _indented(line, margin, out.width))


def wrap(text: str, width: int, hang: int = 0) -> list[str]:
    """Lines of at most `width` cells, broken between words only; a longer word has a line of its own.

    Args:
        text: Its line breaks stay, and lines after a break begin below the first word, behind its bullet or branch.
        width: In cells.
        hang: By how many cells more they are indented.
    """
    lines = []
    for paragraph in text.split("\n"):
        indent = " " * (len(paragraph) - len(paragraph.lstrip(f" └{GLUE}")) + hang)
        line = ""
        for word in _words(paragraph.rstrip(" ")):
            if line and cell_len(line) + cell_len(word) > width:
                lines.append(line)
                word = word.lstrip(" ")
                line = _indented(word, indent, width)
            else:
                line += word
        lines.append(line)
    return lines


def _words(text: str) -> list[str]:
    """Pieces between which a line may be broken: before spaces, and between letters of scripts that write without.

    A per cent sign stays with its number.
    """
    pieces, start = [], 0
    for i in range(1, len(text)):
        before, after = text[i - 1], text[i]
        wide = after.isalpha() and cell_len(before) == cell_len(after) == 2
        if wide or (after == " " and text[start:i].strip(" ") and not text.startswith(" %", i)):
            pieces.append(text[start:i])
            start = i
    return [*pieces, text[start:]]


def _longest(text: str) -> int:
    return max(cell_len(word.strip(" ")) for word in _words(text))


def _shown(columns: Sequence[Column], least: Sequence[int], width: int) -> list[int]:
    """Which columns stand beside each other; none when those of rank 0 do not."""
    for rank in sorted({column.rank for column in columns}, reverse=True):
        shown = [i for i, column in enumerate(columns) if column.rank <= rank]
        if sum(least[i] for i in shown) + GAP * (len(shown) - 1) <= width:
            return shown
    return []


def _spread(sizes: Sequence[tuple[int, int]], width: int) -> list[int]:
    """Widths of columns: what is left over goes to those that wrap, by what they lack."""
    left = width - sum(least for least, _ in sizes) - GAP * (len(sizes) - 1)
    lacking = sum(natural - least for least, natural in sizes)
    share = min(1.0, left / lacking) if lacking else 0.0
    return [least + int(share * (natural - least)) for least, natural in sizes]


def _part(out: Console, text: str | None) -> None:
    """A line that stands above some rows, and the gap above it."""
    if text is not None:
        _put(out)
        for line in wrap(text, out.width):
            _put(out, (line, "italic"))


def _grid(
    out: Console,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    above: Mapping[int, str],
) -> None:
    def line(cells: Sequence[str]) -> str:
        aligned = [
            _padded(cell, width, column.right)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        ]
        return (" " * GAP).join(aligned).rstrip(" ")

    _put(out, (line([column.name for column in columns]), "bold"))
    _put(out, ("─" * (sum(widths) + GAP * (len(widths) - 1)), "dim"))
    for number, row in enumerate(rows):
        _part(out, above.get(number))
        cells = [wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            _put(out, line(parts))


def _padded(text: str, width: int, right: bool = False) -> str:
    room = " " * (width - cell_len(text))
    return room + text if right else text + room


def _indented(text: str, indent: str, width: int) -> str:
    """The text behind as much of the indent as leaves it whole."""
    return indent[: max(0, width - cell_len(text))] + text


def _clean(text: str) -> str:
    """A cell on one line, with nothing in it that rules a terminal."""
    shown = "".join(c if c.isprintable() or c == GLUE else " " if c.isspace() else "·" for c in text)
    return shown.rstrip(" ")


def _whole(cell: str) -> str:
    """A cell whose words hold together in any script."""
    return cell if cell.isascii() else JOINER.join(cell)


def _put(out: Console, *pieces: str | tuple[str, str]) -> None:
    """One line as it is: text, or texts with a style."""
    styled = [(piece, "") if isinstance(piece, str) else piece for piece in pieces]
    plain = [(text.replace(GLUE, " ").replace(JOINER, ""), style) for text, style in styled]
    out.print(Text.assemble(*plain), soft_wrap=True)


def say_notes(notes: Iterable[Diagnostic]) -> None:
    """What a person should know of a recipe that holds; on stderr."""
    for note in notes:
        _draw(console(err=True), note)


def show_error(error: ZooError, as_json: bool = False) -> None:
    """All faults, compiler style on stderr; as data on stdout with `--json`."""
    if as_json:
        say_json({"errors": [diagnostic.as_dict() for diagnostic in error.diagnostics]})
        return
    out = console(err=True)
    for position, diagnostic in enumerate(error.diagnostics):
        if position:
            _put(out)
        _draw(out, diagnostic)
    if len(error.diagnostics) > 1:
        _put(out)
        _put(out, (f"{len(error.diagnostics)} faults", "bold"))


def _draw(out: Console, diagnostic: Diagnostic) -> None:
    """A fault: sentences are wrapped, the lines that quote a text are not."""
    for text in diagnostic.lines():
        label, _, _ = text.partition(": ")
        if text.startswith(("error[", "note")):
            first, *rest = wrap(text, out.width, hang=2)
            _put(
                out,
                (label, "bold red" if diagnostic.code else "bold cyan"),
                (first.removeprefix(label), "bold"),
            )
            for line in rest:
                _put(out, (line, "bold"))
        elif text.startswith("  = "):
            first, *rest = wrap(text, out.width, hang=8)
            _put(out, ("  = ", "blue"), (label[4:], "bold"), first.removeprefix(label))
            for line in rest:
                _put(out, line)
        else:
            _put(out, (text, "red" if set(text.partition("|")[2].strip()) == {"^"} else ""))


@contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What `attnzoo.train` reports: a bar on a terminal, a line now and then otherwise.

    Args:
        quiet: Write nothing to stdout; what comes within an epoch goes to stderr all the same.
    """
    out = console()
    if out.is_terminal and not quiet:
        drawn = out.width // 5
        columns = (TextColumn("{task.description}"), BarColumn(drawn), TextColumn("{task.fields[figures]}"))
        with Progress(*columns, console=out, transient=True) as bar:
            task = bar.add_task("", total=None, figures="")

            def draw(event: dict[str, Any]) -> None:
                if event["event"] == "note":
                    say(event["text"], "dim")
                elif event["event"] == "step":
                    text = f"epoch {event['epoch']}"
                    figures = _figures(event, out.width - drawn - len(text) - 2).replace(GLUE, " ")
                    bar.update(
                        task,
                        description=text,
                        completed=event["step"],
                        total=event["steps"],
                        figures=escape(figures),
                    )

            yield draw
    else:
        yield _lines(quiet)


EVERY = 10.0
"""Seconds between two plain lines of progress, at least."""
PER_EPOCH = 20
"""Lines within an epoch, at most."""


def _lines(quiet: bool = False) -> Callable[[dict[str, Any]], None]:
    """Reports as plain lines: epochs and notes on stdout, steps on stderr; not much more often than `EVERY` seconds.

    The first and the last epoch are always told, the steps of an epoch only when it takes long.
    """
    shown = -EVERY  # when an epoch was told
    said: float | None = None  # when a step was told, or its epoch began
    share, step = 0, dict[str, Any]()

    def line(event: dict[str, Any]) -> None:
        nonlocal shown, said, share, step
        if event["event"] == "note":
            if not quiet:
                say(event["text"])
        elif event["event"] == "step":
            step, now = event, event["seconds"]
            if said is None or event["epoch_step"] == 1:
                said, share = now, 0
            reached = event["epoch_step"] * PER_EPOCH // event["epoch_steps"]
            if share < reached < PER_EPOCH and now - said >= EVERY:
                said, share = now, reached
                console(err=True).print(Text(_progress_line(event).replace(GLUE, " ")))
        elif not quiet and (step["seconds"] - shown >= EVERY or step["step"] == step["steps"]):
            shown = step["seconds"]
            say(_progress_line(step | event))

    return line


def _figures(event: dict[str, Any], room: int = ENDLESS) -> str:
    """Loss, accuracy, speed and time left, as many of them as there is room for."""
    shown = {
        "loss": f"loss {event['train_loss']:.4f}",
        "accuracy": "" if event["test_accuracy"] is None else f"accuracy {percent(event['test_accuracy'])}",
        "speed": f"{event['images_per_second']:,.0f} {event['examples']}/s",
        "left": f"{duration(event['left'])} left",
    }
    for dispensable in ("speed", "left", "accuracy"):
        if cell_len("  ".join(filter(None, shown.values()))) > room:
            del shown[dispensable]
    return "  ".join(filter(None, shown.values()))


def _progress_line(event: dict[str, Any]) -> str:
    return f"epoch {event['epoch']}  step {event['step']}/{event['steps']}  {_figures(event)}"


def duration(value: float) -> str:
    """A long time for people: `1 h 05 min`, `3 min 20 s`, `12 s`."""
    minutes, rest = divmod(round(value), 60)
    if minutes >= 60:
        return _glued(f"{minutes // 60} h {minutes % 60:02} min")
    return _glued(f"{minutes} min {rest:02} s" if minutes else f"{rest} s")


def count(number: float) -> str:
    """1234567 as `1.23 M`."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale:
            part = number / scale
            return _glued(f"{part:.3g} {unit}" if part < 1000 else f"{part:,.0f} {unit}")
    return f"{number:.0f}"


def spaced(number: int) -> str:
    """121786 as `121 786`."""
    return f"{number:,}".replace(",", GLUE)


def percent(share: float) -> str:
    """0.1234 as `12.34 %`."""
    return _glued(f"{100 * share:.2f} %")


def share(part: float, whole: float) -> str:
    """The difference to a whole in per cent: `+2.3 %`."""
    return _glued(f"{100 * (part - whole) / whole:+.1f} %") if whole else ""


def seconds(value: float) -> str:
    """A duration for people."""
    return _glued(f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s")


def _glued(text: str) -> str:
    return text.replace(" ", GLUE)
