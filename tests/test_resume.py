"""A run that was stopped anywhere ends with the bits of one that never was."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training import RECIPE, STEPS, digest, images, last, settings, tiny

from attnzoo.errors import RunError
from attnzoo.train import Stopped, checkpoint, open_run, train

TOTAL = 3 * STEPS
VARYING = ("images_per_second", "seconds")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr("attnzoo.train.kinds.load_images", images)


def rows(folder: Path) -> list[dict]:
    """The log without what the clock decides."""
    return [{k: v for k, v in row.items() if k not in VARYING} for row in open_run(folder).log()]


@pytest.mark.parametrize(
    "changes", [{}, {"ema": 0.9, "accumulate": 2, "workers": 2}, {"optimizer": {"use": "sgd", "lr": 0.1}}]
)
def test_resume_is_exact_at_every_kind_of_step(tmp_path, changes):
    whole = tmp_path / "whole"
    tiny(whole, checkpoint_every=1, keep=99, **changes)
    for step in (1, STEPS, STEPS + 2, TOTAL - 1):
        part = tmp_path / f"from{step}"
        shutil.copytree(whole / f"step_{step:08d}", part / f"step_{step:08d}")
        tiny(part, **changes)
        for name in ("model", "optimizer", "best", *(["ema"] if "ema" in changes else [])):
            file = f"{name}.safetensors"
            assert (last(part) / file).read_bytes() == (last(whole) / file).read_bytes(), (step, name)
        assert rows(part) == rows(whole)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    tiny(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert tiny(tmp_path).summary()["finished"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_damaged_checkpoint_costs_only_its_steps(tmp_path):
    tiny(tmp_path / "whole")
    tiny(tmp_path / "run")
    state = last(tmp_path / "run") / "state.json"
    state.write_text(state.read_text().replace("synthetic", "sinthetic"))
    assert open_run(tmp_path / "run").notes() == [
        "step_00000012 is damaged (state.json changed); the one before it is used"
    ]
    told = []
    tiny(tmp_path / "run", report=told.append)
    notes = [event["text"] for event in told if event["event"] == "note"]
    assert "step_00000012 is damaged" in notes[0] and "after step 8 of 12" in notes[1] and len(notes) == 2
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    (last(tmp_path / "run") / "state.json").unlink()
    (tmp_path / "run" / "step_00000008" / "manifest.json").unlink()
    with pytest.raises(RunError, match="AZ805"):
        tiny(tmp_path / "run")
    with pytest.raises(RunError, match="AZ805"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step(tmp_path, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt(event):
        if event.get("step") == 5:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped) as caught:
        tiny(tmp_path / "run", report=interrupt)
    assert last(tmp_path / "run").name == "step_00000006" and not caught.value.run.summary()["finished"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    tiny(tmp_path / "run")
    tiny(tmp_path / "whole")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_the_second_signal_ends_it_at_once(tmp_path):
    def interrupt(event):
        if event.get("step") == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        tiny(tmp_path, report=interrupt)
    assert not isinstance(caught.value, Stopped) and last(tmp_path).name == "step_00000004"


def test_time_over_is_an_end_that_can_be_moved(tmp_path):
    run = tiny(tmp_path / "run", minutes=1e-9)
    assert (
        run.summary()["finished"]
        and run.summary()["last_epoch"] == 1
        and last(run.folder).name == "step_00000002"
    )
    assert tiny(tmp_path / "run", minutes=1e-9).log() == run.log()
    run = tiny(tmp_path / "run")
    tiny(tmp_path / "whole")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole") and rows(run.folder) == rows(
        tmp_path / "whole"
    )


def test_what_may_change_the_bits_is_said(tmp_path):
    tiny(tmp_path, minutes=1e-9)
    folder = last(tmp_path)
    state = checkpoint.Checkpoint(folder, 2).state()
    state["environment"] |= {"torch": "1.0", "processes": 4}
    tensors = {
        name: checkpoint.Checkpoint(folder, 2).tensors(name) for name in ("model", "optimizer", "best")
    }
    checkpoint.save(tmp_path, 2, tensors, state)
    told = []
    tiny(tmp_path, report=told.append)
    text = next(event["text"] for event in told if event["event"] == "note")
    assert "was 1.0" in text and "processes 1, was 4" in text


# Slow: real kills, real processes.


def in_a_child(work) -> multiprocessing.Process:
    """Start work in a fork: nothing has to be imported again."""
    child = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    child.start()
    return child


def survive_kills(learn, tmp_path: Path) -> None:
    """Kill a training again and again, until it was struck often enough; every run must end with the same bits.

    Args:
        learn: Trains into a folder, with changes of the settings.
        tmp_path: Where.
    """
    kills, chance = int(os.environ.get("ATTNZOO_KILLS", 50)), random.Random(0)
    changes = {"epochs": 6, "checkpoint_every": 1, "ema": 0.9}
    began = time.perf_counter()
    child = in_a_child(lambda: learn(tmp_path / "whole", **changes))
    child.join()
    duration = time.perf_counter() - began
    assert child.exitcode == 0
    struck, run, number = 0, tmp_path / "run0", 0
    while struck < kills:
        child = in_a_child(lambda run=run: learn(run, **changes))
        child.join(chance.uniform(0, duration))
        child.kill()
        child.join()
        struck += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:
            assert digest(run) == digest(tmp_path / "whole") and rows(run) == rows(tmp_path / "whole")
            number += 1
            run = tmp_path / f"run{number}"
        else:
            assert child.exitcode == -signal.SIGKILL
            checkpoint.sound(run)
    learn(run, **changes)
    assert digest(run) == digest(tmp_path / "whole") and not list(run.glob(".tmp-*"))


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    survive_kills(tiny, tmp_path)


@pytest.mark.slow
def test_two_hundred_damaged_bytes(tmp_path):
    tiny(tmp_path)
    chance, folder = random.Random(0), last(tmp_path)
    files = sorted(folder.iterdir())
    for number in range(200):
        file = files[number % len(files)]
        good = file.read_bytes()
        position = chance.randrange(len(good))
        changed = good[position] ^ chance.randrange(1, 256)
        file.write_bytes(good[:position] + bytes([changed]) + good[position + 1 :])
        assert open_run(tmp_path).notes()[0].startswith(f"{folder.name} is damaged"), (file.name, position)
        file.write_bytes(good)
    assert open_run(tmp_path).notes() == []


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
import attnzoo.train.loop as loop, attnzoo.train.kinds as kinds
from training import images, settings
kinds.load_images = images
def report(event):
    if event.get("step") == {stop}:
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)
loop.train({recipe!r}, settings(**{changes!r}), {folder!r}, report=report)
"""


