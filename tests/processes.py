"""Processes for tests that need one of their own but not an interpreter that starts from nothing."""

import atexit
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL


@cache
def _zygote() -> socket.socket:
    """Where requests go; the process at the other end ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "zygote.py"), str(theirs.fileno())], pass_fds=[theirs.fileno()]
    )
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)  # what is registered last comes first
    return ours


def run(
    *arguments: str,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    stdin: int | IO | None = DEVNULL,
    stdout: int | IO = PIPE,
    stderr: int | IO = PIPE,
    check: bool = False,
) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, *arguments], text=True)`, some seconds sooner.

    Args:
        arguments: Of Python: `-m MODULE ...`, `-c CODE ...` or `FILE ...`.
        cwd: Its folder.
        env: Its environment.
        stdin: A file or its number.
        stdout, stderr: A file or its number; `PIPE` hands back what was written.
        check: Whether an exit status other than 0 is an error.

    Raises:
        CalledProcessError: With `check`.
    """
    with (
        open(os.devnull, "rb") as nothing,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as error,
    ):
        streams = [
            given if given not in (PIPE, DEVNULL) else kept
            for given, kept in ((stdin, nothing), (stdout, out), (stderr, error))
        ]
        request = {
            "arguments": arguments,
            "cwd": str(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
        }
        numbers = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
        socket.send_fds(_zygote(), [json.dumps(request).encode()], numbers)
        status = _zygote().recv(64)
        if not status:
            raise RuntimeError("the process that starts the others is gone")
        texts = []
        for given, kept in ((stdout, out), (stderr, error)):
            kept.seek(0)
            texts.append(kept.read().decode() if given == PIPE else None)
    done = subprocess.CompletedProcess([sys.executable, *arguments], int(status), *texts)
    if check:
        done.check_returncode()
    return done


def begun(*arguments: str, **options: Any) -> subprocess.Popen:
    """A process of Python's in a session of its own. It ends when the tests end, killed or not; so do its workers.

    Args:
        arguments: As for `run`.
        options: Of `subprocess.Popen`.
    """
    return subprocess.Popen(
        [sys.executable, *arguments], start_new_session=True, preexec_fn=_ends_with_the_tests, **options
    )


def _ends_with_the_tests() -> None:
    """Linux kills this process when the one that started it is no more."""
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
