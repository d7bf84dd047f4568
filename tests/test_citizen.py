"""Composed models among the tools of others: timm's weights, peft, captum, torchvision, transformers, timm's own tests."""

import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import timm
import torch
from capabilities import BEHIND_OTHERS, TRIALS, images, made, maps, recipe
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg, save_for_hf
from torchvision.models.feature_extraction import create_feature_extractor

import attnzoo
from attnzoo.bench.composition import describe
from attnzoo.errors import RecipeError, UnknownArgument, ZooError
from attnzoo.recipe import compose_file
from attnzoo.zoo import load_zoo

SIZES = {"vit_ham_b_tiny_patch16_224": {"depth": 1}, "vit_tiny_patch16_224": {"depth": 1}}
"""Arguments that make a model small; the plain ViT is timm's own, for comparison."""
NAMES = ["ham_vit_b", "vit_ham_b_tiny_patch16_224", "cct_7_3x1_32_c100", "vit_tiny_patch16_224"]


@pytest.mark.parametrize(
    "asked", [{"num_classes": 3}, {"num_classes": 0}, {"in_chans": 1}, {"img_size": 64}, {}], ids=str
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sample(3)
def test_weights_of_a_file(name, asked, tmp_path):
    """They are for so many classes and channels as the registered model has, whatever is asked for."""
    small = SIZES.get(name, {})
    source = timm.create_model(name, **small)
    file = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), file)
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **small, **asked
    )
    mine, theirs = model.state_dict(), source.state_dict()
    same = {key for key in mine if mine[key].shape == theirs[key].shape}
    other = mine.keys() - same
    assert all(torch.equal(mine[key], theirs[key]) for key in same)
    assert {key.partition(".")[0] for key in other} <= {"head", "patch_embed", "tokenizer", "pos_embed"}
    if "in_chans" in asked:
        (first,) = other
        assert torch.equal(mine[first], theirs[first].sum(dim=1, keepdim=True))
    wanted = asked.get("num_classes", source.num_classes)
    image = (1, asked.get("in_chans", 3), *source.pretrained_cfg["input_size"][1:])
    if "img_size" in asked:
        image = (1, 3, 64, 64)
    assert model(torch.randn(image)).shape[-1] == (wanted or model.num_features)
    assert model.num_classes == wanted
    for key in ("num_classes", "input_size"):
        assert (
            model.pretrained_cfg[key] == source.pretrained_cfg[key] == getattr(get_pretrained_cfg(name), key)
        )


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_says_what_weights_are_for(name, tmp_path):
    """Weights for ten classes, as a fine-tuned model has them."""
    small = SIZES.get(name, {})
    source = timm.create_model(name, num_classes=10, in_chans=1, **small)
    file = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), file)
    rows, columns = source.pretrained_cfg["input_size"][1:]
    overlay = {"file": str(file), "num_classes": 10, "input_size": (1, rows, columns)}
    for asked, classes in ({}, 10), ({"num_classes": 3}, 3), ({"num_classes": 0}, 0), ({"in_chans": 3}, 10):
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **small, **asked)
        assert model.num_classes == classes
        mine, theirs = model.state_dict(), source.state_dict()
        same = [key for key in mine if mine[key].shape == theirs[key].shape]
        assert all(torch.equal(mine[key], theirs[key]) for key in same)
        assert mine.keys() - set(same) == (
            {key for key in mine if key.startswith("head.")} if classes == 3 else
            {key for key in mine if theirs[key].ndim == 4 and theirs[key].shape[1] == 1} if "in_chans" in asked else set()
        )  # fmt: skip
    cfg = {**source.pretrained_cfg, **overlay, "custom_load": False}
    for handed in cfg, get_pretrained_cfg(name).__class__(**cfg):
        model = timm.create_model(name, pretrained=True, pretrained_cfg=handed, num_classes=3, **small)
        assert model.num_classes == 3 and model.pretrained_cfg["num_classes"] == 10


def test_an_overlay_with_another_size_of_images():
    model = timm.create_model(
        "vit_ham_b_tiny_patch16_224", depth=1, pretrained_cfg_overlay={"input_size": (3, 64, 96)}
    )
    assert model.layout.grid == model.blocks[0].layout.grid == (4, 6)
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 1000)


