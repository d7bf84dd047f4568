"""A folder that is a gallery's: brought up to date file by file, and nobody else's files are touched."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from attnzoo.errors import ZooError
from attnzoo.files import read_file

MARK = ".attnzoo-gallery.json"
"""Makes a folder a gallery: the files in it that are the gallery's, as JSON."""


def claimed(folder: Path) -> set[str]:
    """The files of the gallery in a folder; none where there is no folder yet, or nothing in it.

    Args:
        folder: To be a gallery, or one already.

    Raises:
        ZooError: AZ963, when it holds something else.
    """
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return set()
        listed = json.loads(read_file(folder / MARK))
        if not isinstance(listed, list) or not all(
            isinstance(name, str) and _within(name) for name in listed
        ):
            raise ValueError
        return set(listed)
    except NotADirectoryError:
        raise _unfit(folder, "it is a file") from None
    except (FileNotFoundError, ValueError):
        raise _unfit(folder, "it holds other files, and a gallery would come among them") from None
    except OSError as error:
        raise _unfit(folder, (error.strerror or str(error)).lower()) from None


def put(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    """Make a folder hold these files, and of an earlier gallery no others.

    Each file is whole at any moment, one that has not changed keeps its time, and what was interrupted is completed the
    next time.

    Args:
        folder: The gallery; made where it is missing.
        files: Content, or a file to be copied, by the path in the folder, with slashes.

    Raises:
        ZooError: AZ963, when the folder holds something else, or cannot be written to.
    """
    before = claimed(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / MARK, _mark(before | set(files)))
        for name, content in files.items():
            _replace(folder / name, content if isinstance(content, bytes) else content.read_bytes())
        for name in before - set(files):
            (folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                for parent in PurePosixPath(name).parents[:-1]:
                    (folder / parent).rmdir()
        _replace(folder / MARK, _mark(set(files)))
    except OSError as error:
        raise _unfit(folder, (error.strerror or str(error)).lower()) from None


def _replace(file: Path, content: bytes) -> None:
    """Write a file aside and put it in its place, unless it is there already."""
    with suppress(OSError):
        if file.read_bytes() == content:
            return
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        aside.write_bytes(content)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _mark(names: set[str]) -> bytes:
    return json.dumps(sorted(names), indent=0).encode()


def _within(name: str) -> bool:
    """Whether a path stays in its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _unfit(folder: Path, why: str) -> ZooError:
    return ZooError(
        "AZ963",
        f"`{folder}` cannot be a gallery",
        why=why,
        help="name a folder that does not exist yet, an empty one, or a gallery",
    )
