"""A finished model made faster on a CPU gives what it gave."""

import copy
import json
import pickle
import threading

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import attnzoo
from attnzoo.cli.app import app
from attnzoo.errors import ZooError
from attnzoo.inference import PackedLinear

SEQ = "{extends: transformer, host: {dim: 32, vocab: 13, max_length: 16}}"


def verb(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def vit(recipe: str = "ham_b") -> nn.Module:
    torch.manual_seed(0)
    return attnzoo.compose(recipe).eval()


@pytest.mark.parametrize(
    "recipe", ["ham_classic", "ham_a", "ham_b", "digits_linformer", "digits_agent", "cct_7_3x1"]
)
def test_the_same_to_rounding(recipe):
    model = vit(recipe)
    fast, x = attnzoo.accelerate(model), torch.randn(3, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        wanted = model(x)
    assert torch.allclose(fast(x), wanted, rtol=0, atol=1e-5) and not fast(x).requires_grad
    assert any(isinstance(m, PackedLinear) for m in fast.modules())
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_any_model_of_timm():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
    fast, x = attnzoo.accelerate(model), torch.randn(2, 3, 64, 64)
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert [block.mlp.fc1.gelu for block in fast.blocks] == [True, True]
    assert isinstance(fast.blocks[0].mlp.act, nn.Identity) and isinstance(model.blocks[0].mlp.act, nn.GELU)


def test_translation_models():
    model = attnzoo.compose(SEQ).eval()
    fast, source, target = (
        attnzoo.accelerate(model),
        torch.randint(3, 13, (2, 7)),
        torch.randint(3, 13, (2, 5)),
    )
    assert torch.allclose(fast(source, target), model(source, target), atol=1e-5)


@pytest.mark.parametrize("act", [lambda: nn.GELU("tanh"), nn.ReLU, nn.SiLU], ids=["tanh", "relu", "silu"])
def test_other_activations_stay(act):
    mlp = nn.Sequential(Mlp(8, 16, act_layer=act)).eval()
    fast, x = attnzoo.accelerate(mlp), torch.randn(5, 8)
    assert not fast[0].fc1.gelu and torch.allclose(fast(x), mlp(x), atol=1e-6)


def test_who_looks_between_still_sees_it():
    mlp = nn.Sequential(Mlp(8, 16)).eval()
    seen = []
    mlp[0].fc1.register_forward_hook(lambda module, args, out: seen.append(out))
    fast, x = attnzoo.accelerate(mlp), torch.randn(5, 8)
    assert torch.allclose(fast(x), mlp(x), atol=1e-6)
    assert torch.allclose(seen[0], seen[1], atol=1e-6) and bool((seen[0] < -0.2).any())  # before the GELU


def test_the_state_dict_is_unchanged_and_another_can_be_loaded():
    model, other = vit(), vit()
    fast, x = attnzoo.accelerate(model), torch.randn(2, 3, 32, 32)
    assert all(
        torch.equal(a, b)
        for a, b in zip(fast.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert list(fast.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    before = fast(x)
    fast.load_state_dict(other.state_dict())
    assert torch.allclose(fast(x), other(x), atol=1e-4) and not torch.allclose(fast(x), before, atol=1e-2)


def test_copies_and_files():
    fast, x = attnzoo.accelerate(vit()), torch.randn(2, 3, 32, 32)
    wanted = fast(x)
    assert torch.equal(copy.deepcopy(fast)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(fast))(x), wanted)  # noqa: S301 - our own bytes


def test_the_model_is_left_alone():
    model = vit().train()
    attnzoo.accelerate(model)
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_gradients_and_other_precisions_go_the_usual_way():
    """Captum and others ask for the gradient of the input."""
    model = vit()
    fast, x = attnzoo.accelerate(model), torch.randn(2, 3, 32, 32)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast(one).sum().backward()
    model(other).sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(fast(x).float(), model(x).float(), atol=0.1)
    double = fast.double()
    assert torch.allclose(double(x.double()).float(), model(x), atol=1e-4)


def test_many_threads():
    fast = attnzoo.accelerate(vit())
    xs = [torch.randn(n, 3, 32, 32) for n in (1, 2, 3, 4)]
    wanted, found = [copy.deepcopy(fast)(x) for x in xs], [None] * len(xs)
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, fast(xs[i]))) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))


def test_the_command_line(tmp_path):
    """The verbs that use a finished model take `--accelerate`, and say the same."""
    edits = ["host.model.depth=1", "host.model.embed_dim=16", "host.model.num_heads=2", "train.epochs=1"]
    verb("train", "digits_softmax", "--out", str(tmp_path / "run"), *(w for e in edits for w in ("--set", e)))
    plain, fast = (
        json.loads(verb("eval", str(tmp_path / "run"), "--json", *more)) for more in ([], ["--accelerate"])
    )
    assert fast["accuracy"] == plain["accuracy"] and fast["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    words = "--rounds 2 --batch 2 --accelerate --json"
    figures = json.loads(verb("bench", "digits_softmax", "--against", "digits_softmax", *words.split()))[
        "figures"
    ]
    assert [figure["what"] for figure in figures] == ["eval", "memory in eval"]
    assert figures[1]["ratio"] > 1  # the packed weights stand beside the plain ones


def test_no_tokens():
    fast = attnzoo.accelerate(nn.Sequential(nn.Linear(4, 3)))
    assert fast(torch.zeros(2, 0, 4)).shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Linear(2, 2).double(), "float64"),
        (lambda: nn.Linear(2, 2, device="meta"), "meta"),
        (lambda: nn.Conv2d(1, 1, 1), "no `nn.Linear`"),
        (lambda: attnzoo.accelerate(nn.Linear(2, 2)), "already"),
    ],
)
def test_refusals(model, words):
    with pytest.raises(ZooError, match=words) as caught:
        attnzoo.accelerate(model())
    assert caught.value.code == "AZ413" and caught.value.diagnostics[0].help


def test_wrong_copies_would_be_seen():
    """What the comparisons above must see: a stale packed weight, a forgotten bias, a GELU too many."""
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    fast = attnzoo.accelerate(layer)
    stale = fast(x)
    fast.load_state_dict(nn.Linear(4, 3).state_dict())
    assert not torch.allclose(fast(x), stale, atol=1e-3)
    fast.gelu = True
    assert torch.allclose(fast(x), F.gelu(F.linear(x, fast.weight, fast.bias)), atol=1e-6)
