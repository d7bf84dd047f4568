"""Pools: one token of all, at the site `pool` of ViT, CCT and sequence hosts."""

import copy
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from own_components import own_zoo  # noqa: F401 - for all tests here
from timm.models import save_for_hf
from timm.models._features_fx import create_feature_extractor as timms_extractor
from timm.optim import create_optimizer_v2
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor
from typer.testing import CliRunner

from attnzoo.bench.composition import describe
from attnzoo.cli.app import app
from attnzoo.core import Card, Family, Layout, Pool, Site, find_taps, watch
from attnzoo.errors import LayoutMismatch, MissingMap, RecipeError
from attnzoo.recipe import compose, compose_file

VIT = """
recipe: 1
host: {kind: vit, base: vit_tiny_patch16_224, model: {img_size: 32, patch_size: 8, depth: 2, embed_dim: 24,
       num_heads: 3, num_classes: 5%s}}
attention: softmax
"""
CCT = """
recipe: 1
host: {kind: cct, base: cct_2_3x2, model: {img_size: 16, embed_dim: 24, depth: 2, num_heads: 3, num_classes: 5%s}}
attention: softmax
"""
STACK = """
recipe: 1
host: {kind: sequence, dim: 24, mlp_dim: 32, layers: 2, vocab: 11, outputs: 5, max_length: 12%s}
attention: softmax
"""
SEQ2SEQ = """
recipe: 1
host: {kind: seq2seq, dim: 16, mlp_dim: 24, layers: 2, vocab: 13, max_length: 12}
attention: softmax
"""
POOL = "pool: scored_pool\n"
IMAGE_HOSTS = pytest.mark.parametrize("host", [VIT, CCT], ids=["vit", "cct"])


def made(host: str, pool: str = POOL, more: str = "", **options):
    """A model in eval mode, with all parameters away from where they start."""
    torch.manual_seed(0)
    model = compose(host % more + pool, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 5)
    return model


def images(host: str, batch: int = 2, side: int = 0) -> torch.Tensor:
    side = side or (32 if host is VIT else 16)
    return torch.randn(batch, 3, side, side)


def pooled(model, tokens: torch.Tensor) -> torch.Tensor:
    """What `scored_pool` should give of normalised tokens."""
    scores = tokens @ model.pool.score.weight[0]
    return torch.einsum("bn,bnc->bc", scores.exp() / scores.exp().sum(1, keepdim=True), tokens)


# ---------------------------------------------------------------------------------------------------------- in models


@IMAGE_HOSTS
def test_in_the_place_of_the_hosts_own(host):
    model, x = made(host), images(host)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 17 if host is VIT else 16, 24)
    assert isinstance(model.pool, Pool)
    expected = F.linear(pooled(model, tokens), model.head.weight, model.head.bias)
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert torch.equal(model.forward_head(tokens), model(x))
    assert torch.allclose(model.forward_head(tokens, pre_logits=True), pooled(model, tokens), atol=1e-5)
    assert [name for name in model.state_dict() if "pool" in name] == ["pool.score.weight"]
    assert "fc_norm.weight" not in model.state_dict()


@pytest.mark.parametrize("more", [", class_token: false", ", reg_tokens: 2", ", init_values: 0.1"])
def test_tokens_of_all_kinds_are_read(more):
    """Special tokens too, where there are any; none is needed."""
    model, x = made(VIT, more=more), images(VIT)
    tokens = model.forward_features(x)
    assert tokens.shape[1] == 16 + {", class_token: false": 0, ", reg_tokens: 2": 3}.get(more, 1)
    assert torch.allclose(model(x), model.head(pooled(model, tokens)), atol=1e-5)


def test_bases_that_pool_otherwise():
    """Norms stand before the pool, whatever the base does."""
    recipe = (
        "recipe: 1\nhost: {kind: vit, base: %s, model: {depth: 1}}\nattention: softmax\npool: scored_pool\n"
    )
    for base in ("vit_medium_patch16_gap_240", "vit_base_patch16_siglip_224"):
        model = compose(recipe % base)
        assert isinstance(model.norm, torch.nn.LayerNorm) and isinstance(model.fc_norm, torch.nn.Identity)
        assert not any("attn_pool" in name for name in model.state_dict())


