"""A card's paper as a BibTeX entry."""

import re
import unicodedata
from urllib.parse import quote

from attnzoo.core import Paper

_ESCAPED = {
    "\\": r"\textbackslash{}",
    "{": r"\textbraceleft{}",  # `\{` would still count as a brace
    "}": r"\textbraceright{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_"},
}
_SMALL_WORDS = {
    "a",
    "an",
    "the",
    "on",
    "of",
    "for",
    "with",
    "in",
    "to",
    "towards",
    "what",
    "is",
    "are",
    "how",
}
"""Titles begin with them, and a key says nothing by them."""
_INITIALS = re.compile(r"(?:[^\W\d_]\.[ -]?)+")


def bibtex(paper: Paper) -> str:
    """An entry for a bibliography: `@misc` with the eprint, DOI or address, `@inproceedings` where a venue is named.

    "et al." becomes BibTeX's "others". Letters beyond ASCII stay as they are: biber and today's LaTeX read UTF-8.

    Args:
        paper: Of a card.
    """
    kind, source = _source(paper)
    fields = {
        "title": f"{{{_escaped(paper.title)}}}",  # braces once more keep its capitals
        "author": " and ".join("others" if one == "others" else _escaped(one) for one in authors(paper)),
        **source,
        "year": str(paper.year or ""),
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{key(paper)},", *lines, "}"])


def key(paper: Paper) -> str:
    """First author, year and a word of the title: `wang2020linformer`.

    The words before a colon where they are few, as in `liu2021swintransformerv2`, or the first that says something.

    Args:
        paper: Of a card.
    """
    first = next(iter(authors(paper)), "")
    surname = first.partition(",")[0] if "," in first else first.rpartition(" ")[2]
    head, colon, _ = paper.title.partition(":")
    words = [plain for word in paper.title.split() if (plain := _plain(word))]
    word = next((word for word in words if word not in _SMALL_WORDS), "")
    if colon and len(head.split()) <= 3:
        word = _plain(head)
    return f"{_plain(surname)}{paper.year or ''}{word}" or "paper"


def authors(paper: Paper) -> list[str]:
    """Authors one by one; the last is `others` where the card says "et al.".

    Args:
        paper: Of a card.
    """
    named, et_al, _ = re.sub(r",?\s+(et\.? al\.?|and others)$", "\0", _one_line(paper.authors)).partition(
        "\0"
    )
    found: list[str] = []
    for name in filter(None, re.split(r",\s+(?:and\s+|&\s+)?|\s+and\s+|\s*&\s*", named)):
        if found and _INITIALS.fullmatch(name):
            found[-1] += f", {name}"  # `Vaswani, A.` is one author
        else:
            found.append(name)
    return [*found, "others"] if et_al and found else found


def _source(paper: Paper) -> tuple[str, dict[str, str]]:
    """Kind of entry and the fields that say where the paper is."""
    ref = _one_line(paper.ref)
    if eprint := re.search(r"arxiv:\s*([\w.-]+(?:/\d+)?\d)", ref, re.I):
        number = eprint[1]
        address = f"https://arxiv.org/abs/{number}"
        return "misc", {"eprint": number, "archivePrefix": "arXiv", "url": address}
    if doi := re.search(r"\b10\.\d{4,9}/\S+", ref):
        return "misc", {"doi": quote(doi[0], safe="/:;().-_<>")}
    if re.fullmatch(r"https?://\S+|[\w-]+(\.[\w-]+)*\.[a-z]{2,}(/\S*)?", ref):
        address = ref if "://" in ref else f"https://{ref}"
        return "misc", {"url": quote(address, safe="/:?=&#%.-_~")}
    if ref and paper.year and paper.authors:
        return "inproceedings", {"booktitle": _escaped(ref)}
    return "misc", {"howpublished": _escaped(ref)}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    return "".join(_ESCAPED.get(letter, letter) for letter in _one_line(text))


def _plain(word: str) -> str:
    """Letters and digits of ASCII, small."""
    bare = unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", bare)
