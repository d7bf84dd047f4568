"""Bases that are not plain ViTs: timm's Eva (EVA-02, DINOv3, PE), hybrid patch embeddings, norms after attention."""

import copy
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import apply_rot_embed_cat
from timm.models import model_entrypoint
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import attnzoo
from attnzoo import parallel
from attnzoo.core import Layout, MultiHead, Rotation, Site
from attnzoo.errors import LayoutMismatch, RecipeError, UnknownArgument, ZooError
from attnzoo.hosts.vision_transformer import host_info
from attnzoo.recipe import compose_file
from attnzoo.recipe.weights import init_model, save

SMALL = {"depth": 2, "num_classes": 5, "embed_dim": 48, "num_heads": 3}
KINDS = {
    "eva": ("eva_giant_patch14_clip_224", 14, {"mlp_ratio": 2.0}),
    "eva02": ("eva02_tiny_patch14_224", 14, {}),
    "eva02 separate": ("eva02_base_patch14_224", 14, {}),
    "eva02 scaled": ("eva02_base_patch16_clip_224", 16, {}),
    "eva02 post-norm": ("eva02_enormous_patch14_clip_224", 14, {"mlp_ratio": 2.0}),
    "dinov3": ("vit_small_patch16_dinov3", 16, {}),
    "dinov3 biases": ("vit_small_plus_patch16_dinov3_qkvb", 16, {}),
    "pe": ("vit_pe_core_tiny_patch16_384", 16, {}),
    "rope": ("vit_medium_patch16_rope_reg1_gap_256", 16, {}),
    "rope mixed": ("vit_small_patch16_rope_mixed_ape_224", 16, {}),
    "sapiens2": ("vit_base_patch16_sapiens2", 16, {"num_heads": 4, "embed_dim": 64, "num_kv_heads": (4, 2)}),
    "hybrid": ("vit_tiny_r_s16_p8_224", 32, {}),
    "res-post": ("vit_base_patch16_rpn_224", 16, {}),
}
"""What is tried: a base of timm's, pixels of a token, and what keeps it small."""
TURNED = ["eva02", "dinov3", "rope mixed"]
"""One of each of timm's rotary positions."""
HAM = {"fuse": "hadamard", "of": ["softmax", {"use": "soft"}]}


def arguments(kind: str, **more) -> dict:
    return {**SMALL, "img_size": 4 * KINDS[kind][1], **KINDS[kind][2], **more}


def recipe(kind: str, attention="softmax", **more) -> dict:
    return {"recipe": 1, "host": {"kind": "vit", "base": KINDS[kind][0]}, "attention": attention, **more}


def mine(kind: str, attention="softmax", said=None, **more):
    torch.manual_seed(0)
    return attnzoo.compose(recipe(kind, attention, **(said or {})), **arguments(kind, **more)).eval()


