"""Recipe text, or data, to a tree of plain values, with the place of every value; and back from places to faults.

The reader is our own, on PyYAML's events, because `yaml.safe_load` accepts duplicate keys, reads `no` as
false and `1e-3` as text, and lets a few bytes grow into gigabytes. Scalars are those of YAML 1.2; anchors,
aliases, tags, second documents and everything oversized are refused. Faults that leave the rest readable do
not end the reading.
"""

import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from attnzoo.errors import Diagnostic, Place, RecipeError
from attnzoo.files import open_file

MAX_BYTES = 64 * 1024
KEPT_LENGTH = 4096
"""Texts of so many characters, which is what recipes have, are parsed once."""
MAX_DEPTH = 32
MAX_NODES = 10_000
MAX_FAULTS = 20
"""So many are reported at once."""
Loc = tuple[str | int, ...]
"""Where a value is in the tree: keys and indices from the top."""

_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
PROSE = (("summary",), ("source",))
"""Where people write as they do elsewhere."""
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    r"\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e00ff\U000e01f0-\U000e0fff]"
)
"""Characters that do not show, or change how others show: controls, spaces of no width, separators, changes of
direction, tags. They stand nowhere in a recipe."""
_UNSEEN_IN_NAMES = re.compile(
    rf"{_UNSEEN.pattern}|[\xa0\u034f\u1680\u17b4\u17b5\u180b-\u180d\u180f\u2000-\u200d\u202f\u205f\u3000"
    r"\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)
"""Also joiners, variation selectors and other widths of space, which prose needs and names do not."""
_SYNTAX = (
    ("\\t", "a tab stands where only spaces may", "YAML is indented with spaces"),
    (
        "mapping values are not allowed",
        "a `:` where no key can stand",
        "quote text that holds `: `, or mend the indentation",
    ),
    ("expected ':'", "a key without `:`", "write `key: value`"),
    (
        "expected <block end>",
        "this does not line up with what is above",
        "indent all entries of a list or mapping alike",
    ),
    (
        "expected the node content",
        "a value is missing",
        "write one, or quote a text that begins with a special character",
    ),
    (
        "expected ',' or",
        "a comma or a closing bracket is missing",
        "separate entries by `, ` and close every bracket",
    ),
    ("unexpected end of stream", "a quote is not closed", "close every quote"),
    ("unexpected document separator", "a quote is not closed", "close every quote"),
    ("cannot start any token", "no value can begin with this character", "put the text in quotes"),
    ("escape", "an escape that YAML does not know", "write the text in single quotes"),
    ("hexadecimal", "an escape that YAML does not know", "write the text in single quotes"),
)
"""What PyYAML says, what we say, what to do."""


@dataclass
class Source:
    """A text that was read.

    Args:
        file: Its name, as shown in faults.
        tree: Dicts, lists and scalars.
        values: Place of each value.
        keys: Place of each key.
        faults: What is wrong with it, as far as it could be read all the same.
    """

    file: str
    tree: Any = None
    values: dict[Loc, Place] = field(default_factory=dict)
    keys: dict[Loc, Place] = field(default_factory=dict)
    faults: list[Diagnostic] = field(default_factory=list)

    def value_place(self, loc: Loc) -> Place:
        """The place of the value there, or of the nearest one around it."""
        while loc not in self.values and loc:
            loc = loc[:-1]
        return self.values.get(loc, Place(self.file))

    def key_place(self, loc: Loc) -> Place:
        """The place of the key there; of the value where there is no key."""
        return self.keys.get(loc) or self.value_place(loc)

    def fault(self, code: str, message: str, place: Place, why: str = "", help: str = "") -> None:
        """Note a fault and go on."""
        self.faults.append(Diagnostic(code, message, place, why, help))

    def seen(self, text: str, place: Place, prose: bool = False) -> str:
        """A text without the characters that do not show; the first of them is noted as a fault.

        Args:
            text: A key or a value.
            place: Where it stands.
            prose: Whether it is for people.
        """
        unseen = _UNSEEN if prose else _UNSEEN_IN_NAMES
        if bad := unseen.search(text):
            at = place.text.find(bad[0], place.column - 1)
            self.faults.append(_hidden(bad[0], place if at < 0 else replace(place, column=at + 1, width=1)))
            text = unseen.sub("", text)
        return text

    def put(self, loc: Loc, other: "Source") -> None:
        """Take the places of another text at and below a spot, because its tree is now the value there."""
        for table, extra in ((self.values, other.values), (self.keys, other.keys)):
            for known in [k for k in table if k[: len(loc)] == loc and (k != loc or table is self.values)]:
                del table[known]
            table.update({(*loc, *k): place for k, place in extra.items()})


def _hidden(character: str, place: Place) -> Diagnostic:
    """A character that nobody sees, by its code point."""
    name, kind = unicodedata.name(character, "").lower(), unicodedata.category(character)
    looks = "looks like a space and is none" if kind == "Zs" else "does not show"
    message = f"the character U+{ord(character):04X}{f' ({name})' if name else ''} {looks}"
    binary = "a recipe is plain text; is this the right file?"
    help = binary if kind in ("Cc", "Cs") else "delete it, or type the word anew"
    return Diagnostic("AZ104", message, place, help=help)


def read_text(path: Path, shown: str) -> str:
    """The text of a recipe file.

    Args:
        path: The file.
        shown: Its name for faults.

    Raises:
        RecipeError: AZ101 not a readable file, AZ102 too large, AZ103 not UTF-8.
    """
    try:
        with open_file(path, most=None) as file:  # too large is a fault of its own
            data, size = file.read(MAX_BYTES + 1) or b"", os.fstat(file.fileno()).st_size
    except OSError as error:
        raise RecipeError(
            "AZ101",
            f"cannot read `{shown[:200]}`: {(error.strerror or str(error)).lower()}",
            help="name a YAML file; `attnzoo list recipes` shows the recipes that can be called by name",
        ) from None
    if len(data) > MAX_BYTES:
        raise RecipeError(
            "AZ102",
            f"`{shown}` has {max(size, len(data)):,} bytes; a recipe has at most {MAX_BYTES:,}",
            place=Place(shown),
            help="a recipe is a page of YAML; is this the right file?",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data.removeprefix(b"\xef\xbb\xbf")[: error.start].decode()
        utf16 = "this looks like UTF-16; " if data.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
        raise RecipeError(
            "AZ103",
            f"byte {error.start + 1} (0x{error.object[error.start]:02x}) is not UTF-8",
            place=Place(shown, before.count("\n") + 1, len(before) - before.rfind("\n")),
            help=f"{utf16}save the file as UTF-8",
        ) from None


def parse(text: str, file: str, before: str = "", prose: bool = False) -> Source:
    """The tree and the places of a text; what is wrong but does not end the reading is in its `faults`.

    Args:
        text: YAML.
        file: Its name, for faults.
        before: What stands in front of the text on its first line, for faults.
        prose: Whether the whole text is a value for people.

    Raises:
        RecipeError: AZ102, AZ104, AZ105, AZ107 to AZ109, AZ111: what ends the reading.
    """
    text = text.removeprefix("\ufeff")
    if (size := len(text.encode("utf-8", "surrogatepass"))) > MAX_BYTES:
        raise RecipeError(
            "AZ102", f"the recipe has {size:,} bytes; a recipe has at most {MAX_BYTES:,}", place=Place(file)
        )
    read = _read if len(text) <= KEPT_LENGTH else _read.__wrapped__
    source = read(text, file, before, prose)
    tree, values, keys = deepcopy(source.tree), dict(source.values), dict(source.keys)
    return Source(file, tree, values, keys, list(source.faults))  # the caller's to change


@lru_cache(maxsize=256)  # all recipes are read for timm, again for a list, and many extend a few
def _read(text: str, file: str, before: str, prose: bool) -> Source:
    return _Reader(text, file, before, prose).read()


class _Reader:
    """Builds a `Source` from PyYAML's events, never deeper than `MAX_DEPTH`."""

    def __init__(self, text: str, file: str, before: str, prose: bool):
        self.prose = prose
        self.lines = re.split("\r\n|\r|\n", before + text)
        self.text = " " * len(before) + text
        self.source = Source(file)
        self.nodes = 0

    def place(self, mark: Any, end: Any = None) -> Place:
        """A mark of PyYAML, which counts from 0, as a place."""
        line = self.lines[mark.line] if mark.line < len(self.lines) else ""
        width = end.column - mark.column if end is not None and end.line == mark.line else 1
        return Place(self.source.file, mark.line + 1, mark.column + 1, max(1, width), line)

    def fail(self, code: str, message: str, place: Place, why: str = "", help: str = "") -> RecipeError:
        """The faults so far and a last one, to be raised."""
        return RecipeError.of(
            [*self.source.faults[: MAX_FAULTS - 1], Diagnostic(code, message, place, why, help)]
        )

    def read(self) -> Source:
        """The whole text."""
        for number, line in enumerate(self.lines, start=1):
            if bad := _UNSEEN.search(line):
                place = Place(self.source.file, number, bad.start() + 1, 1, line)
                raise RecipeError.of([_hidden(bad[0], place)])
        try:
            self.document(yaml.parse(self.text, Loader=yaml.SafeLoader))
        except yaml.YAMLError as error:
            raise self.syntax(error) from None
        return self.source

    def syntax(self, error: yaml.YAMLError) -> RecipeError:
        """PyYAML's complaint in our words."""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        mark, context = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
        plain, help = next(
            ((plain, help) for theirs, plain, help in _SYNTAX if theirs in problem), (problem, "")
        )
        if context and ("not closed" in plain or "closing bracket" in plain):
            mark = context  # where the quote or bracket was opened
        place = self.place(mark) if mark else Place(self.source.file)
        for number in (place.line - 1, place.line):  # a strange space may have hidden a key from YAML
            line = self.lines[number - 1] if number else ""
            prose = line.strip().startswith(("summary", "source"))
            self.source.seen(line.partition("#")[0], Place(self.source.file, number, text=line), prose)
        if any(fault.code == "AZ104" for fault in self.source.faults):
            return RecipeError.of(list(dict.fromkeys(self.source.faults))[:MAX_FAULTS])
        if "\t" in place.text[: place.column] and not place.text[: place.column].strip():
            _, plain, help = _SYNTAX[0]
        return self.fail("AZ105", f"this is not YAML: {plain}", place, help=help)

    def document(self, events: Iterator[Any]) -> None:
        """The one document."""
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent) and self.nodes:
                place = self.place(event.start_mark, event.end_mark)
                raise self.fail(
                    "AZ107", "a second document begins here", place, help="write one recipe per file"
                )
            if isinstance(event, yaml.NodeEvent):
                self.source.tree = self.node(event, events, (), 1)
        if not self.nodes:
            place = Place(self.source.file)
            raise self.fail(
                "AZ111", "the recipe is empty", place, help="`attnzoo new recipe NAME` writes one"
            )

    def node(self, event: Any, events: Iterator[Any], loc: Loc, depth: int) -> Any:
        """One value and all that is in it."""
        place = self.source.values[loc] = self.place(event.start_mark, event.end_mark)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.fail(
                "AZ108", f"there are more than {MAX_NODES:,} values", place, help="a recipe is a page of YAML"
            )
        if depth > MAX_DEPTH:
            raise self.fail("AZ108", f"this is more than {MAX_DEPTH} levels deep", place, help="nest less")
        self.refuse(event, place)
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, place, self.prose or loc in PROSE)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(inner := next(events), yaml.SequenceEndEvent):
                items.append(self.node(inner, events, (*loc, len(items)), depth + 1))
            return items
        return self.mapping(events, loc, depth) if isinstance(event, yaml.MappingStartEvent) else None

    def refuse(self, event: Any, place: Place) -> None:
        """Note what makes a node more than data."""
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            self.source.fault(
                "AZ107", f"aliases (`*{event.anchor}`) are not allowed", place, help="write the value out"
            )
        elif event.anchor:
            self.source.fault(
                "AZ107",
                f"anchors (`&{event.anchor}`) are not allowed",
                place,
                help="write the value out where it is used",
            )
        elif tag not in (None, "!"):
            shown = tag.replace("tag:yaml.org,2002:", "!!")[:40]
            self.source.fault(
                "AZ107",
                f"tags (`{shown}`) are not allowed",
                place,
                why="a recipe is data: it never makes objects",
            )

    def mapping(self, events: Iterator[Any], loc: Loc, depth: int) -> dict[str, Any]:
        """The entries of a mapping; of a key that stands there twice the first holds."""
        entries: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            place = self.place(event.start_mark, event.end_mark)
            if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
                raise self.fail(
                    "AZ109", "a key must be a word", place, help="did a bracket or a `?` slip in?"
                )
            self.refuse(event, place)
            key = f"*{event.anchor}" if isinstance(event, yaml.AliasEvent) else event.value
            key = self.source.seen(key, place)
            spot = (*loc, key)
            if key == "<<":
                self.source.fault(
                    "AZ107", "merge keys (`<<`) are not allowed", place, help="use `extends: other.yaml`"
                )
            elif key == "":
                self.source.fault(
                    "AZ109", "there is no key in front of this `:`", place, help="write `key: value`"
                )
            elif key in entries:
                line = self.source.keys[spot].line
                message, why = f"`{key[:40]}` stands here a second time", f"the first is on line {line}"
                self.source.fault("AZ106", message, place, why, "keep one of the two")
                self.node(next(events), events, (*loc, f"{key} (again)"), depth + 1)
                continue
            self.source.keys[spot] = place
            entries[key] = self.node(next(events), events, spot, depth + 1)
        return entries

    def scalar(self, event: yaml.ScalarEvent, place: Place, prose: bool) -> Any:
        """A scalar by the rules of YAML 1.2."""
        text = self.source.seen(event.value, place, prose)
        if event.style is not None or event.tag == "!":
            return text
        if text.lower() in _WORDS and text in (text.lower(), text.capitalize(), text.upper()):
            return _WORDS[text.lower()]
        if _INT.fullmatch(text):
            if len(text) <= 20:
                return int(text)
            self.source.fault("AZ113", f"`{text[:20]}…` has {len(text)} digits, too many for a number", place)
            return 0
        if _FLOAT.fullmatch(text):
            number = float(text)
            if math.isfinite(number):
                return number
            self.source.fault("AZ113", f"`{text[:20]}` is too large for a number", place)
            return 0.0
        if _NOT_FINITE.fullmatch(text):
            self.source.fault(
                "AZ113", f"`{text}` is not a finite number", place, help="write it in quotes if text is meant"
            )
            return 0.0
        return text


