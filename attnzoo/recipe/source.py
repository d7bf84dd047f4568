"""Recipe text to a tree of plain values, with the place of every value; and back from places to faults.

The reader is our own, on PyYAML's events, because `yaml.safe_load` accepts duplicate keys, reads `no` as false and
`1e-3` as text, and lets a few bytes grow into gigabytes. Scalars are those of YAML 1.2; anchors, aliases, tags, second
documents and everything oversized are refused.
"""

import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from attnzoo.errors import Diagnostic, Place, RecipeError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_NODES = 10_000
Loc = tuple[str | int, ...]
"""Where a value is in the tree: keys and indices from the top."""

_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


@dataclass
class Source:
    """A text that was read.

    Args:
        file: Its name, as shown in faults.
        tree: Dicts, lists and scalars.
        values: Place of each value.
        keys: Place of each key.
    """

    file: str
    tree: Any = None
    values: dict[Loc, Place] = field(default_factory=dict)
    keys: dict[Loc, Place] = field(default_factory=dict)

    def value_place(self, loc: Loc) -> Place:
        """The place of the value there, or of the nearest one around it."""
        while loc not in self.values and loc:
            loc = loc[:-1]
        return self.values.get(loc, Place(self.file))

    def key_place(self, loc: Loc) -> Place:
        """The place of the key there; of the value where there is no key."""
        return self.keys.get(loc) or self.value_place(loc)

    def forget(self, loc: Loc) -> None:
        """Drop the places at and below a spot, because another value takes it."""
        for table in (self.values, self.keys):
            for known in [k for k in table if k[: len(loc)] == loc]:
                del table[known]


def read_text(path: Path, shown: str) -> str:
    """The text of a recipe file.

    Args:
        path: The file.
        shown: Its name for faults.

    Raises:
        RecipeError: AZ101 not a readable file, AZ102 too large, AZ103 not UTF-8, AZ104 control characters.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not make us wait
    except OSError as error:
        raise RecipeError(
            "AZ101",
            f"cannot read `{shown}`: {(error.strerror or 'unreadable').lower()}",
            help="`attnzoo list recipes` shows the recipes that can be called by name",
        ) from None
    with os.fdopen(handle, "rb") as stream:
        info = os.fstat(stream.fileno())
        if not stat.S_ISREG(info.st_mode):
            what = "a folder" if stat.S_ISDIR(info.st_mode) else "no regular file"
            raise RecipeError("AZ101", f"cannot read `{shown}`: it is {what}", help="name a YAML file")
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise RecipeError(
            "AZ102",
            f"`{shown}` has {max(info.st_size, len(data)):,} bytes; a recipe has at most {MAX_BYTES:,}",
            place=Place(shown),
            help="a recipe is a page of YAML; is this the right file?",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, len(before) - (before.rfind(b"\n") + 1) + 1
        raise RecipeError(
            "AZ103",
            f"byte {error.start + 1} (0x{data[error.start]:02x}) is not UTF-8",
            place=Place(shown, line, column),
            help="save the file as UTF-8",
        ) from None
    return text


def parse(text: str, file: str) -> Source:
    """The tree and the places of a text.

    Args:
        text: YAML.
        file: Its name, for faults.

    Raises:
        RecipeError: AZ102, AZ104 to AZ109; duplicate keys, anchors and the like are all reported together.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError("AZ102", f"a recipe has at most {MAX_BYTES:,} bytes", place=Place(file))
    reader = _Reader(text, file)
    reader.read()
    if reader.faults:
        raise RecipeError.of(reader.faults[:20])
    return reader.source