@pytest.mark.parametrize("causal", ["true", "false"])
def test_a_sequence_gets_one_answer(causal):
    model = made(STACK, more=f", causal: {causal}")
    tokens = torch.randint(0, 11, (3, 7))
    found = {}
    model.norm.register_forward_hook(lambda _m, _args, out: found.update(tokens=out))
    out = model(tokens)
    assert out.shape == (3, 5)
    assert torch.allclose(out, model.head(pooled(model, found["tokens"])), atol=1e-5)
    assert "for the whole" in describe(compose_file(STACK % "" + POOL)).gives


def test_training_asks_at_every_position(tmp_path):
    file = tmp_path / "pooled.yaml"
    file.write_text(STACK.replace("attention", "train: {data: recall}\nattention") % "" + POOL)
    done = CliRunner().invoke(app, ["train", str(file), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2 and "AZ814" in done.output and "pool=null" in done.output
    assert compose(str(file), edits=["pool=null"]).pool is None


def test_taps_of_a_pool():
    model, seen = made(VIT), {}
    assert "pool.weights" in find_taps(model)
    with watch(model, "weights", lambda name, t: seen.update({name: t})):
        model(images(VIT))
    assert seen["pool.weights"].shape == (2, 17)
    assert torch.allclose(seen["pool.weights"].sum(-1), torch.ones(2))


@pytest.mark.parametrize("base", ["vit", "cct", "sequence"])
def test_all_parameters_learn(base):
    host, x = {
        "vit": (VIT, images(VIT)), "cct": (CCT, images(CCT)), "sequence": (STACK, torch.randint(0, 11, (3, 7))),
    }[base]  # fmt: skip
    model = made(host).train()
    model(x).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.pool.parameters()
    )


@pytest.mark.parametrize("mode", ["", "jax", "moco", "skip"])
def test_timms_initialisation_reaches_it(mode):
    torch.manual_seed(0)
    weight = compose(VIT % "" + POOL, weight_init=mode).pool.score.weight
    assert (weight.std() < 0.04) == (mode == "")  # timm's own is N(0, 0.02²)
    assert compose(VIT % "" + POOL + "", edits=["host.init=normal"]).pool.score.weight.std() < 0.04


# ------------------------------------------------------------------------------------------------------ timm's methods


@IMAGE_HOSTS
def test_classifier(host):
    model, x = made(host), images(host)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and isinstance(model.pool, Pool)
    model.reset_classifier(0, "pool")
    assert torch.equal(model(x), features) and model.global_pool == "pool"
    assert made(host, num_classes=0)(x).shape == (2, 24)
    model.reset_classifier(0, "")
    assert model(x).ndim == 3 and not any("pool" in name for name in model.state_dict())
    other = made(host)
    own = "avg" if host is VIT else "seq"
    other.reset_classifier(3, own)
    tokens = other.forward_features(x)
    assert other(x).shape == (2, 3) and other.global_pool == own and not isinstance(other.pool, Pool)
    if host is VIT:
        assert torch.allclose(other(x), other.head(tokens[:, 1:].mean(1)), atol=1e-5)
    with pytest.raises((AssertionError, ValueError)):
        other.reset_classifier(3, "pool")  # it is gone


@IMAGE_HOSTS
def test_another_pooling_as_an_argument(host):
    own = "avg" if host is VIT else "seq"
    model = compose(host % "" + POOL, global_pool=own)
    assert model.global_pool == own and not isinstance(model.pool, Pool)
    assert compose(host % "" + POOL, global_pool="pool").global_pool == "pool"
    with pytest.raises(RecipeError, match="pool"):
        compose(host % "", global_pool="pool")  # there is none


@IMAGE_HOSTS
def test_features(host):
    model, x = made(host), images(host)
    features = compose(host % "" + POOL, features_only=True, out_indices=(0, 1)).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    assert not any("pool" in name for name in features.state_dict())
    inner = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(features(x), inner, strict=True))


@IMAGE_HOSTS
def test_groups_of_parameters(host):
    model = made(host)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert scale[id(names["pool.score.weight"])] >= scale[id(names["blocks.1.mlp.fc1.weight"])]


@IMAGE_HOSTS
@pytest.mark.parametrize("change", ["none", "classes", "other", "nothing"])
def test_a_folder_and_back(host, change, tmp_path):
    model, x = made(host), images(host)
    match change:
        case "classes":
            model.reset_classifier(7)
        case "other":
            model.reset_classifier(7, "avg" if host is VIT else "seq")
        case "nothing":
            model.reset_classifier(0, "")
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    assert again.global_pool == model.global_pool