def lively(model: nn.Module) -> nn.Module:
    """The model with weights none of which is left at zero or one, so that logits are not all but zero."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def both(kind: str, **more):
    """Ours and timm's with timm's weights."""
    theirs = lively(timm.create_model(KINDS[kind][0], **arguments(kind, **more)).eval())
    ours = mine(kind, **more)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def images(kind: str, batch=2, rows=4, columns=4):
    side = KINDS[kind][1]
    return torch.randn(batch, 3, rows * side, columns * side, generator=torch.Generator().manual_seed(1))


def same(ours: Callable, theirs: Callable, *args, **options) -> None:
    """Bit for bit, from one seed."""
    outs = []
    for run in ours, theirs:
        torch.manual_seed(3)
        outs.append(run(*args, **options))
    assert torch.equal(*outs) and outs[0].std() > 1e-3


# ----------------------------------------------------------------------------------------------------- timm's numbers


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_is_timms_bit_for_bit(kind):
    ours, theirs = both(kind)
    assert all(isinstance(block.attn, MultiHead) for block in ours.blocks)
    x = images(kind)
    with torch.no_grad():
        same(ours, theirs, x)
        same(ours.forward_features, theirs.forward_features, x)
        (a, inner), (b, others) = ours.forward_intermediates(x), theirs.forward_intermediates(x)
        assert torch.equal(a, b) and all(map(torch.equal, inner, others))
    for model in ours.train(), theirs.train():
        torch.manual_seed(3)
        model(x).square().sum().backward()
    grads = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert (parameter.grad is None) == (grads[name].grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name].grad), name


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_timms(kind):
    ours, theirs = both(kind)
    for model in ours, theirs:
        model.set_input_size((3 * KINDS[kind][1], 5 * KINDS[kind][1]))
    same(ours, theirs, images(kind, 2, 3, 5))
    ours, theirs = both(kind, dynamic_img_size=True)
    for grid in (4, 4), (3, 6), (5, 3):
        same(ours, theirs, images(kind, 2, *grid))
    assert mine(kind, img_size=5 * KINDS[kind][1]).layout.grid == (5, 5)


@pytest.mark.parametrize("kind", TURNED)
def test_training_is_timms(kind):
    """Dropped patches have the positions of their own places, and coordinates are drawn once for all blocks."""
    for more in (
        {"patch_drop_rate": 0.5},
        {"rope_shift_coords": 0.3, "rope_jitter_coords": 2.0, "rope_rescale_coords": 2.0},
        {"attn_drop_rate": 0.2, "proj_drop_rate": 0.2, "drop_path_rate": 0.3, "patch_drop_rate": 0.25},
    ):
        ours, theirs = both(kind, **more)
        evaluated = ours(images(kind))
        same(ours.train(), theirs.train(), images(kind))
        assert not torch.equal(ours(images(kind)), evaluated)


@pytest.mark.parametrize("kind", [*TURNED, "res-post"])
def test_masks_and_half_precision_are_timms(kind):
    ours, theirs = both(kind)
    n = ours.layout.length
    pairs = (torch.rand(n, n) > 0.4) | torch.eye(n, dtype=torch.bool)
    with torch.no_grad():
        same(ours, theirs, images(kind), attn_mask=pairs)
        same(ours, theirs, images(kind), is_causal=True)
        assert not torch.equal(ours(images(kind), attn_mask=pairs), ours(images(kind)))
        with torch.autocast("cpu", torch.bfloat16):
            same(ours, theirs, images(kind))
        same(ours.bfloat16(), theirs.bfloat16(), images(kind).bfloat16())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(9, 32), (2, 1, 9, 32), (3, 9, 32), (2, 3, 9, 32)], ids=str)
def test_turning_is_timms(half, shape):
    x, table = torch.randn(2, 3, 11, 16), torch.randn(shape)
    turned = Layout((9,), 2, Rotation(table, half)).turn(x)
    assert torch.equal(turned[:, :, 2:], apply_rot_embed_cat(x[:, :, 2:], table, half=half))
    assert torch.equal(turned[:, :, :2], x[:, :, :2])
    assert Layout((9,), 2, Rotation(table, half)) == Layout((9,), 2)


# ------------------------------------------------------------------------------------------------------- mechanisms


@pytest.mark.parametrize("kind", ["eva02 separate", "dinov3", "rope mixed", "sapiens2", "res-post"])
def test_ham_learns(kind):
    model = mine(kind, HAM, drop_path_rate=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    x, labels, losses = images(kind, 4), torch.arange(4), []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1.2 < 1.5 < losses[0], losses
    assert not [name for name, p in model.named_parameters() if p.grad is None and "attn" in name]


def test_a_recipe_over_several_sites():
    overrides = [{"at": "blocks.1", "put": "linformer"}]
    model = lively(mine("eva02", HAM, {"overrides": overrides, "skip": "merged_post"}, depth=3))
    plain = lively(mine("eva02", HAM, {"overrides": overrides}, depth=3))
    assert [block.attn.card.name for block in model.blocks] == ["hadamard", "linformer", "hadamard"]
    assert not torch.allclose(model(images("eva02")), plain(images("eva02")))


@pytest.mark.parametrize(
    "name", ["softmax", "gated_attention", "native_sparse", "dynamic_mask", "selective_heads"]
)
def test_a_line_s_table_turns_as_a_line(name):
    """Who honours rotary positions takes the host's: with the sines of a line they give what a line does."""
    plan = compose_file(recipe("eva02", name)).plans["blocks.0"]
    site = Site("blocks.0", 24, 3, Layout((6,)), rotary=True)
    torch.manual_seed(0)
    line = plan.build(site)
    other = plan.build(Site("blocks.0", 24, 3, Layout((6,)), rotary=True, rotation=(1, 8)))
    other.load_state_dict(line.state_dict())
    angles = torch.arange(6.0)[:, None] * 10_000 ** (-torch.arange(0, 8, 2) / 8)
    angles = angles.repeat_interleave(2, dim=-1)
    x = torch.randn(2, 6, 24)
    layouts = [Layout((6,), 0, Rotation(torch.cat([a.sin(), a.cos()], -1))) for a in (angles, 0 * angles)]
    out, still = (other(x, layout=layout) for layout in layouts)
    torch.testing.assert_close(out, line(x, layout=Layout((6,))), rtol=0, atol=1e-6)
    assert not torch.allclose(out, still, atol=1e-4)


