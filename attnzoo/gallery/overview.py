"""The overview: all components as cards that can be filtered, a page for Sphinx and an extension that completes it.

Everything is in the page, and without a script it is a list. The script filters, counts and keeps what is chosen in the
address (`attnzoo/gallery/overview_files/`). Thumbnails, script and style lie in a folder beside the page, which Sphinx
does not know of, so the extension copies it.
"""

import html
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.catalogue.lists import form_of
from attnzoo.core import Family
from attnzoo.core.mask import KINDS
from attnzoo.version import VERSION
from attnzoo.zoo import Entry

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FOLDER = "overview"
"""Beside the page: thumbnails, script and style."""
FILES = Path(__file__).with_name("overview_files")
SECTIONS = {
    "Mechanisms and pools": ("mechanism", "pool"),
    "Fusions": ("fusion",),
    "Probes": ("probe",),
    "Interventions": ("intervention",),
}
"""Headings, and the kinds below each."""
FACETS = {
    "kind": ("mechanism", "pool", "fusion", "probe", "intervention"),
    "family": tuple(map(str, Family)),
    "mask": KINDS,
    "growth": ("O(1)", "O(log n)", "O(n)", "O(n log n)", "O(n²)", "O(n³)"),
    "grid": ("none", "any", "1-D", "2-D", "3-D"),
    "fidelity": ("exact", "adapted", "inspired"),
    "year": (),
    "plugin": ("attnzoo",),
}
"""What can be filtered by, and the order of values; others come behind these. A card must have every mask that is
chosen, and one of the values of any other facet."""


@dataclass(frozen=True)
class Thumbnail:
    """A small picture.

    Args:
        file: Its name in the folder of the overview.
        alt: What is seen.
        size: Width and height.
    """

    file: str
    alt: str
    size: tuple[int, int]


def facts(entry: Entry) -> dict[str, list[str]]:
    """The values of a component, by facet; what a kind does not claim it does not have.

    Args:
        entry: A mechanism, pool, fusion, probe or intervention.
    """
    card, form = entry.value.card, form_of(entry.value)
    found = {
        "kind": ["mechanism" if form == "head" else form],
        "mask": [kind for kind in KINDS if kind in getattr(card, "masks", ())],
        "fidelity": [card.fidelity],
        "year": [str(card.paper.year)] if card.paper and card.paper.year else [],
        "plugin": [entry.plugin],
    }
    if form in ("head", "mechanism", "pool"):
        grid = {None: "none", "any": "any"}.get(card.grid, f"{card.grid}-D")
        found |= {"family": [str(card.family)], "growth": [card.grows], "grid": [grid]}
    return found


def overview(
    entries: Iterable[Entry],
    files: Mapping[str, str],
    thumbnails: Mapping[str, Thumbnail],
    title: str = "The zoo",
) -> str:
    """The page, as MyST Markdown.

    Args:
        entries: What has a page.
        files: The file of each page beside this one, by full name.
        thumbnails: By full name; what has none is a card without.
        title: Its heading.
    """
    shown = {entry.full_name: facts(entry) for entry in entries}
    by_name = {entry.full_name: entry for entry in entries}
    parts = [
        "---\nhide-toc: true\n---",
        f"# {title}",
        "What there is: each card leads to a page with equations, pictures, costs, checks and paper.",
        _raw(_form(list(shown.values()))),
    ]
    for heading, kinds in SECTIONS.items():
        names = [name for name, values in shown.items() if values["kind"][0] in kinds]
        if not names:
            continue
        names.sort(
            key=lambda name: (_order("family", shown[name].get("family", [""])[0]), by_name[name].name)
        )
        cards = [_card(by_name[name], files[name], shown[name], thumbnails.get(name)) for name in names]
        parts += [f"## {heading}", _raw("\n".join(['<ul class="zoo-cards">', *cards, "</ul>"]))]
        pages = [f"{by_name[name].name} <{files[name].removesuffix('.md')}>" for name in names]
        lines = [":hidden:", f":caption: {heading}", "", *pages]
        parts.append("\n".join(["```{toctree}", *lines, "```"]))
    parts.append(_raw(f'<script src="{FOLDER}/overview.js"></script>'))
    return "\n\n".join(parts) + "\n"


