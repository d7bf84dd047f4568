"""gettext's catalogues as parallel text: `.po` as translators write it, `.mo` as programs read it.

Both by their description in the GNU gettext manual ("The Format of PO Files", "The Format of GNU MO Files").
"""

import io
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from attnzoo.data.parallel.corpus import Corpus, Line
from attnzoo.data.parallel.text import content, decoded, path_of
from attnzoo.errors import DataError, Place

AFTER = {
    "msgctxt": ("",),
    "msgid": ("", "msgctxt"),
    "msgid_plural": ("msgid",),
    "msgstr": ("msgid",),
    "msgstr[0]": ("msgid_plural",),
}
"""What may stand before each word of an entry; before `msgstr[n]` stands the one before it."""
STATEMENT = re.compile(r'(msgctxt|msgid_plural|msgid|msgstr(?:\[(\d{1,2})\])?)\s*(".*)')
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
ESCAPE = re.compile(r"\\([0-7]{1,3}|x[0-9A-Fa-f]{1,2}|.)")
CHARSET = re.compile(
    "(us-)?ascii|(utf|iso|latin|koi|cp|windows|mac|gb|big5|euc|shift|johab|tis).*", re.IGNORECASE
)
"""Python knows other names too, which are no charsets."""
ESCAPES = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "v": "\v",
    "\\": "\\",
    '"': '"',
    "'": "'",
    "?": "?",
}


class Entry(NamedTuple):
    """A message.

    Args:
        message: The text in the program.
        plural: Its plural, if it has one.
        forms: The translation, or one for each plural form of the target language.
        place: Where it is.
    """

    message: str
    plural: str | None
    forms: tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Catalogue:
    """What a file holds.

    Args:
        header: Translation of the empty message, which says charset and language.
        entries: In the order of the file, without the header.
        fuzzy: How many entries were left out because nobody has confirmed them.
    """

    header: str
    entries: tuple[Entry, ...]
    fuzzy: int = 0

    @property
    def language(self) -> str:
        """Of the translations, as the header says; empty when it does not."""
        match = re.search(r"^Language:[ \t]*([A-Za-z]{2,3}(?:[_@-][A-Za-z0-9]+)*)", self.header, re.M | re.I)
        return match[1] if match else ""


def read_gettext(name: str) -> Corpus:
    """A corpus from a catalogue, or from all that lie below a folder, in the order of their paths.

    The source is the message, the target its translation. A plural gives two pairs: the message and the first form,
    the plural and the last form. Fuzzy and obsolete entries are left out.

    Args:
        name: `gettext:FILE` or `gettext:FOLDER`.

    Raises:
        DataError: AZ709 when there is no such file, or no catalogue in the folder; AZ711 for wrong bytes; AZ712 when
            the catalogues are of several languages; AZ714 for wrong syntax.
    """
    path = path_of(name.partition(":")[2], name)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
        if not files:
            raise DataError("AZ709", f"`{path}` has no .po and no .mo in it")
    languages: dict[str, Path] = {}
    lines: list[Line] = []
    fuzzy = 0
    for file in files:
        raw, reader = content(file), READERS.get(file.suffix.lower())
        if reader is None:
            raise DataError("AZ714", f"`{file}` is neither a .po nor a .mo")
        catalogue = reader(raw, str(file))
        lines += _pairs(catalogue)
        fuzzy += catalogue.fuzzy
        if catalogue.language:
            languages.setdefault(catalogue.language, file)
    if len({re.split("[_@-]", language)[0].lower() for language in languages}) > 1:
        shown = ", ".join(f"`{language}` ({file})" for language, file in languages.items())
        raise DataError(
            "AZ712",
            f"`{path}` has catalogues of several languages: {shown}",
            help="name a folder of one language",
        )
    notes = (f"fuzzy entries left out: {fuzzy:,}",) if fuzzy else ()
    return Corpus(name, ("messages", next(iter(languages), "translations")), tuple(lines), notes)


