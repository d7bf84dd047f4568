"""Dual cross-attention learning: its three losses, by hand and against `pairwise_cross`, and its runs."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import attnzoo
from attnzoo.cli.app import app
from attnzoo.core import Layout, Site
from attnzoo.errors import RecipeError, ZooError
from attnzoo.lab.heatmap import view
from attnzoo.lab.maps import collect
from attnzoo.mechanisms.cross.pairwise_cross import PairwiseCross
from attnzoo.methods import DualCrossTransformer, dual_cross
from attnzoo.methods.dual_cross import paired
from attnzoo.recipe import load
from attnzoo.train import open_run, train
from attnzoo.train.check import checked
from attnzoo.train.settings import prepare

LABELS = torch.arange(4)


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def learner(seed: int = 0) -> DualCrossTransformer:
    """In float64, with weights far from their beginning."""
    torch.manual_seed(seed)
    model = dual_cross(attnzoo.compose("dcal")).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def stream(model: DualCrossTransformer, x: torch.Tensor) -> list[torch.Tensor]:
    """Tokens before the first block and behind each block of self-attention, by timm's own way."""
    _, inner = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
    first = model._pos_embed(model.patch_embed(x))
    return [first, *(torch.cat([prefix, grid], dim=1) for grid, prefix in inner[:-1])]


def three(model: DualCrossTransformer, x: torch.Tensor) -> list[torch.Tensor]:
    """Logits of SA, GLCA and PWCA, each by a way of its own."""
    by_self = stream(model, x)
    plain = nn.Module.__new__(type(model).__mro__[1])  # the model without its method
    plain.__dict__ = model.__dict__
    disturbed = by_self[0]
    for layer, block in enumerate(model.blocks[:-1]):
        pairs = []
        for i in range(len(x)):
            own, other = disturbed[i : i + 1], by_self[layer][i - 1 : i or None]
            n, both = own.shape[1], torch.cat([own, other], dim=1)
            layout = Layout((2 * n - 1,), 1)
            pairs.append(block.mix(both, layout, attnzoo.Mask(), {})[:, :n])  # rows of the other are not read
        disturbed = torch.cat(pairs)
    head = lambda tokens: model.head_self(model.norm_self(tokens)[:, 0])  # noqa: E731
    return [head(by_self[-1]), plain(x), head(disturbed)]


# ---------------------------------------------------------------------------------------------------------------- passes


def test_a_block_with_another_image_is_pairwise_cross():
    """The mechanism with the block's weights; without a residual and an MLP of its own it gives the same."""
    block = learner().blocks[0].eval()
    own, other = torch.randn(2, 3, 65, 32, dtype=torch.float64).unbind(0)
    site = Site(
        name="s", dim=32, heads=4, layout=Layout((8, 8), 1), context_dim=32, context_layout=Layout((8, 8), 1)
    )
    mechanism = PairwiseCross(site).double().eval()
    mechanism.load_state_dict(block.attn.state_dict())
    read = mechanism(block.norm1(own), block.norm1(other), layout=site.layout, context_layout=site.layout)
    wanted = own + read
    wanted = wanted + block.mlp(block.norm2(wanted))
    torch.testing.assert_close(paired(block, own, other), wanted)


def test_identity_an_image_that_meets_itself_is_self_attention():
    model = learner().eval()
    x = images(1)
    block, tokens = model.blocks[0], stream(model, x)[0]
    torch.testing.assert_close(paired(block, tokens, tokens), block(tokens))
    model.train()
    alone = model(x, targets=LABELS[:1])
    with torch.no_grad():
        by_self, local, disturbed = three(model.eval(), x)
    torch.testing.assert_close(by_self, disturbed)
    w = model.uncertainty
    losses = [F.cross_entropy(z, LABELS[:1]) for z in (by_self, local, by_self)]
    torch.testing.assert_close(
        alone[0], sum(torch.exp(-a) * b + a for a, b in zip(w, losses, strict=True)) / 2
    )