def spread(folder: Path, processes: int, stop: int = -1, recipe: str = RECIPE, **changes) -> int:
    """Train in several processes; the exit code."""
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT.format(recipe=recipe, changes=changes, folder=str(folder), stop=stop))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [*command, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode in (0, 1), done.stderr[-2000:]
    return done.returncode


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    plain = {"optimizer": {"use": "sgd", "lr": 0.1}, "augment": []}
    recipe = RECIPE.replace("proj_drop_rate: 0.1", "proj_drop_rate: 0.0")
    assert spread(tmp_path / "two", 2, recipe=recipe, **plain) == 0
    one = train(recipe, settings(**plain), tmp_path / "one")
    two = open_run(tmp_path / "two")
    for a, b in zip(one.log(), two.log(), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-6)
        assert a["test_loss"] == pytest.approx(b["test_loss"], abs=1e-6)
    for a, b in zip(one.model("last").parameters(), two.model("last").parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert json.loads((last(two.folder) / "state.json").read_text())["environment"]["processes"] == 2


@pytest.mark.slow
def test_two_processes_resume_exactly(tmp_path):
    assert spread(tmp_path / "whole", 2) == 0
    assert spread(tmp_path / "run", 2, stop=6) == 1
    assert last(tmp_path / "run").name == "step_00000007"
    assert spread(tmp_path / "run", 2) == 0
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
