"""timm's own models inside `tapped`: the same bits, taps that tell the truth, and nothing left behind."""

import copy
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.layers import Attention, AttentionPoolLatent
from torch import nn
from typer.testing import CliRunner

import attnzoo
from attnzoo.bench.composition import default_image
from attnzoo.cli.app import app
from attnzoo.core import Mechanism, MultiHead, watch
from attnzoo.errors import UnsupportedMask, ZooError
from attnzoo.lab.maps import collect, look
from attnzoo.lab.rollout import rollout
from attnzoo.lab.sites import sites_of
from attnzoo.lab.timm_models import KINDS, pool_weights, tapped
from attnzoo.recipe import compose

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2}
STAGES = {"img_size": 32, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4}
FAMILIES = {
    "vit_tiny_patch16_224": TINY | {"img_size": 64},
    "deit_tiny_distilled_patch16_224": TINY | {"img_size": 64},
    "deit3_small_patch16_224": TINY | {"img_size": 64},
    "vit_small_patch14_reg4_dinov2": TINY | {"img_size": 56},
    "vit_base_patch16_siglip_224": TINY | {"img_size": 64},
    "vit_base_patch16_clip_224": TINY | {"img_size": 64},
    "eva_giant_patch14_224": TINY | {"img_size": 56},
    "eva02_tiny_patch14_224": TINY | {"img_size": 56},
    "vit_small_patch16_dinov3": TINY | {"img_size": 64},
    "vit_base_patch16_rope_mixed_224": TINY | {"img_size": 64},
    "vit_pe_core_tiny_patch16_384": TINY | {"img_size": 64},
    "beit_base_patch16_224": TINY | {"img_size": 64},
    "vit_relpos_small_patch16_224": TINY | {"img_size": 64},
    "vit_srelpos_small_patch16_224": TINY | {"img_size": 64},
    "vit_small_patch16_18x2_224": TINY | {"img_size": 64},
    "swin_tiny_patch4_window7_224": STAGES,
    "swinv2_tiny_window8_256": STAGES,
}
ONE_GRID = [name for name in FAMILIES if not name.startswith("swin") and "18x2" not in name]


def made(name: str, **arguments) -> nn.Module:
    """A small model of a family, in eval mode, with biases and tables that are not 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **FAMILIES.get(name, {}) | arguments).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(model: nn.Module, *size: int) -> torch.Tensor:
    """Two images (b 3 y x) of the model's size, or of another."""
    embed = model.patch_embed
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, *(size or embed.img_size), generator=generator)


def everything(model: nn.Module) -> list:
    """Which modules, parameters, buffers and hooks there are, and in which mode."""
    modules = [
        (name, id(part), part.training, dict(part._forward_hooks), dict(part._forward_pre_hooks))
        for name, part in model.named_modules(remove_duplicate=False)
    ]
    tensors = [(name, id(t)) for name, t in (*model.named_parameters(), *model.named_buffers())]
    return [modules, tensors, list(model.state_dict())]