@pytest.mark.parametrize("kind", ["eva02 separate", "dinov3", "rope mixed"])
def test_a_fusion_that_starts_as_softmax_starts_as_timm(kind):
    _, theirs = both(kind)
    start = mine(kind, {**HAM, "with": {"start": "identity"}})
    missing, unexpected = start.load_state_dict(theirs.state_dict(), strict=False)
    assert missing and not unexpected
    same(start, theirs, images(kind))
    assert compose_file(recipe(kind, {**HAM, "with": {"start": "identity"}})).starts_equal


def test_pools_maps_and_the_rollout():
    x = images("dinov3")
    pooled = lively(mine("dinov3", said={"pool": "lama"}))
    assert pooled(x).shape == (2, 5) and pooled(x).std() > 0.1 and pooled.global_pool == "pool"
    for kind in "dinov3", "hybrid":
        model = lively(mine(kind, "region"))
        side, x = KINDS[kind][1], images(kind)
        tokens = torch.randint(0, 3, (2, 4, 4))
        pixels = tokens.repeat_interleave(side, 1).repeat_interleave(side, 2)
        assert torch.equal(model(x, regions=pixels), model(x, regions=tokens))
        assert not torch.equal(model(x, regions=tokens), model(x, regions=torch.zeros_like(tokens)))
    put = [{"at": "blocks.1", "put": "global_local_cross"}]
    assert mine("eva", said={"overrides": put})(images("eva")).shape == (2, 5)


# -------------------------------------------------------------------------------------------------------------- tools


@pytest.mark.parametrize("kind", ["dinov3", "rope mixed", "sapiens2"])
@pytest.mark.sample(9)
def test_compile_export_and_fx(kind):
    more = {"num_kv_heads": 2} if kind == "sapiens2" else {}
    model, x, other = lively(mine(kind, HAM, depth=1, **more)), images(kind), images(kind, 3)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), model(x), atol=1e-5) and model(x).std() > 0.1
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
        assert torch.allclose(program(other), model(other), atol=1e-5)
        graph = create_feature_extractor(model, return_nodes={"head": "out"})
        assert torch.allclose(graph(other)["out"], model(other), atol=1e-5)


