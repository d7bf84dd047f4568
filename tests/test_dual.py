"""The backbone with two streams: an independent oracle, the five second streams, and what timm asks of a model."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_recipe_errors import agree, faults_of, marked
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from torchvision.models.feature_extraction import create_feature_extractor
from typer.testing import CliRunner

import attnzoo
from attnzoo.bench.composition import describe
from attnzoo.cli.app import app
from attnzoo.core import Layout, watch
from attnzoo.errors import MissingMap, ZooError
from attnzoo.hosts.dual import DualBlock, DualTransformer, checkpoint_filter_fn
from attnzoo.hosts.given import stand_ins
from attnzoo.recipe import compose_file
from attnzoo.recipe.weights import init_model
from attnzoo.train import train
from attnzoo.train.settings import prepare

STREAMS = {
    "scale": "{stream: scale, patch_size: 8}",
    "pair": "{stream: pair}",
    "features": "{stream: features, n_conv_layers: 2}",
    "tokens": "{stream: tokens, count: 5}",
    "given map": "{stream: given, name: marks, channels: 3, size: [2, 4]}",
    "given tokens": "{stream: given, channels: 6, size: 5}",
}
EMPTY = {"all": [], "a reads": ["b.*.cross"], "b reads": ["a.*.cross"], "a dictionary": ["b.*"], "here and there": [
    "a.0.self", "b.0.*", "b.1.self", "a.1.cross"]}  # fmt: skip
"""Sites that are left empty."""
KINDS = pytest.mark.parametrize("kind", STREAMS)


def recipe(
    kind: str = "scale", empty: list[str] = EMPTY["all"], more: str = "", attention: str = "softmax"
) -> str:
    """Images of 16 × 8 pixels in 4 × 2 patches for stream a."""
    puts = ", ".join(f"{{at: '{site}', put: null}}" for site in empty)
    return f"""
recipe: 1
host:
  kind: dual
  base: dual_tiny_patch4_32
  model: {{img_size: [16, 8], patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, num_classes: 5,
          b: {STREAMS[kind]}{more}}}
attention: {attention}
overrides: [{puts}]
"""


@cache
def made(
    kind: str = "scale", empty: str = "all", more: str = ", init_values: 0.5", attention: str = "softmax"
):
    """A model in eval mode, its parameters moved off their start; shared, so never change it."""
    torch.manual_seed(0)
    model = attnzoo.compose(recipe(kind, EMPTY[empty], more, attention)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return model


def images(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 8, generator=torch.Generator().manual_seed(1))


def given(model, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model takes beside images, random."""
    chance = torch.Generator().manual_seed(2)
    shapes = getattr(model, "inputs", {}) or getattr(getattr(model, "model", None), "inputs", {})
    return {name: torch.randn(len(x), *shape, generator=chance).to(x) for name, shape in shapes.items()}