@pytest.mark.parametrize(
    "recipe",
    [
        "ham_b",
        "cct_7_3x1",
        "{recipe: 1, host: {kind: vit, model: {embed_dim: 48, num_heads: 2, depth: 1, img_size: 32}}, attention: soft}",
    ],
)
def test_compose_loads_weights(recipe, tmp_path):
    source = attnzoo.compose(recipe, num_classes=10)
    file = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), file)
    overlay = {"file": str(file), "num_classes": 10}
    for asked in {"num_classes": 3}, {"num_classes": 0}, {"in_chans": 1}, {}:
        model = attnzoo.compose(recipe, pretrained=True, pretrained_cfg_overlay=overlay, **asked)
        assert model.num_classes == asked.get("num_classes", 10)
        assert torch.equal(model.blocks[-1].mlp.fc1.weight, source.blocks[-1].mlp.fc1.weight)
    with pytest.raises(RecipeError, match="no published weights"):
        attnzoo.compose("recall", pretrained=True)


def test_what_was_asked_for_travels_in_the_configuration(tmp_path):
    model = attnzoo.compose("ham_b", depth=1, img_size=48, in_chans=1, num_classes=5).eval()
    model.reset_classifier(7)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 1, 48, 48)
    assert torch.equal(again(x), model(x)) and again.num_classes == 7 and len(again.blocks) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: timm.create_model("ham_vit_b", **kw),
        lambda **kw: timm.create_model("cct_7_3x1_32_c100", **kw),
        lambda **kw: timm.create_model("attnzoo_vit", recipe="ham_b", **kw),
        lambda **kw: attnzoo.compose("ham_b", **kw),
        lambda **kw: attnzoo.compose("ham_b", features_only=True, **kw),
        lambda **kw: attnzoo.compose("recall", **kw),
        lambda **kw: attnzoo.compose("transformer", **kw),
    ],
)
def test_unknown_arguments_are_type_errors_too(make):
    for error in (UnknownArgument, TypeError, RecipeError, ZooError):
        with pytest.raises(error, match="takes no argument `nonsense`"):
            make(nonsense=1)


def test_unknown_arguments_are_corrected():
    with pytest.raises(UnknownArgument, match="did you mean `num_classes`"):
        timm.create_model("ham_vit_b", num_clases=1)
    with pytest.raises(UnknownArgument, match="takes no `features_only`"):
        attnzoo.compose("recall", features_only=True)
    with pytest.raises(RecipeError) as error:  # known, but not so
        timm.create_model("ham_vit_b", num_classes="many")
    assert not isinstance(error.value, TypeError)


def test_all_that_is_listed_can_be_built():
    modules = ("vision_transformer", "compact_transformer")
    listed = {
        n
        for n in timm.list_models(module=modules)
        if timm.models.model_entrypoint(n).__module__.startswith("attnzoo")
    }
    assert {"ham_vit_b", "cct_7_3x1_32_c100"} <= listed
    assert not [name for name in timm.list_models() if name.startswith("attnzoo_")]
    with torch.device("meta"):
        for name in listed:
            timm.create_model(name)
    assert timm.is_model("attnzoo_vit") and timm.is_model("attnzoo_cct")
    assert timm.create_model("attnzoo_cct", recipe="cct_7_3x1").num_classes == 100


MECHANISMS = list(load_zoo().mechanisms)
NEEDS_A_CONTEXT = {
    "class_cross", "class_semantics", "conv_transformer", "cross_scale", "global_query", "medusa", "pairwise_cross",
    "prior_cross", "window_cross",
}  # fmt: skip
"""They read a second stream on a grid, which a ViT has not."""
IN_A_VIT = [name for name in MECHANISMS if name not in NEEDS_A_CONTEXT]


