"""One thread, no network, reproducible examples."""

import gc
import os
import signal
import socket
import subprocess
from pathlib import Path
from zlib import crc32

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two workers on two cores, one thread each

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as under `nohup ... &`; processes of the tests would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True, database=None)
settings.register_profile("deep", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


WRONG_VERSIONS = {"test_mutants", "test_the_form_without_a_fault_is_not_caught"}
"""Of the test files of mechanisms and fusions: what tests the oracle. Every day the first of a file and one in four."""


COMMON = ("attnzoo/core/", "attnzoo/functional/", "attnzoo/testing/")
"""What every mechanism stands on."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `sample(n)` the first case and one in n of the others, chosen by name, are for every day.

    Of mechanisms and fusions that have not changed since the revision that `ATTNZOO_SINCE` names, one in four of the
    wrong versions is tried every day, and every second check and oracle; where what they stand on has changed, all are.
    """
    seen, lines = set(), _changed(os.environ.get("ATTNZOO_SINCE"))
    changed = {Path(line).stem.removeprefix("test_") for line in lines}
    everything = any(line.startswith(COMMON) for line in lines)
    for item in items:
        sample, test = item.get_closest_marker("sample"), item.nodeid.partition("[")[0]
        one_in = sample.args[0] if sample else 1
        own = item.path.stem.removeprefix("test_")
        if item.path.parent.name in ("mechanisms", "fusions") and own not in changed:
            one_in = 4 if item.originalname in WRONG_VERSIONS else one_in
        if item.originalname in ("test_conformance", "test_oracle") and not everything:
            component = item.name.partition("[")[2].partition("-")[0]
            one_in = 1 if {component, own} & changed else 2
        first = test not in seen and (item.name != item.originalname or one_in == 1)
        if one_in > 1 and not first and crc32(item.nodeid.encode()) % one_in:
            item.add_marker(pytest.mark.slow)
        seen.add(test)


def _changed(since: str | None) -> list[str]:
    """The files that have changed since a revision, committed or not; none without one that git knows."""
    if since is None:
        return []
    command = ["git", "diff", "--name-only", since]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.splitlines()


def pytest_collection_finish():
    """Garbage is collected seldom: going through all modules and tests again and again took a tenth of a run."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 100)


LOCAL = ("127.", "localhost", "::1")
_connect, _connect_ex = socket.socket.connect, socket.socket.connect_ex


def _local(address) -> bool:
    """Whether an address is on this machine: a Unix socket's path, or the loopback."""
    return isinstance(address, (str, bytes)) or str(address[0]).startswith(LOCAL)


def _guarded(connect):
    def guarded(self, address, *args):
        if not _local(address):
            raise OSError(f"tests have no network; one asked for {address}")
        return connect(self, address, *args)

    return guarded


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Connections to other machines are refused."""
    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", _guarded(_connect))
    patch.setattr(socket.socket, "connect_ex", _guarded(_connect_ex))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test starts from the same random state, in whatever order tests run."""
    torch.manual_seed(0)
