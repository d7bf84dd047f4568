"""Registered models behave as timm's own do, and a plain softmax recipe *is* timm's ViT."""

import copy
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import processes
import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torchvision.models.feature_extraction import create_feature_extractor
from typer.testing import CliRunner

import attnzoo
from attnzoo.cli.app import app
from attnzoo.errors import ZooError

MODELS = sorted(name for name in timm.list_models("*ham*"))
SMALL = ["ham_vit_b", "vit_ham_a_tiny_patch16_224"]
"""Both fusions, at the paper's size and on a base of timm; the others differ from them in width alone."""
EVERY = [pytest.param(name, marks=[] if name in SMALL else pytest.mark.slow) for name in MODELS]
"""These always, the others in the slow run."""


def size(name: str) -> int:
    """Side of the images used here: full-size models see four patches, so that 2-D geometry stays real."""
    return 32


def depth(name: str) -> dict:
    """Three blocks say as much as twelve where time counts; the slow tests take all."""
    return {"depth": 3} if name.startswith("vit_") else {}


@cache
def made(name: str) -> VisionTransformer:
    """A model in eval mode, its new parameters moved off their start; shared, so never change it."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size(name), num_classes=10, **depth(name)).eval()
    return stirred(model)


def stirred(model):
    """Gains away from zero, so that every branch takes part."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "fusion" in path or "branches" in path:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def image(name: str, batch: int = 2, side: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, side or size(name), side or size(name), generator=generator)


def test_the_registered_models():
    full = [f"vit_ham_{v}_{s}_patch16_224" for v in "ab" for s in ("base", "small", "tiny")]
    assert sorted(["ham_vit_a", "ham_vit_b", "ham_vit_classic", *full]) == MODELS


@pytest.mark.parametrize(
    "order", ["import timm, attnzoo", "import attnzoo, timm", "import attnzoo; from timm import create_model"]
)
def test_both_import_orders(order):
    code = f"{order}\nimport timm; print(sum(p.numel() for p in timm.create_model('ham_vit_b').parameters()))"
    done = processes.run("-c", code)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "121786", "")


def test_importing_attnzoo_is_light():
    code = "import sys, attnzoo; print(sorted({'torch', 'timm', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "params"), [("ham_vit_classic", 119_098), ("ham_vit_a", 121_786), ("ham_vit_b", 121_786)]
)
def test_parameters(name, params):
    assert sum(p.numel() for p in timm.create_model(name).parameters()) == params


PLAIN = '{"recipe": 1, "host": {"kind": "vit", "base": "%s", "model": {"depth": 2}}, "attention": "softmax"}'