def _pairs(catalogue: Catalogue) -> Iterator[Line]:
    for entry in catalogue.entries:
        yield Line(entry.message, entry.forms[0], entry.place)
        if entry.plural is not None:
            yield Line(entry.plural, entry.forms[-1], entry.place)


def _charset(header: str, file: str) -> str:
    """The charset that a header names; UTF-8 when none, or a template's placeholder."""
    match = re.search(r"charset=([\w.:-]+)", header)
    charset = match[1] if match and match[1] != "CHARSET" else "UTF-8"
    try:
        usable = CHARSET.fullmatch(charset) is not None and b"msgid".decode(charset) == "msgid"
    except (LookupError, UnicodeError):
        usable = False
    if not usable:
        raise DataError(
            "AZ711",
            f"`{file}` names `{charset}` as its charset, which is none of a catalogue",
            help="write `charset=UTF-8` into its header and save it in UTF-8",
        )
    return charset


# .po


@dataclass
class _Draft:
    """An entry that is being read.

    Args:
        line: Where it begins.
        parts: Texts by word, such as `msgid` and `msgstr[0]`.
        last: The latest word; empty before the first.
        fuzzy: Whether a comment says so.
    """

    line: int = 0
    parts: dict[str, str] = field(default_factory=dict)
    last: str = ""
    fuzzy: bool = False

    @property
    def whole(self) -> bool:
        """Whether a translation has come, so that what follows may belong to the next entry."""
        return self.last.startswith("msgstr")


def parse_po(raw: bytes, file: str = "PO") -> Catalogue:
    """A catalogue from the bytes of a `.po`.

    Args:
        raw: In the charset that its header names, else UTF-8.
        file: What messages call it.

    Raises:
        DataError: AZ711 for bytes that are not of its charset, AZ714 with the line for wrong syntax.
    """
    head = re.search(rb'"[^"\n]*Content-Type:[^"\n]*"', raw, re.I)
    charset = _charset(head[0].decode("ascii", errors="replace") if head else "", file)
    drafts, draft, text, number = [], _Draft(), "", 0

    def fault(message: str, why: str = "") -> DataError:
        place = Place(file, number, 1, max(1, len(text)), text)
        return DataError("AZ714", f"line {number} {message}", place=place, why=why)

    for number, text in enumerate(decoded(io.BytesIO(raw), file, charset), start=1):
        line = text.strip()
        if line.startswith("#"):
            if draft.whole:
                drafts.append(draft)
                draft = _Draft()
            if line.startswith("#~"):  # obsolete, and what was said of it
                draft.fuzzy = False
            elif line.startswith(("#,", "#=")):
                draft.fuzzy |= "fuzzy" in re.split(r"[,\s]+", line[2:])
        elif line.startswith('"'):
            if not draft.last:
                raise fault("goes on with a text that has not begun")
            draft.parts[draft.last] += _unquoted(line, fault)
        elif line:
            match = STATEMENT.fullmatch(line)
            if match is None:
                raise fault(
                    "is not of a catalogue",
                    "a line is blank, a comment, a text in quotes, or msgid and the like",
                )
            if draft.whole and match[1] in ("msgctxt", "msgid"):
                drafts.append(draft)
                draft = _Draft()
            word = f"msgstr[{int(match[2])}]" if match[2] else match[1]
            before = AFTER.get(word) or (f"msgstr[{int(match[2]) - 1}]",)
            if draft.last not in before:
                found = f"`{draft.last}`" if draft.last else "nothing"
                raise fault(
                    f"has `{word}` after {found}", f"before it stands {' or '.join(filter(None, before))}"
                )
            draft.line = draft.line or number
            draft.parts[word], draft.last = _unquoted(match[3], fault), word
    if draft.whole:
        drafts.append(draft)
    elif draft.last:
        raise fault(f"ends the file after `{draft.last}`", "an entry ends with its translation")
    return _catalogue(drafts, file)


