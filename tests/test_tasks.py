"""Pairs and single sequences: the same loop, logs, checkpoints and exact resume as for images."""

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_resume import spread, survive_kills
from torch import nn
from training import digest, last
from training import settings as tiny_settings
from typer.testing import CliRunner

import attnzoo.train.loop as loop
from attnzoo.cli.app import app
from attnzoo.data.pairs import PairData, encoded
from attnzoo.data.sequences import IGNORE, InMemory, SequenceData
from attnzoo.data.vocabulary import EOS, PAD, Symbols
from attnzoo.errors import DataError, RunError
from attnzoo.recipe import load
from attnzoo.train import open_run, prepare, sampler, train
from attnzoo.train.kinds import task_of
from attnzoo.train.pair_task import PairTask, token_losses
from attnzoo.train.sequence_task import SequenceTask, asked, squared_errors
from attnzoo.train.settings import FOR_DATA, Settings, data_kind, default_folder, kind_of

PAIRS = """
recipe: 1
name: pairs
host: {kind: seq2seq, dim: 16, mlp_dim: 32, layers: 1, max_length: 12, dropout: 0.0}
heads: 2
attention: softmax
"""
SEQUENCES = """
recipe: 1
name: sequences
host: {kind: sequence, dim: 16, mlp_dim: 32, layers: 1}
heads: 2
attention: softmax
"""
DATA = {"reverse": "reverse:symbols=4,length=6,train=50,test=20", "recall": "recall:pairs=2,length=16,vocab=20,train=50,test=20",
        "regression": "regression:dim=2,examples=4,train=50,test=20",
        "switching": "switching:symbols=4,length=12,train=50,test=20"}  # fmt: skip
PLAIN = {"epochs": 3, "batch_size": 12, "device": "cpu", "optimizer": {"lr": 0.01}}
STEPS = 5
VARYING = ("images_per_second", "seconds")
RUNNER = CliRunner()


def recipe_for(task: str) -> str:
    return PAIRS if task == "reverse" else SEQUENCES


def settings(task: str, **changes) -> Settings:
    return Settings.model_validate(PLAIN | {"data": DATA[task]} | changes)


def run(task: str, folder: Path, report=None, **changes):
    return train(recipe_for(task), settings(task, **changes), folder, report=report)


def rows(folder: Path) -> list[dict]:
    """The log without what the clock decides."""
    return [{k: v for k, v in row.items() if k not in VARYING} for row in open_run(folder).log()]


def pairs(*texts: tuple[str, str], symbols: str = "abcdef") -> PairData:
    """Pairs of letters, in memory; the test side is the training side."""
    vocabulary = Symbols(symbols)
    side, _ = encoded([(" ".join(s), " ".join(t)) for s, t in texts], vocabulary, vocabulary, 12)
    return PairData("reverse", vocabulary, vocabulary, side, side)


def sequences(inputs, targets, **facts) -> SequenceData:
    side = InMemory(torch.tensor(inputs), torch.tensor(targets))
    return SequenceData(**{"name": "recall", "vocab": 5, "width": None, "outputs": 5, "regression": False,
                           "length": len(inputs[0]), "train": side, "test": side} | facts)  # fmt: skip


class Table(nn.Module):
    """Logits of the next token by the last one, whatever the source."""

    def __init__(self, size: int):
        super().__init__()
        self.logits = nn.Embedding(size, size)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.logits(inputs[-1])


# Buckets


def lengths(count: int = 1000) -> torch.Tensor:
    return torch.randint(3, 100, (count,), generator=torch.Generator().manual_seed(1))


def padding(batches, of: torch.Tensor) -> int:
    return sum(int((of[batch].max() - of[batch]).sum()) for batch in batches)


@pytest.mark.parametrize("count,batch_size", [(1000, 8), (1001, 8), (7, 8), (8, 8), (399, 1)])
def test_an_epoch_shows_every_example_once(count, batch_size):
    batches = sampler.bucketed(lengths(count), batch_size, seed=3, epoch=2)
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert len(batches) == sampler.steps_per_epoch(count, batch_size)
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)