def oracle(state: dict[str, torch.Tensor], x: torch.Tensor, more: dict[str, torch.Tensor], *, heads: int = 2,
           paired: bool | None = None, pool: str = "token") -> torch.Tensor:  # fmt: skip
    """The equations, from the weights alone, one sample, one head after the other.

    Args:
        state: The weights.
        x: Images.
        more: What is handed over with them.
        heads: Of every attention.
        paired: Whether stream b is the image before in the batch; None when it is another stream.
        pool: `token` or `avg`.
    """

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def attend(q, k, v, name):
        d = q.shape[-1] // heads
        out = []
        for own in (slice(h * d, (h + 1) * d) for h in range(heads)):
            out.append(torch.softmax(q[:, own] @ k[:, own].T / d**0.5, -1) @ v[:, own])
        return linear(torch.cat(out, -1), f"{name}.proj")

    def embed(image, name, i):
        if f"{name}.tokens" in state:
            return state[f"{name}.tokens"][0], 0
        if f"{name}.proj.weight" in state:
            (values,) = more.values()
            tokens = linear(values[i] if values.ndim == 3 else values[i].flatten(1).T, f"{name}.proj")
        elif f"{name}.patch_embed.proj.weight" in state:
            weight = state[f"{name}.patch_embed.proj.weight"]
            p = weight.shape[-1]
            rows, columns = image.shape[1] // p, image.shape[2] // p
            cut = [
                image[:, p * r : p * r + p, p * c : p * c + p] for r in range(rows) for c in range(columns)
            ]
            tokens = (
                torch.stack(cut).flatten(1) @ weight.flatten(1).T + state[f"{name}.patch_embed.proj.bias"]
            )
        else:
            layers = sorted(key for key in state if key.startswith(f"{name}.stem"))
            for key in layers:
                image = F.max_pool2d(F.conv2d(image[None], state[key], padding=1).relu(), 3, 2, 1)[0]
            tokens = image.flatten(1).T
        prefix = state[f"{name}.cls_token"][0] if f"{name}.cls_token" in state else tokens[:0]
        return torch.cat([prefix, tokens]) + state[f"{name}.pos_embed"][0], len(prefix)

    def alone(x, i, s):
        """Self-attention."""
        name = f"blocks.{i}.{s}"
        if f"{name}.attn.qkv.weight" not in state:
            return x
        own = norm(x, f"{name}.norm1")
        q, k, v = linear(own, f"{name}.attn.qkv").chunk(3, -1)
        return x + state[f"{name}.ls1.gamma"] * attend(q, k, v, f"{name}.attn")

    def read(x, other, i, s, t):
        """Attention of stream s to stream t."""
        name = f"blocks.{i}.{s}"
        if f"{name}.cross.q.weight" not in state:
            return x
        q = linear(norm(x, f"{name}.norm_cross"), f"{name}.cross.q")
        k, v = linear(norm(other, f"blocks.{i}.{t}.norm_cross"), f"{name}.cross.kv").chunk(2, -1)
        return x + state[f"{name}.ls_cross.gamma"] * attend(q, k, v, f"{name}.cross")

    def think(x, i, s):
        name = f"blocks.{i}.{s}"
        if f"{name}.mlp.fc1.weight" not in state:
            return x
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        return x + state[f"{name}.ls2.gamma"] * linear(hidden, f"{name}.mlp.fc2")

    def pooled(x, prefix):
        return x[0] if pool == "token" and prefix else x[prefix:].mean(0)

    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks"))
    other = "b" if paired is None else "a"
    out = []
    for i in range(len(x)):
        a, p = embed(x[i], "a", i)
        b, r = (None, 0) if paired is False else embed(x[i] if paired is None else x[i - 1], other, i)
        for j in range(depth):
            a = alone(a, j, "a")
            if b is not None:
                b = alone(b, j, other)
                a, b = read(a, b, j, "a", other), read(b, a, j, "b", "a") if paired is None else b
                b = think(b, j, other)
            a = think(a, j, "a")
        parts = [pooled(norm(a, "norm"), p)]
        if "norm_b.weight" in state:
            parts.append(pooled(norm(b, "norm_b"), r))
        out.append(linear(torch.cat(parts), "head"))
    return torch.stack(out)


# --------------------------------------------------------------------------------------------------------- the equations

POOLED = {"token": ", init_values: 0.5", "avg": ", init_values: 0.5, global_pool: avg"}
AGREES = [(kind, "all", pool) for kind in STREAMS for pool in POOLED]
AGREES += [
    (kind, empty, "token") for kind in ("scale", "features", "tokens") for empty in EMPTY if empty != "all"
]


def deviation(kind: str, empty: str = "all", pool: str = "token", training: bool = False) -> float:
    """How far a model is from the equations, at most, in float64."""
    model = copy.deepcopy(made(kind, empty, POOLED[pool])).double().train(training)
    x = images().double()
    paired = training if kind == "pair" else None
    with torch.no_grad():
        out = model(x, **given(model, x))
        wanted = oracle(model.state_dict(), x, given(model, x), paired=paired, pool=pool)
    assert out.shape == wanted.shape == (3, 5)
    return float((out - wanted).abs().max())


@pytest.mark.parametrize(("kind", "empty", "pool"), AGREES)
def test_equals_the_equations(kind, empty, pool):
    for training in (False, True):
        assert deviation(kind, empty, pool, training) < 1e-10


def b_reads_what_a_became(self, a, b):
    a, b = self.a.attend(a), self.b.attend(b)
    a = self.a.read(a, self.a.norm_cross(a), self.b.norm_cross(b), self.b.layout)
    b = self.b.read(b, self.b.norm_cross(b), self.a.norm_cross(a), self.a.layout)
    return self.a.think(a), self.b.think(b)


def a_reads_what_b_was(self, a, b):
    before = b
    a, b = self.a.attend(a), self.b.attend(b)
    u, v = self.a.norm_cross(a), self.b.norm_cross(b)
    a = self.a.read(a, u, self.b.norm_cross(before), self.b.layout)
    return self.a.think(a), self.b.think(self.b.read(b, v, u, self.a.layout))


def bare(self, a, b):
    """What is read is not normalised."""
    a, b = self.a.attend(a), self.b.attend(b)
    u, v = self.a.norm_cross(a), self.b.norm_cross(b)
    one, other = self.a.read(a, u, b, self.b.layout), self.b.read(b, v, a, self.a.layout)
    return self.a.think(one), self.b.think(other)


def thinks_first(self, a, b):
    a, b = self.a.think(self.a.attend(a)), self.b.think(self.b.attend(b))
    u, v = self.a.norm_cross(a), self.b.norm_cross(b)
    return self.a.read(a, u, v, self.b.layout), self.b.read(b, v, u, self.a.layout)