@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", TURNED)
def test_many_threads_with_images_of_several_sizes(kind, again):
    model = lively(mine(kind, HAM, dynamic_img_size=True))
    model.set_grad_checkpointing(again)
    inputs = [images(kind, 1 + i % 2, *grid) for i, grid in enumerate([(2, 3), (3, 2), (1, 6), (4, 1)])]
    alone = [model(x) for x in inputs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(lambda i: torch.equal(model(inputs[i % 4]), alone[i % 4]), range(48)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("skip", [None, "merged", "probs_pairmean"])
@pytest.mark.parametrize("kind", [*TURNED, "res-post"])
def test_checkpointing_computes_the_same_again(kind, skip):
    """Two forwards of different images before one backward."""
    grads = []
    for again in False, True:
        model = lively(mine(kind, said={"skip": skip} if skip else None, depth=3, drop_path_rate=0.2)).train()
        model.set_grad_checkpointing(again)
        torch.manual_seed(1)
        one, other = model(images(kind)), model(images(kind).flip(0) + 1)
        (one + 2 * other).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 20 and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", ["eva02", "eva02 separate", "dinov3 biases", "pe", "rope mixed", "hybrid"])
def test_weights_and_copies(kind, tmp_path):
    ours, theirs = both(kind)
    x, file = images(kind), tmp_path / "weights.safetensors"
    save_file(theirs.state_dict(), file)
    out = theirs(x)
    assert torch.equal(ours(x), out)
    for again in copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)):  # noqa: S301 - our own bytes
        assert torch.equal(again(x), out)
    save(ours, tmp_path / "folder")
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert type(again) is type(ours) and torch.equal(again(x), out)
    blank = mine(kind)
    assert init_model(blank, file)["new"] == [] and torch.equal(blank(x), out)
    overlay = {"file": str(file), "num_classes": 5}
    loaded = mine(kind, pretrained=True, pretrained_cfg_overlay=overlay, img_size=5 * KINDS[kind][1])
    assert torch.equal(loaded.blocks[0].attn.proj.weight, theirs.blocks[0].attn.proj.weight)
    assert loaded(images(kind, 1, 5, 5)).shape == (1, 5)


def test_weights_as_their_authors_wrote_them(tmp_path):
    """Meta's names of DINOv3: timm's filter of the base's own module makes them timm's."""
    kind = "dinov3 biases"
    ours, theirs = both(kind)
    words = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    state = {}
    for key, value in theirs.state_dict().items():
        for timms, metas in words.items():
            key = key.replace(timms, metas)
        state[key] = value
    for i in range(len(theirs.blocks)):
        q, v = (state.pop(f"blocks.{i}.attn.{one}_bias") for one in "qv")
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    file, x = tmp_path / "meta.safetensors", images(kind)
    save_file(state, file)
    blank = mine(kind)
    assert init_model(blank, file)["new"] == [] and torch.equal(blank(x), theirs(x))
    loaded = mine(kind, pretrained=True, pretrained_cfg_overlay={"file": str(file), "num_classes": 5})
    assert torch.equal(loaded(x), theirs(x))


@pytest.mark.parametrize("kind", ["eva02", "eva02 separate", "rope mixed"])
def test_packed_weights_and_adapters(kind):
    """Biases beside their projection are added to what somebody else puts in its place."""
    from peft import LoraConfig, get_peft_model

    model, x = lively(mine(kind)), images(kind)
    out = model(x)
    with torch.no_grad():
        assert torch.allclose(attnzoo.accelerate(model)(x), out, atol=1e-4) and out.std() > 0.1
    targets = ["q_proj"] if kind == "eva02 separate" else ["qkv"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    assert torch.allclose(adapted(x), out, atol=1e-4)
    adapted(x).square().sum().backward()
    grads = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(grads) == 2 and all(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("eva02", "its biases stand beside the projection"),
        ("eva02 separate", "its queries, keys and values have a projection each"),
        ("rope mixed", "the host turns every head in its own way"),
        ("pe", ""),
    ],
)
def test_which_heads_are_divided_among_devices(kind, reason):
    assert parallel._reason(mine(kind).blocks[0].attn, 3) == reason