@IMAGE_HOSTS
def test_copies(host):
    model, x = made(host), images(host)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))  # noqa: S301 - our own bytes


def test_devices_and_types():
    for host in (VIT, CCT):
        model = compose(host % "" + POOL, device="cpu", dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert compose(host % "" + POOL, device="meta").pool.score.weight.is_meta


@IMAGE_HOSTS
@pytest.mark.sample(3)
def test_compile_export_and_fx(host):
    model, x = made(host), images(host)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
        y = images(host, 3)
        assert torch.allclose(program(y), model(y), atol=1e-5)
        for extract in (create_feature_extractor, timms_extractor):
            graph = extract(model, {"head": "out"})
            out = graph(x)
            assert torch.allclose(out["out"] if isinstance(out, dict) else out[0], expected, atol=1e-5)


@IMAGE_HOSTS
@pytest.mark.sample(3)
def test_onnx(host, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    model, x = made(host), images(host)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(out), model(x), atol=1e-4)


# -------------------------------------------------------------------------------------------------- the grid, and maps


def test_the_grid_of_this_forward():
    """With images of any size a pool gets the grid of the images at hand, in many threads at once."""
    model = made(VIT, "pool: row_pool\n", ", dynamic_img_size: true")
    inputs = [torch.randn(1 + i % 2, 3, 8 * (1 + i), 8 * (5 - i)) for i in range(5)]

    def ask(i: int) -> torch.Tensor:
        with torch.no_grad():
            return model(inputs[i % 5])

    with torch.no_grad():
        alone = [ask(i) for i in range(5)]
        for x, out in zip(inputs, alone, strict=True):
            tokens = model.forward_features(x)[:, 1:].unflatten(1, (x.shape[2] // 8, x.shape[3] // 8))
            rows = torch.arange(1.0, x.shape[2] // 8 + 1)
            expected = torch.einsum("byxc,y->bc", tokens, rows) / tokens[0, ..., 0].numel()
            assert torch.allclose(out, model.head(expected), atol=1e-5)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(8) as threads:
                assert all(threads.map(lambda i: torch.equal(ask(i), alone[i % 5]), range(100)))
        finally:
            sys.setswitchinterval(interval)
    tokens = model.forward_features(inputs[0])
    with pytest.raises(LayoutMismatch, match="cannot know"):
        model.forward_head(tokens)
    fixed = made(VIT, "pool: row_pool\n")
    x = images(VIT)
    assert torch.equal(fixed.forward_head(fixed.forward_features(x)), fixed(x))
    fixed.set_input_size((16, 40))
    assert fixed(torch.randn(1, 3, 16, 40)).shape == (1, 5)


@IMAGE_HOSTS
def test_a_pool_may_ask_for_a_map(host):
    model, x = made(host, "pool: lit_pool\n"), images(host)
    light = torch.rand(2, 4, 4)
    tokens = model.forward_features(x, light=light)[:, 1 if host is VIT else 0 :]
    expected = model.head((light.flatten(1)[..., None] * tokens).mean(1))
    assert torch.allclose(model(x, light=light), expected, atol=1e-5)
    with pytest.raises(MissingMap, match="light"):
        model(x)


# -------------------------------------------------------------------------------------------------------- in a recipe

REFUSED = {
    "a pool as attention": (VIT.replace("attention: softmax", "attention: scored_pool") % "", 5, 12, "makes one token of all"),
    "a pool as a branch": (VIT.replace("attention: softmax", "attention: {fuse: add, of: [softmax, scored_pool]}") % "", 5, 38, "makes one token of all"),
    "a pool at a site": (VIT % "" + "overrides: [{at: blocks.0, put: {use: scored_pool}}]\n", 6, 39, "makes one token of all"),
    "a head as a pool": (VIT % "" + "pool: softmax\n", 6, 7, "gives a token for each token"),
    "a mechanism as a pool": (VIT % "" + "pool: {use: own/lit}\n", 6, 13, "pools are"),
    "a fusion of pools": (VIT % "" + "pool: {fuse: mean, of: [scored_pool, row_pool]}\n", 6, 14, "pools cannot be fused"),
    "two ways": (VIT % ", global_pool: avg" + POOL, 4, 51, "both say how tokens are pooled"),
    "two tokens": (VIT.replace("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224") % "" + POOL, 6, 1, "its head reads two tokens"),
    "seq2seq": (SEQ2SEQ + POOL, 5, 1, "has no place for a pool"),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "line", "column", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_there(recipe, line, column, words):
    with pytest.raises(RecipeError) as caught:
        compose_file(recipe)
    (fault,) = caught.value.diagnostics
    assert (fault.code, fault.place.line, fault.place.column) == ("AZ318", line, column), str(caught.value)
    assert words in str(caught.value) and fault.help


OTHERS = {
    "unknown": (VIT % "" + "pool: scored_poll\n", "AZ201", "scored_pool"),
    "option": (VIT % "" + "pool: {use: scored_pool, with: {bios: true}}\n", "AZ210", "bias"),
    "heads": (VIT % "" + "pool: {use: scored_pool, heads: 5}\n", "AZ308", "5 heads"),
    "grid of a sequence": (STACK % "" + "pool: row_pool\n", "AZ302", "`scored_pool`"),
    "map of a sequence": (STACK % "" + "pool: lit_pool\n", "AZ302", "takes a sequence alone"),
    "neither": (VIT % "" + "pool: {with: {bias: true}}\n", "AZ114", "use"),
    "dropped tokens": (VIT % ", patch_drop_rate: 0.5" + "pool: row_pool\n", "AZ302", "`patch_drop_rate`"),
}


@pytest.mark.parametrize(("recipe", "code", "words"), OTHERS.values(), ids=OTHERS)
def test_faults_of_pools_are_those_of_components(recipe, code, words):
    with pytest.raises(RecipeError) as caught:
        compose_file(recipe)
    assert caught.value.code == code and words in str(caught.value)
    assert "pool" in caught.value.diagnostics[0].place.text


def test_edits_and_options():
    assert compose(VIT % "", edits=["pool=scored_pool"]).pool.score.bias is None
    assert compose(VIT % "" + POOL, edits=["pool.with.bias=true"]).pool.score.bias is not None
    with_heads = compose(VIT % "" + "pool: {use: scored_pool, heads: 2, with: {bias: true}}\n")
    assert with_heads.pool.heads == 2 and with_heads.blocks[0].attn.heads == 3
    assert compose(VIT % "" + "heads: [3, 6]\n" + POOL).pool.heads == 6
    everywhere = compose_file(VIT % "" + POOL + "overrides: [{at: '*', put: fourier}]\n")
    assert {plan.entry.name for plan in everywhere.plans.values()} == {"fourier"}
    assert everywhere.pool.entry.name == "scored_pool"


def test_the_schema_knows_it():
    from attnzoo.recipe.json_schema import recipe_schema

    assert recipe_schema()["properties"]["pool"] == {"$ref": "#/definitions/Spec"}


@pytest.mark.parametrize("host", [VIT, CCT, STACK], ids=["vit", "cct", "sequence"])
def test_compose_shows_it(host, tmp_path):
    file = tmp_path / "pooled.yaml"
    file.write_text(host % "" + "pool: {use: scored_pool, with: {bias: true}}\n")
    report = describe(compose_file(str(file)))
    row = report.rows[-1]
    assert (row.sites, row.what, row.params, row.heads) == (
        ("pool",),
        "scored_pool bias=True",
        25,
        3 if host is not STACK else 4,
    )
    assert report.sites == 3 and not report.starts_equal
    done = CliRunner().invoke(app, ["compose", str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"][-1]["sites"] == ["pool"]
    text = CliRunner().invoke(app, ["compose", str(file)])
    assert text.exit_code == 0 and "scored_pool" in text.stdout


def test_show_says_its_form():
    done = CliRunner().invoke(app, ["show", "scored_pool", "--json"])
    data = json.loads(done.stdout)
    assert data["claims"]["form"].startswith("pool (") and data["example"] == "pool: scored_pool"


class Corner(Pool):
    """The first token of a plane."""

    card = Card(name="corner", family=Family.LATENT, summary="The first token of a plane.", grid=2)

    def pool(self, x, *, mask, layout):
        return x[:, layout.prefix]


def test_a_pool_that_needs_a_plane_refuses_a_line():
    pool, x = Corner(Site("pool", 4, 1, Layout((2, 2)))), torch.randn(3, 4, 4)
    assert torch.equal(pool(x, layout=Layout((2, 2))), x[:, 0])
    with pytest.raises(LayoutMismatch, match="AZ401.*needs a 2-D grid"):
        pool(x, layout=Layout((4,)))
