"""Work in processes that never outlive the one that started them, even when that one is killed."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from attnzoo.errors import RunError

GRACE = 2.0
"""Seconds that a worker has to save its step when it is to end."""
Job = TypeVar("Job")
Result = TypeVar("Result")
_ending = threading.Event()


def in_processes(work: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int) -> Iterator[Result]:
    """The results of all jobs, as they come. Ctrl-C reaches the workers through the caller alone.

    Args:
        work: A function of a module; SIGTERM is to end it soon, with a KeyboardInterrupt.
        jobs: Its arguments.
        workers: How many processes at most.

    Raises:
        RunError: AZ809, when a worker ended before its job was done; else what `work` raises.
    """
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    theirs, ours = context.Pipe(duplex=False)  # the system closes our end when we end, however that is
    count = min(workers, max(1, len(jobs)))
    with theirs, ProcessPoolExecutor(count, context, _end_with_caller, (theirs,)) as pool:
        try:
            with _interrupts_blocked():
                futures = [pool.submit(_done, work, job) for job in jobs]
            for future in as_completed(futures):
                done, result = future.result()
                if not done:
                    raise _ended()
                yield result
        except BrokenProcessPool:
            raise _ended() from None
        finally:
            ours.close()
            pool.shutdown(wait=False, cancel_futures=True)


def _done(work: Callable[[Job], Result], job: Job) -> tuple[bool, Result | None]:
    if not _ending.is_set():
        with suppress(KeyboardInterrupt):
            return True, work(job)
    return False, None


def _end_with_caller(lifeline: Connection) -> None:
    """Let this worker end when the other end of the pipe is closed."""

    def watch() -> None:
        with suppress(EOFError, OSError):
            lifeline.recv_bytes()
        _ending.set()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    # between two jobs; a training has its own answer
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes that are started here inherit that Ctrl-C is not for them."""
    change: Any = getattr(signal, "pthread_sigmask", None)  # not on Windows
    before = change(signal.SIG_BLOCK, {signal.SIGINT}) if change else None
    try:
        yield
    finally:
        if change:
            change(signal.SIG_SETMASK, before)


def _ended() -> RunError:
    return RunError(
        "AZ809",
        "a worker ended before its job was done",
        why="somebody stopped it, or the system did because memory ran out",
        help="give the same command again, perhaps with fewer --workers: what is done is not done again",
    )