def test_timms_arguments():
    text = """
        recipe: 1
        host:
          kind: vit
          base: vit_small_patch16_dinov3
          model: {depth: 2, embed_dim: 48, num_heads: 3, reg_tokens: 2, fc_norm: true, norm_layer: rmsnorm, pos_embed: learn}
        attention: softmax
    """
    model = timm.create_model(
        "attnzoo_vit", recipe=text, in_chans=1, num_classes=7, img_size=64, global_pool="avg"
    )
    assert model.num_prefix_tokens == 3 and model.pos_embed.shape == (1, 19, 48)
    assert type(model.fc_norm).__name__ == type(model.blocks[0].norm1).__name__ == "RmsNorm"
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    model.reset_classifier(0, "token")
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 48)
    maps = mine("dinov3", HAM, features_only=True, out_indices=(0, 1))(images("dinov3"))
    assert [tuple(one.shape) for one in maps] == [(2, 48, 4, 4)] * 2
    with pytest.raises(UnknownArgument, match="takes no argument `act_layer`"):
        mine("dinov3", act_layer="relu")
    with pytest.raises(RecipeError, match="`num_kv_heads`, one number"):
        mine("sapiens2", depth=3)


def test_initialisation_is_timms():
    """Linears from N(0, 0.02²), the last of a block scaled by its depth; biases and what a component starts with."""
    torch.manual_seed(0)
    model = attnzoo.compose(recipe("eva02", HAM), depth=3, img_size=28)
    for layer, block in enumerate(model.blocks):
        assert abs(block.attn.proj.weight.std() / (0.02 / (2 * (layer + 1)) ** 0.5) - 1) < 0.05
        assert abs(block.mlp.fc2.weight.std() / (0.02 / (2 * (layer + 1)) ** 0.5) - 1) < 0.05
        assert abs(block.attn.qkv.weight.std() / 0.02 - 1) < 0.05 and not block.attn.q_bias.any()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.init_weights()
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before["blocks.0.attn.qkv.weight"])
    own = attnzoo.compose(recipe("eva02", "selective_heads"), depth=1, img_size=28).blocks[0].attn
    assert abs(own.qkv.weight.std() / (2 / (192 + 64)) ** 0.5 - 1) < 0.05  # Xavier's, as its authors have it
    normal = attnzoo.compose(
        {**recipe("eva02"), "host": {**recipe("eva02")["host"], "init": "normal"}}, depth=2
    )
    assert abs(normal.blocks[1].attn.proj.weight.std() / 0.02 - 1) < 0.05


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "kind, attention, said, code, text",
    [
        ("eva02", "softmax", {"heads": 6}, "AZ316", "turn heads of 16 channels; 6 heads of a width of 48"),
        ("rope mixed", "softmax", {"heads": 6}, "AZ316", "turn 3 heads of 16 channels"),
        ("eva02", {"use": "softmax", "heads": 1}, {}, "AZ316", "1 heads of a width of 48 have 48 each"),
        ("rope mixed", "native_sparse", {}, "AZ316", "turn each of 3 heads in its own way; there are 1 heads"),
        ("rope mixed", {"fuse": "head_split", "level": "tokens", "of": ["softmax"] * 3}, {}, "AZ316", "1 heads of"),
        ("dinov3", "external", {}, "AZ302", "rotary positions are turned inside the heads"),
        ("sapiens2", "talking_heads", {"overrides": [{"at": "*", "put": "mixture_of_heads"}]}, "AZ302", "rotary"),
    ],
)  # fmt: skip
def test_what_the_host_s_positions_cannot_turn(kind, attention, said, code, text):
    with pytest.raises(RecipeError, match=text) as error:
        mine(kind, attention, said)
    assert error.value.code == code and all(d.help and d.place for d in error.value.diagnostics)


@pytest.mark.parametrize(
    "kind, said, code, help",
    [
        ("dinov3", {"num_heads": 8}, "AZ316", "a multiple of 4 channels"),
        ("dinov3", {"num_heads": 7}, "AZ308", "choose one of 1, 2, 3"),
        ("eva02", {"num_heads": 8}, "AZ309", "a multiple of 4 channels"),
        ("rope mixed", {"num_heads": 8}, "AZ309", "a multiple of 4 channels"),
        ("hybrid", {"img_size": 100}, "AZ309", "multiples of the pixels"),
        ("dinov3", {"img_size": 70}, "AZ320", "a multiple of `patch_size`"),
        ("dinov3", {"use_naflex": True}, "AZ309", "leave `use_naflex` out"),
    ],
)
def test_arguments_that_do_not_go_together(kind, said, code, help):
    with pytest.raises(RecipeError) as error:
        mine(kind, **said)
    (fault,) = error.value.diagnostics
    assert fault.code == code and help in fault.help


