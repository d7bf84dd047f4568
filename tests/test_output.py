"""Standard output belongs to answers, whatever plugins, their libraries and their processes write."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from test_plugins import write_plugin

from attnzoo.cli.render import say_json

ROOT = Path(__file__).parent.parent
NOISY = """
    import atexit, ctypes, os, subprocess, sys
    import torch
    from pathlib import Path
    from torch import nn
    from attnzoo import hookimpl
    from attnzoo.core import Card, Family, Mechanism

    C = ctypes.CDLL(None)

    def shout(when):
        if os.environ.get("SILENT"):
            return
        print("noise of print", when)
        sys.__stdout__.write(f"noise of sys.__stdout__ {when}\\n")
        os.write(1, f"noise of os.write {when}\\n".encode())
        C.printf(b"noise of C\\n")
        subprocess.run([sys.executable, "-S", "-c", "print('noise of a process')"])

    shout("at import")
    atexit.register(shout, "at exit")

    class Noisy(Mechanism):
        card = Card(name="noisy", family=Family.MIXING, summary="Gives back its tokens.")

        def __init__(self, site):
            super().__init__(site)
            shout("in __init__")
            self.weight = nn.Parameter(torch.ones(site.dim))

        @classmethod
        def claims(cls, **options):
            shout("in claims")
            return cls.card

        def mix(self, x, source, *, mask, layout):
            print("noise of print in forward", flush=True)
            os.write(1, b"noise of os.write in forward\\n")
            return x * self.weight

    @hookimpl
    def attnzoo_mechanisms():
        shout("in a hook")
        return [Noisy]

    @hookimpl
    def attnzoo_recipes():
        return [Path(__file__).parent / "recipes"]
"""
RECIPE = """
recipe: 1
host: {kind: vit, base: vit_tiny_patch16_224, model: {img_size: 8, patch_size: 4, embed_dim: 8, num_heads: 2, depth: 1, in_chans: 1, num_classes: 10}}
attention: noisy
train: {data: digits, epochs: 1, batch_size: 256}
"""
VERBS = [
    ("list", "--json"),
    ("compose", "noisy_vit", "--json"),
    ("train", "noisy_vit", "--out", "run", "--json"),
]
MORE = [
    ("show", "nosuch", "--json"),
    ("doctor", "--json"),
    ("list", "models", "--json"),
    ("show", "noisy", "--json"),
    ("show", "noisy_vit", "--json"),
    ("compose", "nosuch", "--json"),
    ("check", "noisy", "--examples", "1", "--json"),
    ("plugins", "--json"),
    ("schema",),
    ("eval", "run", "--json"),
    ("bench", "noisy_vit", "--against", "ham_a", "--rounds", "2", "--batch", "2", "--json"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a noisy plugin and a recipe of it."""
    folder = tmp_path_factory.mktemp("noisy")
    write_plugin(folder, "noisy", NOISY)
    (folder / "recipes").mkdir()
    (folder / "recipes" / "noisy_vit.yaml").write_text(RECIPE)
    return folder


def attnzoo(folder, *arguments, **options):
    """A verb in a process of its own, with the plugin installed."""
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    environment |= options.pop("env", {})
    return processes.run("-m", "attnzoo", *arguments, cwd=folder, env=environment, **options)


@pytest.mark.parametrize(
    "arguments", [*VERBS, *(pytest.param(verb, marks=pytest.mark.slow) for verb in MORE)], ids=" ".join
)
@pytest.mark.sample(3)
def test_json_is_json_whatever_a_plugin_prints(folder, arguments):
    done = attnzoo(folder, *arguments)
    assert json.loads(done.stdout), done.stderr
    for noise in (
        "print at import",
        "sys.__stdout__ in a hook",
        "os.write at import",
        "C",
        "a process",
        "print at exit",
    ):
        assert f"noise of {noise}" in done.stderr
    if arguments[0] in ("compose", "train", "check") and "nosuch" not in arguments:
        assert "noise of os.write in forward" in done.stderr and "noise of print in __init__" in done.stderr