@pytest.mark.parametrize(
    "base", ["vit_base_patch16_224", "vit_small_patch16_384", "deit_tiny_patch16_224", "vit_base_patch16_rpn_224",
             "vit_medium_patch16_reg4_gap_256", "vit_base_patch32_clip_224", "vit_base_patch16_siglip_224", "deit3_small_patch16_224",
             "vit_tiny_r_s16_p8_224", "vit_betwixt_patch16_reg4_gap_256"],
)  # fmt: skip
def test_softmax_is_timms_vit(base):
    """Equal state-dict keys and order, and with timm's weights a difference of 0.0; or a refusal that says why."""
    try:
        model = attnzoo.compose(PLAIN % base).eval()
    except ZooError as error:
        assert error.code == "AZ310" and base in ("vit_base_patch16_rpn_224", "vit_tiny_r_s16_p8_224"), error
        return
    torch.manual_seed(3)
    plain = timm.create_model(base, depth=2).eval()
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    x = torch.randn(1, *plain.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert (model(x) - plain(x)).abs().max() == 0.0


@pytest.mark.parametrize(
    "scale", ["tiny", *(pytest.param(s, marks=pytest.mark.slow) for s in ("small", "base"))]
)
@pytest.mark.parametrize("version", ["a", "b"])
def test_full_size_models_start_equal_to_their_base(version, scale):
    model = timm.create_model(f"vit_ham_{version}_{scale}_patch16_224").eval()
    plain = timm.create_model(f"vit_{scale}_patch16_224").eval()
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys and all(".attn.inner." in key for key in result.missing_keys)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("recipe", ["nested", "local_then_global"])
@pytest.mark.parametrize("name", ["a recipe", "its text"])
def test_recipes_compose_by_name_and_text(recipe, name):
    from attnzoo.recipe import load

    loaded = load(recipe)
    model = attnzoo.compose(recipe if name == "a recipe" else loaded.text, img_size=64, num_classes=3)
    assert model(image("", side=64)).shape == (2, 3)


@contextmanager
def layouts(model):
    """How the tokens are arranged that the first block's attention gets."""
    seen: list = []

    def look(_module, _args, options) -> None:
        seen.append(options["layout"])

    handle = model.blocks[0].attn.register_forward_pre_hook(look, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.mark.parametrize("name", EVERY)
class TestEveryModel:
    """What timm's own tests ask of timm's own models."""

    def test_all_parameters_get_finite_gradients(self, name):
        model = copy.deepcopy(made(name)).train()
        model(image(name)).square().mean().backward()
        without = [
            path for path, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
        ]
        dead = [path for path, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
        assert not without and not dead

    def test_gradient_checkpointing_changes_nothing(self, name):
        model = copy.deepcopy(made(name))
        x, expected = image(name), made(name)(image(name))
        model.set_grad_checkpointing()
        model.train()
        out = model(x)
        assert torch.allclose(out, expected, atol=1e-5)
        out.sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_features_only(self, name):
        model = timm.create_model(
            name, img_size=size(name), features_only=True, out_indices=(-2, -1), **depth(name)
        ).eval()
        maps = model(image(name))
        side = size(name) // made(name).patch_embed.patch_size[0]
        assert [tuple(m.shape) for m in maps] == [(2, made(name).embed_dim, side, side)] * 2

    def test_forward_intermediates(self, name):
        model, x = made(name), image(name)
        with torch.no_grad():
            final, inner = model.forward_intermediates(x)
            assert torch.equal(final, model.forward_features(x))
            assert len(inner) == len(model.blocks)
            assert len(model.get_intermediate_layers(x, n=2)) == 2

    def test_prune_intermediate_layers(self, name):
        model = copy.deepcopy(made(name))
        model.prune_intermediate_layers(indices=[0, 1])
        assert len(model.blocks) == 2
        assert model.forward_features(image(name)).isfinite().all()

    def test_classifier(self, name):
        model = copy.deepcopy(made(name))
        x = image(name)
        assert model.get_classifier().out_features == 10
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        model.reset_classifier(0)
        assert model(x).shape == (2, model.num_features)
        model.reset_classifier(0, "")
        assert model(x).ndim == 3
        assert timm.create_model(name, img_size=size(name), num_classes=0, **depth(name))(x).shape == (
            2,
            model.num_features,
        )

    def test_weight_decay_and_layer_groups(self, name):
        model = made(name)
        spared, names = model.no_weight_decay(), {path for path, _ in model.named_parameters()}
        assert {"pos_embed", "cls_token"} <= spared and spared - {"reg_token", "dist_token"} <= names
        fresh = [path for path in names if path.endswith(("gamma", "value_bias"))]
        assert set(fresh) <= spared
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.9)
        undecayed = {
            id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]
        }
        assert all(id(p) in undecayed for path, p in model.named_parameters() if path in spared)
        assert len({group["lr_scale"] for group in optimizer.param_groups}) > len(model.blocks)

    def test_set_input_size(self, name):
        model = copy.deepcopy(made(name))
        patch = model.patch_embed.patch_size[0]
        model.set_input_size((4 * patch, 6 * patch))
        with layouts(model) as seen:
            assert model(torch.randn(1, 3, 4 * patch, 6 * patch)).isfinite().all()
            model.blocks[0](torch.randn(1, 25, model.embed_dim))
        assert [layout.grid for layout in seen] == [(4, 6)] * 2
        assert made(name).layout.grid == (size(name) // patch,) * 2  # of the copy alone

    def test_dynamic_img_size(self, name):
        model = timm.create_model(
            name, img_size=size(name), dynamic_img_size=True, num_classes=10, **depth(name)
        ).eval()
        model.load_state_dict(made(name).state_dict())
        x = image(name)
        with torch.no_grad():
            assert torch.allclose(model(x), made(name)(x), atol=1e-6)
            patch = model.patch_embed.patch_size[0]
            with layouts(model) as seen:
                assert model(torch.randn(1, 3, 3 * patch, 5 * patch)).shape == (1, 10)
        assert [layout.grid for layout in seen] == [(3, 5)]

    def test_positions_are_resized_at_load(self, name):
        patch = made(name).patch_embed.patch_size[0]
        overlay = {"state_dict": made(name).state_dict(), "num_classes": 10}
        model = timm.create_model(
            name,
            img_size=4 * patch,
            num_classes=10,
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            **depth(name),
        )
        assert model.pos_embed.shape[1] == 17
        assert torch.equal(model.blocks[0].attn.qkv.weight, made(name).blocks[0].attn.qkv.weight)

    def test_meta_device(self, name):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert all(p.is_meta for p in model.parameters())
        assert timm.create_model(name, device="meta")(
            torch.empty(1, 3, *model.patch_embed.img_size, device="meta")
        ).is_meta

    def test_device_and_dtype(self, name):
        model = timm.create_model(
            name, img_size=size(name), device="cpu", dtype=torch.bfloat16, **depth(name)
        ).eval()
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        out = model(image(name).bfloat16())
        assert out.dtype == torch.bfloat16 and out.isfinite().all()

    def test_autocast(self, name):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            out = made(name)(image(name))
        assert out.isfinite().all()
        assert torch.allclose(out.float(), made(name)(image(name)), atol=0.3)

    def test_deepcopy_and_pickle(self, name):
        x, expected = image(name), made(name)(image(name))
        assert torch.equal(copy.deepcopy(made(name))(x), expected)
        again = pickle.loads(pickle.dumps(made(name)))  # noqa: S301 - our own bytes
        assert torch.equal(again(x), expected)
        assert again.no_weight_decay() == made(name).no_weight_decay()

    def test_round_trip_through_a_folder(self, name, tmp_path):
        save_for_hf(made(name), str(tmp_path), safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(again(image(name)), made(name)(image(name)))

    def test_unknown_arguments_are_refused(self, name):
        with pytest.raises((ZooError, TypeError), match="nmu_heads"):
            timm.create_model(name, nmu_heads=3)

    def test_pretrained_says_that_there_are_no_weights(self, name):
        with pytest.raises(ZooError, match="no published weights") as error:
            timm.create_model(name, pretrained=True)
        assert error.value.code == "AZ306"

    def test_fx(self, name):
        extractor = create_feature_extractor(made(name), return_nodes={"head": "out"})
        assert torch.equal(extractor(image(name))["out"], made(name)(image(name)))
        with pytest.raises(ZooError, match="no masks"):
            extractor(image(name), is_causal=True)

    @pytest.mark.sample(2)
    def test_compile_in_one_graph(self, name):
        torch._dynamo.reset()
        compiled = torch.compile(made(name), backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert torch.allclose(compiled(image(name)), made(name)(image(name)), atol=1e-5)

    @pytest.mark.sample(2)
    def test_export(self, name):
        batch = torch.export.Dim("batch", min=1, max=64)
        with torch.no_grad():
            program = torch.export.export(made(name), (image(name),), dynamic_shapes=({0: batch},))
            x = image(name, batch=3)
            assert torch.allclose(program.module()(x), made(name)(x), atol=1e-5)

    def test_watched_equals_fused(self, name):
        from attnzoo.core import watch

        seen = {}
        with torch.no_grad():
            expected = made(name)(image(name))
            with watch(made(name), "weights", lambda path, t: seen.update({path: t})):
                out = made(name)(image(name))
        assert torch.allclose(out, expected, atol=1e-5)
        assert len(seen) == len(made(name).blocks) * (1 if name == "ham_vit_classic" else 2)
        assert all(torch.allclose(t.sum(-1), torch.ones(()), atol=1e-5) for t in seen.values())


@cache
def whole(name: str) -> VisionTransformer:
    """As `made`, with all blocks."""
    return stirred(timm.create_model(name, img_size=size(name), num_classes=10).eval())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_all_blocks_in_one_graph(name):
    torch._dynamo.reset()
    x = image(name)
    with torch.no_grad():
        expected = whole(name)(x)
        compiled = torch.compile(whole(name), backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        assert torch.allclose(torch.export.export(whole(name), (x,)).module()(x), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compile_with_inductor(name):
    torch._dynamo.reset()
    compiled = torch.compile(made(name), fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(image(name)), made(name)(image(name)), atol=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "ham_vit_b" else pytest.mark.slow) for name in MODELS]
)
def test_onnx(name):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    buffer = io.BytesIO()
    program = torch.onnx.export(made(name), (image(name),), dynamo=True, verbose=False)
    program.save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: image(name).numpy()})
    assert torch.allclose(torch.from_numpy(out), made(name)(image(name)), atol=1e-4)


@pytest.mark.parametrize("mode", ["", "skip", "jax", "jax_nlhb", "moco", "reset"])
@pytest.mark.parametrize(
    "edit", ["attention.fuse=gated", "attention.fuse=weighted_sum", "attention.fuse=difference"]
)
def test_special_initialisation_survives_timm(mode, edit):
    """Gates, weights and shares are what they say, whatever timm does to Linears afterwards."""
    options = {"weight_init": mode} if mode != "reset" else {}
    model = attnzoo.compose("ham_b", edits=[edit, "host.init=timm"], **options)
    if mode == "reset":
        model.init_weights("reset")
    fusion = model.blocks[1].attn.inner.fusion
    if "gated" in edit:
        assert not fusion.gate.weight.any() and not fusion.gate.bias.any()
    elif "weighted" in edit:
        assert fusion.weight.tolist() == [1.0, 1.0]
    else:
        assert torch.allclose(fusion.share, torch.tensor(0.8 - 0.6 * 2.718281828 ** (-0.3)))


def test_an_unregistered_recipe_travels_in_the_configuration(tmp_path):
    model = stirred(attnzoo.compose("nested", img_size=32, num_classes=5)).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = image("", side=32)
    assert torch.equal(again(x), model(x))


def test_a_saved_configuration_cannot_open_files(tmp_path):
    secret = tmp_path / "x.yaml"
    secret.write_text("recipe: 1")
    with pytest.raises(ZooError) as error:
        timm.create_model("attnzoo_vit", recipe=str(secret))
    assert error.value.code == "AZ204"


def test_masks_reach_the_mechanisms():
    """timm hands masks to blocks; a causal mask hides later tokens, an unsupported one is refused."""
    block = attnzoo.compose("ham_classic", edits=["host.init=timm"]).eval().blocks[0]
    torch.nn.init.normal_(block.attn.qkv.weight, std=0.5, generator=torch.Generator().manual_seed(5))
    x = torch.randn(1, 65, 48)
    y = x.clone()
    y[:, 40:] = torch.randn(1, 25, 48)
    with torch.no_grad():
        assert torch.allclose(block(x, is_causal=True)[:, :40], block(y, is_causal=True)[:, :40], atol=1e-6)
        assert not torch.allclose(block(x)[:, :40], block(y)[:, :40], atol=1e-6)
    with pytest.raises(ZooError) as error:
        attnzoo.compose("ham_a").blocks[0](x, is_causal=True)
    assert error.value.code == "AZ402"


# ---------------------------------------------------------------------------------------- what belongs to one forward

GRIDS = '{"recipe": 1, "host": {"kind": "vit", "base": "%s", "model": {"img_size": 32, "patch_size": 8, "depth": 2, "dynamic_img_size": true%s}}, "attention": "%s"}'  # fmt: skip


def grid_model(attention: str = "neighborhood", base: str = "deit_tiny_patch16_224", more: str = ""):
    """A model whose images may have any size and whose mechanism knows the grid."""
    torch.manual_seed(0)
    return attnzoo.compose(GRIDS % (base, more, attention)).eval()


@pytest.mark.parametrize("base", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("attention", ["neighborhood", "softmax"])
@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.sample(4)
def test_one_model_and_many_threads(attention, base, again):
    """Images of several sizes, masks, intermediates: bit for bit what one thread alone gets."""
    model = grid_model(attention, base)
    model.set_grad_checkpointing(again)
    sides = [(16, 64), (64, 16), (32, 32), (24, 48), (8, 40)]
    images = [torch.randn(1 + i % 2, 3, *side) for i, side in enumerate(sides)]
    masks = [None] * len(images)
    if attention == "softmax":  # half of them, and each of its own size
        sizes = [x.shape[2] * x.shape[3] // 64 + model.num_prefix_tokens for x in images]
        masks = [torch.rand(n, n) > 0.3 if i % 2 else None for i, n in enumerate(sizes)]

    def ask(i: int) -> list[torch.Tensor]:
        x, mask = images[i % len(images)], masks[i % len(images)]
        if i % 3 == 2:
            return model.forward_intermediates(x, attn_mask=mask, intermediates_only=True)
        return [model(x, attn_mask=mask) if i % 3 else model.forward_features(x, attn_mask=mask)]

    alone = [ask(i) for i in range(15)]

    def same(i: int) -> bool:
        return all(torch.equal(one, other) for one, other in zip(ask(i % 15), alone[i % 15], strict=True))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(same, range(120)))
    finally:
        sys.setswitchinterval(interval)


def test_two_sizes_before_one_backward():
    """With checkpointing a block is computed again with the layout that it had."""
    model = grid_model().train()
    images = torch.randn(1, 3, 16, 64), torch.randn(1, 3, 64, 16)  # as many tokens, arranged otherwise
    grads = []
    for again in (False, True):
        model.set_grad_checkpointing(again)
        model.zero_grad()
        sum(model(x).square().sum() for x in images).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*grads, strict=True))


def test_a_block_alone_cannot_guess_the_grid():
    """With images of any size a block that needs the grid must be told; one that does not need it works."""
    x = torch.randn(1, 17, 192)
    with pytest.raises(ZooError, match="cannot know") as error:
        grid_model().blocks[0](x)
    assert error.value.code == "AZ401"
    assert grid_model("softmax").blocks(x).shape == x.shape


def test_blocks_alone_see_what_the_model_hands_them():
    model = attnzoo.compose("ham_a", edits=["attention=neighborhood"]).eval()
    x = torch.randn(2, 65, 48)
    tokens = x
    for block in model.blocks:
        tokens = block(tokens)
    assert torch.equal(tokens, model.blocks(x))


@pytest.mark.parametrize("attention", ["neighborhood", "softmax"])
def test_blocks_compiled_one_by_one(attention):
    model, x = grid_model(attention), torch.randn(2, 3, 16, 48)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
        assert torch.allclose(model(x), expected, atol=1e-6)


@pytest.mark.parametrize("base", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_distilled_and_plain_are_timms(base):
    """What becomes a class of ours keeps timm's arithmetic and pickles."""
    model, plain = attnzoo.compose(PLAIN % base).eval(), timm.create_model(base, depth=2).eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), plain(x))  # noqa: S301 - our own bytes
    assert isinstance(model, type(plain)) and "dist_token" in model.no_weight_decay()