@pytest.mark.parametrize("wrong", [b_reads_what_a_became, a_reads_what_b_was, bare, thinks_first])
def test_the_oracle_sees_a_wrong_layer(wrong, monkeypatch):
    assert deviation("scale") < 1e-10
    monkeypatch.setattr(DualBlock, "forward", wrong)
    assert deviation("scale") > 1e-3


WRONG_PAIRS = {
    "none": lambda self, x, given: (self.a(x, given), None),
    "itself": lambda self, x, given: (self.a(x, given), self.a(x, given)),
    "the next": lambda self, x, given: (self.a(x, given), self.a(x, given).roll(-1, 0)),
    "in eval too": lambda self, x, given: (self.a(x, given), self.a(x, given).roll(1, 0)),
}


@pytest.mark.parametrize("wrong", WRONG_PAIRS)
def test_the_oracle_sees_wrong_pairs(wrong, monkeypatch):
    monkeypatch.setattr(DualTransformer, "embed", WRONG_PAIRS[wrong])
    assert deviation("pair", training=wrong != "in eval too") > 1e-3


def test_the_oracle_sees_a_wrong_classifier(monkeypatch):
    right = DualTransformer.both

    def swapped(self, a, b):
        out = right(self, a, b)
        return torch.cat([out[:, a.shape[1] :], out[:, : a.shape[1]]], dim=1)

    monkeypatch.setattr(DualTransformer, "both", swapped)
    assert deviation("scale") > 1e-3


# ------------------------------------------------------------------------------------------------------------- the pairs


def test_pairs_are_absent_in_eval():
    """Bit for bit the model that has no pair, no cross-attention and no weights for it."""
    model = made("pair")
    plain = attnzoo.compose(recipe("scale", ["b.*"], ", init_values: 0.5")).eval()
    own = {key: value for key, value in model.state_dict().items() if "cross" not in key}
    lost = plain.load_state_dict(own, strict=False)
    assert not lost.unexpected_keys and all(
        "cross" in key or key.startswith("b.") for key in lost.missing_keys
    )
    for block in plain.blocks:
        block.forward = lambda a, b, block=block: (block.a.think(block.a.attend(a)), b)
    calls = []
    handles = [block.a.cross.register_forward_hook(lambda *_: calls.append(1)) for block in model.blocks]
    with torch.no_grad():
        assert torch.equal(model(images()), plain(images()))
        alone = torch.cat([model(x[None]) for x in images()])
        assert torch.allclose(model(images()), alone, atol=1e-6)
    assert not calls
    for handle in handles:
        handle.remove()


def test_pairs_in_training():
    """Image i reads image i - 1 and no other; alone in its batch it reads nobody."""
    model = copy.deepcopy(made("pair")).train()
    x = images(4).requires_grad_()
    for i in range(4):
        (gradient,) = torch.autograd.grad(model(x)[i].square().sum(), x)
        assert gradient.flatten(1).any(1).nonzero().flatten().tolist() == sorted({i, (i - 1) % 4})
    one = images(1)
    assert torch.equal(model(one), model.eval()(one))


# ----------------------------------------------------------------------------------------------------- the other streams


@KINDS
def test_samples_never_influence_each_other(kind):
    """In training mode too, but for pairs."""
    model = copy.deepcopy(made(kind)).train(kind != "pair")
    x = images(4).requires_grad_()
    more = given(model, x)
    for i in range(4):
        (gradient,) = torch.autograd.grad(model(x, **more)[i].square().sum(), x)
        assert gradient.flatten(1).any(1).nonzero().flatten().tolist() == [i]


@pytest.mark.parametrize("kind", ["given map", "given tokens"])
def test_what_the_caller_gives(kind):
    model, x = made(kind), images()
    more = given(model, x)
    (name, values), *rest = more.items()
    assert name == ("marks" if kind == "given map" else "b") and not rest
    changed = values.clone()
    changed[1] += 1
    moved = (model(x, **{name: changed}) != model(x, **more)).any(1)
    assert moved.tolist() == [False, True, False]
    assert torch.equal(model.forward_head(model.forward_features(x, **more)), model(x, **more))
    for wrong, words in (
        ({}, f"model(images, {name}=...)"),
        ({name: values[:2]}, "(3, "),
        ({name: values[..., :1]}, "has shape"),
        ({name: values[0]}, "has shape"),
        ({name: values.long()}, "features"),
    ):
        for call in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(MissingMap) as error:
                call(x, **wrong)
            assert error.value.code == "AZ409" and words in str(error.value)
    with pytest.raises(TypeError, match="'regions'"):
        model(x, regions=values, **more)
    with pytest.raises(TypeError, match="attn_mask"):
        model(x, attn_mask=values, **more)