def test_a_block_alone_needs_positions():
    model = mine("eva02")
    tokens = torch.randn(1, 17, 48)
    with pytest.raises(LayoutMismatch, match="rope=") as error:
        model.blocks[0](tokens)
    assert error.value.code == "AZ401"
    theirs = timm.create_model(KINDS["eva02"][0], **arguments("eva02")).eval()
    theirs.load_state_dict(model.state_dict())
    rope = model.rope.get_embed()
    assert torch.equal(model.blocks[0](tokens, rope=rope), theirs.blocks[0](tokens, rope=rope))
    assert mine("eva").blocks[0](tokens).shape == tokens.shape


@pytest.mark.parametrize(
    "base, why",
    [
        ("vit_base_patch16_xp_224", "ParallelScalingBlock, which project for attention and MLP at once"),
        (
            "vit_dpwee_patch16_reg1_gap_256",
            "DiffParallelScalingBlock, which project for attention and MLP at once",
        ),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock, which have several attentions side by side"),
        ("beit_base_patch16_224", "it is a Beit, not a VisionTransformer or Eva"),
        ("swin_tiny_patch4_window7_224", "it is a SwinTransformer"),
    ],
)
def test_what_cannot_be_a_host(base, why):
    with pytest.raises(RecipeError) as error:
        host_info(base, {})
    (fault,) = error.value.diagnostics
    assert fault.code == "AZ310" and why in fault.why and base in fault.message and fault.help


def timms_names() -> list[str]:
    """All that timm builds as a VisionTransformer or an Eva, but for the models of recipes."""
    modules = ["vision_transformer", "vision_transformer_hybrid", "deit", "eva"]
    names = [name for module in modules for name in timm.list_models(module=module)]
    return [name for name in names if model_entrypoint(name).__module__.startswith("timm.")]


OTHER_ATTENTION = {"vit_dlittle_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256"}
"""Their own attention is differential, so with softmax they are other models."""


def test_another_attention_is_not_said_to_be_the_base():
    said = {"recipe": 1, "host": {"kind": "vit", "model": {"depth": 1}}, "attention": "softmax"}
    for base, equal in [(name, False) for name in OTHER_ATTENTION] + [("vit_wee_patch16_reg1_gap_256", True)]:
        assert compose_file({**said, "host": {**said["host"], "base": base}}).starts_equal == equal


@pytest.mark.slow
def test_every_name(monkeypatch):
    monkeypatch.setenv("ATTNZOO_FORCE", "1")  # nothing is allocated here
    names, refused, strange = timms_names(), dict[str, ZooError](), dict[str, set[str]]()
    for name in names:
        small = (
            {} if name.endswith("sapiens2") else {"depth": 1}
        )  # whose blocks differ in their heads of keys
        try:
            info = host_info(name, small)
        except ZooError as error:
            refused[name] = error
            continue
        said = {"recipe": 1, "host": {"kind": "vit", "base": name}, "attention": "softmax"}
        model = attnzoo.compose(said, device="meta", **small)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        theirs = {key: tuple(value.shape) for key, value in info.model.state_dict().items()}
        if shapes != theirs:
            strange[name] = {
                key for key in shapes.keys() | theirs.keys() if shapes.get(key) != theirs.get(key)
            }
    told = [f"accepted {len(names) - len(refused)} of {len(names)} names of timm {timm.__version__}"]
    for name, error in refused.items():
        (fault,) = error.diagnostics
        told.append(f"refused {name}: {fault.code} {fault.why}")
        assert fault.code == "AZ310" and fault.message and fault.why and fault.help
    sys.stdout.write("\n" + "\n".join(told) + "\n")  # `pytest -s` shows it
    assert len(names) > 200 and len(names) - len(refused) >= 0.95 * len(names)
    assert strange.keys() == OTHER_ATTENTION
    assert all(".attn." in key for keys in strange.values() for key in keys)
