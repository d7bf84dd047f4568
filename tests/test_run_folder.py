"""A folder of a run that somebody changed, or that somebody else uses: one error with what and where, nothing lost."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from training import RECIPE, digest, images, last, tiny
from typer.testing import CliRunner

from attnzoo.cli.app import app
from attnzoo.errors import RunError
from attnzoo.train import checkpoint, open_run
from attnzoo.train.lock import LOCK, held


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr("attnzoo.train.kinds.load_images", images)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with all its checkpoints: steps 0, 4, 8 and 12."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnzoo.train.kinds.load_images", images)
        folder = tmp_path_factory.mktemp("whole") / "run"
        tiny(folder, keep=99)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def rewrite(folder: Path, change) -> Path:
    """Change the state of a checkpoint, and its manifest with it, so that its bytes are vouched for."""
    text = (folder / "state.json").read_text()
    state = json.loads(text)
    changed = change(state)
    text = changed if isinstance(changed, str) else json.dumps(state)
    (folder / "state.json").write_text(text)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    entries = {name: (len(data), checkpoint._sha256(data)) for name, data in files.items()}
    (folder / "manifest.json").write_bytes(checkpoint._manifest(entries))
    assert not checkpoint.damage(folder)
    return folder


def put(*path_and_value):
    """A change that puts a value at a path of keys."""
    *path, key, value = path_and_value

    def change(state):
        for word in path:
            state = state[word]
        state[key] = value

    return change


def without(*path):
    *path, key = path

    def change(state):
        for word in path:
            state = state[word]
        del state[key]

    return change


MALFORMED = {
    "a list": lambda state: "[]",
    "a number": lambda state: "3",
    "nothing": lambda state: "",
    "no json": lambda state: "{'a': 1}",
    "deep": lambda state: "[" * 100_000,
    "not utf-8": lambda state: '"\udc00"',
    "no progress": without("progress"),
    "no settings": without("settings"),
    "no recipe": without("recipe"),
    "no log": without("log"),
    "no environment": without("environment"),
    "progress a list": put("progress", []),
    "epoch a text": put("progress", "epoch", "3"),
    "epoch a float": put("progress", "epoch", 0.5),
    "epoch negative": put("progress", "epoch", -1),
    "epoch huge": put("progress", "epoch", 10**400),
    "step huge": put("progress", "step", 2**70),
    "seconds NaN": put("progress", "seconds", float("nan")),
    "seconds infinite": put("progress", "seconds", float("inf")),
    "best a list": put("progress", "best", [1]),
    "more progress": put("progress", "extra", 1),
    "params a text": put("params", "many"),
    "finished a text": put("finished", "yes"),
    "log a mapping": put("log", {}),
    "row without accuracy": without("log", 0, "test_accuracy"),
    "row with a text": put("log", 0, "test_loss", "low"),
    "row with digits in quotes": put("log", 0, "epoch", "1"),
    "row with more than numbers": put("log", 0, "test_exact", "0.5"),
    "row with NaN": put("log", 0, "lr", float("nan")),
    "recipe a number": put("recipe", 3),
    "recipe a path": put("recipe", "/etc/passwd"),
    "recipe a name": put("recipe", "ham_a"),
    "settings a list": put("settings", []),
    "setting wrong": put("settings", "epochs", "many"),
    "setting unknown": put("settings", "epoch", 3),
    "optimizer a list": put("optimizer", []),
    "optimizer of a name": put("optimizer", "x", {}),
    "environment a list": put("environment", []),
    "classes numbers": put("classes", [1, 2]),
    "step of another": put("step", 5),
}


def spoil(folder: Path, name: str) -> None:
    if name == "not utf-8":
        rewrite(folder, lambda state: "{}")
        (folder / "state.json").write_bytes(b'{"a": "\xff"}')
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
        entries = {each: (len(data), checkpoint._sha256(data)) for each, data in files.items()}
        (folder / "manifest.json").write_bytes(checkpoint._manifest(entries))
    else:
        rewrite(folder, MALFORMED[name])


def cli(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.output


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.sample(3)
def test_a_malformed_state_costs_only_its_steps(name, run, whole):
    spoil(run / "step_00000012", name)
    opened = open_run(run)
    assert opened.summary()["last_epoch"] == 2
    (note,) = opened.notes()
    assert note.startswith("step_00000012 cannot be used (") and note.endswith("; the one before it is used")
    told = []
    tiny(run, keep=99, report=told.append)
    assert digest(run) == digest(whole) and told[0] == {"event": "note", "text": note}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.sample(3)
def test_a_malformed_state_alone_is_one_error(name, run):
    for folder in run.glob("step_*"):
        if folder.name != "step_00000012":
            shutil.rmtree(folder)
    spoil(run / "step_00000012", name)
    before = sorted(path.name for path in run.rglob("*"))
    for verb in ("resume", "eval"):
        code, text = cli(verb, str(run))
        assert code == 2 and "AZ802" in text and "step_00000012" in text and "Traceback" not in text
    with pytest.raises(RunError, match="AZ802"):
        tiny(run)
    assert sorted(path.name for path in run.rglob("*")) == before


def test_a_recipe_that_cannot_be_read(run):
    rewrite(last(run), put("recipe", '{"recipe": 1, "hots": {}}'))
    for folder in run.glob("step_*"):
        if folder != last(run):
            shutil.rmtree(folder)
    code, text = cli("resume", str(run))
    assert code == 2 and "AZ802" in text and "step_00000012" in text and "hots" in text


@pytest.mark.parametrize("number", ["99999999", "9" * 20, "9" * 200])
def test_a_renamed_checkpoint(number, run, whole):
    (run / "step_00000012").rename(run / f"step_{number}")
    opened = open_run(run)
    assert opened.notes() == [
        f"step_{number} cannot be used (it was saved as step 12); the one before it is used"
    ]
    code, text = cli("resume", str(run))
    assert code == 0 and "goes on after step 8 of 12" in text
    assert (run / "step_00000012" / "model.safetensors").read_bytes() == (
        whole / "step_00000012" / "model.safetensors"
    ).read_bytes()
    for folder in run.glob("step_*"):
        if folder.name != f"step_{number}":
            shutil.rmtree(folder)
    code, text = cli("resume", str(run))
    assert code == 2 and "AZ802" in text and "it was saved as step 12" in text


def test_a_progress_that_says_another_step(run):
    for folder in run.glob("step_*"):
        rewrite(folder, put("progress", "step", 3))
    code, text = cli("resume", str(run))
    assert code == 2 and "AZ802" in text and "its progress says step" in text


@pytest.mark.parametrize("changes", [{"seed": 5}, {"recipe": RECIPE.replace("fuse: add", "fuse: max")}])
def test_a_checkpoint_of_another_run(changes, run, tmp_path):
    from training import settings

    from attnzoo.train import train

    recipe = changes.pop("recipe", RECIPE)
    train(recipe, settings(**changes, epochs=4), tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "step_00000016", run / "step_00000016")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for verb in ("resume", "eval", "heatmap"):
        code, text = cli(verb, str(run))
        assert code == 2 and "AZ802" in text and "step_00000016" in text and "two runs" in text
    with pytest.raises(RunError, match="two runs"):
        tiny(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    (run / "step_00000016" / "state.json").write_text("{}")  # damaged: the run's own are used
    assert open_run(run).summary()["last_epoch"] == 3


@pytest.mark.parametrize("name", ["model", "best", "optimizer"])
def test_tensors_of_another_model(name, run, tmp_path):
    saved = checkpoint.Checkpoint(run / "step_00000012", 12)
    tensors = {each: saved.tensors(each) for each in ("model", "best", "optimizer")}
    tensors[name] = {"99/exp_avg": torch.ones(2)}
    checkpoint.save(tmp_path / "odd", 12, tensors, saved.state())
    verbs = {
        "model": [["resume"], ["eval", "--which", "last"]],
        "best": [["eval"]],
        "optimizer": [["resume"]],
    }
    for verb in verbs[name]:
        code, text = cli(*verb, str(tmp_path / "odd"))
        assert code == 2 and "AZ802" in text and "step_00000012` is none of this run" in text


def test_pipes_and_devices_in_a_run(run, whole):
    os.mkfifo(run / "step_00000012" / "more")
    assert "named pipe" in open_run(run).notes()[0]
    (run / "step_00000012" / "more").unlink()
    (run / "step_00000012" / "state.json").unlink()
    (run / "step_00000012" / "state.json").symlink_to("/dev/zero")
    assert "a device" in open_run(run).notes()[0]
    os.mkfifo(run / "step_00000099")
    (run / "step_00000098").symlink_to("step_00000098")
    with open(run / "step_00000012" / "big", "wb") as file:
        file.truncate(10**12)
    for name in ("manifest.json", "state.json"):
        (run / "step_00000008" / name).unlink()
        os.mkfifo(run / "step_00000008" / name)
    notes = open_run(run).notes()
    assert [note[:13] for note in notes] == [f"step_000000{n}" for n in ("99", "98", "12", "08")]
    for name in ("log.csv", "curve.svg", "curve.png"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    code, text = cli("resume", str(run))
    assert code == 0 and digest_of(run / "step_00000012") == digest_of(whole / "step_00000012")


def digest_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_time_that_was_over_before_the_first_epoch(tmp_path):
    tiny(tmp_path / "run", checkpoint_every=1, keep=99)
    for folder in (tmp_path / "run").glob("step_*"):
        if int(folder.name[5:]) > 2:
            (folder / "manifest.json").unlink()
    code, text = cli("resume", str(tmp_path / "run"), "--minutes", "0.001")
    assert code == 0 and "is damaged" in text
    rewrite(tmp_path / "run" / "step_00000002", put("progress", "seconds", 60.0))
    for folder in (tmp_path / "run").glob("step_*"):
        if int(folder.name[5:]) > 2:
            shutil.rmtree(folder)
    code, text = cli("resume", str(tmp_path / "run"), "--minutes", "0.5")
    assert code == 0 and "no epoch is complete yet" in text
    code, text = cli("resume", str(tmp_path / "run"), "--minutes", "0.5", "--json")
    assert json.loads(text)["best_accuracy"] is None


# The lock


CHILD = """
import os, sys, time
import attnzoo.train.kinds as task
from training import images, tiny
task.load_images = images
def report(event):
    if event.get("step") == 2:
        print("trains", flush=True)
        sys.stdin.readline()