def test_the_loss_is_that_of_the_paper():
    """½ Σ (e^{-w} L + w), label by label, of logits that were made otherwise."""
    model = learner().train()
    with torch.no_grad():
        model.uncertainty.copy_(torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64))
        found, logits = model(images(), targets=LABELS), three(model, images())
    wanted = [
        0.5
        * sum(
            math.exp(-w) * -float(z[i].log_softmax(-1)[LABELS[i]]) + w
            for w, z in zip((0.3, -0.7, 1.1), logits, strict=True)
        )
        for i in range(4)
    ]
    assert found.tolist() == pytest.approx(wanted, rel=1e-9)
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


def test_another_image_has_a_say_in_training_alone():
    model, x = learner(), images()
    other = torch.cat([x[:2], -x[2:3], x[3:]])
    changed = model.train()(x, targets=LABELS) != model(other, targets=LABELS)
    assert changed.tolist() == [False, False, True, True]  # the image itself, and the one that meets it
    model.eval()
    alone = torch.cat([model(one[None]) for one in x])
    torch.testing.assert_close(model(x), alone)
    torch.testing.assert_close(model(other)[3], model(x)[3], rtol=0, atol=0)


def test_inference_adds_probabilities():
    model = learner().eval()
    by_self, local, _ = three(model, images())
    wanted = (by_self.softmax(dim=-1) + local.softmax(dim=-1)) / 2
    torch.testing.assert_close(model(images()).exp(), wanted)


def test_weights_of_losses_start_at_0_and_have_gradients():
    """∂/∂w_k = ½ (1 - e^{-w_k} L_k)."""
    torch.manual_seed(0)
    fresh = dual_cross(attnzoo.compose("dcal"))
    assert fresh.uncertainty.tolist() == [0, 0, 0]
    model = learner().train()
    model(images(), targets=LABELS).mean().backward()
    with torch.no_grad():
        losses = torch.stack([F.cross_entropy(z, LABELS) for z in three(model, images())])
        wanted = (1 - torch.exp(-model.uncertainty) * losses) / 2
    torch.testing.assert_close(model.uncertainty.grad, wanted)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_least_loss_has_the_logarithm_of_its_error_as_weight():
    """For fixed errors ½ Σ (e^{-w} L + w) is least at w = log L."""
    model = learner()
    losses = [torch.tensor(v, dtype=torch.float64) for v in (0.5, 2.0, 3.0)]
    with torch.no_grad():
        model.uncertainty.copy_(torch.stack(losses).log())
    (grad,) = torch.autograd.grad(model.balanced(losses), model.uncertainty)
    torch.testing.assert_close(grad, torch.zeros(3, dtype=torch.float64))


def test_shares_and_smoothing_as_in_any_cross_entropy():
    model = learner().train()
    shares = F.one_hot(LABELS, 10).double()
    torch.testing.assert_close(model(images(), targets=shares), model(images(), targets=LABELS))
    smooth = shares * 0.9 + 0.01
    torch.testing.assert_close(
        model(images(), targets=smooth), model(images(), targets=LABELS, label_smoothing=0.1)
    )


# ----------------------------------------------------------------------------------------------------------- as a model


def test_it_is_copied_loaded_and_looked_at_like_the_model():
    model = learner().eval()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(images()), model(images()), rtol=0, atol=0)
    other = learner(seed=1).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(images()), model(images()), rtol=0, atol=0)
    assert {"head_self.weight", "norm_self.weight", "uncertainty"} <= set(model.state_dict())
    found = collect(model.float(), images().float())
    assert found.sites == ("blocks.0", "blocks.1", "blocks.2") and found.class_token
    assert view(found).columns == ("softmax", "rollout")


def test_another_number_of_classes_is_one_of_both():
    model = learner().eval()
    model.reset_classifier(7)
    assert model.double()(images()).shape == (4, 7) and model.head_self.out_features == 7
    for wrong in ({"num_classes": 0}, {"num_classes": 3, "global_pool": "avg"}):
        with pytest.raises(ValueError, match="class tokens"):
            model.reset_classifier(**wrong)


@pytest.mark.parametrize(
    ("recipe", "edits", "said"),
    [
        ("dual_scale", [], "DualTransformer"),
        ("digits_softmax", [], "softmax, softmax"),
        ("digits_global_local_cross", [], "class token"),
        ("dcal", ["attention=cosine"], "cosine"),
        ("dcal", ["host.model.num_classes=0"], "class token"),
    ],
)
def test_other_models_are_refused(recipe, edits, said):
    edits = [*edits, *(["train.method=null"] if recipe == "dcal" else [])]
    with pytest.raises(ZooError, match=said) as caught:
        dual_cross(attnzoo.compose(recipe, edits=edits))
    assert caught.value.code == "AZ326"


