"""Comparisons: the same budget for all, paired statistics, a page that opens from the disk."""

import json
import re
import statistics
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import processes
import pytest
from test_workers import of_session
from typer.testing import CliRunner

from attnzoo.cli.app import app
from attnzoo.train import open_run
from attnzoo.train.compare import Comparison, Difference, Row, compare, difference, equal_flops, trials
from attnzoo.train.lock import held
from attnzoo.train.page import page
from attnzoo.train.settings import prepare
from attnzoo.workers import GRACE

TINY = ["host.model.depth=1", "host.model.embed_dim=16", "host.model.num_heads=2", "train.data=synthetic",
        "train.epochs=2", "train.batch_size=500"]  # fmt: skip


def run(*arguments: str, code: int = 0):
    """The verb in this process; its exit code is checked."""
    result = CliRunner().invoke(app, ["compare", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def sets(*edits: str) -> list[str]:
    return [word for edit in edits for word in ("--set", edit)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two tiny recipes, two seeds."""
    folder = tmp_path_factory.mktemp("compare") / "runs"
    result = run(
        "ham_classic", "ham_b", "--seeds", "2", "--workers", "1", "--out", str(folder), "--json", *sets(*TINY)
    )
    return folder, json.loads(result.stdout)


def test_every_recipe_and_seed_has_run(made):
    folder, data = made
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "ham_b-seed0", "ham_b-seed1", "ham_classic-seed0", "ham_classic-seed1"]  # fmt: skip
    assert [row["recipe"] for row in data["rows"]] == ["ham_classic", "ham_b"]
    assert all(row["seeds"] == 2 and row["epochs"] == 2 for row in data["rows"])
    assert [len(log) for logs in data["logs"].values() for log in logs] == [2] * 4


def test_figures_are_those_of_the_runs(made):
    folder, data = made
    best = [open_run(folder / f"ham_b-seed{k}").summary()["best_accuracy"] for k in (0, 1)]
    base = [open_run(folder / f"ham_classic-seed{k}").summary()["best_accuracy"] for k in (0, 1)]
    row = data["rows"][1]
    assert row["best"] == pytest.approx(statistics.fmean(best))
    assert row["best_spread"] == pytest.approx(statistics.stdev(best))
    mine = next(d for d in data["differences"] if d["what"] == "best")
    assert mine["mean"] == pytest.approx(statistics.fmean(b - a for a, b in zip(base, best, strict=True)))


def test_a_second_time_nothing_is_trained(made):
    folder, first = made
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    again = json.loads(
        run("ham_classic", "ham_b", "--seeds", "2", "--out", str(folder), "--json", *sets(*TINY)).stdout
    )
    assert again["rows"] == first["rows"] and again["logs"] == first["logs"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == stamps


@pytest.mark.slow
def test_processes_change_nothing_but_the_time(made, tmp_path):
    """Two processes give the same accuracies as one worker in this process."""
    _, data = made
    prepared = [(name, *prepare(name, TINY)) for name in ("ham_classic", "ham_b")]
    alone = compare(trials(prepared, 1, tmp_path), workers=2)
    for row, logs in data["logs"].items():
        strip = [
            {k: v for k, v in line.items() if k not in ("images_per_second", "seconds")} for line in logs[0]
        ]
        mine = [
            {k: v for k, v in line.items() if k not in ("images_per_second", "seconds")}
            for line in alone.logs[row][0]
        ]
        assert strip == mine


def test_the_page_opens_from_the_disk(made):
    folder, data = made
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|@import|url\([^#]", text.replace("http://www.w3.org", ""))
    (svg,) = re.findall(r"<svg.*?</svg>", text, re.S)
    drawn = ET.fromstring(svg)
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg" and "a line for each recipe" in drawn[0].text
    written = [one.text for one in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"ham_classic", "ham_b", "epoch", "test accuracy", "training loss"} <= set(written)
    assert f"{data['rows'][0]['best']:.2%}" in text and "noise" in text


def test_epochs_to_an_accuracy(made):
    """The first epoch of each run that has it; how many runs, where not all got there; asked of runs that are there."""
    folder, data = made
    logs = {
        name: [[line["test_accuracy"] for line in log] for log in runs] for name, runs in data["logs"].items()
    }
    base = ["ham_classic", "ham_b", "--seeds", "2", "--out", str(folder), *sets(*TINY)]
    assert data["reach"] is None and all(row["reached"] == [] for row in data["rows"])
    asked = max(log[1] for log in logs["ham_b"])
    found = json.loads(run(*base, "--json", "--reach", str(100 * asked)).stdout)
    wanted = [next((i for i, value in enumerate(log, 1) if value >= asked), None) for log in logs["ham_b"]]
    assert found["rows"][1]["reached"] == wanted and found["reach"] == pytest.approx(asked)
    at_once = run(*base, "--reach", "0").output
    assert "epochs to 0 % test accuracy: ham_classic 1.0 ± 0.0, ham_b 1.0 ± 0.0" in at_once
    assert "epochs to 100 % test accuracy: ham_classic never" in run(*base, "--reach", "100").output
    assert "epochs to 100 %" in (folder / "index.html").read_text(encoding="utf-8")
    assert "100" in run(*base, "--reach", "101", code=2).output


def test_epochs_are_averaged_over_the_runs_that_got_there():
    row = Row("a", 3, 0.5, 0, 1, 0.5, 0, 10, 1.0, 9, reached=(2, None, 5))
    assert row.epochs_to_reach() == "3.5 ± 2.1 (2 of 3 runs)"
    assert replace(row, reached=(None, None, None)).epochs_to_reach() == "never"
    assert replace(row, reached=(2, 4, 6)).epochs_to_reach() == "4.0 ± 2.0"
    assert replace(row, reached=(None, 4, None)).epochs_to_reach() == "4.0 (1 of 3 runs)"
    assert replace(row, reached=(2,), seeds=1).epochs_to_reach() == "2.0"


def difference_of(*values: float) -> Difference:
    return difference("b", "a", "last", values)


def test_verdicts():
    assert difference_of(0.02, 0.021, 0.019, 0.02, 0.022).verdict == "better"
    assert difference_of(-0.02, -0.021, -0.019, -0.02, -0.022).verdict == "worse"
    assert difference_of(0.03, -0.02, 0.01, -0.01, 0.02).verdict == "noise"


def test_one_seed_has_no_interval():
    found = difference_of(0.5)
    assert found.verdict == "noise" and found.low is found.high is found.bootstrap_low is None
    row = Row("b", 1, 0.5, 0, 1, 0.5, 0, 10, 1.0, 1)
    line = {"test_accuracy": 0.5, "train_loss": 1.0}
    comparison = Comparison("digits", "epochs", (row,), (found,), {row.recipe: [[line]]})
    assert comparison.sentences() == [
        "b against a: +50.00 points of last accuracy; of one seed nobody can tell it from noise"
    ]
    assert (
        "one seed has none" in page(comparison, "x") and "inf" not in page(comparison, "x").split("<svg")[0]
    )


def test_intervals_are_those_of_student_and_the_bootstrap():
    found = difference_of(0.1, 0.2, 0.3)
    half = 4.303 * statistics.stdev([0.1, 0.2, 0.3]) / 3**0.5
    assert found.low == pytest.approx(0.2 - half) and found.high == pytest.approx(0.2 + half)
    assert found.bootstrap_low == pytest.approx(0.1) and found.bootstrap_high == pytest.approx(0.3)
    assert found.low <= found.bootstrap_low <= found.mean <= found.bootstrap_high <= found.high
    assert difference_of(0.1, 0.2, 0.3) == found  # the same each time


def test_false_alarms_are_rare():
    """Two equal recipes, five seeds: the verdict is wrong in about 5 of 100 cases."""
    import random

    rng = random.Random(1)
    wrong = sum(difference_of(*(rng.gauss(0, 1) for _ in range(5))).verdict != "noise" for _ in range(60))
    assert wrong <= 8


def test_equal_flops():
    assert equal_flops([100, 200, 50, 10_000], 10) == [10, 5, 20, 1]


def test_trials_come_in_pairs(tmp_path):
    prepared = [(name, *prepare(name, TINY)) for name in ("ham_classic", "ham_b")]
    todo = trials(prepared, 2, tmp_path, [4, 3])
    assert [(t.recipe, t.seed, t.settings.epochs) for t in todo] == [
        ("ham_classic", 0, 4), ("ham_b", 0, 3), ("ham_classic", 1, 4), ("ham_b", 1, 3)]  # fmt: skip


def test_names_are_escaped():
    row = Row("<script>x</script>", 1, 0.5, 0, 1, 0.5, 0, 10, 1.0, 1)
    line = {"test_accuracy": 0.5, "train_loss": 1.0}
    text = page(Comparison("<b>", "epochs", (row,), (), {row.recipe: [[line]]}), "<i>")
    assert "<script" not in text and "<b>" not in text and "<i>" not in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["ham_a", "ham_b", "--budget", "epoch"], "did you mean `epochs`"),
        (["ham_a", "ham_b", "--budget", "seconds"], "go together"),
        (["ham_a", "ham_b", "--minutes", "1"], "go together"),
        (["ham_a", "ham_a"], "stands here twice"),
        (["ham_a", "ham_bb"], "AZ204"),
        (["ham_a", "--data", "digit", "--workers", "1"], "did you mean `digits`"),
        pytest.param(  # two processes import torch, to find the same
            ["ham_a", "--data", "digit"], "did you mean `digits`", marks=pytest.mark.slow
        ),
    ],
)
def test_faults(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run(*arguments, code=2).output
    assert text in output and "Traceback" not in output


@pytest.mark.slow  # three processes import torch and train; tests/test_workers.py holds what they rest on
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are counted in /proc")
def test_a_killed_comparison_leaves_nothing_behind(tmp_path):
    command = ["compare", "ham_classic", "ham_b", "--seeds", "2", "--workers", "2"]
    edits = sets(*TINY, "train.epochs=10000")
    parent = processes.begun("-m", "attnzoo", *command, "--out", str(tmp_path / "c"), *edits)
    try:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "c").glob("*/log.csv"))) < 2:
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        assert len(of_session(parent.pid)) >= 3
    finally:
        parent.kill()
        parent.wait()
    time.sleep(GRACE + 2)
    assert of_session(parent.pid) == []
    for folder in (tmp_path / "c").iterdir():  # nothing is lost, and nothing locked
        with held(folder):
            assert open_run(folder).notes() == []


@pytest.mark.slow
def test_on_a_local_ray(tmp_path):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    result = run(
        "ham_classic",
        "ham_b",
        "--seeds",
        "1",
        "--ray",
        "local",
        "--out",
        str(tmp_path / "r"),
        "--json",
        *sets(*TINY),
    )
    assert [row["seeds"] for row in json.loads(result.stdout)["rows"]] == [1, 1]


def test_runs_can_decide_together(made):
    folder, data = made
    runs = [str(folder / f"ham_b-seed{k}") for k in (0, 1)]
    result = CliRunner().invoke(app, ["eval", "--committee", *runs, "--which", "last", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    last = [log[-1]["test_accuracy"] for log in data["logs"]["ham_b"]]
    assert found["accuracies"] == pytest.approx(last) and 0 <= found["accuracy"] <= 1
    shown = CliRunner().invoke(app, ["eval", "--committee", *runs, "--vote", "majority"])
    assert "committee, by majority" in shown.output and "ham_b-seed1" in shown.output
    alone = CliRunner().invoke(app, ["eval", *runs])
    assert alone.exit_code == 2 and "AZ813" in alone.output
