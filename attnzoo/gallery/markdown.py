"""Texts of cards and docstrings as Markdown that says what they say, whatever signs are in them."""

import re
import textwrap
from collections.abc import Sequence

_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_SIGNS = re.compile(
    r"""[\\$~`] | \*(?=\S)  # formulas, code whose end is missing, emphasis
    | (?<![^\W_])(?<![\u0300-\u036f])_(?=\S)  # emphasis too, unless a letter is before it
    | <(?=[A-Za-z/!?]) | &(?=\#?\w+;)  # HTML
    | \](?=[(\[]) | \[(?=\^)  # links, notes
    | \}$  # a role, before code""",
    re.X,
)
_BLOCK = re.compile(r"#{1,6}(?!\S)|>|[-+*=](?!\S)|[-=]{3,}$|\[(?=[^\]]*\]:)|\d+(?=[.)](?!\S))")
"""What a list, a heading, a quotation or the target of a link begins with."""


def prose(text: str) -> str:
    """A paragraph, in which only backticks mean something: code.

    Args:
        text: As on a card; its line breaks are spaces.
    """
    line, parts, at = " ".join(text.split()), [], 0
    for code in _CODE.finditer(line):
        parts += [_SIGNS.sub(r"\\\g<0>", line[at : code.start()]), code[0]]
        at = code.end()
    parts.append(_SIGNS.sub(r"\\\g<0>", line[at:]))
    escaped = "".join(parts)
    if not (begins := _BLOCK.match(escaped)):
        return escaped
    number = begins[0].isdigit()  # `1.` is a list by its point
    return f"{begins[0]}\\{escaped[begins.end() :]}" if number else f"\\{escaped}"


def paragraphs(text: str) -> list[str]:
    """A docstring as blocks of Markdown: paragraphs, lists of lines that begin with `-`, and indented lines as text.

    Args:
        text: Of a docstring, without the indent that all its lines have.
    """
    found = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.splitlines()
        if all(line.startswith("  ") for line in lines):
            found.append(fenced(textwrap.dedent(block), "text"))
        elif block.startswith("- "):
            items = re.split(r"\n- ", block[2:])
            found.append("\n".join(f"- {prose(item)}" for item in items))
        else:
            found.append(prose(block))
    return found


def fenced(text: str, kind: str) -> str:
    """A block whose lines are its own.

    Args:
        text: Lines, in which there may be fences.
        kind: A language, or a directive of MyST in braces.
    """
    ticks = "`" * max([2, *(len(run) for run in re.findall(r"`+", text))])
    return f"{ticks}`{kind}\n{text}\n{ticks}`"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are Markdown on one line.

    Args:
        heads: Of the columns.
        rows: Of as many cells.
    """
    lines = [f"| {' | '.join(map(_cell, cells))} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)
