"""Training: what a step sees, what it does, what is written, and how it ends when something is wrong."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from training import AUGMENT, RECIPE, STEPS, TINY, digest, images, last, settings, tiny
from typer.testing import CliRunner

import attnzoo.train.loop as loop
from attnzoo.cli.app import app
from attnzoo.errors import DataError, RecipeError, RunError
from attnzoo.mechanisms.routing.mixture_of_heads import MixtureOfHeads
from attnzoo.recipe import load
from attnzoo.train import checkpoint, open_run, prepare, sampler, train
from attnzoo.train.curve import draw_curve
from attnzoo.train.image_task import fit
from attnzoo.train.loop import NotFinite
from attnzoo.train.metrics import Evaluation, wilson
from attnzoo.train.settings import Settings, default_folder, settings_of

ROOT = Path(__file__).parent.parent
RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr("attnzoo.train.kinds.load_images", images)


def built_with(monkeypatch, change) -> None:
    """Let `change` have every model that a run builds."""
    build = loop.build

    def changed(*arguments):
        model = build(*arguments)
        change(model)
        return model

    monkeypatch.setattr(loop, "build", changed)


# The sampler


@pytest.mark.parametrize("world,parts", [(1, 1), (1, 3), (2, 1), (3, 2), (5, 4)])
def test_an_epoch_shows_every_image_once_to_one_process(world, parts):
    seen = []
    for step in range(sampler.steps_per_epoch(50, 12)):
        batch = sampler.batch(50, 12, seed=1, epoch=2, step=step)
        shares = [sampler.share(batch, rank=rank, world=world, microbatches=parts) for rank in range(world)]
        assert all(len(share) == parts for share in shares)
        assert sorted(torch.cat([part for share in shares for part in share]).tolist()) == sorted(
            batch.tolist()
        )
        seen += batch.tolist()
    assert sorted(seen) == list(range(50)) and len(batch) == 2


def test_the_order_follows_seed_and_epoch_alone():
    first = sampler.order(50, 1, 2).tolist()
    torch.manual_seed(99)
    sampler.order.cache_clear()
    assert sampler.order(50, 1, 2).tolist() == first
    others = [
        sampler.order(50, 1, 3).tolist(),
        sampler.order(50, 2, 2).tolist(),
        sampler.order(50, 2, 1).tolist(),
    ]
    assert len({tuple(order) for order in [first, *others]}) == 4


def test_reseeding_sets_all_three():
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    sampler.reseed(1, 2)
    first = draw()
    sampler.reseed(2, 1)
    second = draw()
    sampler.reseed(1, 2)
    assert draw() == first and not set(first) & set(second)


# The loop


def test_same_seed_same_bits(tmp_path):
    tiny(tmp_path / "a")
    torch.manual_seed(5)
    tiny(tmp_path / "b", workers=2, checkpoint_every=3, keep=1, minutes=60)
    tiny(tmp_path / "c", seed=1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


@pytest.mark.slow
def test_another_process_with_other_hashes_finds_the_same_bits(tmp_path):
    tiny(tmp_path / "here")
    code = (f"import torch; torch.set_num_threads(1)\nimport attnzoo.train.kinds as kinds, training\n"
            f"kinds.load_images = training.images\ntraining.tiny(training.Path({str(tmp_path / 'there')!r}))")  # fmt: skip
    environment = os.environ | {
        "PYTHONHASHSEED": "77",
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    assert digest(tmp_path / "here") == digest(tmp_path / "there")


def test_a_batch_in_parts_is_the_batch(tmp_path):
    recipe = RECIPE.replace("proj_drop_rate: 0.1", "proj_drop_rate: 0.0")
    plain = {"augment": [], "optimizer": {"use": "sgd", "lr": 0.1}}
    whole = train(recipe, settings(**plain), tmp_path / "whole")
    parts = train(
        recipe, settings(**plain, accumulate=5), tmp_path / "parts"
    )  # the last batch has four images
    for a, b in zip(whole.model("last").parameters(), parts.model("last").parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert [row["train_loss"] for row in whole.log()] == pytest.approx(
        [row["train_loss"] for row in parts.log()]
    )
    other = train(recipe, settings(**plain, batch_size=10), tmp_path / "other")
    assert not torch.allclose(other.model("last").head.weight, whole.model("last").head.weight, atol=1e-6)


def test_the_average_of_the_weights(tmp_path):
    run = tiny(tmp_path, ema=0.5, epochs=1, checkpoint_every=1, keep=99)
    average = None
    for step in range(1, STEPS + 1):
        weights = checkpoint.Checkpoint(tmp_path / f"step_{step:08d}", step).tensors("model")["head.weight"]
        average = weights if average is None else 0.5 * average + 0.5 * weights
    assert torch.allclose(run.model("last").head.weight, average, atol=1e-6)
    assert not torch.allclose(average, weights, atol=1e-4)


ROUTED = RECIPE.replace("num_heads: 2", "num_heads: 4").replace(
    "{fuse: add, of: [softmax, soft]}", "{use: mixture_of_heads, with: {shared: 0, active: 1}}"
)
"""With one active head its gate is 1 whatever the router says, so only the balance loss teaches the router."""


def test_what_mechanisms_add_to_the_loss(tmp_path):
    plain, taught = (
        train(ROUTED, settings(epochs=1, keep=9, auxiliary=weight), tmp_path / str(weight))
        for weight in (0, 100)
    )
    name = "blocks.0.attn.route.weight"
    start = checkpoint.Checkpoint(plain.folder / "step_00000000", 0).tensors("model")[name]
    left, moved = (run.model("last").get_parameter(name).detach() for run in (plain, taught))
    still, goes = (left - start).abs().max(), (moved - start).abs().max()
    assert still < 1e-4 < 1e-3 < goes  # weight decay alone, and more
    assert taught.log()[0]["train_loss"] == pytest.approx(plain.log()[0]["train_loss"], abs=0.05)


@pytest.mark.parametrize("where", ["output", "gradient", "auxiliary"])
def test_what_is_not_finite_is_named_and_loses_nothing(tmp_path, monkeypatch, where):
    calls = []

    def bad(module, inputs, output):
        calls.append(module.training)
        return output * torch.inf if sum(calls) > 5 else None

    def balance(self, *, shares):
        calls.append(1)
        return shares.mean() * (torch.nan if len(calls) > 5 else 1)

    def change(model: nn.Module) -> None:
        if where == "gradient":
            model.blocks[0].mlp.fc2.weight.register_hook(
                lambda g: calls.append(1) or (g * torch.inf if len(calls) > 5 else g)
            )
        elif where == "output":
            model.blocks[0].mlp.fc1.register_forward_hook(bad)

    built_with(monkeypatch, change)
    if where == "auxiliary":
        monkeypatch.setattr(MixtureOfHeads, "auxiliary", balance)
    with pytest.raises(NotFinite) as caught:
        train(ROUTED, settings(), tmp_path)
    said = {
        "output": "the output of `blocks.0.mlp.fc1`",
        "gradient": "the gradient of `blocks.0.mlp.fc2.weight`",
        "auxiliary": "the gradient of `blocks.0.attn.route.weight`",
    }[where]
    assert caught.value.exit_code == 1 and caught.value.code == "AZ803"
    assert f"it begins with {said}" in str(caught.value) and "step 6, in epoch 2" in str(caught.value)
    noted = json.loads((tmp_path / "not_finite.json").read_text())
    assert noted["indices"] == sampler.batch(40, 12, seed=0, epoch=1, step=1).tolist()
    saved, notes = checkpoint.sound(tmp_path)
    assert saved.step == 5 and not notes and all(t.isfinite().all() for t in saved.tensors("model").values())


def test_a_clipped_gradient_moves_the_weights_less(tmp_path):
    recipe = RECIPE.replace("0.1}", "0.0}")
    plain = {"augment": [], "epochs": 1, "batch_size": 40, "clip_grad": 0.01}
    plain["optimizer"] = {"use": "sgd", "lr": 1.0, "weight_decay": 0.0}
    run = train(recipe, settings(**plain, checkpoint_every=1, keep=9), tmp_path)
    before = checkpoint.Checkpoint(tmp_path / "step_00000000", 0).tensors("model")
    moved = torch.cat([(p - before[name]).flatten() for name, p in run.model("last").named_parameters()])
    assert moved.norm().item() == pytest.approx(
        1.9 * 0.01, rel=0.01
    )  # timm's sgd adds Nesterov's momentum of 0.9


def test_precision_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="AZ806"):
        tiny(tmp_path / "run", precision="fp16")
    assert not (tmp_path / "run").exists()
    assert tiny(tmp_path / "run", precision="bf16", epochs=1).summary()["finished"]


@pytest.mark.parametrize("changes,said", [
    ({"optimizer": {"use": "adamwx"}}, "did you mean `adamw`?"),
    ({"optimizer": {"use": "kron"}}, "timm has no optimiser called `kron`"),
    ({"optimizer": {"use": "fusedadam"}}, "timm cannot make the optimiser `fusedadam`"),
    ({"batch_size": 2, "accumulate": 3}, "2 images cannot be shared"),
])  # fmt: skip
def test_settings_that_cannot_be_met(tmp_path, changes, said):
    with pytest.raises(RunError, match="AZ806") as caught:
        tiny(tmp_path / "run", **changes)
    assert said in str(caught.value) and not (tmp_path / "run").exists()


def test_schedules():
    def rates(**schedule) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = loop.make_scheduler(optimizer, settings(epochs=5, schedule=schedule), 4)
        found = []
        for step in range(20):
            scheduler.step_update(step)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    assert rates() == [1.0] * 20
    rising = rates(warmup=1.0, start=0.2)
    assert rising == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 16)
    cosine = rates(use="cosine", warmup=1.0, start=0.2, end=0.1)
    assert cosine[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and cosine[12] == pytest.approx(0.55)
    assert all(a > b for a, b in zip(cosine[4:], cosine[5:], strict=False)) and cosine[-1] > 0.1


# What is written


def test_log_and_figures(tmp_path):
    told = []
    run = tiny(tmp_path, report=told.append)
    log = run.log()
    assert [row["epoch"] for row in log] == [1, 2, 3]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == log
    with open(tmp_path / "log.csv", newline="") as file:
        assert [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)] == log
    assert [
        {k: v for k, v in event.items() if k not in ("event", "weights")}
        for event in told
        if event["event"] == "epoch"
    ] == log
    assert sum(event["event"] == "step" for event in told) == 3 * STEPS
    figures, best = run.summary(), max(row["test_accuracy"] for row in log)
    assert figures["best_accuracy"] == best == run.evaluate("best").accuracy
    assert figures["best_epoch"] == next(row["epoch"] for row in log if row["test_accuracy"] == best)
    assert (figures["last_accuracy"], figures["last_epoch"]) == (log[-1]["test_accuracy"], 3)
    assert figures["last_loss"] == pytest.approx(run.evaluate("last").loss)
    assert figures["params"] == sum(p.numel() for p in run.model().parameters()) and figures["finished"]
    assert open_run(tmp_path) == run or open_run(tmp_path).settings == run.settings
    assert not run.model().training


def test_train_loss_is_the_mean_over_images(tmp_path):
    recipe = RECIPE.replace("0.1}", "0.0}")
    run = train(recipe, settings(augment=[], epochs=1, optimizer={"use": "sgd", "lr": 1e-9}), tmp_path)
    data = run.data()
    images, labels = data.train.batch(torch.arange(40))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    logits = run.model("last")((images / 255 - mean) / std)
    assert run.log()[0]["train_loss"] == pytest.approx(
        nn.functional.cross_entropy(logits, labels).item(), abs=1e-5
    )


def test_it_learns(tmp_path):
    run = tiny(tmp_path, epochs=40, augment=[], optimizer={"lr": 0.02, "weight_decay": 0.0})
    assert (
        run.summary()["last_accuracy"] > 0.9
        and run.log()[-1]["train_loss"] < 0.5 * run.log()[0]["train_loss"]
    )


def test_the_curve_is_drawn_as_asked(tmp_path):
    """What it shows is held by tests/test_plot.py."""
    log = [{"epoch": e, "train_loss": 1 / e, "test_loss": 2 / e, "test_accuracy": e / 9} for e in (1, 2, 3)]
    assert draw_curve([], tmp_path) == [] and not list(tmp_path.iterdir())
    svg, png, pdf = draw_curve(log, tmp_path, ("svg", "png", "pdf"))
    assert svg.name == "curve.svg" and f"{tmp_path.name}: best accuracy 33.33% in epoch 3" in svg.read_text()
    assert png.read_bytes().startswith(b"\x89PNG") and pdf.read_bytes().startswith(b"%PDF")
    with pytest.raises(RunError, match="AZ804|cannot"):
        draw_curve(log, tmp_path / "nowhere")


def test_the_curve_is_drawn_when_training_ends(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(loop, "draw_curve", lambda log, folder: drawn.append([row["epoch"] for row in log]))
    tiny(tmp_path / "a", epochs=3)
    assert drawn == [[1, 2, 3]]
    monkeypatch.setattr(loop, "REDRAW", -1.0)
    tiny(tmp_path / "b", epochs=2)
    assert drawn[1:] == [[1], [1, 2], [1, 2]]


@pytest.mark.parametrize(
    "hits,of,low,high",
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (98, 100, 0.9300, 0.9945), (0, 0, 0, 1)],
)
def test_wilson(hits, of, low, high):
    assert wilson(hits, of) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_an_evaluation_adds_up():
    found = Evaluation.of(torch.tensor([[2, 1, 3.0], [0, 0, 0], [4, 4, 1.0]]), ("a", "b", "c"))
    assert (found.images, found.correct, found.accuracy, found.loss) == (6, 5, 5 / 6, 4 / 6)
    assert [c.loss for c in found.classes] == [1.5, 0.0, 0.25] and found.as_dict()["interval"] == list(
        found.interval
    )


# Recipe, data and settings


def test_the_paper_and_what_extends_it():
    classic, b = (load(name).recipe.train for name in ("ham_classic", "ham_b"))
    assert classic == b and b.data == "cifar10" and (b.batch_size, b.epochs) == (256, 400)
    assert (b.optimizer.use, b.optimizer.lr, b.optimizer.weight_decay, b.schedule.use) == (
        "adamw",
        0.01,
        0.01,
        "constant",
    )
    from attnzoo.data import PAPER

    assert [step.model_dump(by_alias=True) for step in b.augment] == [
        step.model_dump(by_alias=True) for step in PAPER
    ]


def test_train_is_inherited_key_by_key(tmp_path):
    (tmp_path / "a.yaml").write_text(
        RECIPE.replace("tiny", "a", 1) + "train: {epochs: 7, optimizer: {lr: 0.5, weight_decay: 0.3}}\n"
    )
    (tmp_path / "b.yaml").write_text("recipe: 1\nextends: a.yaml\ntrain: {seed: 3, optimizer: {lr: 0.25}}\n")
    found = load(tmp_path / "b.yaml").recipe.train
    assert (found.epochs, found.seed, found.optimizer.lr, found.optimizer.weight_decay) == (7, 3, 0.25, 0.3)


def test_other_data_bring_what_they_need_and_the_user_has_the_last_word():
    _, own = prepare("ham_b")
    assert own == settings_of(load("ham_b")) and own.batch_size == 256
    loaded, other = prepare("ham_b", ["train.data=digits", "train.batch_size=16"], minutes=2.0)
    assert (other.epochs, other.schedule.use, other.batch_size, other.minutes) == (40, "cosine", 16, 2.0)
    assert not {step.use for step in other.augment} & {"horizontal_flip", "vertical_flip"}
    assert loaded.recipe.host.mean is None and other.optimizer.weight_decay == 0.01
    assert default_folder(loaded, other) == Path("runs/ham_b-digits-seed0")
    with pytest.raises(RecipeError, match="AZ110"):
        prepare("ham_b", ["train.epoch=3"])
    with pytest.raises(RecipeError, match="AZ113"):
        prepare("ham_b", ["train.optimizer.lr=-1"])


def test_a_model_follows_its_data():
    data = images()
    loaded = load("ham_b")
    fitted = fit(loaded, settings(data="synthetic"), data)
    host = fitted.recipe.host
    assert (host.model.img_size, host.model.num_classes, host.mean) == (8, 4, [0.4, 0.4, 0.4])
    assert fit(fitted, settings(data="synthetic"), data).text == fitted.text and fitted.name == "ham_b"
    assert loaded.recipe.train.batch_size == 256 and "train" in loaded.source.tree
    assert fit(loaded, settings(data="cifar10"), data).recipe.host.mean == loaded.recipe.host.mean


def test_a_folder_holds_one_run(tmp_path):
    tiny(tmp_path / "run", epochs=1)
    before = digest(tmp_path / "run")
    for changes, said in (
        ({"batch_size": 8}, "`batch_size` is 12 there and 8 here"),
        ({"augment": []}, "`augment` is"),
    ):
        with pytest.raises(RunError, match="AZ802") as caught:
            tiny(tmp_path / "run", **{"epochs": 1} | changes)
        assert said in str(caught.value) and "--out" in str(caught.value)
    with pytest.raises(RunError, match="the recipe is another"):
        train(RECIPE.replace("add", "max"), settings(epochs=1), tmp_path / "run")
    assert digest(tmp_path / "run") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        tiny(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(RunError, match="AZ801") as caught:
        open_run(tmp_path / "runn")
    assert "holds mine, run" in str(caught.value)


def test_wrong_augmentation_begins_nothing(tmp_path):
    with pytest.raises(DataError, match="AZ705"):
        tiny(tmp_path / "run", augment=[{"use": "horizontal_flop"}])
    assert not (tmp_path / "run").exists()


def test_settings_travel_as_json():
    chosen = settings(minutes=2.5, ema=0.99, optimizer={"betas": [0.9, 0.95]})
    assert (
        Settings.model_validate(json.loads(json.dumps(chosen.model_dump(mode="json", by_alias=True))))
        == chosen
    )
    assert set(chosen.decisive()) >= set(TINY) - {"device"} and "minutes" not in chosen.decisive()
    assert chosen.decisive()["augment"] == AUGMENT


# The command line


def cli(*arguments: str, code: int = 0) -> str:
    """A verb in this process; its exit code is checked."""
    result = RUNNER.invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_train_eval_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    first = (
        "train",
        "tiny.yaml",
        "--data",
        "synthetic",
        "--epochs",
        "2",
        "--batch-size",
        "12",
        "--device",
        "cpu",
    )
    out = cli(*first, "--lr", "0.02", "--set", "train.ema=0.5")
    for text in ("epoch 2  step 8/8", "best: ", "last: ", "run: runs/tiny-synthetic-seed0", "curve.svg",
                 "next: attnzoo heatmap runs/tiny-synthetic-seed0 · attnzoo eval runs/tiny-synthetic-seed0"):  # fmt: skip
        assert text in out, text
    run = open_run("runs/tiny-synthetic-seed0")
    assert (run.settings.optimizer.lr, run.settings.ema, run.settings.batch_size) == (0.02, 0.5, 12)
    again = cli(*first, code=2)
    assert "AZ802" in again and "`optimizer` is" in again
    assert json.loads(cli("resume", str(run.folder), "--json"))["last_epoch"] == 2
    data = json.loads(cli("eval", str(run.folder), "--json", "--which", "last"))
    assert (
        data["accuracy"] == run.summary()["last_accuracy"]
        and sum(c["correct"] for c in data["classes"]) == data["correct"]
    )
    shown = cli("eval", str(run.folder))
    assert " % of 20 images" in shown.replace(") of", " of").replace("(", "") and shown.count(" %") > 6
    state = last(run.folder) / "state.json"
    state.write_text(state.read_text() + " ")
    assert "is damaged" in cli("eval", str(run.folder))


def test_eval_refuses_other_classes(tmp_path, monkeypatch):
    run = tiny(tmp_path, epochs=1)
    other = images("other")
    monkeypatch.setattr("attnzoo.train.kinds.load_images",
                        lambda *_, **__: type(other)(**vars(other) | {"classes": ("a", "b", "c", "z")}))  # fmt: skip
    assert "AZ807" in cli("eval", str(run.folder), "--data", "other", code=2)


def test_a_stopped_run_says_how_to_go_on(tmp_path, monkeypatch):
    import signal

    (tmp_path / "tiny.yaml").write_text(RECIPE)
    advance = loop._Training._advance

    def interrupted(self, *arguments):
        advance(self, *arguments)
        if self.taken == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop._Training, "_advance", interrupted)
    run = str(tmp_path / "run")
    train_ = (
        "train",
        str(tmp_path / "tiny.yaml"),
        "--data",
        "synthetic",
        "--batch-size",
        "12",
        "--epochs",
        "3",
        "--out",
        run,
    )
    assert f"next: attnzoo resume {run}" in cli(*train_, code=130)
    assert open_run(run).summary()["finished"] is False
    out = cli("resume", run)
    assert "goes on after step 6 of 12" in out and "epoch 3" in out


def test_faults_end_with_their_code(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    built_with(monkeypatch, lambda model: model.head.register_forward_hook(lambda m, i, o: o * torch.nan))
    out = cli(
        "train", str(tmp_path / "tiny.yaml"), "--data", "synthetic", "--out", str(tmp_path / "run"), code=1
    )
    assert "AZ803" in out and "`head`" in out
    assert "AZ801" in cli("resume", str(tmp_path / "nothing"), code=2)


def test_a_checkpoint_holds_no_pickle(tmp_path):
    tiny(tmp_path, epochs=1, ema=0.9)
    files = {path.name for path in last(tmp_path).iterdir()}
    assert files == {
        "model.safetensors",
        "optimizer.safetensors",
        "ema.safetensors",
        "best.safetensors",
        "state.json",
        "manifest.json",
    }
    state = json.loads((last(tmp_path) / "state.json").read_text())
    assert state["recipe_sha256"] == hashlib.sha256(state["recipe"].encode()).hexdigest()
    assert {"torch", "timm", "threads", "processes"} <= set(state["environment"]) and state["progress"][
        "epoch"
    ] == 1
