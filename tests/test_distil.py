"""Distillation of grafts: what learns and what does not, what is told, and that it works."""

import functools
import random
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import attnzoo
from attnzoo.data import ImageData, Images, load_images
from attnzoo.errors import ZooError
from attnzoo.grafting import distillation
from attnzoo.grafting.distillation import FAR, block_outputs, cosine_distance, relative_error, replaced_blocks
from attnzoo.train import Settings, open_run, prepare, train

ELU = {"recipe": 1, "name": "elu", "host": {"kind": "vit"}, "attention": "elu_linear"}
LAST = {**ELU, "attention": "softmax", "overrides": [{"at": "blocks.1", "put": "elu_linear"}]}


@functools.cache
def digits() -> ImageData:
    """A few of the digits."""
    data = load_images("digits")
    train, test = (
        Images(side.labels[:n], side.images[:n]) for side, n in ((data.train, 256), (data.test, 100))
    )
    return replace(data, train=train, test=test)


@pytest.fixture(autouse=True)
def few_images(monkeypatch, request):
    """Distillation sees a few of the digits, but for the test of how well it does."""
    if not request.node.get_closest_marker("slow"):
        load = distillation.load_images
        monkeypatch.setattr(
            distillation,
            "load_images",
            lambda name, **how: digits() if name == "digits" else load(name, **how),
        )


def donor(**more) -> nn.Module:
    torch.manual_seed(1)
    said = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "num_heads": 4, "depth": 2, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **said | more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def settings(**said) -> Settings:
    optimizer = {"use": "adamw", "lr": 0.003, **said.pop("optimizer", {})}
    return Settings(
        **{**FAR, "data": "digits", "epochs": 1, "batch_size": 64, "optimizer": optimizer, **said}
    )