def test_unknown_arguments_of_a_forward():
    with pytest.raises(TypeError, match="'regions'; this model takes no maps"):
        grid_model()(torch.randn(1, 3, 32, 32), regions=torch.zeros(1, 4, 4))


POOLED = """\
recipe: 1
host: {kind: vit, base: vit_tiny_patch16_224, model: {depth: 3, img_size: 32, num_classes: 5, %s}}
attention: {fuse: hadamard, of: [softmax, soft]}
"""
"""A recipe whose tokens are pooled in a way of its own."""


@pytest.mark.parametrize(
    "more",
    [
        "",
        pytest.param(", class_token: false", marks=pytest.mark.slow),
        pytest.param(", reg_tokens: 2", marks=pytest.mark.slow),
        ", class_token: false, reg_tokens: 2",
    ],
)
@pytest.mark.parametrize("pool", ["map", "prr", "avg"])
def test_attention_pooling_works_in_every_way(pool, more, tmp_path):
    text = POOLED % f"global_pool: {pool}{more}"
    model = attnzoo.compose(text)
    (tmp_path / "r.yaml").write_text(text)
    result = CliRunner().invoke(app, ["compose", str(tmp_path / "r.yaml")])
    assert result.exit_code == 0 and "received a finite one" in result.output, result.output
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.grad.any())
    assert model.no_weight_decay() <= set(before) | {"dist_token", "cls_token", "reg_token"}
    features = attnzoo.compose(text, features_only=True)(torch.randn(1, 3, 32, 32))
    assert [tuple(one.shape) for one in features] == [(1, 192, 2, 2)] * 3
    assert model.forward_head(model.forward_features(torch.randn(2, 3, 32, 32)), pre_logits=True).shape == (
        2,
        192,
    )
    model.reset_classifier(7)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("name", ["softmax", "squeeze_excite", "{fuse: mean, of: [softmax, squeeze_excite]}"])
def test_dropped_patches_have_a_layout(name):
    text = f"recipe: 1\nhost: {{kind: vit, base: vit_tiny_patch16_224, model: {{depth: 2, img_size: 64, patch_drop_rate: 0.5}}}}\nattention: {name}\n"
    model, seen = attnzoo.compose(text), []
    model.blocks[1].attn.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["layout"]), with_kwargs=True
    )
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    model.eval()(torch.randn(2, 3, 64, 64))
    assert seen == [attnzoo.Layout((8,), prefix=1), attnzoo.Layout((4, 4), prefix=1)]