def test_what_cannot_be_in_a_vit_is_refused():
    for name in NEEDS_A_CONTEXT:
        with pytest.raises(RecipeError, match="second stream; the site has none"):
            attnzoo.compose(recipe(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_A_VIT)
def test_supports_is_what_works(name):
    """Every word of the line `supports: ...   not: ...`, tried; no capability is left out of it."""
    report = describe(compose_file(recipe(name)))
    assert set(report.supports) | set(report.lacks) == TRIALS.keys() and not set(report.supports) & set(
        report.lacks
    )
    works = []
    for word, trial in TRIALS.items():
        if word in report.supports:
            trial(name)
            works.append(word)
        else:
            with pytest.raises(Exception):  # noqa: B017 - each tool refuses in its own way
                trial(name)
    assert sorted(works) == sorted(report.supports)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("softmax", "additive") else pytest.mark.slow)
        for name in IN_A_VIT
    ],
)
def test_torchvisions_feature_extractor(name):
    """Maps are handed to the model by keyword, which a symbolic trace follows too."""
    last = 1 if name in BEHIND_OTHERS else 0
    model, x = made(name, depth=last + 1), images(2)
    extractor = create_feature_extractor(model, return_nodes={f"blocks.{last}.attn": "mixed", "head": "out"})
    given = maps(name, x)
    with torch.no_grad():
        out = extractor(x, **given)
        assert torch.allclose(out["out"], model(x, **given), atol=1e-6)
    assert out["mixed"].shape == (2, 17, 32)


TIMM_SUITE = {
    "test_model_forward_torchscript": "TorchScript reads the source of mechanisms, which is Python that it does not know",
    "test_model_forward_fx_torchscript": "the same, of the traced model",
}
"""What of timm's own tests is left out, and why."""


