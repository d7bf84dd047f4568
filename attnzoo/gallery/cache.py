"""What was drawn is kept by a hash of all that it depends on, so that a stale figure is never found."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attnzoo.errors import ZooError
from attnzoo.version import VERSION
from attnzoo.zoo import Entry

ROOT = Path(__file__).parents[1]
"""The package."""
LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "scikit-learn",
    "matplotlib",
    "pillow",
    "hypothesis",
)
"""Whose versions everything depends on."""
STARTED = time.time()
"""When this process may have read source for the last time."""
DAY = 86400.0
"""Seconds for which a file that is not used any more is left, because another build may use it."""


class Cache:
    """A folder of files, each named by what it depends on.

    A file appears whole or not at all: it is written aside, synced and renamed. So a killed build leaves nothing that
    is found, and two builds in one folder write the same files.

    Args:
        folder: Where; is made.

    Raises:
        ZooError: AZ960, when nothing can be kept there.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unkept(self.folder, error) from None

    def file(self, name: str, depends_on: Any, make: Callable[[], bytes]) -> Path:
        """The file with what `make` gives for these dependencies: the one that is there, or a new one.

        Args:
            name: What it is called before the hash: `softmax-flow.png`.
            depends_on: All that the content depends on, as JSON has it.
            make: Gives the content; what it raises leaves no file.

        Raises:
            ZooError: AZ960, when it cannot be written.
        """
        stem, _, suffix = name.rpartition(".")
        path = self.folder / f"{stem}-{key_of([name, depends_on])}.{suffix}"
        try:
            os.utime(path)  # is used
            return path
        except OSError:
            content = make()
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="writing-", delete=False) as aside:
                aside.write(content)
                aside.flush()
                os.fsync(aside.fileno())
            os.chmod(aside.name, 0o644)
            os.replace(aside.name, path)
        except OSError as error:
            raise _unkept(self.folder, error) from None
        return path

    def sweep(self, used: Iterable[Path], older: float = DAY) -> list[Path]:
        """Remove what is not used any more, and what killed builds left half written.

        Args:
            used: Files that stay.
            older: Seconds since the last use.

        Returns:
            What was removed.
        """
        stays, gone = {path.name for path in used}, []
        for path in self.folder.iterdir():
            try:
                if path.is_file() and path.name not in stays and time.time() - path.stat().st_mtime >= older:
                    path.unlink()
                    gone.append(path)
            except OSError:  # another build was faster
                continue
        return gone


def key_of(depends_on: Any) -> str:
    """A name for dependencies: 16 hexadecimal digits.

    Args:
        depends_on: What JSON can say.
    """
    return sha256(json.dumps(depends_on, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def dependencies(entry: Entry, code: Sequence[str], **settings: Any) -> dict[str, Any]:
    """What a figure of a component depends on: its source, that of what draws it, settings, versions.

    Args:
        entry: A mechanism, pool or fusion of the zoo.
        code: Files and rooms of the package that take part: `core`, `gallery/flow.py`.
        settings: Sizes, seeds, what is read: as JSON has them.
    """
    return {
        "component": [entry.full_name, entry.value.__qualname__, _sources(str(component_root(entry)))],
        "code": {part: _sources(str(ROOT / part)) for part in sorted({"core", "functional", *code})},
        "settings": settings,
        "versions": {"attnzoo": VERSION, entry.plugin: entry.version, **_versions()},
    }


def component_root(entry: Entry) -> Path:
    """The file of a built-in component; the whole package of another, since its files may use each other.

    Args:
        entry: A mechanism, pool or fusion of the zoo.
    """
    file = Path(entry.file)
    module = entry.value.__module__
    if entry.plugin == "attnzoo" or "." not in module:
        return file
    return file.parents[module.count(".") - 1]


@cache
def _sources(root: str) -> str:
    """A hash of a file, or of all Python below a folder."""
    path = Path(root)
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    found = sha256()
    for file in files:
        content = file.read_bytes()
        if (
            file.stat().st_mtime > STARTED
        ):  # what runs may be what was there before: nobody else finds what it makes
            content += f"\0{os.getpid()} {STARTED}".encode()
        found.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


@cache
def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = ""
    return found


def _unkept(folder: Path, error: OSError) -> ZooError:
    return ZooError(
        "AZ960",
        f"cannot keep figures in `{folder}`: {(error.strerror or str(error)).lower()}",
        help="name a folder that can be written",
    )