def test_plain_answers_are_clean_too(folder):
    noisy = attnzoo(folder, "list", "mechanisms")
    silent = attnzoo(folder, "list", "mechanisms", env={"SILENT": "1"})
    assert noisy.stdout == silent.stdout and "noisy" in noisy.stdout and "noise" in noisy.stderr


def test_a_script_has_its_own_standard_output(folder):
    script = folder / "script.py"
    script.write_text("import os, timm\nprint('the script')\nos.write(1, b'writes\\n')\n")
    done = attnzoo(folder, "run", "script.py", env={"SILENT": "1"})
    assert sorted(done.stdout.split("\n")) == ["", "the script", "writes"]


def test_help_and_what_is_written_by_new_are_answers(folder, tmp_path):
    for arguments in (
        ("--help",),
        ("list", "--help"),
        ("--version",),
        ("new", "recipe", "mine", "--into", str(tmp_path)),
    ):
        done = attnzoo(folder, *arguments)
        assert done.returncode == 0 and done.stdout and not done.stderr


@pytest.mark.parametrize(
    "closed", ["both", *(pytest.param(one, marks=pytest.mark.slow) for one in ("stdout", "stderr"))]
)
def test_closed_streams_do_no_harm(folder, closed):
    """As `attnzoo list >&-`: nothing is written elsewhere, nothing is traced."""
    redirect = {"stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-"}[closed]
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "SILENT": "1"}
    command = f"{sys.executable} -m attnzoo list fusions --json {redirect}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0
    assert not done.stderr and bool(done.stdout) == (closed == "stderr")


@pytest.mark.parametrize("form", [(), ("--json",)])
@pytest.mark.sample(3)
def test_nobody_reads_any_more(folder, form):
    reader, writer = os.pipe()
    os.close(reader)
    done = attnzoo(folder, "list", *form, stdout=writer, env={"SILENT": "1"})
    os.close(writer)
    assert done.returncode == 1 and not done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
@pytest.mark.parametrize(
    "arguments", [("list",), ("list", "--json"), ("show", "nosuch", "--json")], ids=" ".join
)
@pytest.mark.sample(4)
def test_a_full_disk_is_said(folder, arguments):
    with open("/dev/full", "w") as full:
        done = attnzoo(folder, *arguments, stdout=full, env={"SILENT": "1"})
    assert done.returncode == 2 and "AZ602" in done.stderr and "Traceback" not in done.stderr


def test_a_terminal_is_still_one(folder):
    """Colours, and the terminal's width, though standard input and error lead elsewhere."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 132, 0, 0))
    environment = {"SILENT": "1", "TERM": "xterm-256color", "NO_COLOR": "", "COLUMNS": ""}
    streams = {"stdin": processes.DEVNULL, "stdout": theirs, "stderr": processes.PIPE}
    done = attnzoo(folder, "list", "fusions", env=environment, **streams)
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        text += piece
    os.close(ours)
    assert done.returncode == 0 and b"\x1b[" in text
    plain = re.sub(rb"\x1b\[[0-9;]*m", b"", text).decode()
    assert 80 < max(map(len, plain.splitlines())) <= 132


def test_a_call_from_python_leaves_the_streams_alone(folder):
    code = """
import contextlib, io, os
from attnzoo.cli.app import app
from typer.testing import CliRunner
result = CliRunner().invoke(app, ["list", "fusions", "--json"])
assert result.exit_code == 0 and '"hadamard"' in result.stdout
os.write(1, b"file 1 is what it was")
"""
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "SILENT": "1"}
    done = processes.run("-c", code, cwd=folder, env=environment)
    assert done.stdout == "file 1 is what it was", done.stderr


def test_json_has_no_numbers_that_json_has_not(capsys):
    say_json({"a": float("nan"), "b": [1.5, (float("-inf"), 2)], "c": {"d": float("inf")}})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": None, "b": [1.5, [None, 2]], "c": {"d": None},
    }  # fmt: skip