tiny(__import__("pathlib").Path({folder!r}), report=report)
"""


def trains(folder: Path) -> subprocess.Popen:
    """Another process in the middle of a training there; a line on its standard input lets it go on."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(folder=str(folder))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert child.stdout.readline() == "trains\n"
    return child


def test_two_processes_in_one_folder(tmp_path):
    tiny(tmp_path / "whole")
    child = trains(tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(RunError) as caught:
        tiny(tmp_path / "run")
    assert caught.value.code == "AZ808" and f"process {child.pid} on " in str(caught.value)
    code, text = cli("resume", str(tmp_path / "run"))
    assert code == 2 and "AZ808" in text and f"kill {child.pid}" in text
    assert open_run(tmp_path / "run").summary()["finished"] is False  # to read is allowed
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    child.communicate("\n")
    assert child.returncode == 0 and digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_killed_process_leaves_no_lock(tmp_path):
    child = trains(tmp_path / "run")
    child.kill()
    child.wait()
    assert (tmp_path / "run" / LOCK).exists()
    tiny(tmp_path / "run")
    tiny(tmp_path / "whole")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole") and not (tmp_path / "run" / LOCK).exists()


def test_forks_and_programs_do_not_keep_the_lock(tmp_path):
    """They live on when the process that trained is gone."""
    out, into = os.pipe()
    parent = os.fork()
    if parent == 0:
        with held(tmp_path):
            fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            fork.start()
            program = subprocess.Popen(["sleep", "60"], close_fds=False)
            os.write(into, f"{fork.pid} {program.pid}".encode())
            time.sleep(60)
    pids = [int(word) for word in os.read(out, 100).split()]
    try:
        with pytest.raises(RunError, match="AZ808"), held(tmp_path):
            pass
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        for pid in pids:
            os.kill(pid, 0)  # both are there
        with held(tmp_path):
            pass
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def test_a_fork_that_ends_does_not_let_go(tmp_path):
    with held(tmp_path):
        with multiprocessing.get_context("fork").Pool(1) as pool:
            pool.apply(os.getpid)
        with pytest.raises(RunError, match="AZ808"), held(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_of_many_at_once_one_holds_it(tmp_path):
    holders, most, lock = 0, 0, threading.Lock()

    def work():
        nonlocal holders, most
        for _ in range(200):
            try:
                with held(tmp_path / "run"):
                    with lock:
                        holders += 1
                        most = max(most, holders)
                    time.sleep(0.0001)
                    with lock:
                        holders -= 1
            except RunError as error:
                assert error.code in ("AZ808", "AZ804")  # AZ804: who was first has just removed the folder

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_what_is_made_for_the_lock_is_removed(tmp_path):
    with held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "x").write_text("")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link"])
def test_a_lock_that_is_no_file(kind, tmp_path):
    lock = tmp_path / LOCK
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to("/dev/zero" if kind == "device" else tmp_path / "elsewhere")
    with pytest.raises(RunError, match="AZ804"), held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
