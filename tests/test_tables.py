"""What is printed at any width: no word is broken, no line is too long, what is left out is named."""

import io
import os
import pty
import re
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import processes
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parallel_corpus import as_tsv
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from attnzoo.cli import render
from attnzoo.cli.app import app
from attnzoo.cli.render import GLUE, Column

ROOT = Path(__file__).parent.parent
WIDTHS = (40, 80, 100, 120)
TINY = ["host.model.depth=1", "host.model.embed_dim=16", "host.model.num_heads=2", "train.batch_size=500"]
PAIRS = [
    "host.dim=16",
    "host.mlp_dim=16",
    "host.layers=1",
    "host.max_length=40",
    "heads=2",
    "train.tokens.size=300",
]
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def drawn(width: int, draw: Callable[[], None], color: str | None = "truecolor") -> str:
    """What is seen on a terminal of this width, after its colours are taken off."""
    out = io.StringIO()
    patch = pytest.MonkeyPatch()
    patch.setattr(
        render,
        "console",
        lambda err=False: Console(
            file=out, width=width, force_terminal=True, color_system=color, highlight=False
        ),
    )
    with patch.context():
        draw()
    patch.undo()
    return ESCAPE.sub("", out.getvalue())


def too_long(text: str, width: int) -> list[str]:
    """Lines that stick out; a word that is itself too long may, by itself and without an indent."""
    return [f"too long: {line}" for line in text.splitlines() if cell_len(line) > width and " " in line]


WITHOUT_SPACES = re.compile(r"[\u3000-\u9fff\uac00-\ud7af]+")


def words(text: str, exact: bool = True) -> list[str]:
    """What may not be broken: what stands between spaces, a number and its unit; of prose not a script without spaces."""
    apart = text if exact else WITHOUT_SPACES.sub(" ", text)
    return [word.replace(GLUE, " ") for word in apart.split(" ") if word]


def faults(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int, text: str) -> list[str]:
    """What is wrong with a table as printed."""
    found = too_long(text, width)
    flat = " ".join(text.split())
    notice = re.search(rf"left out at {width} columns: (.*?) · a wider terminal, .*--json shows them", flat)
    absent = notice.group(1).split(", ") if notice else []
    found += [f"no such column: {name}" for name in absent if name not in [column.name for column in columns]]
    lines = [f" {line} " for line in text.splitlines()]
    for i, column in enumerate(columns):
        cells = [row[i] for row in rows]
        if column.name in absent:
            found += [f"left out: {column.name}"] if column.rank == 0 else []
            continue
        exact = not column.wrap
        grid = any("───" in line for line in lines)
        heads = [column.name] if grid or (i and any(cells)) else []
        for one in [*heads, *(word for cell in cells for word in words(cell, exact))]:
            pattern = rf"(?<!\S){re.escape(one)}(?!\S)" if exact or one in heads else re.escape(one)
            if one and not any(re.search(pattern, line) for line in lines):
                found.append(f"broken: {one}")
        if grid and exact:
            found += [
                f"on two lines: {c}" for c in cells if not any(c.replace(GLUE, " ") in line for line in lines)
            ]
    return found


