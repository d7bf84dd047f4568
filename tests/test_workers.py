"""Workers never outlive the process that started them, and what they say arrives."""

import os
import signal
import subprocess
import time
from pathlib import Path

import processes
import pytest

from attnzoo.errors import RunError
from attnzoo.workers import GRACE, in_processes

PARENT = """
import sys
from attnzoo.workers import in_processes
from test_workers import {job}
if __name__ == "__main__":
    for done in in_processes({job}, sys.argv[1:], workers=2):
        print(done, flush=True)
"""


def stay(file: str) -> str:
    """A job that does not end by itself."""
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)
    return file


def stay_deaf(file: str) -> str:
    """One that SIGTERM does not end either."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return stay(file)


def save_and_stop(file: str) -> str:
    """One that ends as a training does: it saves when it is asked to stop."""

    def ask(number, frame):
        Path(file).with_suffix(".saved").write_text("")
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ask)
    return stay(file)


def soon(file: str) -> str:
    """A job that is done soon; then its worker is idle."""
    Path(file).write_text(str(os.getpid()))
    return file


def square(number: int) -> int:
    return number**2


def fail(number: int) -> int:
    raise RunError("AZ803", f"number {number}")


def interrupt(number: int) -> int:
    raise KeyboardInterrupt


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not yet fetched does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def started(job: str, tmp_path: Path) -> tuple[subprocess.Popen, list[int]]:
    """A process with two workers in the middle of a job."""
    files = [tmp_path / "a", tmp_path / "b"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    parent = processes.begun(
        "-c", PARENT.format(job=job), *map(str, files),
        env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert parent.poll() is None and time.monotonic() < deadline, parent.communicate()
        time.sleep(0.05)
    return parent, [int(file.read_text()) for file in files]


def of_session(leader: int) -> list[int]:
    """All processes that run in a session, helpers of multiprocessing too."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
            except OSError:
                continue
            found += [int(entry.name)] if session == leader else []
    return found


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are counted in /proc")


@linux
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        signal.SIGTERM,
        *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGHUP, signal.SIGINT)),
    ],
)
def test_nothing_is_left_of_a_killed_process(number, tmp_path):
    parent, workers = started("stay_deaf" if number == signal.SIGKILL else "stay", tmp_path)
    assert len(set(workers)) == 2 and all(alive(pid) for pid in workers)
    os.kill(parent.pid, number)
    deadline = time.monotonic() + GRACE + 5
    while of_session(parent.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert of_session(parent.pid) == []
    parent.wait()


@linux
def test_what_tests_start_ends_with_them(tmp_path):
    """A run of tests that is killed leaves no comparison behind that would go on for hours."""
    code = f"""
import pathlib, processes, time
child = processes.begun("-c", "import time; time.sleep(600)")
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
time.sleep(600)
"""
    tests = processes.begun("-c", code, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)})
    deadline = time.monotonic() + 60
    while not ((tmp_path / "child").exists() and (tmp_path / "child").read_text()):
        assert tests.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child = int((tmp_path / "child").read_text())
    assert alive(child)
    tests.kill()
    tests.wait()
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)


@linux
def test_idle_workers_end_too(tmp_path):
    """One job of the two is done; its worker waits for more when the process is killed."""
    (tmp_path / "a").write_text("")
    parent, workers = started("soon_or_stay", tmp_path)
    assert parent.stdout.readline() == f"{tmp_path / 'a'}\n"
    parent.kill()
    deadline = time.monotonic() + GRACE + 5
    while of_session(parent.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert of_session(parent.pid) == []
    parent.wait()


def soon_or_stay(file: str) -> str:
    return soon(file) if file.endswith("a") else stay(file)


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_save_first(number, tmp_path):
    parent, _ = started("save_and_stop", tmp_path)
    os.killpg(parent.pid, number) if number == signal.SIGINT else os.kill(parent.pid, number)
    _, errors = parent.communicate()
    deadline = time.monotonic() + GRACE + 5
    while of_session(parent.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "a.saved").exists() and (tmp_path / "b.saved").exists()
    assert errors.count("Traceback") <= 1  # a worker says nothing


def test_results_arrive():
    assert sorted(in_processes(square, range(5), workers=2)) == [0, 1, 4, 9, 16]


def test_an_error_arrives_and_ends_the_rest(tmp_path):
    with pytest.raises(RunError, match="number 3") as caught:
        list(in_processes(fail, [3], workers=2))
    assert caught.value.code == "AZ803"


@pytest.mark.parametrize("work", [os._exit, interrupt])
def test_a_worker_that_ends(work):
    with pytest.raises(RunError) as caught:
        list(in_processes(work, [1], workers=1))
    assert caught.value.code == "AZ809"


def test_who_wants_no_more_results_does_not_wait():
    began = time.monotonic()
    results = in_processes(time.sleep, [0.01, 600], workers=2)
    next(results)
    results.close()
    assert time.monotonic() - began < GRACE + 20