def test_buckets_pad_little_and_still_mix():
    of = lengths()
    batches = sampler.bucketed(of, 8, seed=0, epoch=0)
    plain = [sampler.batch(1000, 8, seed=0, epoch=0, step=step) for step in range(125)]
    assert padding(batches, of) < 0.1 * padding(plain, of)
    means = torch.stack([of[batch].double().mean() for batch in batches])
    assert not bool((means.diff() >= 0).all()) and abs(float(means[:60].mean() - means[60:].mean())) < 12


def test_equal_lengths_meet_others_in_every_epoch():
    of = torch.full((64,), 5)
    first, second = (
        {frozenset(b.tolist()) for b in sampler.bucketed(of, 8, seed=0, epoch=e)} for e in (0, 1)
    )
    assert not first & second


def test_buckets_follow_seed_and_epoch_alone():
    def drawn(seed: int, epoch: int) -> tuple:
        return tuple(
            tuple(batch.tolist()) for batch in sampler.bucketed(lengths(), 8, seed=seed, epoch=epoch)
        )

    first = drawn(1, 2)
    torch.manual_seed(99)
    assert drawn(1, 2) == first and len({first, drawn(1, 3), drawn(2, 2), drawn(2, 1)}) == 4


# What is learnt, against sums by hand


def test_the_loss_of_pairs_is_per_target_token_and_knows_no_padding():
    data = pairs(("ab", "b"), ("cde", "abcd"), ("f", "fe"))
    for smoothing in (0.0, 0.2):
        task = PairTask(load(PAIRS), settings("reverse", label_smoothing=smoothing), data)
        indices, model = torch.tensor([1, 0, 2]), Table(10).double()
        inputs, targets = task.prepare(0, indices)
        assert [t.shape for t in (*inputs, targets)] == [(3, 5), (3, 5), (3, 5)]
        assert targets[1].tolist() == [data.target.encode("b")[0], EOS, PAD, PAD, PAD]
        losses = task.losses(model, inputs, targets)
        for row, i in enumerate(indices.tolist()):
            whole = torch.tensor([1, *data.train.targets[i], 2])
            expected = F.cross_entropy(
                model.logits(whole[:-1]), whole[1:], reduction="sum", label_smoothing=smoothing
            )
            assert losses[row].item() == pytest.approx(expected.item(), abs=1e-5)
        assert task.units(indices) == 5 + 2 + 3 and task.units(indices[:0]) == 0


def test_figures_of_pairs():
    data = pairs(("a", "ab"), ("b", "ba"), ("c", "cccc"))
    task, model = PairTask(load(PAIRS), settings("reverse"), data), Table(10)
    a, b, c = (data.target.encode(letter)[0] for letter in "abc")
    with torch.no_grad():
        model.logits.weight.zero_()
        for given, answer in (
            (1, a),
            (a, b),
            (b, EOS),
            (c, c),
        ):  # right: `ab` throughout; of `ba` nothing; `ccc` of `cccc`
            model.logits.weight[given, answer] = 5.0
    model.train()
    tally = task.tally(model)
    assert model.training and tally.tolist()[:2] == [3 + 3 + 5, 3 + 0 + 3] and tally.tolist()[3:] == [3, 1]
    figures = task.figures(tally)
    assert (figures["test_accuracy"], figures["test_exact"]) == (6 / 11, 1 / 3)
    wrong, right = math.log(9 + math.exp(5.0)), math.log(9 + math.exp(5.0)) - 5.0
    assert figures["test_loss"] == pytest.approx((6 * right + 5 * wrong) / 11, abs=1e-5)
    halves = sum(task.tally(model, rank=rank, world=2) for rank in (0, 1))
    assert torch.allclose(halves, tally)


