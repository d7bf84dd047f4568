"""What shells complete, asked through their own protocol: environment variables in, words on stdout out."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnzoo.cli import completion
from attnzoo.cli.app import app

ROOT = Path(__file__).parent.parent
RECIPES = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that the first question fills."""
    return tmp_path_factory.mktemp("cache")


def asked(line: str, cache: Path, shell: str) -> dict[str, str]:
    """What a shell says when Tab is pressed at the end of a line."""
    words = {"bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)},
             "zsh": {"_TYPER_COMPLETE_ARGS": line},
             "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}}[shell]  # fmt: skip
    return {"_ATTNZOO_COMPLETE": f"complete_{shell}", "XDG_CACHE_HOME": str(cache)} | words


def words(line: str, cache: Path, shell: str = "bash") -> list[str]:
    """What it is told, in this process."""
    result = CliRunner().invoke(app, [], env=asked(line, cache, shell), prog_name="attnzoo")
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    return result.stdout.split()


def spawned(line: str, cache: Path, site: str = "", **more: str) -> list[str]:
    """What it is told by a process of its own, with a folder of installed distributions."""
    path = os.pathsep.join(filter(None, [site, str(ROOT)]))
    environment = os.environ | asked(line, cache, "bash") | {"PYTHONPATH": path} | more
    done = subprocess.run([sys.executable, "-m", "attnzoo"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


def test_verbs(cache):
    assert words("attnzoo comp", cache) == ["compose", "compare"]
    assert words("attnzoo new ", cache) == ["plugin", "mechanism", "fusion", "recipe"]


@pytest.mark.parametrize("verb", ["compose", "train", "compare ham_classic", "bench ham_vit_a --against"])
@pytest.mark.sample(4)
def test_recipes(cache, verb, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert set(words(f"attnzoo {verb} ham_", cache)) == {name for name in RECIPES if name.startswith("ham_")}
    assert words(f"attnzoo {verb} recipes/nest", cache) == ["recipes/nested.yaml"]
    assert words(f"attnzoo {verb} {ROOT}/recipes/nest", cache) == [f"{ROOT}/recipes/nested.yaml"]


def test_names_of_the_zoo(cache):
    assert words("attnzoo check so", cache) == ["soft", "softmax", "softmax_one"]
    assert set(words("attnzoo show ha", cache)) == {
        "hadamard",
        "halo",
        *(name for name in RECIPES if name.startswith("ha")),
    }
    assert words("attnzoo list --plugin at", cache) == ["attnzoo"]
    assert words("attnzoo check --plugin at", cache) == ["attnzoo"]
    assert words("attnzoo bench d", cache)[0] == "decode"
    assert words("attnzoo list mech", cache) == ["mechanisms"]


def test_zsh_and_fish(cache):
    assert words("attnzoo check sof", cache, shell="fish") == ["soft", "softmax", "softmax_one"]
    assert words("attnzoo check sof", cache, shell="zsh") == [
        "_arguments",
        "'*:",
        ':(("soft"',
        '"softmax"',
        '"softmax_one"))\'',
    ]


def test_runs_and_files(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "group/b", "group/c"):
        (tmp_path / "runs" / name / "step_00000001").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    for name in (
        "mine/x.yaml",
        "mine/y.txt",
        "mine/with space.yaml",
        "mine/.hidden.yaml",
        "alone.py",
        "runs.yaml",
    ):
        (tmp_path / name).touch()

    for verb in ("eval", "resume", "translate", "eval runs/a"):
        assert words(f"attnzoo {verb} ", cache) == ["runs/a", "runs/group/"]
        assert words(f"attnzoo {verb} ru", cache) == ["runs/a", "runs/group/"]
        assert words(f"attnzoo {verb} runs/g", cache) == ["runs/group/b", "runs/group/c"]
    assert words("attnzoo heatmap ru", cache) == ["runs/", "runs.yaml"]
    assert words("attnzoo compose mi", cache) == [
        "mine/x.yaml"
    ]  # a folder that is the only answer is entered
    assert words("attnzoo check alo", cache) == words("attnzoo run al", cache) == ["alone.py"]
    assert words("attnzoo compose nowhere/x", cache) == words("attnzoo compose ~nobody_here/x", cache) == []


def test_it_is_quick_and_light(cache):
    """Without torch once the names are kept; the time is generous, because tests share the machine."""
    spawned("attnzoo show so", cache)
    used = []
    for _ in range(3):
        began = os.times()
        spawned("attnzoo show so", cache)
        took = os.times()
        used.append(took.children_user + took.children_system - began.children_user - began.children_system)
    assert min(used) < 1.0  # seconds of a processor: how busy the machine is has no say
    code = ("import sys; from attnzoo.cli import completion; assert 'softmax' in completion.everything('so')\n"
            "assert not {'torch', 'timm', 'numpy', 'rich'} & set(sys.modules)")  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"XDG_CACHE_HOME": str(cache)}
    )


PLUGIN = """
import os, sys
{before}
from attnzoo import hookimpl
from attnzoo.fusions.add import Add

class Mine(Add):
    card = __import__("dataclasses").replace(Add.card, name="{name}")

@hookimpl
def attnzoo_fusions():
    return [Mine]
"""


def plugin(folder: Path, before: str = "", name: str = "my_own") -> str:
    """An installed distribution with a plugin; returns its folder for PYTHONPATH."""
    info = folder / "mine-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attnzoo]\nmine = mine_plugin\n")
    (folder / "mine_plugin.py").write_text(PLUGIN.format(before=before, name=name))
    return str(folder)


@pytest.mark.slow  # five shells, each of which imports the zoo
def test_plugins_and_their_changes(tmp_path):
    path = plugin(tmp_path / "site")
    assert spawned("attnzoo show my", tmp_path, path) == ["my_own"]
    assert spawned("attnzoo list --plugin mi", tmp_path, path) == ["mine"]
    plugin(tmp_path / "site", name="my_other")
    assert spawned("attnzoo show my", tmp_path, path) == ["my_other"]
    assert spawned("attnzoo show my", tmp_path, path, ATTNZOO_DISABLE_PLUGINS="mine") == []


@pytest.mark.slow
def test_plugins_that_are_gone(tmp_path):
    assert spawned("attnzoo show my", tmp_path, plugin(tmp_path / "site")) == ["my_own"]
    shutil.rmtree(tmp_path / "site")
    assert spawned("attnzoo show my", tmp_path) == []


@pytest.mark.parametrize("before", [
    "print('hello'); os.write(1, b'noise'); os.write(2, b'noise'); os.system('echo noise')", 
    *(pytest.param(way, marks=pytest.mark.slow) for way in ("sys.exit(3)", "os._exit(4)")),
])  # fmt: skip
def test_broken_plugins_do_not_disturb(before, tmp_path):
    path = plugin(tmp_path / "site", before)
    assert spawned("attnzoo show softm", tmp_path, path) == ["softmax", "softmax_one"]


def test_a_plugin_that_hangs_costs_its_time_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def survey(switches):
        calls.append(switches)
        return {} if not switches else {"mechanism": ["softmax"], "fusion": [], "recipe": [], "plugin": []}

    monkeypatch.setattr(completion, "_survey", survey)
    assert completion.components("so") == completion.components("so") == ["softmax"]
    assert calls == [{}, {"ATTNZOO_PLUGINS": ""}]


def test_a_survey_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(completion, "PATIENCE", 0.5)
    monkeypatch.setattr(completion, "_SURVEY", "import time; time.sleep(60)")
    began = time.perf_counter()
    assert completion._survey({}) == {} and time.perf_counter() - began < 20


@pytest.mark.parametrize("kept", ["", "{", "[]", "null", '{"key": 3}', "\x00"])
def test_a_damaged_file_is_written_again(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(completion, "_survey", lambda switches: {"plugin": ["attnzoo"]})
    place = completion._place()
    place.parent.mkdir(parents=True)
    place.write_text(kept)
    assert completion.plugins("a") == ["attnzoo"] and json.loads(place.read_text())["plugin"] == ["attnzoo"]
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_nowhere_to_keep_it(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(completion, "_survey", lambda switches: {"plugin": ["attnzoo"]})
    assert completion.plugins("a") == ["attnzoo"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_of_shells(shell, tmp_path):
    environment = os.environ | {"_ATTNZOO_COMPLETE": f"source_{shell}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "attnzoo"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "_ATTNZOO_COMPLETE" in done.stdout and f"complete_{shell}" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_in_bash(cache, tmp_path):
    """The installed script in bash itself: what it puts into COMPREPLY."""
    command = tmp_path / "attnzoo"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m attnzoo "$@"\n')
    command.chmod(0o755)
    script = ('eval "$(_ATTNZOO_COMPLETE=source_bash attnzoo)"; COMP_WORDS=(attnzoo compose nest); COMP_CWORD=2; '
              '_attnzoo_completion attnzoo; echo "[${COMPREPLY[*]}]"; complete -p attnzoo')  # fmt: skip
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True,
                          env=os.environ | environment | {"XDG_CACHE_HOME": str(cache)})  # fmt: skip
    assert done.stdout.splitlines() == ["[nested]", "complete -o default -F _attnzoo_completion attnzoo"], (
        done.stderr
    )