@pytest.mark.slow
def test_timms_own_suite():
    """timm's tests/test_models.py on every model that a recipe registers."""
    folder = os.environ.get("ATTNZOO_TIMM_TESTS")
    if not folder:
        pytest.skip(
            f"ATTNZOO_TIMM_TESTS names no unpacked sdist of timm: `pip download --no-deps --no-binary :all: "
            f"timm=={timm.__version__}`, unpack it, and set the variable to the folder"
        )
    file = Path(folder, "tests", "test_models.py")
    assert file.is_file(), f"ATTNZOO_TIMM_TESTS: there is no {file}"
    here = Path(__file__).parent
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    }
    left_out = " or ".join(TIMM_SUITE)
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "timm_suite",
        "-n",
        "0",
        "-k",
        f"not ({left_out})",
    ]
    done = subprocess.run(
        [sys.executable, *command, str(file)], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


PLAIN = {"img_size": 32, "depth": 2, "num_classes": 5}
TARGETS = [["qkv"], ["proj"], ["fc1"], ["fc2"], ["qkv", "proj"], "all-linear"]


def trained(model, targets) -> set[str]:
    """Names of what LoRA trains, and the classifier with it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["head"])
    return {name for name, p in get_peft_model(model, config).named_parameters() if p.requires_grad}


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize(
    "attention", ["softmax", "{fuse: add, of: [softmax, soft]}", "{fuse: gated, of: [softmax, soft]}"]
)
@pytest.mark.sample(4)
def test_lora_trains_what_it_does_on_timms_vit(targets, attention):
    text = f"{{recipe: 1, host: {{kind: vit, base: vit_tiny_patch16_224}}, attention: {attention}}}"
    mine = trained(attnzoo.compose(text, **PLAIN), targets)
    theirs = trained(timm.create_model("vit_tiny_patch16_224", **PLAIN), targets)
    assert any("head.modules_to_save" in name for name in mine) and any("lora_A" in name for name in mine)
    own = {
        f"base_model.model.blocks.{i}.attn.inner.fusion.gate.lora_{side}.default.weight"
        for i in range(2)
        for side in "AB"
    }
    assert mine - theirs == (own if "gated" in attention and targets == "all-linear" else set())
    assert not theirs - mine


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_A_VIT)
def test_lora_on_every_mechanism(name):
    """`all-linear` meets nothing that it cannot adapt, and the model answers and learns with it."""
    model, x = made(name), images(2)
    given, before = maps(name, x), model(x, **maps(name, x))
    names = trained(model, "all-linear")
    assert torch.allclose(model(x, **given), before, atol=1e-5)
    assert {name for name in names if "head." in name} == {
        "base_model.model.head.modules_to_save.default.weight",
        "base_model.model.head.modules_to_save.default.bias",
    }
    assert {
        name.split(".modules_to")[0].split(".lora_")[0]
        for name in names
        if ".blocks." in name and ".mlp." in name
    } == {f"base_model.model.blocks.{i}.mlp.fc{j}" for i in range(2) for j in (1, 2)}


@pytest.mark.parametrize("skip", ["merged", "merged_raw", "merged_post", "probs_pairmean", "logits_pairmean"])
@pytest.mark.sample(3)
def test_torchvisions_feature_extractor_with_a_skip(skip):
    """What blocks hand on is in the graph, and each call has its own."""
    model, x = attnzoo.compose(recipe("softmax") | {"skip": skip}).eval(), images(2)
    extractor = create_feature_extractor(model, return_nodes=["head"])
    with torch.no_grad():
        for image in x, x.flip(0) + 1:
            assert torch.allclose(extractor(image)["head"], model(image), atol=1e-6)


def test_captums_integrated_gradients():
    """What is attributed to the pixels sums to what the class gained over a black image."""
    from captum.attr import IntegratedGradients

    model, x = made({"fuse": "add", "of": ["softmax", "soft"]}), images(2)
    found, _ = IntegratedGradients(model).attribute(x, target=1, n_steps=64, return_convergence_delta=True)
    with torch.no_grad():
        gained = (model(x) - model(torch.zeros_like(x)))[:, 1]
    assert torch.allclose(found.sum(dim=(1, 2, 3)).float(), gained, atol=1e-4) and gained.abs().min() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("architecture, arguments", [("ham_vit_b", {}), ("attnzoo_vit", {"recipe": "ham_a"})])
def test_transformers_timm_wrapper(architecture, arguments, tmp_path):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture=architecture, num_labels=5, model_args=arguments or None)
    model, x = TimmWrapperForImageClassification(config).eval(), images(2)
    plain = timm.create_model(architecture, num_classes=5, **arguments).eval()
    plain.load_state_dict(model.timm_model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x).logits, plain(x))
        model.save_pretrained(tmp_path)
        again = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(again(x).logits, plain(x))


SCRIPT = """
import argparse, timm
from timm.utils import ParseKwargs
parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)  # as timm's own train.py
said = parser.parse_args()
print(sum(p.numel() for p in timm.create_model(said.model, **said.model_kwargs).parameters()))
"""
MINE = (
    "recipe: 1\nhost: {kind: vit, base: vit_tiny_patch16_224, model: {depth: 1}}\nattention: soft  # ours\n"
)
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("which", range(3))
@pytest.mark.slow  # a shell that trains with timm's script
def test_the_lines_for_somebodys_script(which, tmp_path):
    """Those of the README, which docs/recipes.md repeats, run in a shell as they stand."""
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "my.yaml").write_text(MINE)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def run(line: str) -> subprocess.CompletedProcess:
        words = subprocess.run(  # the shell's own, for a line may ask for the content of a file
            ["bash", "-c", f"printf '%s\\0' {line.removeprefix('attnzoo')}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return processes.run("-m", "attnzoo", *words.stdout.split("\0")[:-1], cwd=tmp_path, env=env)

    lines = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("attnzoo run train.py")
    ]
    assert [line for line in lines if "recipe=" in line] == [
        line
        for line in (ROOT / "docs" / "recipes.md").read_text().splitlines()
        if line.startswith("attnzoo run")
    ]
    assert len(lines) == 3
    model = [
        lambda: timm.create_model("ham_vit_b"),
        lambda: attnzoo.compose("ham_a"),
        lambda: attnzoo.compose(MINE),
    ][which]()
    assert run(lines[which]).stdout.strip() == str(sum(p.numel() for p in model.parameters()))
    refused = run("attnzoo run train.py --model attnzoo_vit --model-kwargs recipe=my.yaml")
    assert (
        "error[AZ204]: `my.yaml` is a path" in refused.stderr and 'recipe="$(cat my.yaml)"' in refused.stderr
    )
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
