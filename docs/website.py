"""The site, as HTML: python docs/website.py

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

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "docs" / "_build"
SOURCE = BUILD / "source"
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
    elsewhere = {ROOT / "docs" / name for name in ("_build", "__pycache__", "guides", "index.rst")}
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*")]:
        if file.is_file() and elsewhere.isdisjoint([file, *file.parents]):
            yield file.relative_to(ROOT), file.read_bytes()


def mirror() -> None:
    """Brings the mirror up to date. A file that has not changed keeps its time, by which Sphinx knows it."""
    wanted = dict(mirrored())
    for file in SOURCE.rglob("*.*"):
        path = file.relative_to(SOURCE)
        if path not in wanted and path.parts[:2] not in (("docs", "guides"), ("docs", "reference")):
            file.unlink()
    for path, content in wanted.items():
        file = SOURCE / path
        if not file.is_file() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    for name in LINKED:
        if not (SOURCE / name).is_symlink():
            (SOURCE / name).symlink_to(ROOT / name)


if __name__ == "__main__":
    mirror()
    strict = ["--fail-on-warning", "--keep-going", "--quiet"]
    settings = ["-c", str(ROOT / "docs"), "-d", str(BUILD / "doctrees")]
    sys.exit(sphinx([*strict, *settings, str(SOURCE), str(BUILD / "html")]))