def copy_files(folder: Path) -> None:
    """Script and style of the overview into a folder.

    Args:
        folder: Of the overview's files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES.iterdir():
        shutil.copyfile(file, folder / file.name)


def _form(values: Sequence[Mapping[str, Sequence[str]]]) -> str:
    """Filters for what differs; shown by the script."""
    lines = [
        f'<link rel="stylesheet" href="{FOLDER}/overview.css">',
        '<form class="zoo-filter" role="search" aria-label="Filter the zoo" hidden>',
        '<p><label for="zoo-text">Words</label> <input id="zoo-text" type="search" name="text" autocomplete="off" '
        'placeholder="linear, kernel, Vaswani" aria-keyshortcuts="/"> <button type="reset">Clear</button></p>',
    ]
    lines.append("<details open><summary>Filters</summary>")
    for facet in FACETS:
        there = sorted(
            {one for card in values for one in card.get(facet, ())}, key=lambda v: _order(facet, v)
        )
        if len(there) < 2:
            continue
        lines.append(f"<fieldset><legend>{facet}</legend><div>")
        lines += [
            f'<label><input type="checkbox" name="{facet}" value="{html.escape(value)}"> '
            f"{html.escape(value)} <span></span></label>"
            for value in there
        ]
        lines.append("</div></fieldset>")
    keys = "<kbd>/</kbd> words · <kbd>Esc</kbd> clears · <kbd>←</kbd> <kbd>→</kbd> <kbd>↑</kbd> <kbd>↓</kbd> cards"
    lines += [
        "</details>",
        '<p><output role="status" aria-live="polite"></output>',
        f"<small>{keys}</small></p>",
        "</form>",
    ]
    return "\n".join(lines)


def _card(entry: Entry, file: str, values: Mapping[str, Sequence[str]], thumbnail: Thumbnail | None) -> str:
    card = entry.value.card
    data = "".join(
        f' data-{facet}="{html.escape("|".join(values.get(facet, ())))}"'
        for facet in FACETS
        if values.get(facet)
    )
    words = html.escape(f"{card.paper or ''} {' '.join(sorted(getattr(card, 'laws', ())))}".strip())
    picture = ""
    if thumbnail:
        width, height = thumbnail.size
        picture = (
            f'<img src="{FOLDER}/{html.escape(thumbnail.file)}" alt="{html.escape(thumbnail.alt)}" '
            f'width="{width}" height="{height}" loading="lazy" decoding="async">'
        )
    tags = [tag for facet in ("family", "growth", "year") for tag in values.get(facet, ())]
    said = html.escape(" · ".join(tags))
    page = html.escape(file.removesuffix(".md") + ".html")
    return (
        f'<li{data} data-words="{words}"><a href="{page}">{picture}<strong>{html.escape(entry.name)}</strong></a>'
        f"<span>{html.escape(card.summary)}</span>{f'<small>{said}</small>' if said else ''}</li>"
    )


def _order(facet: str, value: str) -> tuple[int, str]:
    known: Sequence[str] = FACETS[facet]
    return (known.index(value) if value in known else len(known), value)


def _raw(text: str) -> str:
    return f"```{{raw}} html\n{text}\n```"


def _copied(app: "Sphinx", error: Exception | None) -> None:
    """The folder beside each overview goes beside its page."""
    if error is None and app.builder.format == "html":
        for script in Path(app.srcdir).rglob(f"{FOLDER}/overview.js"):
            target = Path(app.outdir) / script.parent.relative_to(app.srcdir)
            shutil.copytree(script.parent, target, dirs_exist_ok=True)


def setup(app: "Sphinx") -> dict[str, Any]:
    """As an extension of Sphinx."""
    app.connect("build-finished", _copied, priority=100)  # before those who look for what pages refer to
    return {"version": VERSION, "parallel_read_safe": True, "parallel_write_safe": True}