def changed(before: dict, model: nn.Module) -> set[str]:
    """Names of the tensors that are not what they were."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def kept(model: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_losses():
    one = torch.randn(2, 5, 8)
    assert cosine_distance(one, 3 * one) == pytest.approx(0, abs=1e-6)
    assert cosine_distance(one, -one) == pytest.approx(2, abs=1e-6)
    assert cosine_distance(torch.eye(4)[None], torch.eye(4)[None].roll(1, 1)) == pytest.approx(1)
    assert relative_error(one, one) == 0 and relative_error(3 * one, one) == pytest.approx(4)
    assert relative_error(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)) == 0


def test_first_the_new_attention_then_all():
    model = donor()
    before = kept(model)
    made, _ = attnzoo.graft(model, LAST)
    assert replaced_blocks(made) == [1]
    found = attnzoo.distil(made, settings(epochs=3), teacher=model, finetune=0)
    moved = changed(before, made)
    assert moved and all(name.startswith("blocks.1.attn.") for name in moved)
    assert found.replaced == (1,) and [stage.name for stage in found.stages] == ["graft", "distilled"]
    first, second = found.stages
    assert first.cosines[0] == second.cosines[0] == pytest.approx(1, abs=1e-5)  # softmax, as in the donor
    assert first.cosines[1] < second.cosines[1] < 1
    attnzoo.distil(made, settings(), teacher=model, finetune=1, tune="blocks")
    moved = changed(before, made)
    assert "blocks.1.mlp.fc1.weight" in moved and all(name.startswith("blocks.1.") for name in moved)
    found = attnzoo.distil(made, settings(), teacher=model, first=0, finetune=1)
    assert changed(before, made) == set(before)
    assert [stage.name for stage in found.stages] == ["graft", "fine-tuned"]
    assert changed(before, model) == set()
    assert found.donor == pytest.approx(0.1, abs=0.1) and found.images == 100
    assert found.recovered == pytest.approx(found.stages[-1].accuracy / found.donor)


def test_an_lstm_learns_what_attention_gives():
    """FAR's own mechanism: blocks come nearer to the donor's, and nothing but the LSTM has changed."""
    made, _ = attnzoo.graft(donor(), {**ELU, "attention": "bilstm"})
    before = {name: p.clone() for name, p in made.named_parameters()}
    graft, distilled = attnzoo.distil(made, settings(epochs=3), teacher=donor(), finetune=0).stages
    assert all(1 - new < 0.8 * (1 - old) for old, new in zip(graft.cosines, distilled.cosines, strict=True))
    changed = {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".attn." in name}


def test_the_donor_teaches_when_nobody_else_is_named():
    made, other = (attnzoo.graft(donor(), ELU)[0] for _ in range(2))
    one = attnzoo.distil(made, settings(), finetune=0)
    two = attnzoo.distil(other, settings(), teacher=donor(), finetune=0)
    assert one.stages == two.stages and not changed(kept(made), other)


def test_one_block_after_the_other():
    """Each learns alone, on what those before it have become; what comes after it has no say."""
    model, events = donor(depth=3), []
    recipe = {**ELU, "attention": "softmax", "overrides": [{"at": "blocks.[02]", "put": "elu_linear"}]}
    made, _ = attnzoo.graft(model, recipe)
    state = kept(made)

    def tell(event):
        if event.get("text", "").endswith("learn"):
            events.append((event["text"], changed(state, made)))

    attnzoo.distil(made, settings(), teacher=model, finetune=0, at_once=1, report=tell)
    assert [text for text, _ in events] == ["blocks.0 learn", "blocks.2 learn"]
    assert not events[0][1] and {name[:14] for name in events[1][1]} == {"blocks.0.attn."}
    assert {name[:14] for name in changed(state, made)} == {"blocks.0.attn.", "blocks.2.attn."}

    other, _ = attnzoo.graft(model, recipe)
    with torch.no_grad():
        other.blocks[2].attn.proj.weight.mul_(-3)  # of a block that learns later
    first = {name: tensor for name, tensor in made.state_dict().items() if name.startswith("blocks.0.attn.")}
    attnzoo.distil(other, settings(), teacher=model, finetune=0, at_once=1)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in first.items())

    together, parallel = (attnzoo.graft(model, recipe)[0] for _ in range(2))
    attnzoo.distil(together, settings(), teacher=model, finetune=0, at_once=2)
    attnzoo.distil(parallel, settings(), teacher=model, finetune=0)
    assert not changed(kept(together), parallel)


@pytest.mark.parametrize(
    "how, code", [({"at_once": 0}, "AZ944"), ({"at_once": -1}, "AZ944"), ({"at_once": 1, "ce": 1.0}, "AZ928")]
)
def test_parts_that_cannot_be_are_refused(how, code):
    with pytest.raises(ZooError, match=code):
        attnzoo.distil(attnzoo.graft(donor(), ELU)[0], settings(), **how)


@pytest.mark.parametrize("extra", [{"mse": 1.0}, {"ce": 1.0}])
def test_more_losses_give_other_weights(extra):
    plain, other = (attnzoo.graft(donor(), ELU)[0] for _ in range(2))
    attnzoo.distil(plain, settings(), finetune=0)
    attnzoo.distil(other, settings(), finetune=0, **extra)
    assert {name.split(".")[2] for name in changed(kept(plain), other)} == {"attn"}


def test_what_was_there_is_there_again():
    """Modes, gradients, hooks and random states; after an exception too."""
    digits()  # scikit-learn draws a number when it is imported
    made, _ = attnzoo.graft(donor(), ELU)
    made.head.weight.requires_grad_(False)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    def stop(event):
        if event["event"] == "step" and event["step"] == 3:
            raise KeyboardInterrupt

    for report in None, stop:
        before = made.head.weight.clone()
        try:
            attnzoo.distil(made, settings(), finetune=1, report=report)
        except KeyboardInterrupt:
            assert report is stop
        assert not made.training and not made.head.weight.requires_grad and made.head.bias.requires_grad
        assert torch.equal(made.head.weight, before) and made.head.bias.grad is None
        assert all(not module._forward_hooks for module in made.modules())
        assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
        assert torch.equal(states[2], torch.get_rng_state())


@pytest.mark.parametrize("first, rates", [(1, [0.003, 0.0003]), (0, [0.003])])
def test_learning_rates(first, rates, monkeypatch):
    seen, make = [], distillation.make_optimizer
    monkeypatch.setattr(
        distillation, "make_optimizer", lambda model, chosen: seen.append(chosen.lr) or make(model, chosen)
    )
    made, _ = attnzoo.graft(donor(), ELU)
    attnzoo.distil(made, settings(), teacher=donor(), first=first, finetune=1)
    assert seen == pytest.approx(rates)


def test_a_teacher_keeps_its_mode():
    made, _ = attnzoo.graft(donor(), ELU)
    teacher = donor(drop_rate=0.5).train()
    found = attnzoo.distil(made, settings(), teacher=teacher, finetune=0)
    assert teacher.training and teacher.blocks[0].training
    again, _ = attnzoo.graft(donor(), ELU)
    assert attnzoo.distil(again, settings(), teacher=teacher.eval(), finetune=0).stages == found.stages


def test_what_is_told():
    made, _ = attnzoo.graft(donor(), ELU)
    events = []
    attnzoo.distil(made, settings(epochs=2), finetune=0, report=events.append)
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == 2 * 4 and [event["epoch"] for event in steps] == [1] * 4 + [2] * 4
    assert steps[-1]["step"] == steps[-1]["steps"] == 8 and steps[-1]["left"] == 0
    assert steps[-1]["train_loss"] < steps[0]["train_loss"]
    assert [event["text"][:6] for event in events if event["event"] == "note"] == ["graft:", "distil"]


def test_block_outputs():
    model = donor()
    x = torch.randn(2, 3, 32, 32)
    with block_outputs(model) as seen:
        out = model(x)
    assert [tuple(one.shape) for one in seen] == [(2, 5, 32)] * 2
    assert torch.equal(model.forward_head(model.norm(seen[-1])), out)
    model(x)
    assert len(seen) == 2


@pytest.mark.parametrize(
    "made, said, code, text",
    [
        (lambda: donor(), {}, "AZ942", "is no graft"),
        (lambda: attnzoo.graft(donor(), {**ELU, "attention": "softmax"})[0], {}, "AZ944", "no block"),
        (
            lambda: attnzoo.graft(donor(num_classes=3), ELU)[0],
            {},
            "AZ944",
            "has 10 classes in 3 channels, the graft 3",
        ),
        (lambda: attnzoo.graft(donor(), ELU)[0], {"data": "digit"}, "AZ701", "digit"),
        (lambda: attnzoo.graft(donor(), ELU)[0], {"optimizer": {"use": "adamv"}}, "AZ806", "adamv"),
    ],
)
def test_what_is_refused(made, said, code, text):
    with pytest.raises(ZooError, match=text) as error:
        attnzoo.distil(made(), settings(**said))
    assert error.value.code == code and error.value.diagnostics[0].help


def test_a_loss_that_is_not_finite():
    made, _ = attnzoo.graft(donor(), ELU)
    with torch.no_grad():
        made.blocks[0].attn.proj.weight[0, 0] = float("nan")
    with pytest.raises(ZooError, match="step 1 is not finite") as error:
        attnzoo.distil(made, settings(), teacher=donor())
    assert error.value.code == "AZ945" and all(p.requires_grad for p in made.parameters())


@pytest.mark.slow
def test_elu_linear_recovers_a_vit_trained_on_digits(tmp_path):
    """FAR's claim, in small: what a linear attention has learnt of a ViT's blocks is worth its accuracy."""
    edits = ["train.epochs=30", "train.schedule={use: cosine, warmup: 2}"]
    loaded, how = prepare("digits_softmax", edits)
    train(loaded, how, tmp_path / "teacher")
    teacher = open_run(tmp_path / "teacher").model("best")
    made, _ = attnzoo.graft(tmp_path / "teacher", "digits_elu_linear")
    found = attnzoo.distil(made, Settings(**FAR, data="digits"), teacher=teacher, finetune=10)
    graft, distilled, tuned = found.stages
    assert found.donor > 0.9 and graft.accuracy < 0.75 * found.donor
    assert min(distilled.cosines) > 0.95 > min(graft.cosines)
    assert distilled.accuracy > graft.accuracy and found.recovered >= 0.95
