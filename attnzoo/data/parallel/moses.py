"""OPUS's zip files in Moses format: two line-aligned members, `NAME.en-es.en` and `NAME.en-es.es`."""

import lzma
import re
import zipfile
import zlib
from pathlib import Path

from attnzoo.data.parallel.aligned import side_by_side
from attnzoo.data.parallel.corpus import Corpus
from attnzoo.data.parallel.text import LANGUAGE, decoded, language_pair, path_of, unreadable
from attnzoo.errors import DataError, did_you_mean
from attnzoo.files import open_file

LIMIT = 2**30
"""Most bytes of both members, unpacked. A zip of kilobytes may unpack to more than there is memory."""
MEMBER = re.compile(f"(.+)\\.({LANGUAGE})-({LANGUAGE})\\.({LANGUAGE})")
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)
"""What `zipfile` raises for a damaged zip, an unknown method (NotImplementedError), a password (RuntimeError)."""


def read_moses(name: str) -> Corpus:
    """A corpus from a zip file.

    Args:
        name: `moses:FILE.zip` or `moses:FILE.zip:en-es`. The pair says which language is the source; without it the
            zip must have one pair of languages, and the first is the source.

    Raises:
        DataError: as for `read_zip`; AZ712 when the name has no path or an impossible pair.
    """
    return read_zip(name, *zip_and_pair(name))


def zip_and_pair(name: str) -> tuple[Path, tuple[str, str] | None]:
    """The path in a name, and the languages if it says them.

    Args:
        name: As for `read_moses`.

    Raises:
        DataError: AZ712 when the name has no path or an impossible pair.
    """
    rest = name.partition(":")[2]
    match = re.fullmatch(r"(.*\.zip):(.*)", rest, re.IGNORECASE)
    path, pair = (match[1], language_pair(match[2], name)) if match else (rest, None)
    return path_of(path, name), pair


def read_zip(name: str, path: Path, pair: tuple[str, str] | None) -> Corpus:
    """A corpus from two members of a zip file. They are read where they lie; nothing is unpacked to the disk.

    Args:
        name: Of the data set.
        path: Of the zip file.
        pair: Source and target language; as the zip has them when null.

    Raises:
        DataError: AZ709 when the file cannot be read, AZ710 when the members are of unequal length, AZ711 when one is
            not UTF-8, AZ712 when the zip has other languages, AZ714 when it is damaged, has no pair or is too large.
    """
    try:
        with open_file(path, most=LIMIT) as stored, zipfile.ZipFile(stored) as archive:
            pair, members = _members(archive, path, pair)
            if sum(member.file_size for member in members) > LIMIT:
                raise DataError(
                    "AZ714",
                    f"`{path}` unpacks to more than {LIMIT:,} bytes",
                    why="all of it would be held in memory; a small zip may unpack to terabytes",
                    help="unpack it, take as many lines as you need and use `aligned:FILE:FILE`",
                )
            files = [f"{path}:{member.filename}" for member in members]
            sides = []
            for member, file in zip(members, files, strict=True):
                with archive.open(member) as stream:  # gives no more than the member's stated size
                    sides.append(list(decoded(stream, file)))
    except DAMAGED as error:
        raise DataError(
            "AZ714", f"`{path}` is not a sound zip file: {error}", help="fetch it once more"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    return Corpus(name, pair, side_by_side(sides[0], sides[1], files[0], files[1]))


def _members(
    archive: zipfile.ZipFile, path: Path, pair: tuple[str, str] | None
) -> tuple[tuple[str, str], list[zipfile.ZipInfo]]:
    """The languages, and the members with source and target."""
    found: dict[tuple[str, str], list[zipfile.ZipInfo]] = {}
    for info in archive.infolist():
        match = MEMBER.fullmatch(info.filename)
        if match and match[4] in match.group(2, 3):
            found.setdefault((match[2], match[3]), []).append(info)
    if not found:
        raise DataError(
            "AZ714", f"`{path}` has no members `NAME.en-es.en` and `NAME.en-es.es`, whatever the languages"
        )
    shown = [f"{one}-{other}" for one, other in found]
    known = ", ".join(f"`{each}`" for each in shown)
    if pair is None and len(found) > 1:
        raise DataError(
            "AZ712",
            f"`{path}` has several pairs of languages: {known}",
            help=f"say which: `moses:{path}:{shown[0]}`",
        )
    pair = pair or next(iter(found))
    infos = found.get(pair) or found.get(pair[::-1])
    if infos is None:
        hint = did_you_mean("-".join(pair), [*shown, *(f"{b}-{a}" for a, b in found)])
        raise DataError("AZ712", f"`{path}` has no pair `{'-'.join(pair)}`", help=hint or f"it has {known}")
    members = []
    for language in pair:
        mine = [info for info in infos if info.filename.endswith(f".{language}")]
        if len(mine) != 1:
            names = ", ".join(f"`{info.filename}`" for info in infos)
            raise DataError("AZ714", f"`{path}` has {len(mine)} members in `{language}`, not 1: {names}")
        members += mine
    return pair, members
