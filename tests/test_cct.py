"""The Compact Convolutional Transformer: an independent oracle, its options, and what timm asks of a model."""

import copy
import pickle
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torchvision.models.feature_extraction import create_feature_extractor

import attnzoo
from attnzoo.bench.composition import describe
from attnzoo.core import watch
from attnzoo.errors import ZooError
from attnzoo.hosts.compact_transformer import (
    BASES,
    CompactTransformer,
    SequencePool,
    checkpoint_filter_fn,
    sine_positions,
)
from attnzoo.recipe import compose_file
from attnzoo.recipe.weights import init_model

NAME = "cct_7_3x1_32_c100"
TINY = {"img_size": 16, "embed_dim": 32, "depth": 3, "num_classes": 10}
"""8 × 8 tokens; everything else as in CCT-7/3x1."""
HAM = "attention={fuse: hadamard, of: [softmax, {use: soft, with: {variant: pooled}}]}"
EDITS = {
    "softmax": [],
    "conv front": ["host.model.n_conv_blocks=1"],
    "sine": ["host.model.pos_embed=sine"],
    "two convolutions": ["host.model.n_conv_layers=2", "host.model.kernel_size=5"],
    "ham": [HAM],
    "neighborhood": ["attention={use: neighborhood, with: {window: 3}}"],
    "elu_linear": ["attention=elu_linear"],
}


@cache
def made(kind: str = "softmax") -> CompactTransformer:
    """A small model in eval mode, its running means moved off their start; shared, so never change it."""
    torch.manual_seed(0)
    edits = [*EDITS[kind], *(f"host.model.{key}={value}" for key, value in TINY.items())]
    model = attnzoo.compose("cct_7_3x1", edits=edits).train()
    with torch.no_grad():
        for _ in range(3):
            model(image(batch=8))
    return model.eval()