def test_stand_ins():
    x = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    same = stand_ins(x, {"b": (3, 2, 2)})["b"]
    assert torch.equal(same, F.avg_pool2d(x, 2))
    tokens = stand_ins(x, {"b": (6, 4)})["b"]
    assert torch.equal(tokens, x.reshape(2, 6, 4, 2).mean(-1))


def test_where_a_stream_is():
    """Every site knows its own layout and that of what it reads."""
    for kind, b in [
        ("scale", Layout((2, 1), 1)), ("features", Layout((4, 2))), ("tokens", Layout((5,))), ("given map", Layout((2, 4))),
        ("given tokens", Layout((5,))),
    ]:  # fmt: skip
        sites, a = compose_file(recipe(kind)).info.sites(), Layout((4, 2), 1)
        assert list(sites) == [f"{s}.{i}.{k}" for i in range(2) for s in "ab" for k in ("self", "cross")]
        for name, site in sites.items():
            own, other = (a, b) if name.startswith("a") else (b, a)
            crossing = name.endswith("cross")
            assert site.layout == own and site.name == name and (site.layer, site.depth) == (int(name[2]), 2)
            assert (site.context_dim, site.context_layout) == ((16, other) if crossing else (None, None))
    assert list(compose_file(recipe("pair")).info.sites()) == [
        "a.0.self",
        "a.0.cross",
        "a.1.self",
        "a.1.cross",
    ]
    seen = []
    model = attnzoo.compose(recipe("features"))
    hook = lambda _m, args, where: seen.append((args[1].shape[1], where["layout"], where["context_layout"]))  # noqa: E731
    model.blocks[1].a.cross.register_forward_pre_hook(hook, with_kwargs=True)
    model.blocks[1].b.cross.register_forward_pre_hook(hook, with_kwargs=True)
    model(images())
    a, b = Layout((4, 2), 1), Layout((4, 2))
    assert seen == [(8, a, b), (9, b, a)]


def test_a_guide_is_made_once_and_read_by_all_layers():
    """MEDUSA: one body, a head in each layer, and all heads see what the body made, which nothing changes."""
    model = attnzoo.compose("dual_medusa").eval()
    made, read = [], []
    model.b.stem.register_forward_hook(lambda _m, _x, out: made.append(out))
    for block in model.blocks:
        block.a.cross.register_forward_pre_hook(lambda _m, args: read.append(args[1]))
    model(torch.randn(2, model.in_chans, *model.img_size))
    assert len(made) == 1 and len(read) == len(model.blocks) > 1
    assert all(torch.equal(guide, read[0]) for guide in read)


FILLED = [(kind, empty) for kind in STREAMS for empty in EMPTY if kind != "pair" or empty == "all"]


@pytest.mark.parametrize(("kind", "empty"), FILLED)
@pytest.mark.sample(4)
def test_nothing_is_there_for_empty_sites(kind, empty):
    """No parameters without a use: every one gets a gradient. A stream that is never changed is read by no classifier."""
    model = copy.deepcopy(made(kind, empty)).train()
    x = images(4)
    model(x, **given(model, x)).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert model.reads_b == (empty != "a dictionary" and kind != "pair")
    assert model.head.in_features == (32 if model.reads_b else 16)
    report = describe(compose_file(recipe(kind, EMPTY[empty], ", init_values: 0.5")))
    assert report.params == report.base_params == sum(p.numel() for p in model.parameters())
    assert report.sites == len(model.sites)


def test_heads_by_layer():
    model = attnzoo.compose(recipe() + "heads: [4, 2]\n")
    found = [
        (part.heads, part.inner.heads)
        for block in model.blocks for stream in (block.a, block.b) for part in (stream.attn, stream.cross)
    ]  # fmt: skip
    assert found == [(4, 4)] * 4 + [(2, 2)] * 4


