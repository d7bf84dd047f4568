"""The gallery as sources for Sphinx: a page for each component, the overview, pictures."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from attnzoo.bench.mechanisms import read_csv
from attnzoo.catalogue.lists import rows
from attnzoo.catalogue.pages import look_up
from attnzoo.errors import ZooError
from attnzoo.gallery import overview
from attnzoo.gallery.cache import Cache
from attnzoo.gallery.drawing import SHARP, Drawn, draw_all
from attnzoo.gallery.folder import claimed, put
from attnzoo.gallery.influence import LEGEND
from attnzoo.gallery.pages import ALT, Pages, kind_of
from attnzoo.zoo import Entry, Zoo, load_zoo

PICTURES = "pictures"
"""Folder of the pictures, beside the pages."""
THUMBNAIL, COLOURS = (320, 200), 48
"""Of a card: width and height in pixels at most, twice what is shown; and how many colours."""
KINDS = ("mechanism", "fusion")
"""What is drawn and checked."""


@dataclass(frozen=True)
class Written:
    """What a gallery holds.

    Args:
        pages: Files of the pages, by full name of the component.
        left_out: What could not be drawn or checked, and why, by full name.
        size: Bytes of all files.
    """

    pages: Mapping[str, str]
    left_out: Mapping[str, Mapping[str, str]]
    size: int


def write(
    folder: Path,
    *,
    only: Sequence[str] = (),
    plugin: str | None = None,
    cache: Path | None = None,
    pictures: bool = True,
    timings: Path | None = None,
    docs: Path | None = None,
    workers: int = 2,
    report: Callable[[str], None] = lambda line: None,
) -> Written:
    """Write the pages of what is installed, for Sphinx with the settings of `attnzoo.gallery.sphinx_settings`.

        attnzoo.gallery.write(Path("docs/zoo"), plugin="attnzoo-wavelets")

    What is drawn is kept, and drawn anew when something changed on which it depends; so the second time is fast.

    Args:
        folder: Where: a new one, an empty one, or one that this function wrote.
        only: Names of components; all when empty.
        plugin: Whose components; everybody's when None.
        cache: Where pictures and results of checks are kept; beside the folder when None.
        pictures: Whether components are drawn and checked; pages without take seconds for the whole zoo.
        timings: A CSV file of `attnzoo bench mechanisms`, for times against the number of tokens.
        docs: The folder `docs` of attnzoo's source, for its own site: pages refer to it and show its timings and
            pictures.
        workers: How many processes draw.
        report: Is told what is done, a line at a time.

    Raises:
        ZooError: AZ963, when the folder cannot be a gallery; AZ964, when there is nothing to show; AZ201 and AZ605 for
            names that there are not.
    """
    zoo = load_zoo()
    entries = chosen(zoo, only, plugin)
    claimed(folder)  # before hours of drawing
    if docs is not None:
        timings = docs / "benchmarks" / "mechanisms.csv"
    measured = read_csv(timings) if timings else {}
    drawn: dict[str, Drawn] = {}
    if pictures:
        kept = Cache(cache or beside(folder))
        shown = [entry for entry in entries if kind_of(entry, zoo) in KINDS]
        drawn = draw_all(kept.folder / PICTURES, shown, kept, workers, measured=measured, report=report)
        kept.sweep(())  # of what was drawn the last day nothing goes
    pages = Pages(zoo, measured, frozenset(entry.full_name for entry in entries), docs is not None)
    files: dict[str, bytes | Path] = {}
    thumbnails: dict[str, overview.Thumbnail] = {}
    for entry in entries:
        own = drawn.get(entry.full_name)
        files[pages.files[entry.full_name]] = pages.page(entry, own).encode()
        for picture in own.pictures.values() if own else ():
            files[f"{PICTURES}/{picture.path.name}"] = picture.path
        if seen := _seen_first(entry, own, docs):
            thumbnails[entry.full_name], small = thumbnail(*seen)
            files[f"{overview.FOLDER}/{thumbnails[entry.full_name].file}"] = small
    named = {entry.full_name: pages.files[entry.full_name] for entry in entries}
    files["index.md"] = overview.overview(entries, named, thumbnails).encode()
    files |= {f"{overview.FOLDER}/{file.name}": file for file in overview.FILES.iterdir()}
    put(folder, files)
    size = sum(len(one) if isinstance(one, bytes) else one.stat().st_size for one in files.values())
    return Written(named, {name: own.missing for name, own in drawn.items() if own.missing}, size)


def chosen(zoo: Zoo, only: Sequence[str] = (), plugin: str | None = None) -> list[Entry]:
    """The components that are shown: mechanisms, fusions, probes, interventions.

    Args:
        zoo: What is installed.
        only: Names, or `plugin/name`; all when empty.
        plugin: Name of a plugin or its distribution; all when None.

    Raises:
        RecipeError: AZ201, AZ202, AZ205 for names.
        ZooError: AZ605 for a plugin that there is not; AZ964, when nothing is left.
    """
    found: list[Entry] = []
    for registry in zoo.registries[:-1]:
        names = [row["name"] for row in rows(zoo, f"{registry.kind}s", plugin=plugin)]
        found += [registry[name] for name in names]
    if only:
        wanted = [look_up(name) for name in only]
        if recipes := [entry.name for kind, entry in wanted if kind == "recipe"]:
            raise ZooError(
                "AZ964",
                f"`{recipes[0]}` is a recipe, and has no page",
                help="name mechanisms, fusions, probes or interventions: `attnzoo list` shows them",
            )
        found = [entry for entry in found if any(entry is one for _, one in wanted)]
    if not found:
        of = f" of `{plugin}`" if plugin else ""
        raise ZooError("AZ964", f"there is nothing to show{of}", help="`attnzoo list` says who provides what")
    return found


def beside(folder: Path) -> Path:
    """Where a gallery keeps what was drawn: `gallery.cache` beside `gallery`.

    Args:
        folder: The gallery.
    """
    named = folder if folder.name.strip(".") else folder.resolve()
    return named.with_name(f"{named.name}.cache")


def thumbnail(picture: Path, name: str, alt: str, below: int = 0) -> tuple[overview.Thumbnail, bytes]:
    """A picture made small for the overview.

    Args:
        picture: A PNG file.
        name: Of the file that it becomes.
        alt: What is seen.
        below: How many rows of pixels at the bottom are left out, such as a legend.
    """
    with Image.open(picture) as whole:
        small = whole.convert("RGB").crop((0, 0, whole.width, whole.height - below))
    small.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.quantize(COLOURS).save(out, "PNG", optimize=True)
    return overview.Thumbnail(name, alt, (small.width // 2, small.height // 2)), out.getvalue()


def _seen_first(entry: Entry, drawn: Drawn | None, docs: Path | None) -> tuple[Path, str, str, int] | None:
    """The picture that says most in little room, as `thumbnail` takes it; None without pictures."""
    name = f"{entry.full_name.replace('/', '-')}.png"
    for kind, below in (("influence", SHARP * LEGEND), ("maps", 0), ("flow", 0)):
        if drawn and kind in drawn.pictures:
            return drawn.pictures[kind].path, name, f"{ALT[kind]} {entry.name}", below
    if docs is not None and (file := docs / "pictures" / f"{entry.name}.png").is_file():
        return file, name, f"{entry.name.replace('_', ' ')} of a small model", 0
    return None