def test_the_loss_of_classes_is_per_question():
    data = sequences([[1, 2, 3], [3, 2, 1]], [[IGNORE, 2, 4], [IGNORE, IGNORE, 0]])
    task, model = SequenceTask(load(SEQUENCES), settings("recall"), data), Table(5)
    (inputs,), targets = task.prepare(0, torch.tensor([0, 1]))
    losses, log = task.losses(model, (inputs,), targets), -model.logits.weight.log_softmax(dim=1)
    assert losses.tolist() == pytest.approx([(log[2, 2] + log[3, 4]).item(), log[1, 0].item()])
    assert task.units(torch.tensor([0, 1])) == 3 and task.units(torch.tensor([1])) == 1
    with torch.no_grad():
        model.logits.weight.copy_(5 * torch.eye(5))
    figures = task.figures(task.tally(model))
    assert figures["test_accuracy"] == pytest.approx(1 / 3) and set(figures) == {"test_loss", "test_accuracy"}
    assert torch.equal(sum(task.tally(model, rank=r, world=2) for r in (0, 1)), task.tally(model))


def test_subtasks_are_told_apart():
    inputs = torch.tensor([[1, 2, 3, 4]])
    side = InMemory(inputs, torch.tensor([[1, 0, 3, IGNORE]]), torch.tensor([[0, 0, 1, -1]]))
    data = sequences([[1, 2, 3, 4]], [[0, 0, 0, 0]], train=side, test=side, kinds=("x", "y", "z"))
    task, model = SequenceTask(load(SEQUENCES), settings("recall"), data), Table(5)
    with torch.no_grad():
        model.logits.weight.copy_(5 * torch.eye(5))
    figures = task.figures(task.tally(model))
    assert [figures[f"test_{name}"] for name in ("accuracy", "x", "y", "z")] == [2 / 3, 1 / 2, 1.0, 0.0]


NAN = float("nan")


def test_numbers():
    inputs = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]
    targets = [[[NAN, NAN], [1.0, 10.0]], [[2.0, NAN], [3.0, 30.0]]]
    data = sequences(inputs, targets, name="regression", vocab=None, width=2, outputs=2, regression=True)
    task, model = SequenceTask(load(SEQUENCES), settings("regression"), data), nn.Linear(2, 2)
    (x,), y = task.prepare(0, torch.tensor([0, 1]))
    losses = task.losses(model, (x,), y)
    errors = (model(x) - y).square()
    assert losses.tolist() == pytest.approx(
        [errors[0, 1].sum().item(), errors[1][~y[1].isnan()].sum().item()]
    )
    losses.sum().backward()
    assert model.weight.grad.isfinite().all() and task.units(torch.tensor([1])) == 3
    figures = task.figures(task.tally(model))
    total = errors[asked(y)].sum().item()
    assert figures["test_loss"] == pytest.approx(total / 5, rel=1e-5)
    variance = 2.0 + 200.0  # of 1, 2, 3 around 2 and of 10, 30 around 20
    assert figures["test_accuracy"] == pytest.approx(1 - total / variance, rel=1e-5)
    assert torch.allclose(sum(task.tally(model, rank=r, world=2) for r in (0, 1)), task.tally(model))
    perfect = torch.where(asked(y), y, 7.0)
    assert float(squared_errors(perfect, y).sum()) == 0


