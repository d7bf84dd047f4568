"""Wherever a file is read: pipes, devices, sockets, folders, endless links and files without end are refused at once."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from attnzoo.bench.composition import open_image
from attnzoo.cli.app import app
from attnzoo.data import load_images
from attnzoo.data.cifar import CIFAR10
from attnzoo.data.parallel import Tokens, load_pairs
from attnzoo.errors import ZooError
from attnzoo.files import open_file, read_file, sha256
from attnzoo.lab.heatmap import read_image
from attnzoo.recipe import load

KINDS = {
    "pipe": "a named pipe",
    "zero": "a device",
    "socket": "a socket",
    "folder": "a folder",
    "loop": "symbolic links",
    "link to a pipe": "a named pipe",
    "sparse": "bytes",
    "no": "no such file",
}
"""Kind of file to what must be said of it."""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a file of a kind; a read that hangs fails the test after twenty seconds."""
    monkeypatch.chdir(tmp_path)

    def made(kind: str, name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "zero":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "link to a pipe":
            os.mkfifo(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
        elif kind == "sparse":
            with path.open("wb") as file:
                file.truncate(10**11)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind("bound")  # a socket's path must be short
            os.rename("bound", path)
        return path

    def hangs(number, frame):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(20)
    yield made
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
def test_refused_by_kind(kind, make):
    path = make(kind, "x")
    for read in (open_file, read_file, sha256):
        with pytest.raises(OSError) as caught:
            read(path)
        assert KINDS[kind] in caught.value.strerror.lower()
    with pytest.raises(OSError, match="name of a file"):
        read_file("a\0b")


def test_a_regular_file_is_read(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "y").symlink_to("x")
    assert read_file(tmp_path / "y", most=3) == b"abc"
    assert sha256(tmp_path / "x").startswith("ba7816bf")
    with pytest.raises(OSError, match="3 bytes, and may have 2"):
        read_file(tmp_path / "x", most=2)


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="only Linux has files that do not tell their size"
)
def test_a_file_that_does_not_tell_its_size_is_bounded():
    assert os.stat("/proc/self/maps").st_size == 0
    with pytest.raises(OSError, match="more bytes"):
        read_file("/proc/self/maps", most=10)


def images(make, kind):
    for name in ("a", "b"):
        for i in range(3):
            path = make("", f"data/{name}/{i}.png")
            Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(path)
    make(kind, "data/b/9.png")
    data = load_images(f"folder:{Path('data').resolve()}", size=8)
    for side in (data.train, data.test):
        side.batch(side.labels.new_tensor(range(len(side))))


def cifar(make, kind):
    folder = make("", "cifar-10-batches-bin/x").parent
    for member in CIFAR10.archive.members:
        make("", f"{folder.name}/{member}").write_bytes(b"a " * 10 if member.endswith("txt") else b"")
    make(kind, "cifar-10-binary.tar.gz")
    (folder / "test_batch.bin").unlink()
    load_images("cifar10", root=folder.parent, download=False)


def pairs(template: str):
    def read(make, kind):
        path = make(kind, f"file.{template.rpartition('.')[2]}")
        load_pairs(template.replace("FILE", str(path.with_suffix(""))), tokens=Tokens(), max_length=8)

    return read


def opus(make, kind):
    make(kind, "opus-Books-v1-en-es.zip")
    load_pairs("opus_books:en-es", root=Path.cwd(), download=False, tokens=Tokens(), max_length=8)


READERS = {
    "images of a folder": (images, "AZ704"),
    "archive": (cifar, ("AZ703", "AZ702")),
    "tsv": (pairs("tsv:FILE.tsv"), "AZ709"),
    "aligned": (pairs("aligned:FILE.en:FILE.en"), "AZ709"),
    "moses": (pairs("moses:FILE.zip"), "AZ709"),
    "catalogue": (pairs("gettext:FILE.po"), "AZ709"),
    "opus": (opus, ("AZ709", "AZ702")),
    "heat map": (lambda make, kind: read_image(make(kind, "x.png"), (3, 8, 8)), "AZ902"),
    "composing": (lambda make, kind: open_image(make(kind, "x.png"), None), "AZ604"),
    "recipe": (lambda make, kind: load(make(kind, "x.yaml")), ("AZ101", "AZ102")),
}


CASES = [
    (reader, kind)
    for reader in READERS
    for kind in KINDS
    if kind != "no" and (reader, kind) != ("catalogue", "folder")  # a folder of catalogues is read as one
]


@pytest.mark.parametrize("reader,kind", CASES)
def test_refused_by_reader(reader, kind, make):
    read, codes = READERS[reader]
    with pytest.raises(ZooError) as caught:
        read(make, kind)
    assert caught.value.code in codes
    if caught.value.code != "AZ702":  # downloads put a file where there is none
        assert KINDS[kind] in str(caught.value).lower()


@pytest.mark.parametrize("verb", ["heatmap", "compose", "train"])
def test_on_the_command_line(verb, make):
    pipe = str(make("pipe", "x.png"))
    arguments = {
        "heatmap": ["ham_a", "--images", pipe],
        "compose": ["ham_a", "--image", pipe],
        "train": ["deep_head", "--data", f"tsv:{pipe}"],
    }[verb]
    result = CliRunner().invoke(app, [verb, *arguments])
    assert result.exit_code == 2 and "a named pipe" in result.output and "Traceback" not in result.output


def test_opening_does_not_reach_child_processes(tmp_path):
    (tmp_path / "x").write_text("")
    with open_file(tmp_path / "x") as file:
        code = f"import os; os.fstat({file.fileno()})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, close_fds=False)
    assert "Bad file descriptor" in done.stderr
