"""`attnzoo sweep`: random recipes under a budget, trained briefly, ranked."""

import csv
import json

import pytest
from typer.testing import CliRunner

from attnzoo.bench import sweep
from attnzoo.bench.budget import NEAR, cost
from attnzoo.cli.app import app
from attnzoo.errors import RunError
from attnzoo.recipe import load, resolve
from attnzoo.train.settings import prepare

SMALL = [
    "host.model.img_size=16",
    "host.model.embed_dim=16",
    "train.epochs=1",
    "train.data=synthetic",
    "train.batch_size=500",
]


@pytest.fixture
def base():
    return prepare("digits_softmax", SMALL)[0]


@pytest.mark.parametrize("budget", ["params", "flops"])
def test_all_meet_the_budget_on_the_host_of_the_base(base, budget, tmp_path):
    drawn = sweep.draw(base, 4, tmp_path, budget=budget)
    first, *others = drawn.candidates
    assert first.loaded is base and len(others) == 4
    target = first.cost.of(budget)
    for one in others:
        again = load(str(one.file))
        assert resolve(again).info.dim == 16 and again.recipe.train == base.recipe.train
        assert abs(cost(again).of(budget) / target - 1) <= NEAR[budget]
        assert cost(again) == one.cost and one.text == sweep._words(again)
    assert len({one.text for one in drawn.candidates}) == 5


def test_the_seed_decides(base, tmp_path):
    texts = [
        [one.text for one in sweep.draw(base, 3, tmp_path, seed=seed, budget=None).candidates]
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_only_what_was_asked_for(base, tmp_path):
    names = {"fourier", "pooling", "nothing"}
    drawn = sweep.draw(base, 5, tmp_path, budget=None, mechanisms=sorted(names))
    leaves = {leaf.entry.name for one in drawn.candidates[1:] for plan in resolve(one.loaded).plans.values() for leaf in plan.leaves()}  # fmt: skip
    assert leaves <= names and leaves


def test_what_can_never_hold_is_refused(base, tmp_path):
    """`agent` alone has more parameters than such a base."""
    with pytest.raises(RunError, match="AZ815") as caught:
        sweep.draw(base, 2, tmp_path, mechanisms=["neighborhood_that_is_not"])
    assert "AZ201" in str(caught.value)


def test_overrides_are_written_once():
    drawn = {"attention": "a", "overrides": [{"at": "blocks.*", "put": "b"}, {"at": "blocks.1", "put": "c"}], "skip": "merged"}  # fmt: skip
    sites = ["blocks.0", "blocks.1", "blocks.2"]
    assert sweep._tidy(drawn, sites) == {
        "attention": "b",
        "skip": "merged",
        "overrides": [{"at": "blocks.1", "put": "c"}],
    }
    assert sweep._tidy({"attention": "a"}, sites) == {"attention": "a"}


def test_the_best_comes_first_and_what_fails_last(base, tmp_path, monkeypatch):
    candidates = sweep.draw(base, 2, tmp_path, budget=None).candidates
    accuracy = {candidates[0].name: 0.5, candidates[2].name: 0.7}

    def run(one):
        if one.name == candidates[1].name:
            return one.name, "the loss is not finite"
        return one.name, ""

    class Done:
        def __init__(self, folder):
            self.name = folder.name

        def summary(self):
            return {"best_accuracy": 0.9, "last_accuracy": accuracy[self.name]}

    monkeypatch.setattr(sweep, "_finished", lambda one: False)
    monkeypatch.setattr(sweep, "_run", run)
    monkeypatch.setattr(sweep, "open_run", Done)
    ranked = sweep.rank(candidates)
    assert [one.candidate.name for one in ranked] == [candidates[i].name for i in (2, 0, 1)]
    assert ranked[-1].last is None and ranked[-1].failure == "the loss is not finite"
    sweep.write_table(ranked, tmp_path / "t.csv")
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2", "3"] and rows[0]["last_accuracy"] == "0.7"


def test_the_verb_and_that_it_goes_on(tmp_path):
    words = f"sweep digits_softmax --count 1 --epochs 1 --workers 1 --data synthetic --out {tmp_path}".split()
    words += [word for edit in [*SMALL[:2], SMALL[-1]] for word in ("--set", edit)]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    assert "2 of 2: sweep_01" in first.output and "a start, no verdict" in first.output
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*") if file.is_file()}
    again = CliRunner().invoke(app, [*words, "--json"])
    assert again.exit_code == 0, again.output
    data = json.loads(again.stdout)
    assert {row["recipe"] for row in data["ranking"]} == {"digits_softmax", "sweep_01"}
    accuracies = [row["last_accuracy"] for row in data["ranking"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert written == {f: f.stat().st_mtime_ns for f in written}  # nothing was trained again


def test_a_name_that_is_none_is_refused_before_anything_is_drawn():
    result = CliRunner().invoke(app, ["sweep", "--mechanism", "sofmax"])
    assert result.exit_code == 2 and "did you mean `softmax`" in result.output
    result = CliRunner().invoke(app, ["sweep", "--mechanism", "mean"])
    assert result.exit_code == 2 and "`mean` is a fusion" in result.output
