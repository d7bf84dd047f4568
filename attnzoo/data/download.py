"""Archives of data sets: fetched once, checked before they are opened, unpacked without trust."""

import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from attnzoo.errors import DataError
from attnzoo.files import sha256


@dataclass(frozen=True)
class Archive:
    """A file that a data set's authors publish.

    Args:
        url: Where it lies.
        sha256: Its checksum, in hexadecimal.
        folder: The folder in it that is wanted.
        members: The files in that folder that are wanted; anything else stays packed.
    """

    url: str
    sha256: str
    folder: str
    members: tuple[str, ...]

    @property
    def file(self) -> str:
        """Its file name."""
        return self.url.rpartition("/")[2]


def unpacked(archive: Archive, root: Path, *, download: bool) -> Path:
    """The folder with an archive's members, fetched and unpacked if it is not there yet.

    Args:
        archive: What is wanted.
        root: Where data sets lie.
        download: Whether the network may be asked.

    Raises:
        DataError: AZ702 when the archive cannot be had, AZ703 when it is not what was published.
    """
    folder, file = root / archive.folder, root / archive.file
    if all((folder / member).is_file() for member in archive.members):
        return folder
    if not file.exists():
        _fetch(archive, root, download)
    _verify(archive, file)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=root) as scratch:
        _extract(archive, file, Path(scratch))
        folder.mkdir(exist_ok=True)
        for member in archive.members:
            os.replace(Path(scratch, archive.folder, member), folder / member)
    return folder


def _fetch(archive: Archive, root: Path, download: bool) -> None:
    """Download into a scratch folder and move into place once the checksum is right."""
    from torchvision.datasets.utils import download_url

    help = (
        f"put {archive.file} from {archive.url} into {root}, or name the folder that has it in ATTNZOO_DATA"
    )
    if not download:
        raise DataError(
            "AZ702", f"{archive.file} is not in `{root}`, and downloading was not asked for", help=help
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".downloading-", dir=root) as scratch:
            download_url(archive.url, scratch, archive.file)
            _verify(archive, Path(scratch, archive.file))
            os.replace(Path(scratch, archive.file), root / archive.file)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; too many redirects a RuntimeError
        raise DataError("AZ702", f"cannot download {archive.file}: {error}", help=help) from error


def _verify(archive: Archive, file: Path) -> None:
    try:
        found = sha256(file)
    except OSError as error:
        raise DataError(
            "AZ703", f"cannot read `{file}`: {error.strerror}", help="delete it and load again"
        ) from error
    if found != archive.sha256:
        raise DataError(
            "AZ703",
            f"{archive.file} has the wrong checksum",
            why=f"SHA-256 is {found}, but {archive.sha256} was published",
            help="delete the file and load again; if it happens twice, do not use it",
        )


def _extract(archive: Archive, file: Path, scratch: Path) -> None:
    """The wanted members and nothing else; regular files only, nowhere but below the scratch folder."""
    try:
        with tarfile.open(file, "r:gz") as tar:
            for member in archive.members:
                entry = tar.getmember(f"{archive.folder}/{member}")
                content = tar.extractfile(entry) if entry.isreg() else None
                if content is None:
                    raise DataError("AZ703", f"`{entry.name}` in {archive.file} is not a regular file")
                target = scratch / archive.folder / member  # names of our own list
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("wb") as out:
                    shutil.copyfileobj(content, out)
    except (tarfile.TarError, EOFError, OSError, KeyError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        raise DataError(
            "AZ703", f"cannot unpack {archive.file}: {text}", help="delete it and load again"
        ) from error
