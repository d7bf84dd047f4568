"""`attnzoo probe MODEL` without a run: recipes, timm's models, folders of timm's; what is shown, and what it says of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import CliRunner

import attnzoo
from attnzoo.bench.composition import default_image
from attnzoo.cli.app import app
from attnzoo.data import Images, evaluation, load_images
from attnzoo.data.chance import drawn
from attnzoo.lab.subject import Subject
from attnzoo.lab.timm_models import tapped

RECIPE = """
recipe: 1
name: small
extends: ham_classic
host: {model: {depth: 2, embed_dim: 32}}
attention: softmax
"""
TIMM = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where pictures and tables go."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def run(*arguments: object, code: int = 0) -> str:
    """What `attnzoo probe` prints."""
    done = CliRunner().invoke(app, ["probe", *map(str, arguments)], env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return done.output


def said(*arguments: object) -> dict:
    """What it says as JSON."""
    return json.loads(run(*arguments, "--json"))


def saved(folder: Path, classes: int = 10, **names: object) -> tuple[torch.nn.Module, str]:
    """A small ViT in timm's format, and what the command calls it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **TIMM).eval()
    timm.models.save_for_hf(model, folder, model_args=TIMM, model_config=names or None)
    return model, f"local-dir:{folder}"


def test_a_recipe_is_measured_as_training_would_begin():
    first = said("small.yaml", "entropy", "head_importance", "--data", "digits", "--count", 8, "--seed", 4)
    assert first["state"] == "small, untrained, seed 4" and first["examples"] == 8 and "run" not in first
    torch.manual_seed(4)
    model = attnzoo.compose("small.yaml", edits=["host.model.num_classes=10"]).eval()
    data = load_images("digits")
    images, labels = data.test.batch(torch.tensor(drawn(len(data.test), 8, 4)))
    ready = evaluation(data.image, data.mean, data.std)(images)
    for probe, found in zip(("entropy", "head_importance"), first["findings"], strict=True):
        wanted = attnzoo.probe(model, probe, inputs=ready, targets=labels)
        assert found["columns"][wanted.shows] == pytest.approx(wanted[wanted.shows], rel=1e-4)


def test_a_recipe_of_sequences_is_shown_its_own_data():
    found = said("induction", "induction_score(on='data')", "--count", 4)
    assert (
        found["state"] == "induction, untrained, seed 0"
        and len(found["findings"][0]["columns"]["match"]) == 4
    )


def test_a_folder_of_timms_is_measured_with_its_weights_and_labels_only_where_they_are_its_own(folder):
    digits = list(load_images("digits").classes)
    model, name = saved(folder / "own", label_names=digits)
    found = said(name, "entropy", "head_importance", "--data", "digits", "--count", 4)
    assert found["state"] == f"own, weights of {folder / 'own'}"
    data = load_images("digits")
    images, _ = data.test.batch(torch.tensor(drawn(len(data.test), 4, 0)))
    cfg = timm.data.resolve_model_data_config(model)
    ready = evaluation((3, 32, 32), cfg["mean"], cfg["std"])(images)
    wanted = attnzoo.probe(model, "entropy", inputs=ready)
    assert found["findings"][0]["columns"]["share"] == pytest.approx(wanted["share"], rel=1e-4)

    _, name = saved(folder / "strange")
    assert said(name, "entropy", "--data", "digits", "--count", 4)["examples"] == 4
    assert "error[AZ926]" in run(name, "head_importance", "--data", "digits", "--count", 4, code=2)


def test_timms_untrained_model_has_the_classes_of_the_data(folder):
    found = said("test_vit", "head_importance", "--data", "digits", "--count", 4)
    assert found["state"] == "test_vit, untrained, seed 0" and found["findings"][0]["figures"]["loss"] < 5
    torch.save(timm.create_model("test_vit").state_dict(), folder / "w.pth")
    given = said("test_vit", "entropy", "--images", default_image(), "--init-from", "w.pth")
    assert given["examples"] == 1 and given["state"] == "test_vit, weights of w.pth"


def test_grey_images_fill_the_channels_of_the_model():
    data, mean, std = load_images("digits"), (0.1, 0.2, 0.3), (1.0, 0.5, 0.25)
    grey = [
        Images(side.labels, side.batch(torch.arange(len(side)))[0][:, :1]) for side in (data.train, data.test)
    ]
    data = replace(data, image=(3, 32, 32), mean=mean, std=std, train=grey[0], test=grey[1])
    model = timm.create_model("test_vit", num_classes=10, img_size=32)
    with tapped(model):
        found = Subject.of_data(model, data, "images", count=2, labelled=False)
    (batch,) = found.batches
    assert batch.targets is None and found.classes is None
    plain = batch.inputs[0] * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    wanted = grey[1].images[drawn(len(grey[1]), 2, 0)].expand(-1, 3, -1, -1) / 255
    assert torch.allclose(plain, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "about"),
    [
        (["vit_tiny_patch16_224", "entropy"], "AZ926", "--data digits"),
        (["small.yaml", "entropy", "--data", "digits", "--images", "."], "AZ928", "do not go together"),
        (["induction", "entropy", "--images", "."], "AZ908", "--images"),
        (["induction", "entropy", "--data", "digits"], "AZ814", "digits"),
        (["small.yaml", "entropy", "--images", "none.png"], "AZ902", "no such file"),
        (["nothing_like_it", "entropy"], "AZ204", "no timm model"),
        (["resnet10t", "entropy", "--data", "digits"], "AZ903", "ResNet"),
        (["local-dir:nowhere", "entropy", "--data", "digits"], "AZ935", "config.json"),
        (["vit_tiny_patch16_224", "nothing", "--data", "digits"], "AZ201", "nothing"),
    ],
)
def test_what_cannot_be_is_refused(arguments, code, about):
    output = run(*arguments, code=2)
    assert f"error[{code}]" in output and about in output and "Traceback" not in output