def test_initialisation_and_rates():
    model = attnzoo.compose("dual_scale", edits=["host.model.embed_dim=128", "host.model.drop_path_rate=0.2"])
    for parameter in (
        model.blocks[0].a.attn.qkv.weight,
        model.a.pos_embed,
        model.b.cls_token,
        model.head.weight,
    ):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.15)
    assert not model.blocks[0].b.cross.kv.bias.any()
    assert model.blocks[0].a.drop_path.__class__.__name__ == "Identity"
    assert model.blocks[1].a.drop_path.drop_prob == model.blocks[1].b.drop_path.drop_prob == 0.2
    normal = attnzoo.compose("dual_features", edits=["host.init=normal"])
    assert normal.b.stem[0][0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    rates = "host.model={attn_drop_rate: 0.1, proj_drop_rate: 0.2, pos_drop_rate: 0.3, drop_rate: 0.4, qkv_bias: false}"
    model = attnzoo.compose("dual_scale", edits=[rates])
    block = model.blocks[1]
    assert {part.inner.attn_drop for s in (block.a, block.b) for part in (s.attn, s.cross)} == {0.1}
    assert {part.proj_drop.p for s in (block.a, block.b) for part in (s.attn, s.cross)} == {0.2}
    assert (model.pos_drop.p, model.head_drop.p, block.b.mlp.drop1.p) == (0.3, 0.4, 0.2)
    assert block.a.cross.kv.bias is None and model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


# ------------------------------------------------------------------------------------------------------------------ timm


@KINDS
class TestEveryStream:
    def test_gradient_checkpointing_changes_nothing(self, kind):
        one, two, x = copy.deepcopy(made(kind)).train(), copy.deepcopy(made(kind)).train(), images()
        two.set_grad_checkpointing()
        for model in (one, two):
            model(x, **given(model, x)).sum().backward()
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-6)

    def test_features(self, kind):
        model, x = made(kind), images()
        more = given(model, x)
        with torch.no_grad():
            final, inner = model.forward_intermediates(x, **more)
            assert torch.equal(final, model.forward_features(x, **more))
            assert torch.equal(model.forward_head(final), model(x, **more))
            assert [tuple(m.shape) for m in inner] == [(3, 16, 4, 2)] * 2
            (tokens,) = model.forward_intermediates(
                x, [1], norm=True, output_fmt="NLC", intermediates_only=True, **more
            )
            assert torch.equal(tokens, final[:, 1:9])
            (early,) = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True, **more)
            assert torch.equal(early, inner[0])
            wrapped = attnzoo.compose(
                recipe(kind, more=", init_values: 0.5"), features_only=True, out_indices=(0, 1)
            ).eval()
            wrapped.model.load_state_dict(model.state_dict(), strict=False)
            out = wrapped(x, **more)
            assert all(torch.equal(one, other) for one, other in zip(out, inner, strict=True))
            assert wrapped.feature_info.channels() == [16, 16] and wrapped.feature_info.reduction() == [4, 4]

    def test_weight_decay_and_layer_groups(self, kind):
        model = made(kind)
        spared, names = model.no_weight_decay(), {path for path, _ in model.named_parameters()}
        assert {"a.pos_embed", "a.cls_token"} <= spared <= names
        assert all(
            name in spared
            for name in names
            if name.startswith("b.") and name.endswith(("_embed", "token", "tokens"))
        )
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
        undecayed = {
            id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]
        }
        assert all(id(p) in undecayed for path, p in model.named_parameters() if path in spared)
        scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
        by_part = [model.a.pos_embed, *(block.b and block.b.attn.qkv.weight for block in model.blocks)]
        by_part = [scale[id(p)] for p in by_part if p is not None]
        assert (
            by_part == sorted(set(by_part))
            and scale[id(model.norm.weight)] == scale[id(model.head.weight)] / 2
        )

    def test_copies(self, kind, tmp_path):
        model, x = made(kind), images()
        more = given(model, x)
        expected = model(x, **more)
        assert torch.equal(copy.deepcopy(model)(x, **more), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x, **more), expected)  # noqa: S301 - our own bytes
        save_for_hf(model, str(tmp_path), safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(again(x, **more), expected)

    def test_threads(self, kind):
        """Many at once, with other batches: each as if alone."""
        model = made(kind)
        batches = [images(i) for i in (1, 2, 3, 4)] * 4
        with torch.no_grad(), ThreadPoolExecutor(4) as pool:
            alone = [model(x, **given(model, x)) for x in batches]
            together = list(pool.map(lambda x: torch.no_grad()(model)(x, **given(model, x)), batches))
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))

    @pytest.mark.sample(4)
    def test_export(self, kind):
        model, x = made(kind), images()
        more = given(model, x)
        with torch.no_grad():
            batch = torch.export.Dim("batch", min=1, max=64)
            shapes = {name: {0: batch} for name in ("x", *more)}
            program = torch.export.export(model, (x,), more, dynamic_shapes=shapes).module()
            x = images(5)
            more = given(model, x)
            assert torch.allclose(program(x, **more), model(x, **more), atol=1e-5)

    @pytest.mark.sample(3)
    def test_fx(self, kind):
        model, x = made(kind), images()
        graph = create_feature_extractor(model, return_nodes={"head": "out"})
        assert torch.allclose(graph(x, **given(model, x))["out"], model(x, **given(model, x)), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        ("scale", False),
        ("pair", True),
        pytest.param("given map", True, marks=pytest.mark.slow),
        pytest.param("scale", True, marks=pytest.mark.slow),
        pytest.param("pair", False, marks=pytest.mark.slow),
        pytest.param("given map", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.sample(3)
def test_compile(kind, training):
    model, x = copy.deepcopy(made(kind)).train(training), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        assert torch.allclose(compiled(x, **given(model, x)), model(x, **given(model, x)), atol=1e-5)


def test_classifier():
    model, x = copy.deepcopy(made()), images()
    assert model.get_classifier().in_features == model.head_hidden_size == 32 and model.num_features == 16
    model.reset_classifier(7)
    assert model(x).shape == (3, 7)
    model.reset_classifier(0)
    features = model.forward_features(x)
    assert features.shape == (3, 9 + 3, 16)
    assert torch.equal(model(x), torch.cat([features[:, 0], features[:, 9]], 1))
    model.reset_classifier(0, "avg")
    assert torch.equal(model(x), torch.cat([features[:, 1:9].mean(1), features[:, 10:].mean(1)], 1))
    assert torch.equal(model(x), model.forward_head(features, pre_logits=True))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(3, "token")
    assert model(x).shape == (3, 3)
    with pytest.raises(ValueError, match="pooled by `token` or `avg`"):
        model.reset_classifier(3, "map")
    bare = attnzoo.compose(recipe(more=", class_token: false"))
    assert bare.global_pool == "avg" and bare.forward_features(x).shape == (3, 8 + 2, 16)
    with pytest.raises(ValueError, match="needs the class token"):
        bare.reset_classifier(3, "token")


def test_pruned():
    model, x = copy.deepcopy(made()), images()
    inner = model.forward_intermediates(x, intermediates_only=True)
    assert model.prune_intermediate_layers([0], prune_norm=True) == [0] and len(model.blocks) == 1
    assert torch.equal(model.a.layout.to_grid(model(x)[:, 1:]), inner[0])


def test_positions_are_resized_at_load():
    small, large = (attnzoo.compose(recipe().replace("[16, 8]", side)) for side in ("16", "32"))
    state = checkpoint_filter_fn(small.state_dict(), large)
    assert state["a.pos_embed"].shape == (1, 65, 16) and state["b.pos_embed"].shape == (1, 17, 16)
    assert torch.equal(state["b.pos_embed"][:, 0], small.b.pos_embed[:, 0])
    large.load_state_dict(state)
    tokens = attnzoo.compose(recipe("tokens"))
    assert checkpoint_filter_fn(tokens.state_dict(), tokens).keys() == tokens.state_dict().keys()


def test_a_fused_model_takes_the_plain_ones_weights(tmp_path):
    file = tmp_path / "plain.safetensors"
    save_file(made().state_dict(), file)
    start = "{fuse: add, with: {start: identity}, of: [softmax, elu_linear]}"
    model = attnzoo.compose(recipe(more=", init_values: 0.5", attention=start)).eval()
    ledger = init_model(model, file)
    assert ledger["copied"] == len(made().state_dict()) and len(ledger["new"]) == 8
    assert all(".fusion." in name for name in ledger["new"])
    assert torch.equal(model(images()), made()(images()))


def test_devices_and_types():
    model = attnzoo.compose("dual_scale", device="cpu", dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(2, 3, 32, 32).bfloat16()).isfinite().all()
    assert attnzoo.compose("dual_scale", device="meta")(torch.empty(1, 3, 32, 32, device="meta")).is_meta
    with pytest.raises(ZooError, match="no published weights"):
        attnzoo.compose("dual_scale", pretrained=True)
    assert timm.create_model("attnzoo_dual", recipe="dual_scale", num_classes=7)(
        torch.randn(1, 3, 32, 32)
    ).shape == (1, 7)


def test_weights_can_be_watched():
    seen = {}
    with torch.no_grad(), watch(made(), "weights", lambda path, t: seen.update({path: tuple(t.shape)})):
        made()(images())
    block = {"a.attn": (9, 9), "b.attn": (3, 3), "a.cross": (9, 3), "b.cross": (3, 9)}
    assert seen == {
        f"blocks.{i}.{part}.inner.weights": (3, 2, *shape) for i in range(2) for part, shape in block.items()
    }


# -------------------------------------------------------------------------------------------------------------- refusals


def dual(model: str = "", rest: str = "") -> str:
    """A recipe on images of 32 × 32 pixels, four layers, width 64."""
    return f"recipe: 1\nhost: {{kind: dual, base: dual_tiny_patch4_32, model: {model or '{}'}}}\nattention: softmax\n{rest}"


def puts(*entries: str, b: str = "{stream: tokens, count: 4}") -> str:
    """The same with these overrides."""
    return dual(f"{{b: {b}}}", f"overrides: [{', '.join(entries)}]\n")


REFUSED = {
    "stream unknown": (dual("{b: {stream: ⟦piar}}"), "AZ113 did you mean `pair`?"),
    "stream unknown, with a key": (dual("{b: {stream: ⟦scales, patch_size: 8}}"), "AZ113 `pair`, `features`, `tokens` or `given`"),
    "stream missing": (dual("{⟦b: {patch_size: 8}}"), "AZ111 add `stream: ...`"),
    "no mapping": (dual("{b: ⟦pair}"), "AZ112 must be a mapping"),
    "key of another stream": (dual("{b: {stream: pair, ⟦patch_size: 8}}"), "AZ110 the keys here are `stream`"),
    "count missing": (dual("{⟦b: {stream: tokens}}"), "AZ111 add `count: ...`"),
    "size of three": (
        dual("{b: {stream: given, channels: 3, size: ⟦[2, 2, 2]}}"), "AZ113 a whole number from 1 to 4096 or a list of 2",
    ),
    "outside of the model": (
        "recipe: 1\nhost: {kind: dual, ⟦b: {stream: pair}}\nattention: softmax\n", "AZ110 `b` stands under `host: model:`",
    ),
    "key of a vit": (dual("{⟦patch_drop_rate: 0.5}"), "AZ110 `host.model`"),
    "b of a vit": ("recipe: 1\nhost: {kind: vit, model: {⟦b: {stream: pair}}}\nattention: softmax\n", "AZ110 the keys here are"),
    "base unknown": (
        "recipe: 1\nhost: {kind: dual, base: ⟦dual_tiny}\nattention: softmax\n", "AZ301 did you mean `dual_tiny_patch4_32`?",
    ),
    "patches of a do not tile": (dual("{patch_size: ⟦5}"), "AZ320 an image of 32 × 32 pixels cannot be cut into patches of 5 × 5"),
    "patches of b do not tile": (dual("{b: ⟦{stream: scale, patch_size: 5}}"), "AZ322 at another scale"),
    "patch larger than the image": (dual("{b: ⟦{stream: scale, patch_size: 64}}"), "AZ322 multiples of `patch_size`"),
    "name taken": (dual("{b: ⟦{stream: given, name: x, channels: 3, size: 2}}"), "AZ322 choose another `name`"),
    "name is a keyword": (dual("{b: ⟦{stream: given, name: class, channels: 3, size: 2}}"), "AZ322 cannot be called `class`"),
    "no class token to read": (dual("⟦{class_token: false, global_pool: token}"), "AZ309 write `global_pool: avg`"),
    "heads do not divide": (dual("{num_heads: ⟦5}"), "AZ308 5 heads do not divide a width of 64"),
    "too large": (dual("⟦{b: {stream: tokens, count: 60000}, embed_dim: 8192, depth: 96}"), "AZ311 make the model smaller"),
    "nobody reads b": (
        dual("{b: ⟦{stream: tokens, count: 4}}", 'overrides: [{at: "b.*", put: null}, {at: "*.cross", put: null}]\n'),
        "AZ322 nothing reads stream b",
    ),
    "a pair that nobody reads": (
        dual("{b: ⟦{stream: pair}}", 'overrides: [{at: "a.*.cross", put: null}]\n'), "AZ322 nothing reads stream b",
    ),
    "sites of a pair": (puts('{at: ⟦"b.*", put: null}', b="{stream: pair}"), "AZ304 the sites are a.0.self to a.3.cross"),
    "no such site": (puts('{at: ⟦"c.*", put: softmax}'), "AZ304 `*` means all"),
    "cannot read": (puts('{at: "a.*.cross", put: ⟦fourier}'), "AZ302 the site reads from a context; `fourier` cannot"),
    "reads where there is nothing to read": (puts("{at: a.0.self, put: ⟦window_cross}"), "AZ302 reads from a second stream"),
    "context without a grid": (puts('{at: "a.*.cross", put: ⟦window_cross}'), "AZ302 needs a context on a 2-D grid"),
    "tokens without a grid": (puts('{at: "*.self", put: ⟦large_kernel}'), "AZ302 the site has a 1-D grid"),
    "grids that do not go together": (
        puts('{at: "b.*.cross", put: ⟦window_cross}', b="{stream: scale, patch_size: 16}"), "AZ401 do not tile a grid of (2, 2)",
    ),
    "and in a fusion": (
        puts('{at: "b.*.cross", put: {fuse: add, of: [softmax, ⟦window_cross]}}', b="{stream: scale, patch_size: 16}"),
        "AZ401 do not tile a grid of (2, 2)",
    ),
    "maps": (puts('{at: "a.*.self", put: ⟦region}'), "AZ302 a model of kind dual hands none on to its sites"),
    "a pool": (dual("", "⟦pool: map_pool\n"), "AZ318 reads both streams"),
    "a skip": (dual("", "skip: ⟦merged\n"), "AZ314 tokens alone go on | leave `skip:` out"),
    "heads of sides": (dual("", "heads: ⟦{encoder: 4}\n"), "AZ313 belongs to a host of kind seq2seq"),
    "empty in a vit": (
        "recipe: 1\nhost: {kind: vit, base: vit_tiny_patch16_224}\nattention: softmax\noverrides: [{at: blocks.0, put: ⟦null}]\n",
        "AZ323 blocks.0 cannot be left empty",
    ),
    "empty in a seq2seq": (
        "recipe: 1\nhost: {kind: seq2seq}\nattention: softmax\noverrides: [{at: '*', put: softmax}, {at: '*.cross', put: ⟦null}]\n",
        "AZ323 decoder.0.cross cannot be left empty",
    ),
    "attention empty": ("recipe: 1\nhost: {kind: dual}\nattention: ⟦null\n", "AZ114 `attention` must say"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"), [(text, want) for text, *want in REFUSED.values()], ids=REFUSED
)
def test_refusals(text, expected):
    clean, spots = marked(text)
    agree(faults_of(clean), spots, expected)


def test_a_later_entry_fills_what_an_earlier_one_left_empty():
    text = puts('{at: "b.*", put: null}', "{at: b.1.cross, put: additive}", '{at: "a.[01].*", put: null}')
    composition = compose_file(text)
    assert sorted(composition.plans) == ["a.2.cross", "a.2.self", "a.3.cross", "a.3.self", "b.1.cross"]
    assert [str(plan) for name, plan in composition.plans.items() if name.startswith("b")] == ["additive"]
    assert attnzoo.compose(text)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_arguments_are_held_to_the_same_rules():
    model = timm.create_model(
        "attnzoo_dual", recipe="dual_scale", b={"stream": "tokens", "count": 3}, depth=1
    )
    assert model.b.tokens.shape == (1, 3, 32) and len(model.blocks) == 1
    with pytest.raises(ZooError, match="b.stream") as error:
        timm.create_model("attnzoo_dual", recipe="dual_scale", b={"stream": "scales"})
    assert error.value.code == "AZ113"
    with pytest.raises(TypeError, match="reg_tokens") as error:
        timm.create_model("attnzoo_dual", recipe="dual_scale", reg_tokens=3)


# --------------------------------------------------------------------------------------------------------------- recipes

RECIPES = attnzoo.list_recipes("dual_*", plugin="attnzoo")


def test_a_recipe_for_every_stream():
    assert {attnzoo.recipe.compose_file(name).info.model.b.__class__.__name__ for name in RECIPES} >= {
        "Patches", "Features", "Tokens", "Given", "NoneType",
    }  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.sample(3)
def test_compose_shows_both_streams(name):
    result = CliRunner().invoke(app, ["compose", name])
    assert result.exit_code == 0, result.output
    first = " ".join(result.output.split("\n\n")[1].split())
    info = compose_file(name).info
    assert first.startswith(
        ("a: 3 × 32 × 32 image → 8 × 8 + 1 tokens → 2 × [ ", "a: 3 × 32 × 32 image → 8 × 8 tokens → 2 × [ ")
    )
    assert f"b: {info.second}" in first and "forward takes images (b 3 32 32)" in first
    for given_name, shape in info.inputs.items():
        assert f"{given_name}=(b {' '.join(map(str, shape))})" in first
    assert f"stream b: {info.second}" in str(attnzoo.describe(attnzoo.compose(name)))


PAPERS = {
    "window_cross": "given", "prior_cross": "tokens", "cross_scale": "scale", "conv_transformer": "features",
    "pairwise_cross": "pair", "class_semantics": "tokens", "medusa": "features",
    "global_query": "features", "class_cross": "scale",
}  # fmt: skip
"""What the mechanisms of two streams read, each in a recipe of its own."""


def test_every_paper_has_its_recipe():
    assert sorted(PAPERS) == attnzoo.list_mechanisms(family="cross", context=True, plugin="attnzoo")
    for name, stream in PAPERS.items():
        composition = compose_file(f"dual_{name}")
        assert composition.loaded.recipe.host.model.b.stream == stream and composition.loaded.recipe.source
        found = {site.split(".", 2)[2] for site, plan in composition.plans.items() if plan.entry.name == name}
        assert found == ({"self"} if stream == "pair" else {"cross"})


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_of_a_recipe_is_used(name):
    torch.manual_seed(0)
    model = attnzoo.compose(name).train()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    model(x, **given(model, x)).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_it_learns(name, tmp_path):
    """The mean loss of the fourth epoch, steps 70 to 92, is below that of the first by a tenth at least."""
    loaded, settings = prepare(name, ["train.epochs=4"])
    run = train(loaded, settings, tmp_path / "run")
    losses = [epoch["train_loss"] for epoch in run.log()]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0], losses
    assert run.evaluate("last").accuracy == pytest.approx(run.log()[-1]["test_accuracy"])