def old(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """The table as it was once drawn: rich narrows columns below their words."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.name, justify="right" if column.right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    render.console().print(table)


def cropped(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """A table whose lines are cut at the border."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.name, no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*row)
    render.console().print(table)


def silent(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """A table that says nothing of the columns it drops."""
    patch = pytest.MonkeyPatch()
    patch.setattr(render, "say", lambda *_: None)
    with patch.context():
        render.table(columns, rows)
    patch.undo()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs on images by a comparison, and one on pairs."""
    folder = tmp_path_factory.mktemp("runs")
    edits = [word for edit in [*TINY, "train.data=synthetic", "train.epochs=1"] for word in ("--set", edit)]
    verb(
        "compare",
        "ham_classic",
        "ham_b",
        "--seeds",
        "1",
        "--workers",
        "1",
        "--out",
        str(folder / "c"),
        *edits,
    )
    name = as_tsv(folder / "pairs.tsv")
    edits = [word for edit in [*PAIRS, "train.epochs=1"] for word in ("--set", edit)]
    verb("train", "transformer", "--data", name, "--out", str(folder / "pairs"), *edits)
    return folder


def verb(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def recorded(monkeypatch, *arguments: str) -> list[tuple[str, tuple, dict]]:
    """What a verb asks `render` to print, in its order."""
    calls: list[tuple[str, tuple, dict]] = []
    with monkeypatch.context() as patch:
        for name in ("table", "facts", "say", "say_next"):
            patch.setattr(render, name, lambda *a, _name=name, **k: calls.append((_name, a, k)))
        verb(*arguments)
    assert calls
    return calls


VERBS = [
    "list",
    "list models",
    pytest.param("list mechanisms --mask causal", marks=pytest.mark.slow),
    "show soft",
    pytest.param("show luong_global", marks=pytest.mark.slow),
    "show hadamard",
    "compose ham_a",
    pytest.param("compose nested", marks=pytest.mark.slow),
    pytest.param("compose deep_head --set host.dim=128", marks=pytest.mark.slow),
    pytest.param("compose cct_7_3x1", marks=pytest.mark.slow),
    "compose ham_seq2seq --set host.dim=64",
    "plugins",
    "doctor",
    "check fourier --examples 2",
    "bench ham_vit_b --against ham_vit_classic --rounds 2 --batch 1 --train-batch 1",
    "compare ham_classic ham_b --seeds 1 --workers 1 --out {c} " + " ".join(f"--set {edit}" for edit in TINY)
    + " --set train.data=synthetic --set train.epochs=1",
    *(
        pytest.param(f"eval {what}", marks=pytest.mark.slow)
        for what in ("{c}/ham_b-seed0", "{c}/ham_b-seed0 {c}/ham_classic-seed0 --committee", "{pairs} --beams 1")
    ),
]  # fmt: skip


@pytest.mark.parametrize("command", VERBS, ids=lambda command: " ".join(command.split()[:3]))
@pytest.mark.sample(3)
def test_verbs_fit_the_terminal(command, request, monkeypatch):
    if "{" in command:
        runs = request.getfixturevalue("trained" if command.startswith("eval") else "tmp_path")
        command = command.format(c=runs / "c", pairs=runs / "pairs")
    calls = recorded(monkeypatch, *command.split())
    tables = [arguments for name, arguments, _ in calls if name == "table"]
    assert tables or command.startswith("show")
    for width in WIDTHS:
        for name, arguments, named in calls:
            text = drawn(width, lambda: getattr(render, name)(*arguments, **named))  # noqa: B023
            assert not too_long(text, width)
            if name == "table":
                columns, rows = arguments
                assert not faults(columns, rows, width, text), text
            else:
                said = [*arguments[0]] if name == "facts" else [arguments]
                for one in [
                    word
                    for part in said
                    for text_ in part
                    for line in text_.split("\n")
                    for word in words(line, exact=False)
                ]:
                    assert one in text, (one, text)


@pytest.mark.slow
def test_old_tables_are_caught(monkeypatch):
    calls = recorded(monkeypatch, "list")
    columns, rows = next(arguments for name, arguments, _ in calls if name == "table")
    for width in (40, 80):
        for draw in (old, cropped):
            text = drawn(width, lambda: draw(columns, rows))  # noqa: B023
            assert faults(columns, rows, width, text), text
    assert faults(columns, rows, 80, drawn(80, lambda: silent(columns, rows)))
    assert not faults(columns, rows, 80, drawn(80, lambda: render.table(columns, rows)))


names = st.text("abcdefghij_0123456789", min_size=1, max_size=64)
signs = st.text("abcxyz²×ᵀΣσ√φ名前注意力한글🙂é%·", min_size=1, max_size=20)
numbers = st.integers(0, 10**12).map(render.spaced) | st.floats(0, 1e15).map(render.count)
prose = st.lists(names | signs, max_size=12).map(" ".join)


@st.composite
def tables(draw):
    kinds = draw(st.lists(st.sampled_from(["name", "sign", "number", "prose"]), min_size=1, max_size=7))
    heads = draw(
        st.lists(names.map(lambda head: head[:24]), min_size=len(kinds), max_size=len(kinds), unique=True)
    )
    cells = {"name": names, "sign": signs, "number": numbers, "prose": prose}
    columns = [
        Column(
            head,
            0 if i == 0 else draw(st.integers(0, 4)),
            kind == "number",
            draw(st.integers(1, 40)) * (kind == "prose"),
        )
        for i, (head, kind) in enumerate(zip(heads, kinds, strict=True))
    ]
    rows = draw(st.lists(st.tuples(*(cells[kind] for kind in kinds)), min_size=1, max_size=5))
    return columns, rows


@given(tables(), st.integers(40, 160))
def test_any_table_fits_any_terminal(table, width):
    columns, rows = table
    text = drawn(width, lambda: render.table(columns, rows))
    assert not faults(columns, rows, width, text), text


@given(tables(), st.integers(40, 160))
def test_a_wider_terminal_shows_no_less(table, width):
    columns, rows = table

    def shown(width: int) -> int:
        notice = re.search(
            r"columns: (.*?) · a wider", " ".join(drawn(width, lambda: render.table(columns, rows)).split())
        )
        return len(columns) - len(notice.group(1).split(", ")) if notice else len(columns)

    if "───" in drawn(width, lambda: render.table(columns, rows)):
        assert shown(width + 1) >= shown(width)


@given(tables())
def test_piped_tables_are_whole(table):
    columns, rows = table
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        render.table(columns, rows)
    head, rule, *body = out.getvalue().splitlines()
    assert head.split() == [column.name for column in columns] and set(rule) == {"─"}
    assert [line.split() for line in body[:-1]] == [" ".join(row).replace(GLUE, " ").split() for row in rows]
    assert len(body) == len(rows) + 1


@given(prose, st.integers(10, 80))
def test_wrapped_lines_hold_all_words_in_order(text, width):
    lines = render.wrap(text, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(cell_len(line) <= width or " " not in line.replace(" %", "") for line in lines)


@pytest.mark.parametrize("width", [20, 80])
def test_lines_stand_above_their_rows(width):
    columns, rows = [Column("name"), Column("number", 1)], [["one", "1"], ["two", "2"], ["three", "3"]]
    text = drawn(
        width, lambda: render.table(columns, rows, above={0: "those at first", 2: "and the last of all"})
    )
    lines = [line.split("  ")[0] for line in text.splitlines()]
    assert lines.index("those at first") + 1 == lines.index("one") < lines.index("two")
    assert not too_long(text, width) and lines.index("two") < lines.index("three")
    assert lines[lines.index("three") - 1] in ("and the last of all", "all")


def test_lines_are_broken_as_late_as_possible():
    assert render.wrap("one two three four", 9) == ["one two", "three", "four"]
    assert render.wrap("  └ one two", 8) == ["  └ one", "    two"]
    assert render.wrap("a 3" + GLUE + "ms", 4) == ["a", f"3{GLUE}ms"]
    assert render.wrap("注意力機構である", 6) == ["注意力", "機構で", "ある"]
    assert render.wrap("a 95 % b", 4) == ["a", "95 %", "b"]
    assert render.wrap("one\ntwo", 80) == ["one", "two"]
    assert render.wrap("attnzoo compose x", 12, hang=2) == ["attnzoo", "  compose x"]


def test_cells_cannot_rule_the_terminal():
    text = drawn(80, lambda: render.table([Column("name")], [["a\x1b[2Jb\nc\u202ed[bold]"]]))
    assert "a·[2Jb c·d[bold]" in text


def test_next_steps_stand_whole():
    steps = ("attnzoo heatmap runs/a", "attnzoo eval runs/a --committee")
    assert drawn(80, lambda: render.say_next(*steps)) == "next: " + " · ".join(steps) + "\n"
    assert drawn(40, lambda: render.say_next(*steps)) == f"next: {steps[0]}\n      {steps[1]}\n"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_epochs_fit_the_terminal(width):
    """The bar of a run: what is shown of the figures is whole."""
    event = {"event": "step", "epoch": 310, "step": 5, "steps": 391, "train_loss": 2.3456, "test_accuracy": 0.9876,
             "images_per_second": 12345.0, "examples": "images", "left": 3900.0}  # fmt: skip

    def draw() -> None:
        with render.progress() as report:
            report(event)

    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", drawn(width, draw)).replace("\r", "\n")
    assert not too_long(text, width) and "epoch 310" in text and "loss 2.3456" in text and "…" not in text
    assert ("12,345 images/s" in text) == (width >= 120) and ("accuracy 98.76 %" in text) == (width > 40)


@pytest.mark.parametrize("width", [40, 80])
def test_faults_fit_the_terminal(width):
    from attnzoo.errors import RecipeError

    error = RecipeError("AZ201", "there is no mechanism called `" + "x" * 30 + "` in what was written here",
                        help="`attnzoo list mechanisms` shows all that are installed, plugins included")  # fmt: skip
    text = drawn(width, lambda: render.show_error(error))
    assert not too_long(text, width) and "x" * 30 in text and "error[AZ201]:" in text
    assert " ".join(text.split()).endswith("shows all that are installed, plugins included")


def on_a_terminal(width: int, *arguments: str, **environment: str) -> str:
    """A verb on a pseudo-terminal of this width, as its user sees it."""
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    clean = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    seen = []

    def read() -> None:
        with suppress(OSError):  # the other end is closed
            while part := os.read(master, 4096):
                seen.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
    clean |= {"TERM": "xterm-256color"} | environment
    done = processes.run("-m", "attnzoo", *arguments, cwd=ROOT, env=clean, **streams)
    os.close(slave)
    reader.join()
    os.close(master)
    assert done.returncode == 0, seen
    return b"".join(seen).decode()


def test_a_real_terminal_has_its_width_and_colours():
    plain = on_a_terminal(80, "list", "mechanisms", NO_COLOR="1")
    coloured = on_a_terminal(80, "list", "mechanisms")
    assert "left out at 80 columns" in plain and "left out at 80 columns" in coloured
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", plain) and "\x1b[" in coloured
    lines = ESCAPE.sub("", plain).replace("\r", "").splitlines()
    assert not too_long("\n".join(lines), 80)
    family, name = (
        next(i for i, line in enumerate(lines) if line.startswith(w)) for w in ("linear: ", "agent ")
    )
    assert lines[family] == "linear: how to avoid n × m?" and name == family + 1 and not lines[family - 1]


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["compose", "--help"], ["train", "--help"], ["new", "--help"]]
)
def test_help_fits_80_columns(arguments):
    assert not too_long(ESCAPE.sub("", on_a_terminal(80, *arguments)).replace("\r", ""), 80)