def _unquoted(quoted: str, fault: Callable[[str, str], DataError]) -> str:
    """The text in quotes, escapes resolved."""
    match = STRING.fullmatch(quoted)
    if match is None:
        raise fault("has a text that is not in quotes from end to end", 'a `"` in a text is written `\\"`')

    def one(escape: re.Match) -> str:
        code = escape[1]
        number = int(code, 8) if code[0] in "01234567" else int(code[1:], 16) if len(code) > 1 else None
        found = chr(number) if number is not None and number < 128 else ESCAPES.get(code)
        if found is None:
            raise fault(
                f"has `\\{code}`, which means nothing", f"after a backslash comes one of {' '.join(ESCAPES)}"
            )
        return found

    return ESCAPE.sub(one, match[1])


def _catalogue(drafts: list[_Draft], file: str) -> Catalogue:
    header, entries, fuzzy = "", [], 0
    for draft in drafts:
        message, context = draft.parts["msgid"], draft.parts.get("msgctxt")
        forms = tuple(text for word, text in draft.parts.items() if word.startswith("msgstr"))
        if not message and context is None:
            header = header or forms[0]
        elif draft.fuzzy:
            fuzzy += 1
        else:
            entries.append(Entry(message, draft.parts.get("msgid_plural"), forms, f"{file}:{draft.line}"))
    return Catalogue(header, tuple(entries), fuzzy)


# .mo


def parse_mo(raw: bytes, file: str = "MO") -> Catalogue:
    """A catalogue from the bytes of a `.mo`.

    Args:
        raw: Either byte order.
        file: What messages call it.

    Raises:
        DataError: AZ711 for bytes that are not of its charset, AZ714 when it is cut short or none.
    """
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(raw[:4])
    if order is None or len(raw) < 20:
        raise DataError(
            "AZ714", f"`{file}` does not begin as a .mo does", help="`msgfmt` makes one from a .po"
        )
    revision, count, messages, translations = struct.unpack_from(f"{order}4I", raw, 4)
    if revision >> 16 > 1:
        raise DataError("AZ714", f"`{file}` is a .mo of revision {revision >> 16}; 0 and 1 are known")
    sides = [_strings(raw, order, count, table, file) for table in (messages, translations)]
    found = dict(zip(*sides, strict=True))
    header = found.pop(b"", b"")
    charset = _charset(header.decode("ascii", errors="replace"), file)
    entries = []
    for number, pair in enumerate(found.items(), start=1):
        try:
            message, translation = (part.decode(charset) for part in pair)
        except UnicodeDecodeError as error:
            byte = f"0x{error.object[error.start]:02X}"
            at = f"byte {error.start + 1} of a text of message {number} in `{file}` is {byte}"
            raise DataError(
                "AZ711", f"{at}: this is not {charset}", why="its header names the charset"
            ) from error
        one, zero, plural = message.rpartition("\x04")[2].partition("\0")
        forms = tuple(translation.split("\0"))
        entries.append(Entry(one, plural if zero else None, forms, f"{file}, message {number}"))
    return Catalogue(header.decode(charset, errors="replace"), tuple(entries))


def _strings(raw: bytes, order: str, count: int, table: int, file: str) -> list[bytes]:
    """The texts of a table of lengths and offsets. All of them together are no longer than the file."""
    fits = table + 8 * count <= len(raw)
    spans = list(struct.iter_unpack(f"{order}2I", raw[table : table + 8 * count])) if fits else []
    if (
        not fits
        or any(at + size > len(raw) for size, at in spans)
        or sum(size for size, _ in spans) > len(raw)
    ):
        raise DataError("AZ714", f"`{file}` is damaged: a text lies beyond its end")
    return [raw[at : at + size] for size, at in spans]


READERS: dict[str, Callable[[bytes, str], Catalogue]] = {".po": parse_po, ".mo": parse_mo}
"""By the ending of the file."""
