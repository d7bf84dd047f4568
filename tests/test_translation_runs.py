"""A parallel corpus from every format, trained end to end: BLEU on held-out lines rises above a floor."""

import json

import pytest
from parallel_corpus import as_aligned, as_moses, as_po, as_tsv, sentences
from typer.testing import CliRunner

from attnzoo.cli.app import app
from attnzoo.eval.translation import evaluate_translations
from attnzoo.train import open_run

SMALL = ["host.dim=64", "host.mlp_dim=128", "host.layers=2", "host.max_length=40", "heads=4", "host.dropout=0.0",
         "train.optimizer={use: adamw, lr: 0.002}", "train.schedule={use: cosine, warmup: 0.5}", "train.batch_size=32",
         "train.epochs=6", "train.tokens.size=600", "train.label_smoothing=0.0", "train.clip_grad=1.0"]  # fmt: skip
FLOOR = 60.0
"""BLEU that must be passed. The references' own words in another order give about 30."""


def run(*words: str) -> str:
    """The command line, which must end well."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


def train(name: str, folder, recipe: str = "transformer", *more: str) -> None:
    """A small model on a corpus."""
    edits = [word for edit in [*SMALL, *more] for word in ("--set", edit)]
    run("train", recipe, "--data", name, "--out", str(folder), *edits)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "recipe"), [("tsv", "transformer"), ("aligned", "luong_seq2seq"),
                                              ("moses", "ham_seq2seq"), ("po", "linear_seq2seq")])  # fmt: skip
def test_a_corpus_is_learnt(form, recipe, tmp_path):
    write = {"tsv": as_tsv, "aligned": as_aligned, "moses": as_moses, "po": as_po}[form]
    there = tmp_path / "corpus"
    there.mkdir()
    where = (
        there
        if form == "aligned"
        else there / {"tsv": "pairs.tsv", "moses": "pairs.zip", "po": "pairs.po"}[form]
    )
    name = write(where)
    train(name, tmp_path / "run", recipe)
    trained = open_run(tmp_path / "run")
    scores = evaluate_translations(trained, beams=1)
    assert scores.bleu.value > FLOOR and scores.sentences > 100
    assert scores.bleu.interval[0] < scores.bleu.value < scores.bleu.interval[1]


@pytest.mark.slow
def test_a_deep_head_learns_translates_and_is_scored(tmp_path):
    name = as_tsv(tmp_path / "pairs.tsv")
    heads = "heads={encoder: {schedule: halving, first: 8, last: 4}, decoder: 4}"
    train(name, tmp_path / "run", "deep_head", heads)
    report = json.loads(run("eval", str(tmp_path / "run"), "--json"))
    assert report["translations"]["bleu"]["value"] > FLOOR
    lines = [source for source, _ in sentences(5)]
    out = run("translate", str(tmp_path / "run"), *lines).splitlines()
    assert len(out) >= 5 and all(out[:5])