def test_nothing_is_lost_where_nothing_is_asked():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    token_losses(logits, torch.full((2, 3), IGNORE), IGNORE).sum().backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("task", ["reverse", "recall", "regression"])
def test_a_batch_in_parts_is_the_batch(tmp_path, task):
    plain = {"optimizer": {"use": "sgd", "lr": 0.01 if task == "regression" else 0.1}, "epochs": 2}
    whole = run(task, tmp_path / "whole", **plain)
    parts = run(task, tmp_path / "parts", **plain, accumulate=5)  # the smallest batch has two examples
    for a, b in zip(whole.model("last").parameters(), parts.model("last").parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for a, b in zip(rows(whole.folder), rows(parts.folder), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_train_loss_is_the_mean_over_target_tokens(tmp_path):
    done = run("reverse", tmp_path, epochs=1, optimizer={"use": "sgd", "lr": 1e-9})
    model, side = done.model("last"), done.data().train
    source, target = side.batch(torch.arange(len(side)))
    expected = F.cross_entropy(
        model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD
    )
    assert done.log()[0]["train_loss"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["reverse", "recall"])
def test_two_processes_train_as_one(tmp_path, task):
    plain = {"optimizer": {"use": "sgd", "lr": 0.1}, "epochs": 2, "augment": []}
    given = PLAIN | {"data": DATA[task]} | plain
    assert spread(tmp_path / "two", 2, recipe=recipe_for(task), **given) == 0
    one = train(recipe_for(task), tiny_settings(**given), tmp_path / "one")
    for a, b in zip(rows(one.folder), rows(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    two = open_run(tmp_path / "two")
    for a, b in zip(one.model("last").parameters(), two.model("last").parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


# Resume


@pytest.mark.parametrize("task,changes", [
    ("reverse", {"ema": 0.9, "accumulate": 2, "workers": 2, "label_smoothing": 0.1}),
    ("reverse", {"schedule": {"use": "inverse_sqrt", "warmup": 1.0}}),
    ("switching", {}),
    ("regression", {}),
])  # fmt: skip
@pytest.mark.sample(3)
def test_resume_is_exact(tmp_path, task, changes):
    whole = tmp_path / "whole"
    run(task, whole, checkpoint_every=1, keep=99, **changes)
    for step in (1, STEPS, STEPS + 2, 3 * STEPS - 1):
        part = tmp_path / f"from{step}"
        shutil.copytree(whole / f"step_{step:08d}", part / f"step_{step:08d}")
        run(task, part, **changes)
        assert digest(part) == digest(whole) and rows(part) == rows(whole), step
        assert (last(part) / "optimizer.safetensors").read_bytes() == (
            last(whole) / "optimizer.safetensors"
        ).read_bytes()


def test_a_run_is_opened_and_goes_on_from_what_it_says_itself(tmp_path):
    run("reverse", tmp_path / "run", minutes=1e-9)
    found = open_run(tmp_path / "run")
    train(found.loaded, found.settings.model_copy(update={"minutes": None}), found.folder)
    run("reverse", tmp_path / "whole")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_a_run_from_before_units_were_counted_goes_on(tmp_path):
    whole = train_images(tmp_path / "whole", checkpoint_every=1, keep=99)
    state = whole / "step_00000002" / "state.json"
    told = json.loads(state.read_text())
    assert told["progress"].pop("units") == told["progress"]["images"] == 24
    from attnzoo.train import checkpoint

    saved = checkpoint.Checkpoint(whole / "step_00000002", 2)
    tensors = {name: saved.tensors(name) for name in ("model", "optimizer")}
    told["progress"]["best"] = -1.0
    checkpoint.save(tmp_path / "old", 2, tensors, told)
    old = train_images(tmp_path / "old")
    assert digest(old) == digest(whole) and rows(old) == rows(whole)


def train_images(folder: Path, **changes) -> Path:
    from training import RECIPE, images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnzoo.train.kinds.load_images", images)
        return train(RECIPE, tiny_settings(**changes), folder).folder


def test_other_data_under_the_same_name_are_refused(tmp_path, monkeypatch):
    def fixed(*names: str):
        texts = [(a + b, b + a) for a in "abcdef" for b in "abcdef"]
        monkeypatch.setattr(
            "attnzoo.train.kinds.load_pairs", lambda *_, **__: pairs(*texts, symbols="".join(names))
        )

    fixed(*"abcdef")
    run("reverse", tmp_path, minutes=1e-9)
    fixed(*"abcdeg")  # as many symbols
    with pytest.raises(RunError, match="AZ802") as caught:
        run("reverse", tmp_path)
    assert "vocabularies differ" in str(caught.value)


# What is written and read


def test_log_figures_and_what_a_run_knows(tmp_path):
    told = []
    done = run("reverse", tmp_path, report=told.append)
    assert list(done.log()[0]) == ["epoch", "train_loss", "test_loss", "test_accuracy", "test_exact", "images_per_second",
                                   "lr", "seconds"]  # fmt: skip
    assert (
        (tmp_path / "log.csv").read_text().startswith("epoch,train_loss,test_loss,test_accuracy,test_exact,")
    )
    assert [event["text"] for event in told if event["event"] == "note"] == list(done.data().notes)
    figures = done.summary()
    assert figures["data_kind"] == done.kind == "pairs" and figures["finished"]
    again = done.figures("last")
    assert {f"last_{k[5:]}": v for k, v in again.items()} == pytest.approx(
        {key: figures[key] for key in ("last_loss", "last_accuracy", "last_exact")}
    )
    source, target = done.vocabularies()
    assert source.decode(source.encode("a b")) == "a b" and source.size == target.size == 8
    state = json.loads((last(tmp_path) / "state.json").read_text())
    assert len(state["vocabularies"]) == 1 and "classes" not in state


def test_other_pairs_come_in_the_vocabularies_of_the_run(tmp_path):
    done = run("reverse", tmp_path, epochs=1)
    other = done.data("reverse:symbols=6,length=5,train=40,test=10")
    assert other.source.as_data() == done.vocabularies()[0].as_data() and len(other.test) == 10
    assert {i for row in other.train.sources for i in row} <= set(range(3, 8))  # 3: what the run never saw
    assert done.figures("last", other.name)["test_loss"] > 0
    with pytest.raises(RunError, match="AZ814"):
        done.data("digits")


def test_sequences_that_do_not_fit_the_model(tmp_path):
    done = run("recall", tmp_path, epochs=1)
    with pytest.raises(RunError, match="AZ807"):
        done.figures("last", "recall:pairs=2,length=16,vocab=32,train=20,test=10")
    assert set(done.figures("last", DATA["recall"])) == {"test_loss", "test_accuracy"}
    with pytest.raises(RunError, match="AZ814"):
        done.vocabularies()
    with pytest.raises(RunError, match="AZ814"):
        done.evaluate()


def test_columns_of_subtasks(tmp_path):
    done = run("switching", tmp_path, epochs=1)
    row = done.log()[0]
    assert {"test_I", "test_A", "test_R", "test_C"} <= set(row) and done.summary()["last_I"] == row["test_I"]


@pytest.mark.slow
def test_pairs_survive_kills_at_any_moment(tmp_path):
    survive_kills(partial(run, "reverse"), tmp_path)


def test_explained_variance_far_below_zero_is_still_the_best(tmp_path, monkeypatch):
    build = loop.build

    def far_off(*arguments):
        model = build(*arguments)
        nn.init.constant_(model.head.bias, 100.0)
        return model

    monkeypatch.setattr(loop, "build", far_off)
    done = run("regression", tmp_path, epochs=2, optimizer={"use": "sgd", "lr": 1e-9, "weight_decay": 0.0})
    assert done.summary()["best_accuracy"] < -100 and (last(tmp_path) / "best.safetensors").exists()


@pytest.mark.parametrize("task", ["reverse", pytest.param("recall", marks=pytest.mark.slow), "regression"])
def test_it_learns(tmp_path, task):
    log = run(task, tmp_path, epochs=40, optimizer={"lr": 0.01, "weight_decay": 0.0}).log()
    assert log[-1]["train_loss"] < 0.5 * log[0]["train_loss"]


# Recipe, data and settings


def test_a_model_follows_its_data(tmp_path):
    def fitted(task: str, recipe: str | None = None):
        made = task_of(load(recipe or recipe_for(task)), settings(task))
        again = task_of(made.loaded, settings(task))
        assert again.loaded.text == made.loaded.text and again.loaded.name == made.loaded.name
        return made.loaded.recipe.host

    host = fitted("reverse")
    assert (host.vocab, host.max_length) == (8, 12)
    short = fitted("reverse", PAIRS.replace("max_length: 12", "max_length: 5"))
    assert short.max_length == 8  # six symbols, beginning and end
    host = fitted("recall")
    assert (host.vocab, host.width, host.outputs, host.max_length) == (20, 0, 20, 16)
    host = fitted("regression")
    assert (host.vocab, host.width, host.outputs, host.max_length) == (0, 3, 1, 5)
    longer = fitted("regression", SEQUENCES.replace("layers: 1", "layers: 1, max_length: 9"))
    assert longer.max_length == 9


def test_two_vocabularies():
    data = pairs(("ab", "ba"))
    other = PairData(data.name, data.source, Symbols("xyz"), data.train, data.test)
    task = PairTask(load(PAIRS), settings("reverse"), other)
    assert task.loaded.recipe.host.vocab.model_dump() == {"source": 10, "target": 7}
    assert len(task.facts()["vocabularies"]) == 2
    tied = load(PAIRS.replace("dim: 16", "dim: 16, tie: all"))
    with pytest.raises(RunError, match="AZ814"):
        PairTask(tied, settings("reverse"), other)
    assert PairTask(tied, settings("reverse"), data).loaded.recipe.host.vocab == 10


def test_a_model_that_would_see_the_answers_is_refused():
    blind = SEQUENCES.replace("layers: 1", "layers: 1, causal: false")
    with pytest.raises(RunError, match="AZ814"):
        task_of(load(blind), settings("switching"))
    assert task_of(load(blind), settings("recall"))


def test_numbers_have_no_labels_to_smooth():
    with pytest.raises(RunError, match="AZ806"):
        task_of(load(SEQUENCES), settings("regression", label_smoothing=0.1))


@pytest.mark.parametrize("name,kind", [
    ("digits", "images"), ("folder:x", "images"), ("reverse:length=5", "pairs"), ("tsv:a.tsv", "pairs"),
    ("opus_books:en-es", "pairs"), ("recall", "sequences"), ("regression:dim=3", "sequences"), ("revers", None),
])  # fmt: skip
def test_kinds_of_data(name, kind):
    assert data_kind(name) == kind


@pytest.mark.parametrize("recipe,data", [
    ("ham_b", "reverse"), ("ham_b", "recall"), (PAIRS, "digits"), (PAIRS, "recall"), (SEQUENCES, "copy"),
    (SEQUENCES, "cifar10"), (PAIRS, "folder:/nowhere"),
])  # fmt: skip
def test_a_recipe_of_another_kind_is_refused_before_anything_is_read(tmp_path, monkeypatch, recipe, data):
    for loader in ("load_images", "load_pairs", "load_sequences"):
        monkeypatch.setattr(f"attnzoo.train.kinds.{loader}", lambda *_, **__: pytest.fail("data were read"))
    with pytest.raises(RunError, match="AZ814") as caught:
        train(recipe, Settings.model_validate(PLAIN | {"data": data}), tmp_path / "run")
    assert "these are" in str(caught.value) and not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="AZ814"):
        prepare(recipe, [f"train.data={data}"])


def test_unknown_names_get_the_hint_of_their_kind(tmp_path):
    for recipe, name, meant in ((PAIRS, "revers", "reverse"), (SEQUENCES, "recal", "recall")):
        with pytest.raises(DataError, match="AZ701") as caught:
            train(recipe, Settings.model_validate(PLAIN | {"data": name}), tmp_path / "run")
        assert f"did you mean `{meant}`" in str(caught.value)


def test_other_data_bring_what_they_need():
    loaded, chosen = prepare(PAIRS, ["train.data=reverse:length=5", "train.batch_size=7"])
    assert chosen.batch_size == 7 and chosen.schedule.use == "cosine" and kind_of(loaded, chosen) == "pairs"
    assert all(data_kind(name) for name in FOR_DATA)


@pytest.mark.parametrize("data,folder", [
    ("reverse", "reverse"), ("recall:pairs=8,length=64", "recall-pairs=8-length=64"), ("opus_books:en-es", "opus_books-en-es"),
    ("opus:Books/v1:en-es", "opus-Books-v1-en-es"), ("tsv:some/where/a.tsv", "a.tsv"),
])  # fmt: skip
def test_folders(data, folder):
    assert default_folder(load(PAIRS), Settings.model_validate(PLAIN | {"data": data})) == Path(
        f"runs/pairs-{folder}-seed0"
    )


def test_the_inverse_square_root():
    def rates(**schedule) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        chosen = settings("reverse", epochs=5, schedule={"use": "inverse_sqrt"} | schedule)
        scheduler = loop.make_scheduler(optimizer, chosen, 4)
        found = []
        for step in (*range(20), 3):  # the last: it has no memory
            scheduler.step_update(step)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    found = rates(warmup=1.0, start=0.2)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and found[16] == pytest.approx(0.5)
    assert found[5:20] == pytest.approx([math.sqrt(4 / t) for t in range(5, 20)]) and found[20] == found[3]
    assert rates()[:5] == pytest.approx([1.0, 1.0, math.sqrt(1 / 2), math.sqrt(1 / 3), 0.5])


def test_epsilon_reaches_the_optimiser(tmp_path):
    one, other = (
        run("reverse", tmp_path / str(eps), epochs=1, optimizer={"lr": 0.01, "eps": eps})
        for eps in (1e-8, 0.5)
    )
    assert digest(one.folder) != digest(other.folder)


# The command line


def cli(*arguments: str, code: int = 0) -> str:
    """A verb in this process; its exit code is checked."""
    result = RUNNER.invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.mark.parametrize("task", ["reverse", "regression"])
def test_train_eval_resume(tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    (name := Path(f"{recipe_for(task).split()[3]}.yaml")).write_text(recipe_for(task))
    out = cli("train", str(name), "--data", DATA[task], "--epochs", "2", "--batch-size", "12", "--out", "run")
    assert (
        "% test accuracy" in out and f"{'pairs' if task == 'reverse' else 'sequences'}/s in training" in out
    )
    assert ("% exact" in out) == (task == "reverse") and "attnzoo eval run" in out
    run = open_run("run")
    assert json.loads(cli("resume", "run", "--json"))["last_epoch"] == 2
    data = json.loads(cli("eval", "run", "--json", "--which", "last"))
    assert data["accuracy"] == pytest.approx(run.summary()["last_accuracy"])
    assert "accuracy" in cli("eval", "run")
    assert "AZ814" in cli("eval", "--committee", "run", "run", code=2)


def test_compare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, heads in (("one", 1), ("two", 2)):
        Path(f"{name}.yaml").write_text(
            PAIRS.replace("name: pairs", f"name: {name}").replace("heads: 2", f"heads: {heads}")
        )
    common = ("compare", "one.yaml", "two.yaml", "--data", DATA["reverse"], "--set", "train.batch_size=12")
    out = cli(*common, "--seeds", "2", "--epochs", "1", "--workers", "1", "--out", "runs")
    assert "pairs/s" in out
    page = Path("runs/index.html").read_text()
    assert "pairs/s" in page and "the same order of pairs" in page and "target tokens" in page
    assert not re.search("images", page)
    assert "AZ812" in cli(*common, "--budget", "flops", code=2)
    Path("seq.yaml").write_text(
        SEQUENCES.replace("name: sequences", "name: seq") + f"train: {{data: '{DATA['recall']}'}}\n"
    )
    Path("own.yaml").write_text(
        PAIRS.replace("name: pairs", "name: own") + f"train: {{data: '{DATA['reverse']}'}}\n"
    )
    assert "AZ812" in cli("compare", "seq.yaml", "own.yaml", code=2)
    assert "AZ814" in cli("compare", "one.yaml", "ham_b", "--data", "reverse", code=2)