def vit(**arguments) -> nn.Module:
    """A small plain ViT: 64 x 64 images, 1 + 16 tokens."""
    return made("vit_tiny_patch16_224", **arguments)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_bits_are_timms(name):
    model = made(name)
    x, before, random = images(model), everything(model), torch.get_rng_state()
    plain, parameters = model(x), [(key, id(p)) for key, p in model.named_parameters()]
    with tapped(model):
        assert not any(type(part) in KINDS for part in model.modules())
        assert torch.equal(model(x), plain)
        assert list(model.state_dict()) == before[2]
        assert [(key, id(p)) for key, p in model.named_parameters()] == parameters
    assert everything(model) == before and torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_what_is_watched_is_what_happens(name):
    model, heads = made(name), []
    x = images(model)
    plain = model(x)
    with tapped(model):
        for site, mechanism in sites_of(model).items():
            mechanism.inner.register_forward_hook(lambda _part, args, out: heads.append((args[2], out)))
            assert model.get_submodule(f"{site}.attn") is mechanism
        looked = look(model, sites_of(model), (x,))
    torch.testing.assert_close(looked.output, plain, rtol=1e-4, atol=1e-5)
    assert len(looked.maps) == len(heads) and not looked.absent
    for found, (v, out) in zip(looked.maps, heads, strict=True):
        assert found.kind == "weights" and found.stochastic and found.weights.std() > 0
        torch.testing.assert_close(found.weights.sum(dim=-1), torch.ones_like(found.weights[..., 0]))
        torch.testing.assert_close(found.weights @ v, out, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_are_the_softmax_of_timms_queries_and_keys():
    model, seen = vit(), {}
    attn = model.blocks[1].attn
    attn.qkv.register_forward_hook(lambda _part, _args, out: seen.update(qkv=out))
    found = collect(model, images(model)).maps[1].weights
    q, k, _ = seen["qkv"].reshape(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(found, (q @ k.mT / 4).softmax(dim=-1), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_swin_shows_positions_and_what_shifted_windows_hide():
    model = made("swin_tiny_patch4_window7_224")
    with tapped(model):
        looked = look(model, sites_of(model), (images(model),))
    shifted = looked.maps[1].weights  # (b·w h n n); the last window of an image has four regions
    assert shifted.shape == (8, 2, 16, 16) and looked.layouts[1].grid == (4, 4)
    region = torch.tensor([[(y >= 2) * 2 + (x >= 2) for x in range(4)] for y in range(4)]).flatten()
    apart = region[:, None] != region[None]
    assert (shifted[3][:, apart] < 1e-9).all() and (shifted[0][:, apart] > 1e-9).any()


def test_gradients_are_timms():
    model = vit().train()
    model(images(model)).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with tapped(model):
        model(images(model)).square().sum().backward()
    assert all(torch.equal(p.grad, plain[name]) for name, p in model.named_parameters())


MASKS = {
    "pairs": torch.rand(17, 17, generator=torch.Generator().manual_seed(2)) > 0.3,
    "heads": torch.rand(2, 17, 17, generator=torch.Generator().manual_seed(2)) > 0.3,
    "keys": (torch.arange(17) < 9).view(1, 1, 1, 17),
    "samples": torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(2)) > 0.3,
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [*MASKS, "floats", "causal"])
@torch.no_grad()
def test_masks_mean_what_they_mean_to_timm(kind, fused):
    model = vit()
    mask = MASKS.get(kind, MASKS["pairs"]) | torch.eye(17, dtype=torch.bool)
    if kind == "floats":
        mask = torch.zeros(17, 17).masked_fill(~mask, float("-inf"))
    said = {"is_causal": True} if kind == "causal" else {"attn_mask": mask}
    for block in model.blocks:
        block.attn.fused_attn = fused
    x = images(model)
    plain = model(x, **said)
    with tapped(model):
        masked = model(x, **said)
    if kind == "heads" and fused:  # with three axes PyTorch takes another kernel than with four
        torch.testing.assert_close(masked, plain, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(masked, plain)
    assert (model(x) - plain).abs().max() > 1e-2


def test_scores_that_come_as_a_mask_are_refused():
    model = vit()
    with tapped(model), pytest.raises(UnsupportedMask) as caught:
        model(images(model), attn_mask=torch.rand(17, 17))
    assert caught.value.code == "AZ405" and type(model.blocks[0].attn) is Attention


@torch.no_grad()
def test_an_attention_that_is_not_fused_stays_so():
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    x = images(model)
    plain = model(x)
    with tapped(model):
        assert torch.equal(model(x), plain)


@torch.no_grad()
def test_heads_need_not_be_as_wide_as_the_tokens():
    model = vit(attn_drop_rate=0.5)
    for block in model.blocks:
        block.attn = Attention(
            32, num_heads=2, attn_head_dim=24, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm
        )
    x = images(model)
    plain = model(x)
    with tapped(model):
        assert torch.equal(model(x), plain)


def test_keys_for_several_heads_of_queries():
    model = made(
        "vit_small_patch16_dinov3", num_heads=4, attn_type="rope", num_kv_heads=(2, 4), qkv_fused=False
    )
    assert model.blocks[0].attn.num_kv_groups == 2
    with torch.no_grad(), tapped(model):
        inside = model(images(model))
    assert torch.equal(inside, model(images(model)))


@torch.no_grad()
def test_the_grid_is_that_of_the_images():
    model = made("vit_small_patch14_reg4_dinov2", dynamic_img_size=True)
    for rows, columns in ((28, 56), (56, 28), (42, 42)):
        maps = collect(model, images(model, rows, columns))
        assert maps.layout.grid == (rows // 14, columns // 14) and maps.layout.prefix == 5
        assert maps.asked(rollout(maps)).shape == (2, *maps.layout.grid)


@torch.no_grad()
def test_a_block_alone_has_a_line_of_tokens_and_no_positions():
    model = made("vit_small_patch16_dinov3")
    tokens = torch.randn(1, 9, 32)
    plain, seen = model.blocks[0](tokens), []
    with tapped(model):
        hook = model.blocks[0].attn.inner.register_forward_hook(
            lambda _part, _args, said, _out: seen.append(said["layout"]), with_kwargs=True
        )
        assert torch.equal(model.blocks[0](tokens), plain)
        hook.remove()
    assert seen[0].grid == (4,) and seen[0].prefix == 5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_dropped_patches_leave_a_line(name):
    model = made(name, patch_drop_rate=0.5, attn_drop_rate=0.3).train()
    x, seen, out = images(model), [], []

    def forward() -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return model(x)

    plain = forward()
    with tapped(model):
        model.blocks[0].attn.inner.register_forward_hook(
            lambda _part, _args, said, _out: seen.append(said["layout"]), with_kwargs=True
        )
        out.append(forward())
    assert torch.equal(out[0], plain) and seen[0].grid == (8,) and seen[0].prefix == 1


def test_everything_is_undone_after_exceptions():
    model = vit()
    before = everything(model)
    with pytest.raises(RuntimeError), tapped(model):
        model(torch.zeros(1, 4, 64, 64))
    with pytest.raises(KeyError), tapped(model), watch(model, "weights", lambda _name, _seen: {}["no"]):
        model(images(model))
    assert everything(model) == before


def test_nested_blocks_and_models_with_mechanisms_are_left_alone():
    model = vit()
    with tapped(model) as outer:
        mechanism = model.blocks[0].attn
        with tapped(model):
            assert model.blocks[0].attn is mechanism
        assert outer is model and model.blocks[0].attn is mechanism
    own = compose("ham_classic")
    before = everything(own)
    with tapped(own):
        assert everything(own) == before


def test_what_is_done_inside_stays():
    model = made("eva02_tiny_patch14_224")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with tapped(model):
        model.double()
        model.train()
        model.load_state_dict({key: value + 1 for key, value in state.items()})
        model.blocks[1].attn.proj = nn.Identity()
        model.blocks[0].drop_path1 = nn.Dropout(0.0)
    x = images(model).double()
    assert model(x).dtype == torch.float64 and all(part.training for part in model.modules())
    for key in ("blocks.0.attn.qkv.weight", "blocks.0.attn.q_bias"):
        assert torch.equal(model.get_parameter(key), (state[key] + 1).double())
    assert isinstance(model.blocks[1].attn.proj, nn.Identity)
    with tapped(model):
        model.blocks[0].attn = nn.Identity()
    assert isinstance(model.blocks[0].attn, nn.Identity)  # what somebody put there is not thrown away


def test_buffers_move_along():
    model = made("beit_base_patch16_224")
    attn = model.blocks[0].attn
    with tapped(model):
        model.to("meta")
    assert attn.relative_position_index.is_meta and attn.k_bias.is_meta
    assert "relative_position_index" not in dict(attn.state_dict())


@torch.no_grad()
def test_copies_keep_their_taps():
    model = vit(dynamic_img_size=True)
    x = images(model)
    plain = model(x)
    with tapped(model):
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert isinstance(other.blocks[0].attn, MultiHead) and torch.equal(other(x), plain)
        assert other.blocks[0].attn.qkv.weight is not model.blocks[0].attn.qkv.weight
        assert list(other.state_dict()) == list(model.state_dict())
        assert collect(other, images(model, 32, 96)).layout.grid == (2, 6)


@torch.no_grad()
def test_hooks_on_timms_attention_go_on():
    model, seen = vit(), []
    attn = model.blocks[0].attn
    attn.register_forward_pre_hook(lambda _part, args, said: seen.append(set(said)), with_kwargs=True)
    hook = attn.register_forward_hook(lambda _part, _args, out: seen.append(out.shape))
    with tapped(model):
        model(images(model))
        hook.remove()
        model(images(model))
    said = {"attn_mask", "is_causal"}
    assert seen == [said, (2, 17, 32), said]


def test_every_part_keeps_its_mode():
    model = vit()
    model.blocks[0].attn.proj_drop.train()
    modes = [part.training for part in model.modules()]
    collect(model, images(model))
    assert [part.training for part in model.modules()] == modes and any(modes)


def test_two_threads_look_into_two_models():
    sizes = {"vit_tiny_patch16_224": (32, 64), "vit_small_patch14_reg4_dinov2": (56, 28)}
    models = {name: made(name, dynamic_img_size=True) for name in sizes}
    start = threading.Barrier(2)

    def at_work(name: str) -> list:
        start.wait(10)
        return [collect(models[name], images(models[name], *sizes[name])) for _ in range(8)]

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(sizes, pool.map(at_work, sizes), strict=True))
    assert {str(maps.layout) for maps in found["vit_tiny_patch16_224"]} == {"1 + 2 × 4 = 9"}
    assert {str(maps.layout) for maps in found["vit_small_patch14_reg4_dinov2"]} == {"5 + 4 × 2 = 13"}
    for maps in found.values():
        assert all(torch.equal(one.logits, maps[0].logits) for one in maps)


@torch.no_grad()
def test_threads_share_a_model_and_not_its_grid():
    model = vit(dynamic_img_size=True)
    shapes, seen = [(32, 64), (64, 32)], {}
    plain = [model(images(model, *shape)) for shape in shapes]
    step = threading.Barrier(2)

    def forward(i: int) -> torch.Tensor:
        with torch.no_grad():
            return model(images(model, *shapes[i]))

    def note(_part, _args, said, _out) -> None:
        seen.setdefault(threading.get_ident(), []).append(said["layout"].grid)

    def wait(*_) -> None:
        step.wait(10)  # both have cut their images before one goes on

    hook = model.norm_pre.register_forward_hook(wait)
    with tapped(model), ThreadPoolExecutor(2) as pool:
        model.blocks[0].attn.inner.register_forward_hook(note, with_kwargs=True)
        out = list(pool.map(forward, range(2)))
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    assert sorted(map(tuple, seen.values())) == [((2, 4),), ((4, 2),)]


@torch.no_grad()
def test_others_may_call_the_model_meanwhile():
    model = vit()
    x, stop, wrong = images(model), threading.Event(), []
    plain = model(x)

    def call() -> None:
        while not stop.is_set():
            with torch.no_grad():
                wrong.append(not torch.equal(model(x), plain))

    thread = threading.Thread(target=call)
    thread.start()
    for _ in range(20):
        with tapped(model):
            pass
    stop.set()
    thread.join()
    assert wrong and not any(wrong)


@pytest.mark.parametrize("name", ONE_GRID)
def test_maps_and_rollout_of_timms_models(name):
    model = made(name)
    x = images(model)
    with torch.no_grad():
        plain = model(x)
    maps = collect(model, x)
    assert maps.sites == ("blocks.0", "blocks.1") and maps.layout.grid == (4, 4)
    assert maps.layout.prefix == model.num_prefix_tokens and len(maps.maps) == 2
    rolled = rollout(maps)
    torch.testing.assert_close(rolled.sum(dim=-1), torch.ones(2, maps.layout.length))
    assert maps.asked(rolled).shape == (2, 4, 4) and maps.on_grid(maps.maps[0]).shape == (2, 2, 4, 4)
    if model.num_classes:
        torch.testing.assert_close(maps.logits, plain, rtol=1e-4, atol=1e-5)
    else:
        assert maps.logits.shape == (2, 0)


@pytest.mark.parametrize(
    ("name", "options", "reads"),
    [
        ("vit_tiny_patch16_224", {}, "the class token"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "the mean of the grid tokens"),
        (
            "vit_tiny_patch16_224",
            {"global_pool": "avg", "pool_include_prefix": True},
            "the mean of all tokens",
        ),
        ("deit_tiny_distilled_patch16_224", {}, "the mean of class and distillation token"),
        ("vit_base_patch16_siglip_224", {}, "the attention pool"),
        ("vit_pe_core_tiny_patch16_384", {}, "the attention pool"),
        ("eva02_tiny_patch14_224", {}, "the mean of the grid tokens"),
    ],
)
def test_the_answer_is_read_where_it_is_read(name, options, reads):
    """The gradient of the answer at the last tokens says which of them are read."""
    model, last = made(name, **options), []
    x = images(model)
    maps = collect(model, x)
    assert maps.reads == reads
    norm = model.norm if not isinstance(model.norm, nn.Identity) else model.blocks[-1]
    norm.register_forward_hook(lambda _part, _args, out: last.append(out) or out.retain_grad())
    model(x).sum().backward()
    read = last[0].grad.abs().sum(dim=-1) > 0
    everything = torch.eye(maps.layout.length).expand(2, -1, -1)
    prefix = maps.layout.prefix
    if maps.readout is not None:
        assert torch.equal(maps.readout.shares > 0, read)
        torch.testing.assert_close(maps.readout.shares.sum(dim=-1), torch.ones(2))
    torch.testing.assert_close(maps.asked(everything).flatten(1) > 0, read[:, prefix:])


@torch.no_grad()
def test_the_weights_of_a_pool_are_its_own():
    pool, tokens = (
        AttentionPoolLatent(16, num_heads=2, latent_len=3, qk_norm=True, pos_embed="abs", feat_size=5),
        None,
    )
    nn.init.normal_(pool.pos_embed)
    tokens, seen = torch.randn(2, 5, 16), []
    pool.proj.register_forward_pre_hook(lambda _part, args: seen.append(args[0]))
    pool(tokens)
    v = pool.kv(tokens + pool.pos_embed).reshape(2, 5, 2, 2, 8)[:, :, 1].transpose(1, 2)
    merged = (pool_weights(pool, tokens) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(merged, seen[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("vit_small_patch16_18x2_224", {}, "side by side"),
        ("pit_ti_224", {"base_dims": [8, 8, 8], "heads": [1, 2, 4], "depth": [1, 1, 1]}, "merged"),
    ],
)
def test_maps_of_whole_images_are_refused_where_there_are_none(name, arguments, said):
    model = made(name, **arguments)
    before = everything(model)
    size = getattr(model.patch_embed, "img_size", (224, 224))
    with pytest.raises(ZooError) as caught:
        collect(model, torch.zeros(2, 3, *size))
    assert caught.value.code == "AZ903" and said in str(caught.value)
    assert everything(model) == before


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("resnet10t", {}, "is called an attention"),
        ("xcit_nano_12_p16_224", {"depth": 1}, "XCA, where channels look at channels"),
        ("vit_dlittle_patch16_reg1_gap_256", TINY, "difference of two softmaxes"),
        ("vit_dpwee_patch16_reg1_gap_256", TINY, "attention and MLP at once"),
        ("crossvit_tiny_240", {}, "CrossAttention"),
    ],
)
def test_who_has_no_taps_says_why(name, arguments, said):
    model = timm.create_model(name, **arguments)
    for refused in (lambda: tapped(model).__enter__(), lambda: sites_of(model)):
        with pytest.raises(ZooError) as caught:
            refused()
        assert caught.value.code == "AZ903" and said in str(caught.value)


def test_a_gate_is_refused():
    model = vit()
    model.blocks[1].attn = Attention(32, num_heads=2, gated=True)
    before = everything(model)
    with pytest.raises(ZooError, match="gate multiplies"), tapped(model):
        pass
    assert everything(model) == before


def test_classes_derived_from_timms_are_not_taken_for_them():
    class Louder(Attention):
        def forward(self, *args, **said):
            return 2 * super().forward(*args, **said)

    model = vit()
    model.blocks[1].attn.__class__ = Louder
    with pytest.raises(ZooError, match="Louder"), tapped(model):
        pass
    assert type(model.blocks[0].attn) is Attention


def test_what_timms_attention_is_asked_for_is_there():
    model = made("eva02_tiny_patch14_224")
    asked = ("num_heads", "head_dim", "scale", "fused_attn", "num_prefix_tokens", "rotate_half")
    plain = [getattr(model.blocks[0].attn, name) for name in asked]
    with tapped(model):
        assert [getattr(model.blocks[0].attn, name) for name in asked] == plain


def test_a_model_that_could_have_taps_says_how():
    with pytest.raises(ZooError, match="tapped"):
        sites_of(vit())


@pytest.mark.parametrize(
    "name", ["ham_classic", "cct_7_3x1", "lit_small", "dual_scale", "transformer", "deep_head", "recall"]
)
def test_sites_are_called_as_recipes_call_them(name):
    with torch.device("meta"):
        model = compose(name)
    sites = sites_of(model)
    placed = {
        vars(part)["_placed"].site: part
        for part in model.modules()
        if "_placed" in vars(part) and isinstance(part, Mechanism)
    }
    assert sites == placed and len(sites) > 1


def test_a_mechanism_in_a_network_by_hand_is_where_it_is():
    block = nn.Sequential()
    block.add_module("mix", attnzoo.create("softmax", dim=8, heads=2).attn)
    assert list(sites_of(nn.ModuleDict({"head": block}))) == ["head"]


# --- attnzoo heatmap


def run(*arguments: object, code: int = 0) -> str:
    """What `attnzoo heatmap` says."""
    result = CliRunner().invoke(app, ["heatmap", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder as timm writes it: 32 x 32 images of cats and dogs, of mean 0.5."""
    arguments = {"depth": 2, "img_size": 32, "embed_dim": 32, "num_heads": 2}
    model = made("vit_tiny_patch16_224", **arguments, num_classes=2)
    with torch.no_grad():
        model.head.bias[1] += 100  # it always says dog
    config = {"num_classes": 2, "label_names": ["cat", "dog"]}
    timm.models.save_for_hf(
        model, tmp_path / "pets", model_config=config, model_args=arguments, safe_serialization=True
    )
    return tmp_path / "pets"


def test_a_folder_of_timms_is_shown(folder, tmp_path):
    image, out = default_image(), tmp_path / "sheet.png"
    said = run(f"local-dir:{folder}", image, image, "--images", image, "--out", out, "--npy")
    assert "written" in said and "images: 3 · layers: 2" in said and "weights of" in said
    assert np.load(tmp_path / "sheet.npy").shape == (3, 1, 2, 2, 2)
    data = json.loads(run(f"local-dir:{folder}", image, "--out", out, "--json"))
    assert data["images"] == [image.name] and [one["site"] for one in data["maps"]] == [
        "blocks.0",
        "blocks.1",
    ]


def test_a_timm_model_and_its_weights(folder, tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    said = run("test_vit", "--init-from", tmp_path / "w.pth", "--out", one, "--npy")
    assert "weights of w.pth" in said and "layers: 6" in said
    assert "untrained, seed 5" in run("test_vit", "--seed", 5, "--out", other, "--npy")
    assert not np.allclose(np.load(tmp_path / "one.npy"), np.load(tmp_path / "other.npy"), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["resnet10t"], "AZ903", "is called an attention"),
        (["vit_tny_patch16_224"], "AZ204", "did you mean `vit_tiny_patch16_224`?"),
        (["ham_c"], "AZ204", "did you mean `ham_"),
        (["vit_tiny_patch16_224.no_such_tag"], "AZ935", "no_such_tag"),
        (["local-dir:nowhere"], "AZ935", "config.json"),
        (["local-dir:text"], "AZ935", "text"),
        (["local-dir:empty"], "AZ935", "checkpoints"),
        (["local-dir:pets", "--init-from", "w.pth"], "AZ907", "weights of its own"),
        (["local-dir:pets", "--text", "a"], "AZ908", "looks at images"),
        (["local-dir:pets", "none.png"], "AZ902", "no such file"),
        (["recall", "none.png"], "AZ908", "`IMAGE` is for images"),
    ],
)
def test_what_cannot_be_shown_is_told(arguments, code, said, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name, text in (("text", "no JSON"), ("empty", (folder / "config.json").read_text())):
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    output = run(*arguments, code=2)
    assert f"error[{code}]" in output and said in output and "Traceback" not in output


def test_a_recipe_comes_before_a_timm_model(monkeypatch):
    from attnzoo.cli.models import opened

    monkeypatch.setattr(timm, "is_model", lambda name: True)
    assert opened("ham_a", None)[1].name == "ham_a" and opened("vit_tiny_patch16_224", None) == (None, None)