def image(batch: int = 2, side: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def params(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def oracle(state: dict[str, torch.Tensor], x: torch.Tensor, heads: int) -> torch.Tensor:
    """The equations, from the weights alone, one head after the other."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def attend(x, name):
        q, k, v = linear(x, f"{name}.qkv").chunk(3, dim=-1)
        d = q.shape[-1] // heads
        out = []
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            scores = q[..., own] @ k[..., own].transpose(1, 2) / d**0.5
            out.append(scores.softmax(-1) @ v[..., own])
        return linear(torch.cat(out, -1), f"{name}.proj")

    def convolve(x, name):
        side = round(x.shape[1] ** 0.5)
        y = F.conv2d(
            x.transpose(1, 2).reshape(len(x), -1, side, side), state[f"{name}.conv.weight"], padding=1
        )
        mean, variance, gain, bias = (
            state[f"{name}.bn.{key}"][:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        y = (y - mean) / (variance + 1e-5).sqrt() * gain + bias
        return y.relu().flatten(2).transpose(1, 2)

    layers = [key for key in state if key.startswith("tokenizer")]
    for key in layers:
        k = state[key].shape[-1]
        x = F.conv2d(x, state[key], stride=max(1, k // 2 - 1), padding=k // 2).relu()
        x = F.max_pool2d(x, 3, 2, 1)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    for i in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks"))):
        block = f"blocks.{i}"
        if f"{block}.conv.conv.weight" in state:
            x = x + convolve(x, f"{block}.conv")
            continue
        x = x + attend(norm(x, f"{block}.norm1"), f"{block}.attn")
        x = norm(x, f"{block}.norm2")
        x = x + linear(F.gelu(linear(x, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    x = norm(x, "norm")
    x = (linear(x, "pool.score").softmax(1).transpose(1, 2) @ x)[:, 0]
    return linear(x, "head")


@pytest.mark.parametrize("kind", ["softmax", "conv front", "sine", "two convolutions"])
def test_equals_the_equations(kind):
    model, x = copy.deepcopy(made(kind)).double(), image().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        assert torch.allclose(model(x), oracle(model.state_dict(), x, heads=4), rtol=0, atol=1e-10)


def test_parameters():
    model = timm.create_model(NAME)
    assert params(model) == 3_783_269
    assert params(attnzoo.compose("cct_7_3x1_many_heads")) == 3_783_269
    block = 256 * 256 * 4 + 256 + 2 * 512 + 2 * 256 * 512 + 512 + 256
    assert params(attnzoo.compose("cct_conv_front")) == 3_783_269 + 2 * (9 * 256 * 256 + 512 - block)
    published = {"cct_2_3x2": 0.28e6, "cct_4_3x2": 0.48e6, "cct_6_3x1": 3.17e6, "cct_7_3x1": 3.76e6}
    for base in BASES:
        with torch.device("meta"):
            assert params(CompactTransformer(**BASES[base], num_classes=10)) == pytest.approx(
                published[base], rel=0.03
            )


def test_initialisation_and_rates():
    model = timm.create_model(NAME)
    assert model.pos_embed.std().item() == pytest.approx(0.2, rel=0.02)
    assert model.blocks[3].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.tokenizer[0][0].weight.std().item() == pytest.approx((2 / 27) ** 0.5, rel=0.05)
    assert model.blocks[0].attn.qkv.bias is None and not model.blocks[0].attn.proj.bias.any()
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.1 * i / 6 for i in range(7)])
    assert {block.attn.inner.attn_drop for block in model.blocks} == {0.1}
    assert (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]) == (
        (0.5071, 0.4867, 0.4408),
        (0.2675, 0.2565, 0.2761),
    )


def test_normal_initialisation():
    model = attnzoo.compose("cct_7_3x1", edits=["host.init=normal", HAM])
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.tokenizer[0][0].weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_softmax_at_all_sites_is_the_plain_model():
    torch.manual_seed(2)
    plain = CompactTransformer(**TINY).eval()
    model = copy.deepcopy(made())
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model(image()), plain(image()))


def test_sequence_pooling():
    x = torch.randn(2, 9, 8)
    pool = SequencePool(8)
    assert torch.allclose(pool.weights(x).sum(1), torch.ones(2, 1))
    shuffled = x[:, torch.randperm(9)]
    assert torch.allclose(pool(x), pool(shuffled), atol=1e-6)
    torch.nn.init.zeros_(pool.score.weight)
    assert torch.allclose(pool(x), x.mean(1), atol=1e-6)
    torch.nn.init.constant_(pool.score.weight, 1e4)
    assert torch.allclose(pool(x), x[torch.arange(2), x.sum(-1).argmax(1)])


def test_sine_positions():
    table = sine_positions(5, 6)
    assert table.shape == (1, 5, 6)
    assert table[0, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert table[0, 3, 2].item() == pytest.approx(torch.tensor(3 / 10_000 ** (2 / 6)).sin().item())
    assert table[0, 3, 3].item() == pytest.approx(torch.tensor(3 / 10_000 ** (2 / 6)).cos().item())
    model = made("sine")
    assert "pos_embed" in model.state_dict() and "pos_embed" not in dict(model.named_parameters())


def test_tokens():
    """The grid is what the tokenizer gives, also for images that are not square and sides that are not even."""
    for size, layers, kernel, grid in [
        (32, 1, 3, (16, 16)),
        ((9, 14), 1, 3, (5, 7)),
        ((33, 20), 2, 7, (3, 2)),
    ]:
        model = CompactTransformer(size, embed_dim=16, depth=1, n_conv_layers=layers, kernel_size=kernel)
        rows, columns = model.tokenizer.img_size
        assert model.layout.grid == grid
        assert model.embed(torch.randn(1, 3, rows, columns)).shape == (1, model.layout.length, 16)
    with pytest.raises(AssertionError, match="rows"):
        made()(image(side=8))


def test_conv_front():
    model = made("conv front")
    assert [type(block).__name__ for block in model.blocks] == ["ConvBlock", "CompactBlock", "CompactBlock"]
    x = model.embed(image())
    assert model.blocks[0](x).shape == x.shape
    wide = copy.deepcopy(model.blocks[0])
    with torch.no_grad():
        wide.conv.conv.weight.zero_()
        wide.conv.conv.weight[:, :, 1, 1] = torch.eye(32)
        wide.conv.bn.running_mean.zero_()
        wide.conv.bn.running_var.fill_(1)
        assert torch.allclose(wide(x), x + x.relu(), atol=1e-4)


def test_no_conv_front_changes_nothing():
    torch.manual_seed(3)
    zero = CompactTransformer(**TINY, n_conv_blocks=0).eval()
    torch.manual_seed(3)
    assert torch.equal(CompactTransformer(**TINY).eval()(image()), zero(image()))
    for blocks in (-1, 3, 4):
        with pytest.raises(ValueError, match="must attend"):
            CompactTransformer(**TINY, n_conv_blocks=blocks)


def test_sites_begin_after_the_conv_front():
    composition = compose_file("cct_conv_front")
    assert list(composition.plans) == [f"blocks.{i}" for i in range(2, 7)]
    report = describe(composition)
    assert (report.family, report.depth, report.sites, report.grid, report.prefix) == (
        "CCT",
        7,
        5,
        (16, 16),
        0,
    )
    assert report.params == report.base_params and report.flops == report.base_flops and report.starts_equal
    with pytest.raises(ZooError, match="matches no site") as error:
        compose_file("cct_conv_front", ["overrides=[{at: blocks.1, put: softmax}]"])
    assert "the sites are blocks.2 to blocks.6" in error.value.diagnostics[0].help


def test_positions_are_resized_at_load():
    state = CompactTransformer(**TINY | {"img_size": 24}).state_dict()
    assert checkpoint_filter_fn(state, made())["pos_embed"].shape == (1, 64, 32)
    overlay = {"state_dict": state, "num_classes": 10}
    model = timm.create_model(NAME, **TINY, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])


def test_a_fused_model_takes_the_plain_ones_weights(tmp_path):
    file = tmp_path / "plain.safetensors"
    save_file(made().state_dict(), file)
    start = HAM.replace("hadamard,", "hadamard, with: {start: identity},")
    model = attnzoo.compose("cct_7_3x1", edits=[start], **TINY).eval()
    ledger = init_model(model, file)
    assert ledger["copied"] == len(made().state_dict()) and all(
        ".attn.inner." in name for name in ledger["new"]
    )
    assert torch.equal(model(image()), made()(image()))


@pytest.mark.parametrize("kind", EDITS)
class TestEveryKind:
    def test_all_parameters_get_finite_gradients(self, kind):
        model = copy.deepcopy(made(kind)).train()
        model(image(batch=4)).square().mean().backward()
        faulty = [
            path
            for path, p in model.named_parameters()
            if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
        ]
        assert [path for path in faulty if path != "pool.score.bias"] == []  # a softmax knows no common shift

    def test_gradient_checkpointing_changes_nothing(self, kind):
        one, two = copy.deepcopy(made(kind)), copy.deepcopy(made(kind))
        two.set_grad_checkpointing()
        for model in (one, two):
            model(image()).sum().backward()
        assert torch.equal(one(image()), two(image()))
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-6)

    def test_features(self, kind):
        model, x = made(kind), image()
        with torch.no_grad():
            final, inner = model.forward_intermediates(x)
            assert torch.equal(final, model.forward_features(x))
            assert torch.equal(model.forward_head(final), model(x))
            rows, columns = model.layout.grid
            assert [tuple(m.shape) for m in inner] == [(2, 32, rows, columns)] * 3
            (tokens,) = model.forward_intermediates(x, [1], norm=True, output_fmt="NLC", stop_early=True,
                                                    intermediates_only=True)  # fmt: skip
            assert torch.equal(tokens, model.norm(inner[1].flatten(2).transpose(1, 2)))
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1] and len(pruned.blocks) == 2
        assert torch.equal(pruned(x), inner[1].flatten(2).transpose(1, 2))

    def test_weight_decay_and_layer_groups(self, kind):
        model = made(kind)
        spared, names = model.no_weight_decay(), {path for path, _ in model.named_parameters()}
        assert "pos_embed" in spared and spared - {"pos_embed"} <= names
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.9)
        undecayed = {
            id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]
        }
        assert all(id(p) in undecayed for path, p in model.named_parameters() if path in spared)
        assert len({group["lr_scale"] for group in optimizer.param_groups}) > len(model.blocks)

    def test_copies(self, kind, tmp_path):
        model, x = made(kind), image()
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)  # noqa: S301 - our own bytes
        save_for_hf(model, str(tmp_path), safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize(
    "kind",
    [
        "softmax",
        "conv front",
        pytest.param("ham", marks=pytest.mark.slow),
        pytest.param("neighborhood", marks=pytest.mark.slow),
        pytest.param("elu_linear", marks=pytest.mark.slow),
    ],
)
@pytest.mark.sample(3)
def test_compile_and_export(kind):
    model, x = made(kind), image()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
        assert torch.allclose(program(image(batch=3)), model(image(batch=3)), atol=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "conv front", "ham"])
def test_fx(kind):
    graph = create_feature_extractor(made(kind), return_nodes={"head": "out"})
    assert torch.allclose(graph(image())["out"], made(kind)(image()), atol=1e-6)


def test_features_only():
    model = timm.create_model(NAME, **TINY, features_only=True, out_indices=(-2, -1)).eval()
    assert [tuple(m.shape) for m in model(image())] == [(2, 32, 8, 8)] * 2
    assert model.feature_info.channels() == [32, 32] and model.feature_info.reduction() == [2, 2]


def test_classifier():
    model, x = copy.deepcopy(made()), image()
    assert model.get_classifier().out_features == 10
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 64, 32)
    model.reset_classifier(3, "seq")
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match="pooled by `seq`"):
        model.reset_classifier(3, "token")
    assert timm.create_model(NAME, **TINY | {"num_classes": 0})(x).shape == (2, 32)


def test_devices_and_types():
    with torch.device("meta"):
        assert all(p.is_meta for p in timm.create_model(NAME).parameters())
    assert timm.create_model(NAME, device="meta")(torch.empty(1, 3, 32, 32, device="meta")).is_meta
    model = timm.create_model(NAME, **TINY, device="cpu", dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(image().bfloat16()).isfinite().all()


def test_weights_can_be_watched():
    seen = {}
    with torch.no_grad(), watch(made(), "weights", lambda path, t: seen.update({path: t})):
        out = made()(image())
    assert [tuple(t.shape) for t in seen.values()] == [(2, 4, 64, 64)] * 3
    assert torch.allclose(out, made()(image()), atol=1e-5)


def test_what_cannot_be_had():
    with pytest.raises(ZooError, match="no published weights") as error:
        timm.create_model(NAME, pretrained=True)
    assert error.value.code == "AZ306" and "timm.create_model" not in error.value.diagnostics[0].help
    with pytest.raises(ZooError, match="nmu_heads") as error:
        timm.create_model(NAME, nmu_heads=3)
    assert error.value.code == "AZ309"
