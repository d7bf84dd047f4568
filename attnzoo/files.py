"""Files are opened here: what is no regular file, or is too large, is refused before a byte of it is read.

A named pipe would make a program wait for ever, `/dev/zero` and a sparse file of terabytes would fill its memory, and
links may lead to any of them.
"""

import errno
import hashlib
import os
import stat
from io import BufferedReader

MOST = 2**30
"""Bytes that a file may have when nothing else is said."""
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)  # what is put in its place meanwhile must not make us wait either
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_BINARY", 0)
)


def open_file(path: str | os.PathLike, *, most: int | None = MOST) -> BufferedReader:
    """A regular file, opened to be read.

    Args:
        path: The file, or a link to it.
        most: How many bytes it may have; any number when null.

    Raises:
        OSError: what `strerror` says: the system's reason, or that it is a pipe, a device, a folder or too large.
    """
    try:
        _hold_to(path, os.stat(path), most)  # first, since opening a device may do something
        handle = os.open(path, _FLAGS)
    except ValueError:  # a zero byte, or half of a character
        raise OSError(errno.EINVAL, "this cannot be the name of a file", os.fspath(path)) from None
    try:
        _hold_to(path, os.fstat(handle), most)
        return os.fdopen(handle, "rb")
    except OSError:
        os.close(handle)
        raise


def read_file(path: str | os.PathLike, *, most: int = MOST) -> bytes:
    """All bytes of a regular file.

    Args:
        path: The file, or a link to it.
        most: How many bytes it may have.

    Raises:
        OSError: as for `open_file`.
    """
    with open_file(path, most=most) as file:
        data = file.read(most + 1) or b""  # None: a file of the kernel that has nothing to say now
    if len(data) > most:  # files of the kernel do not tell their size
        raise _too_large(path, most)
    return data


def sha256(path: str | os.PathLike, *, most: int | None = MOST) -> str:
    """The SHA-256 of a regular file, in hexadecimal.

    Args:
        path: The file, or a link to it.
        most: How many bytes it may have; any number when null.

    Raises:
        OSError: as for `open_file`.
    """
    with open_file(path, most=most) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hold_to(path: str | os.PathLike, info: os.stat_result, most: int | None) -> None:
    if not stat.S_ISREG(info.st_mode):
        kind = next((name for test, name in _KINDS if test(info.st_mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))
    if most is not None and info.st_size > most:
        raise _too_large(path, most, info.st_size)


def _too_large(path: str | os.PathLike, most: int, size: int | None = None) -> OSError:
    has = "more" if size is None else f"{size:,}"
    return OSError(errno.EFBIG, f"it has {has} bytes, and may have {most:,}", os.fspath(path))