def test_masks_are_refused_in_training():
    mask = torch.ones(65, 65, dtype=torch.bool)
    model = learner()
    with pytest.raises(ZooError, match="AZ326"):
        model(images(), mask, targets=LABELS)
    assert model.eval()(images(), mask).shape == (4, 10)


# ------------------------------------------------------------------------------------------------------------------ runs

SHORT = ["train.epochs=2", "train.batch_size=256"]


def run(folder, until: int | None = None):
    return train(*prepare("dcal", SHORT), folder, until=until)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("dcal") / "whole")


def newest(folder):
    return sorted(folder.glob("step_*"))[-1]


def test_a_run_that_was_stopped_ends_with_the_same_bits(whole, tmp_path):
    run(tmp_path / "run", until=5)
    stopped = load_file(newest(tmp_path / "run") / "model.safetensors")
    run(tmp_path / "run")
    for name in ("model", "optimizer"):
        one, other = (load_file(newest(f) / f"{name}.safetensors") for f in (whole.folder, tmp_path / "run"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    model = load_file(newest(whole.folder) / "model.safetensors")
    assert bool((model["uncertainty"] != 0).all()) and bool(
        (model["uncertainty"] != stopped["uncertainty"]).all()
    )
    moments = load_file(newest(whole.folder) / "optimizer.safetensors")
    assert sum(tensor.shape == (3,) for tensor in moments.values()) == 2  # of three weights, in two moments


def test_a_run_answers_with_both_classifiers(whole):
    model = open_run(whole.folder).model("last")
    assert isinstance(model, DualCrossTransformer) and not model.training
    assert model(images(2).float()).exp().sum(dim=-1).tolist() == pytest.approx([1, 1], rel=1e-5)
    assert whole.evaluate("last").loss == pytest.approx(whole.log()[-1]["test_loss"], rel=1e-6)
    state = json.loads((newest(whole.folder) / "state.json").read_text())
    assert state["params"] == sum(p.numel() for p in model.parameters())
    assert state["settings"]["method"] == "dual_cross"


def test_a_run_is_not_ejected_in_part(whole, tmp_path):
    with pytest.raises(ZooError, match="dual_cross") as caught:
        attnzoo.eject(whole.folder)
    assert caught.value.code == "AZ973"


@pytest.mark.parametrize("recipe", ["digits_softmax", "reverse_seq2seq"])
def test_a_method_that_does_not_fit_is_no_run(recipe, tmp_path):
    name = recipe if recipe in attnzoo.list_recipes() else "linear_seq2seq"
    edits = ["train.data=reverse"] if name != "digits_softmax" else []
    with pytest.raises(ZooError) as caught:
        train(*prepare(name, ["train.method=dual_cross", *edits]), tmp_path / "run")
    assert caught.value.code == "AZ326" and not any((tmp_path / "run").glob("step_*"))


def test_compose_and_train_say_where_a_recipe_asks_for_a_method_that_does_not_fit(tmp_path):
    recipe = tmp_path / "other.yaml"
    recipe.write_text(
        "recipe: 1\nname: other\nextends: digits_softmax\ntrain: {method: dual_cross, data: synthetic}\n"
    )
    for verb in (["compose"], ["train", "--out", str(tmp_path / "run")]):
        result = CliRunner().invoke(app, [verb[0], str(recipe), *verb[1:]])
        assert result.exit_code == 2, result.output
        assert "error[AZ326]" in result.output and "other.yaml:4:17" in result.output
    assert not (tmp_path / "run").exists()
    assert CliRunner().invoke(app, ["compose", "dcal"]).exit_code == 0


def test_an_unfit_method_is_told_beside_the_other_faults_of_training():
    with pytest.raises(RecipeError) as caught:
        checked(load("digits_softmax", ["train.method=dual_cross", "train.data=digitz"]))
    assert {(fault.code, fault.place.line) for fault in caught.value.diagnostics} >= {("AZ326", 1)}
    assert len(caught.value.diagnostics) == 2