class _Reader:
    """Builds a `Source` from PyYAML's events, without recursion in the parser's own stack."""

    def __init__(self, text: str, file: str):
        self.lines = text.split("\n")
        self.text, self.file = text, file
        self.source = Source(file)
        self.faults: list[Diagnostic] = []
        self.nodes = 0

    def place(self, mark: Any, end: Any = None) -> Place:
        """A mark of PyYAML, which counts from 0, as a place."""
        line = self.lines[mark.line].rstrip("\r") if mark.line < len(self.lines) else ""
        width = end.column - mark.column if end is not None and end.line == mark.line else 1
        return Place(self.file, mark.line + 1, mark.column + 1, max(1, width), line)

    def fault(self, code: str, message: str, place: Place, why: str = "", help: str = "") -> None:
        self.faults.append(Diagnostic(code, message, place, why, help))

    def fail(self, code: str, message: str, place: Place, why: str = "", help: str = "") -> RecipeError:
        self.fault(code, message, place, why, help)
        return RecipeError.of(self.faults)

    def read(self) -> None:
        for number, line in enumerate(self.lines, start=1):
            bad = next((i for i, c in enumerate(line) if ord(c) < 32 and c not in "\t\r" or c == "\x7f"), None)
            if bad is not None:
                raise self.fail(
                    "AZ104",
                    f"control character U+{ord(line[bad]):04X}",
                    Place(self.file, number, bad + 1, 1, line),
                    help="a recipe is plain text; is this the right file?",
                )
        events = yaml.parse(self.text, Loader=yaml.SafeLoader)
        try:
            self.document(events)
        except yaml.YAMLError as error:
            raise self.syntax(error) from None
        except RecursionError:
            raise self.fail("AZ108", f"more than {MAX_DEPTH} levels deep", Place(self.file)) from None

    def syntax(self, error: yaml.YAMLError) -> RecipeError:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        place = self.place(mark) if mark else Place(self.file)
        help = "quote text that holds `: `, `#` or brackets; indent with spaces"
        if "\\t" in problem or "\t" in place.text[: place.column]:
            problem, help = "a tab where only spaces may stand", "YAML is indented with spaces"
        return self.fail("AZ105", f"this is not YAML: {problem}", place, help=help)

    def document(self, events: Iterator[yaml.Event]) -> None:
        for event in events:
            if isinstance(event, (yaml.StreamStartEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)):
                if isinstance(event, yaml.DocumentStartEvent) and self.nodes:
                    raise self.fail(
                        "AZ107", "a second document begins", self.place(event.start_mark), help="one recipe per file"
                    )
            elif isinstance(event, yaml.StreamEndEvent):
                break
            else:
                self.source.tree = self.node(event, events, (), 1)
        if not self.nodes:
            raise self.fail("AZ111", "the recipe is empty", Place(self.file), help="`attnzoo new recipe NAME` writes one")

    def node(self, event: Any, events: Iterator[yaml.Event], loc: Loc, depth: int) -> Any:
        place = self.place(event.start_mark, event.end_mark)
        self.source.values[loc] = place
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.fail("AZ108", f"more than {MAX_NODES:,} values", place, help="a recipe is a page of YAML")
        if depth > MAX_DEPTH:
            raise self.fail("AZ108", f"more than {MAX_DEPTH} levels deep", place, help="nest less")
        if isinstance(event, yaml.AliasEvent):
            self.fault("AZ107", "aliases (`*name`) are not allowed", place, help="write the value out")
            return None
        if event.anchor:
            self.fault("AZ107", "anchors (`&name`) are not allowed", place, help="write the value out where it is used")
        if event.tag is not None and event.tag != "!":
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.fault("AZ107", f"tags (`{tag}`) are not allowed", place, why="a recipe is data: it never makes objects")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, place)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            for inner in events:
                if isinstance(inner, yaml.SequenceEndEvent):
                    break
                items.append(self.node(inner, events, (*loc, len(items)), depth + 1))
            return items
        return self.mapping(events, loc, depth)

    def mapping(self, events: Iterator[yaml.Event], loc: Loc, depth: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            place = self.place(event.start_mark, event.end_mark)
            if not isinstance(event, yaml.ScalarEvent):
                raise self.fail("AZ109", "a key must be a word", place, help="did a bracket or `?` slip in?")
            if event.anchor or (event.tag is not None and event.tag != "!"):
                self.fault("AZ107", "anchors and tags are not allowed", place)
            key = event.value
            if key == "<<":
                self.fault("AZ107", "merge keys (`<<`) are not allowed", place, help="use `extends: other.yaml`")
            elif key in entries:
                first = self.source.keys[(*loc, key)]
                self.fault("AZ106", f"`{key}` stands here a second time", place, why=f"first on line {first.line}",
                           help="keep one of the two")  # fmt: skip
                self.node(next(events), events, (*loc, f"{key} (again)"), depth + 1)
                continue
            self.source.keys[(*loc, key)] = place
            entries[key] = self.node(next(events), events, (*loc, key), depth + 1)
        return entries

    def scalar(self, event: yaml.ScalarEvent, place: Place) -> Any:
        text = event.value
        if event.style is not None or (event.tag == "!"):
            return text
        if text.lower() in _WORDS and text in (text.lower(), text.capitalize(), text.upper()):
            return _WORDS[text.lower()]
        if _INT.fullmatch(text):
            if len(text) > 20:
                self.fault("AZ113", f"`{text[:20]}…` has {len(text)} digits", place, help="is this meant to be a number?")
                return 0
            return int(text)
        if _FLOAT.fullmatch(text):
            number = float(text)
            if math.isinf(number):
                self.fault("AZ113", f"`{text[:20]}` is too large for a number", place)
                return 0.0
            return number
        return text
