"""Files and languages: what every format of parallel text needs."""

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from attnzoo.errors import DataError, Place
from attnzoo.files import read_file

LANGUAGE = r"[A-Za-z]{2,3}(?:[_@][A-Za-z0-9]+)*"
"""A language as OPUS writes it: `en`, `pt_BR`, `sr@latin`."""


def path_of(text: str, name: str) -> Path:
    """The path in a data set's name.

    Raises:
        DataError: AZ712 when there is none.
    """
    if not text:
        raise DataError(
            "AZ712", f"`{name}` names no file", help=f"write `{name.partition(':')[0]}:` and a path"
        )
    return Path(os.path.expanduser(text))  # leaves an unknown user's home as it is written


def content(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        DataError: AZ709 when it cannot be read.
    """
    try:
        return read_file(path)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> DataError:
    """What is said of a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return DataError("AZ709", f"there is no file `{path}`", help="a path counts from the current folder")
    return DataError("AZ709", f"cannot read `{path}`: {error.strerror or error}")


def lines_of(path: Path) -> list[str]:
    """The lines of a file in UTF-8, without their ends.

    Raises:
        DataError: AZ709 when it cannot be read, AZ711 when it is not UTF-8.
    """
    return list(decoded(io.BytesIO(content(path)), str(path)))


def decoded(lines: Iterable[bytes], file: str, charset: str = "UTF-8") -> Iterator[str]:
    """Lines of text from lines of bytes, without their ends and the mark that may begin a file.

    Args:
        lines: As a binary stream gives them: they end with a line feed.
        file: What messages call them.
        charset: Of the bytes.

    Raises:
        DataError: AZ711 at the first byte that is not of the charset, or zero, as UTF-16 has them.
    """
    for number, line in enumerate(lines, start=1):
        if (zero := line.find(b"\0")) >= 0:
            raise _undecodable(line, zero, file, number, charset)
        try:
            text = line.decode(charset)
        except UnicodeDecodeError as error:
            raise _undecodable(line, error.start, file, number, charset) from error
        text = text.rstrip("\r\n")
        yield text.removeprefix("\ufeff") if number == 1 else text


def _undecodable(line: bytes, at: int, file: str, number: int, charset: str) -> DataError:
    before = line[:at].decode(charset, errors="replace")
    shown = line[: at + 200].decode(charset, errors="replace").rstrip("\r\n")  # a line may be a gigabyte
    return DataError(
        "AZ711",
        f"byte {at + 1} of line {number} is 0x{line[at]:02X}: this is not {charset}",
        place=Place(file, number, len(before) + 1, 1, shown),
        why=f"the file is read as {charset}",
        help="save it in UTF-8; `iconv -f ENCODING -t UTF-8 FILE` converts it",
    )


def language_pair(text: str, name: str) -> tuple[str, str]:
    """Source and target language from `en-es`.

    Args:
        text: What was written.
        name: The data set's name, for the message.

    Raises:
        DataError: AZ712 when it is no pair.
    """
    match = re.fullmatch(f"({LANGUAGE})-({LANGUAGE})", text)
    if match is None:
        slip = re.fullmatch(r"\s*([A-Za-z]{2,3})\s*[^A-Za-z]{1,3}\s*([A-Za-z]{2,3})\s*", text)
        hint = f"did you mean `{slip[1].lower()}-{slip[2].lower()}`?" if slip else ""
        what = f"`{text}` in `{name}`" if text else f"the end of `{name}`"
        raise DataError(
            "AZ712",
            f"{what} is no pair of languages",
            help=hint or "a pair is the source's code, a hyphen and the target's, such as `en-es`",
        )
    if match[1] == match[2]:
        raise DataError("AZ712", f"source and target of `{name}` are the same language, `{match[1]}`")
    return match[1], match[2]
