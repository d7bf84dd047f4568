"""One process trains in a folder at a time. The system lets go of the lock when the process ends, however it ends."""

import errno
import json
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attnzoo.errors import RunError
from attnzoo.train.checkpoint import unwritable

LOCK = ".lock"
"""A file in the folder of a run that says who trains there, as JSON. Only the system's lock on it counts."""
_WITHOUT = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""What file systems answer that know no locks: there nobody is refused."""
_held: set[int] = set()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made; what is made is removed again if nothing else came into it.

    Args:
        folder: Of a run.

    Raises:
        RunError: AZ804 when the place may not be written to, AZ808 when another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _taken(folder)
    except OSError as error:
        raise unwritable(folder, error) from None
    _held.add(handle)
    try:
        yield
    finally:
        if handle in _held:  # a fork holds nothing
            with suppress(OSError):  # on Windows an open file stays
                os.unlink(folder / LOCK)
            os.close(handle)
            _held.discard(handle)
            with suppress(OSError):  # not empty
                for path in made:
                    path.rmdir()


def _taken(folder: Path) -> int:
    """A handle that holds the lock."""
    path = folder / LOCK
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(path, flags, 0o644)  # not inherited by programs that are started
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, f"{LOCK} is not a regular file")
            if not _lock(handle):
                raise _refusal(folder, os.read(handle, 1000))
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):  # not removed by who held it before
                    os.truncate(handle, 0)
                    os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> bool:
        os.lseek(handle, 2**20, os.SEEK_SET)  # far behind what is written: a locked byte cannot be read
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _lock(handle: int) -> bool:
        """Whether the lock was free; it is held until the handle is closed."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _WITHOUT:
                raise
        return True

    def _let_go() -> None:
        """A fork has the handle too, and would hold the lock when its parent is gone."""
        for handle in _held:
            os.close(handle)
        _held.clear()

    os.register_at_fork(after_in_child=_let_go)


def _refusal(folder: Path, written: bytes) -> RunError:
    try:
        holder = json.loads(written)
        pid, host = int(holder["pid"]), str(holder["host"])
    except (ValueError, TypeError, LookupError):
        return RunError("AZ808", f"another process trains in `{folder}`", help="wait until it is done")
    here = host == socket.gethostname()
    return RunError(
        "AZ808",
        f"process {pid} on {host} trains in `{folder}`",
        why="two at once would overwrite each other's checkpoints",
        help="wait until it is done, " + (f"or stop it: kill {pid}" if here else f"or stop it on {host}"),
    )
