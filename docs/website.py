"""The site, as HTML: python docs/website.py [--quick]

`--quick` is for those who write: the zoo without pictures, and no guide is run.

Sphinx reads a mirror of the repository, docs/_build/source, so that a relative link means the same on GitHub and on the
site. There docs/api/ is made from the public names, docs/guides/ from the scripts of that folder by running them, and
docs/reference/ is the gallery. A warning is an error. What has not changed since the last time is neither drawn nor run
nor written again.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from api_pages import pages
from sphinx.cmd.build import main as sphinx

from attnzoo import gallery

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "docs" / "_build"
SOURCE = BUILD / "source"
GUIDES, REFERENCE = Path("docs/guides"), Path("docs/reference")
"""Of the mirror: what sphinx-gallery and the gallery of components look after themselves."""
LINKED = (
    "attnzoo",
    "plugins",
    "recipes",
    "tests",
    "LICENSE",
    "Makefile",
    "constraints.txt",
    "pyproject.toml",
)
"""What pages link to without being pages."""


def mirrored() -> Iterator[tuple[Path, bytes]]:
    """What stands in the mirror besides guides and gallery: the path there, and the content."""
    yield Path("index.rst"), (ROOT / "docs" / "index.rst").read_bytes()
    for name, page in pages().items():
        yield Path("docs/api", f"{name}.rst"), page.encode()
    elsewhere = {
        ROOT / "docs" / name for name in ("_build", "__pycache__", "guides", "reference", "index.rst")
    }
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*")]:
        if file.is_file() and elsewhere.isdisjoint([file, *file.parents]):
            yield file.relative_to(ROOT), file.read_bytes()


def mirror() -> None:
    """Brings the mirror up to date. A file that has not changed keeps its time, by which Sphinx knows it."""
    wanted = dict(mirrored())
    guides = {file.stem for file in (ROOT / "docs" / "guides").glob("*.py")} | {"index"}
    for file in [file for file in SOURCE.rglob("*") if file.is_file()]:
        path = file.relative_to(SOURCE)
        if path in wanted or path.parts[0] in LINKED or path.parts[:2] == REFERENCE.parts:
            continue
        if path.parts[:2] != GUIDES.parts or (path.suffix == ".rst" and path.stem not in guides):
            file.unlink()
    for path, content in wanted.items():
        file = SOURCE / path
        if not file.is_file() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    for name in LINKED:
        if not (SOURCE / name).is_symlink():
            (SOURCE / name).symlink_to(ROOT / name)


def without_source() -> Iterator[Path]:
    """Pages of an earlier time, of which Sphinx knows nothing any more."""
    for file in (BUILD / "html").rglob("*.html"):
        page = file.relative_to(BUILD / "html")
        found = any((SOURCE / page).with_suffix(suffix).exists() for suffix in (".md", ".rst"))
        if not found and page.name not in ("genindex.html", "py-modindex.html", "search.html"):
            yield file


def say(line: str) -> None:
    """Progress."""
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    mirror()
    from_docs = {"plugin": "attnzoo", "docs": ROOT / "docs", "cache": BUILD / "drawn"}
    gallery.write(SOURCE / REFERENCE, **from_docs, pictures=not quick, report=say)
    for file in list(without_source()):
        file.unlink()
    say("guides and pages")
    strict = ["--fail-on-warning", "--keep-going", "--quiet", "-D", f"plot_gallery={not quick:d}"]
    settings = ["-c", str(ROOT / "docs"), "-d", str(BUILD / "doctrees")]
    failed = sphinx([*strict, *settings, str(SOURCE), str(BUILD / "html")])
    say("failed" if failed else f"built: {BUILD / 'html' / 'index.html'}")
    sys.exit(failed)