def from_data(data: Any, file: str) -> Source:
    """The tree of Python data, copied and held to the limits of a text; what is wrong is in its `faults`.

    Args:
        data: Mappings, lists and tuples of text, numbers, true, false and null.
        file: What it is called in faults.

    Raises:
        RecipeError: AZ102, AZ108: what ends the reading.
    """
    reader = _Copier(file)
    reader.source.tree = reader.node(data, ())
    return reader.source


class _Copier:
    """Builds a `Source` from Python data, of which a cycle is endlessly deep."""

    def __init__(self, file: str):
        self.source = Source(file)
        self.nodes = self.size = 0

    def place(self, loc: Loc) -> Place:
        """Where a value is: its keys, and its number in the order of reading."""
        return Place(self.source.file, line=self.nodes + 1, keys=".".join(str(step)[:40] for step in loc))

    def node(self, value: Any, loc: Loc) -> Any:
        """A copy of a value and of all that is in it."""
        place = self.source.values[loc] = self.place(loc)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise RecipeError(
                "AZ108", f"there are more than {MAX_NODES:,} values", place=place, help="a recipe is a page"
            )
        if len(loc) >= MAX_DEPTH:
            raise RecipeError(
                "AZ108",
                f"this is more than {MAX_DEPTH} levels deep",
                place=place,
                help="does it hold itself?",
            )
        if isinstance(value, Mapping):
            return self.mapping(value.items(), loc)
        if isinstance(value, list | tuple):
            return [self.node(inner, (*loc, i)) for i, inner in enumerate(value)]
        return self.scalar(value, place, loc in PROSE)

    def mapping(self, items: Iterable[tuple[Any, Any]], loc: Loc) -> dict[str, Any]:
        """The entries of a mapping."""
        entries: dict[str, Any] = {}
        for key, inner in items:
            if type(key) is not str or not key:
                what = "there is an empty key" if key == "" else f"a key must be a word, not {_kind(key)}"
                self.source.fault("AZ109", what, self.place(loc), help="a key is a text, as in a YAML file")
                continue
            spot = (*loc, self.text(key, self.place((*loc, key)), False))
            self.source.keys[spot] = self.place(spot)
            entries[str(spot[-1])] = self.node(inner, spot)
        return entries

    def text(self, value: str, place: Place, prose: bool) -> str:
        """A key or a text, without what does not show."""
        self.size += len(value)
        if self.size > MAX_BYTES:
            raise RecipeError("AZ102", f"the texts have more than {MAX_BYTES:,} characters", place=place)
        return self.source.seen(value, place, prose)

    def scalar(self, value: Any, place: Place, prose: bool) -> Any:
        """A value that YAML could hold."""
        if type(value) is str:
            return self.text(value, place, prose)
        if type(value) is float and not math.isfinite(value):
            self.source.fault("AZ113", f"`{value}` is not a finite number", place)
            return 0.0
        if type(value) is int and abs(value) >= 10**20:
            self.source.fault("AZ113", "this number has more than 20 digits", place)
            return 0
        if value is None or type(value) in (bool, int, float):
            return value
        help = "write plain numbers, texts, lists and dicts: `int(...)`, `str(...)`, `.tolist()`"
        self.source.fault("AZ112", f"a recipe cannot hold {_kind(value)}", place, help=help)
        return None


def _kind(value: Any) -> str:
    """The type of a value of Python, in words."""
    return f"a value of Python's type `{type(value).__module__}.{type(value).__qualname__}`"
