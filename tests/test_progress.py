"""What is seen of a training that takes long: piped, as data, on a terminal; and nothing that a library says in vain."""

import json
import os
from pathlib import Path

import processes
import pytest
from training import RECIPE, images, settings
from typer.testing import CliRunner

from attnzoo.cli.app import app
from attnzoo.cli.render import EVERY, PER_EPOCH, progress
from attnzoo.train import train


def events(epochs: int, steps: int, seconds: float, start: int = 0, before: float = 0.0):
    """What a training reports whose steps take `seconds` each."""
    for taken in range(start + 1, epochs * steps + 1):
        epoch, step = divmod(taken - 1, steps)
        yield {"event": "step", "epoch": epoch + 1, "step": taken, "steps": epochs * steps, "epoch_step": step + 1,
               "epoch_steps": steps, "train_loss": 1.5, "images_per_second": 1234.0, "examples": "images",
               "test_accuracy": None, "seconds": before + (taken - start) * seconds, "left": 60.0}  # fmt: skip
        if step + 1 == steps:
            yield {"event": "epoch", "epoch": epoch + 1, "train_loss": 1.25, "test_accuracy": 0.5}


def told(capsys, *arguments, quiet=False, **options) -> tuple[list[str], list[str]]:
    """Lines on stdout and on stderr."""
    with progress(quiet) as report:
        for event in events(*arguments, **options):
            report(event)
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


def test_a_long_epoch_tells_how_far_it_is(capsys):
    out, err = told(capsys, 1, 100, 1.0)
    assert err[0] == "epoch 1  step 11/100  loss 1.5000  1,234 images/s  1 min 00 s left"
    assert len(err) == 9 and len(out) == 1 and "accuracy 50.00 %" in out[0]


@pytest.mark.parametrize("steps,seconds", [(100_000, 1.0), (1000, 3600.0), (7, 3600.0), (25, 100.0)])
def test_never_more_than_a_couple_of_dozen(capsys, steps, seconds):
    out, err = told(capsys, 2, steps, seconds)
    for epoch in ("epoch 1 ", "epoch 2 "):
        lines = [line for line in err if line.startswith(epoch)]
        assert min(steps, PER_EPOCH) - 2 <= len(lines) <= PER_EPOCH
    assert len(out) == 2  # every epoch that took long is told, however late its last step was


def test_a_short_epoch_tells_nothing_of_its_steps(capsys):
    out, err = told(capsys, 50, 10, 0.01)
    assert err == [] and len(out) == 2
    out, err = told(capsys, 3, 10, EVERY / 20)
    assert err == []


def test_a_run_that_goes_on_tells_as_one_that_begins(capsys):
    _, err = told(capsys, 2, 100, 1.0, start=50, before=5000.0)
    assert err[0].startswith("epoch 1  step 61/200")


def test_data_stay_alone_on_stdout(capsys):
    out, err = told(capsys, 1, 100, 1.0, quiet=True)
    assert out == [] and len(err) == 9


SCRIPT = """
import sys
import attnzoo.cli.render as render, attnzoo.train.kinds as task
from attnzoo.cli.app import main
from training import images
task.load_images, render.EVERY = images, 0.0
sys.argv = ["attnzoo", *sys.argv[1:]]
main()
"""


def test_through_a_pipe(tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    verb = [
        "train",
        "tiny.yaml",
        "--data",
        "synthetic",
        "--epochs",
        "1",
        "--set",
        "train.batch_size=4",
        "--json",
    ]
    done = processes.run("-c", SCRIPT, *verb, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=True)
    assert json.loads(done.stdout)["last_epoch"] == 1
    lines = done.stderr.splitlines()
    assert lines and all(line.startswith("epoch 1  step ") for line in lines), done.stderr


def test_a_schedule_of_one_step_says_nothing(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr("attnzoo.train.kinds.load_images", images)
    train(RECIPE, settings(epochs=1, batch_size=40, schedule={"use": "cosine"}), tmp_path / "run")
    assert caplog.records == [] and capsys.readouterr().err == ""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    arguments = [
        "--data",
        "synthetic",
        "--epochs",
        "1",
        "--batch-size",
        "40",
        "--set",
        "train.schedule.use=cosine",
    ]
    result = CliRunner().invoke(
        app, ["train", str(tmp_path / "tiny.yaml"), *arguments, "--out", str(tmp_path / "b")]
    )
    assert result.exit_code == 0 and result.stderr == ""


def test_what_else_is_logged_is_heard(caplog):
    import logging

    from attnzoo.train.loop import _unsaid

    with _unsaid("some.library", "In vain"):
        logging.getLogger("some.library").warning("In vain: one epoch")
        logging.getLogger("some.library").warning("the disk burns")
    logging.getLogger("some.library").warning("In vain: later")
    assert [record.getMessage() for record in caplog.records] == ["the disk burns", "In vain: later"]
