"""Grafting: bits of the first outputs, a ledger of every tensor, and the donor again."""

import copy
import json
import pickle
import random
import re

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer
from torch import nn
from typer.testing import CliRunner

import attnzoo
from attnzoo.cli.app import app
from attnzoo.errors import RecipeError, ZooError
from attnzoo.grafting import Graft, save_graft
from attnzoo.grafting.donor import described, seeded
from attnzoo.grafting.grafts import FILES, first_difference
from attnzoo.hosts.given import stand_ins, taken
from attnzoo.recipe import load, resolve
from attnzoo.recipe.schema import VitHost
from attnzoo.recipe.weights import save
from attnzoo.train.checkpoint import fingerprint
from attnzoo.zoo import load_zoo

SMALL = {"depth": 2, "num_classes": 5}
DONORS = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "embed_dim": 96},
    "vit_base_patch16_siglip_224": {"img_size": 64, "embed_dim": 48, "num_heads": 4},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "vit_small_patch16_dinov3": {"img_size": 64, "embed_dim": 96},
    "eva_giant_patch14_224": {"img_size": 56, "embed_dim": 64, "num_heads": 4},
    "vit_base_patch16_clip_quickgelu_224": {"img_size": 64, "embed_dim": 48, "num_heads": 4},
}
"""timm models of every kind that can be a host, made small."""
FULL = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
)


def lively(model: nn.Module, seed: int = 1) -> nn.Module:
    """A model whose every learnt number is drawn, so that none is where its initialisation left it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def donor(name: str = "vit_tiny_patch16_224", **more) -> nn.Module:
    said = SMALL | DONORS.get(name, {}) | more
    return lively(timm.create_model(name, **said)).eval()


def tiny(**more) -> nn.Module:
    return donor(**{"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 4} | more)


def spec(attention, **said) -> dict:
    return {"recipe": 1, "name": "mine", "host": {"kind": "vit"}, "attention": attention, **said}


def images(model: nn.Module, count: int = 2) -> torch.Tensor:
    return torch.randn(count, model.in_chans, *model.patch_embed.img_size)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models are of one class and have the same tensors, bit for bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    return (
        type(one) is type(other)
        and list(mine) == list(theirs)
        and all(mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]) for key in mine)
    )


def audit(model: nn.Module, made: nn.Module, ledger) -> None:
    """Hold a ledger to the tensors: all are in it, and each is what it says."""
    theirs, mine = model.state_dict(), made.state_dict()
    assert {row.donor for row in ledger.rows if row.donor} == theirs.keys()
    assert {row.graft for row in ledger.rows if row.graft} == mine.keys()
    told: dict = {}
    for row in ledger.rows:
        told.setdefault(row.graft, set()).add(row.kind)
        assert (row.donor is None) == (row.kind == "new") and (row.graft is None) == (row.kind == "dropped")
        assert row.donor is None or row.donor_shape == tuple(theirs[row.donor].shape)
        assert row.graft is None or row.graft_shape == tuple(mine[row.graft].shape)
        if row.kind == "copied":
            assert torch.equal(theirs[row.donor], mine[row.graft])
        if row.kind == "reshaped":
            numbers = set(theirs[row.donor].flatten().tolist())
            assert numbers & set(mine[row.graft].flatten().tolist())
    for name, kinds in told.items():
        assert name is None or len(kinds) == 1
    placed = {row.donor for row in ledger.rows if row.graft}
    assert not placed & {row.donor for row in ledger.rows if row.kind == "dropped"}
    counts = ledger.counts()
    assert counts["copied"] + counts["reshaped"] + counts["new"] == len(mine)
    assert sum(group.tensors for group in ledger.groups() if group.kind != "dropped") == len(mine)


# ------------------------------------------------------------------------------------------------------- first outputs


@pytest.mark.parametrize("name", DONORS)
def test_ham_b_starts_as_the_donor_and_leaves_it_again(name):
    model = donor(name)
    made, ledger = attnzoo.graft(model, "ham_b")
    x = images(model)
    assert torch.equal(made(x), model(x)) and made(x).std() > 0.01
    assert ledger.difference == 0 and "bit for bit" in ledger.notes[-1]
    assert ledger.counts()["copied"] == len(model.state_dict()) and ledger.counts()["dropped"] == 0
    audit(model, made, ledger)
    assert same(attnzoo.ungraft(made), model) and torch.equal(attnzoo.ungraft(made)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_five_timm_vits_as_they_are(name, tmp_path):
    model = lively(timm.create_model(name)).eval()
    made, ledger = attnzoo.graft(model, "ham_b")
    x = images(model)
    with torch.no_grad():
        assert torch.equal(made(x), model(x))
    audit(model, made, ledger)
    save_graft(made, tmp_path / "graft")
    again = attnzoo.ungraft(tmp_path / "graft")
    with torch.no_grad():
        assert same(again, model) and torch.equal(again.eval()(x), model(x))


def test_the_others_enter_when_gamma_moves():
    """The first outputs are the donor's because γ is 0, not because the others are not there."""
    model = tiny()
    made, _ = attnzoo.graft(model, "ham_b")
    x = images(model)
    with torch.no_grad():
        made.blocks[1].attn.inner.fusion.gamma.fill_(0.5)
    assert not torch.equal(made(x), model(x))


def test_start_as_the_recipe_says():
    model = tiny()
    made, ledger = attnzoo.graft(model, "ham_b", start="recipe")
    x = images(model, 1)
    assert "gamma" not in "".join(made.state_dict()) and ledger.difference > 0.01
    assert not torch.equal(made(x), model(x)) and "does not start as" in ledger.notes[-1]
    free = {"fuse": "add", "with": {"start": "free"}, "of": ["softmax", "soft"]}
    assert attnzoo.graft(model, spec(free))[1].difference > 0.01


@pytest.mark.parametrize(
    "attention",
    [
        {"fuse": "mean", "level": "tokens", "of": ["softmax", "elu_linear", "mixture_of_heads"]},
        {"fuse": "weighted_sum", "of": [{"fuse": "difference", "of": ["softmax", "cosine"]}, "soft"]},
        {"fuse": "serial", "level": "tokens", "of": ["softmax", "elu_linear"]},
    ],
)
def test_fusions_start_as_their_first_branch(attention):
    model = tiny()
    made, ledger = attnzoo.graft(model, spec(attention, overrides=[{"at": "blocks.1", "put": attention}]))
    x = images(model)
    assert torch.equal(made(x), model(x)) and ledger.difference == 0
    assert any("`start: identity` was set" in note for note in ledger.notes)
    audit(model, made, ledger)


@pytest.mark.parametrize(
    "said, why",
    [
        ({"attention": "elu_linear"}, "`elu_linear` does not start"),
        ({"attention": {"fuse": "add", "of": ["elu_linear", "softmax"]}}, r"`add\(elu_linear, softmax\)`"),
        ({"attention": {"fuse": "head_split", "of": ["softmax", "elu_linear"]}}, "`head_split"),
        ({"attention": "softmax", "skip": "merged"}, "`skip: merged`"),
        ({"attention": "softmax", "pool": "lama"}, "`pool: lama`"),
    ],
)
def test_what_cannot_start_as_the_donor_says_so(said, why):
    model = tiny()
    made, ledger = attnzoo.graft(model, spec(**said))
    with torch.no_grad():
        x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        found = float((made(x).double() - model(x).double()).abs().max())
    assert ledger.difference == found > 0
    assert re.search(why, ledger.notes[-1]) and f"{found:.3g}" in ledger.notes[-1]
    audit(model, made, ledger)
    assert same(attnzoo.ungraft(made), model)


# ---------------------------------------------------------------------------------------------------------- the ledger


def vit_recipes() -> list[str]:
    """The shipped recipes that are put into a ViT."""
    names = load_zoo().recipes
    hosts = {
        name: load(str(entry.value)).recipe.host for name, entry in names.items() if entry.plugin == "attnzoo"
    }
    return sorted(name for name, host in hosts.items() if isinstance(host, VitHost) and name != "third_party")


def donor_of(name: str) -> nn.Module:
    """A plain timm model of the depth, grid and heads of a recipe, but narrow."""
    info = resolve(load(name)).info
    heads = info.arguments.get("num_heads") or info.model.blocks[0].attn.num_heads
    most = max(info.heads, default=heads)
    arguments = {"embed_dim": 8 * most, "num_heads": heads, "num_classes": 3, **dict(info.arguments)}
    if info.dim > 64:
        size = {"img_size": [112, 112]} if info.image[1] == 224 else {}
        arguments |= {"embed_dim": 8 * most, "num_classes": 3} | size
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    arguments.pop("norm_eps", None)
    if arguments.get("global_pool") == "":  # the recipe has a pool of its own
        arguments["global_pool"] = "avg"
    return lively(timm.create_model(info.base, **arguments)).eval()


def test_there_are_many_recipes():
    assert len(vit_recipes()) > 110


@pytest.mark.parametrize("name", vit_recipes())
@pytest.mark.sample(14)
def test_every_recipe_s_ledger_has_every_tensor(name):
    model = donor_of(name)
    made, ledger = attnzoo.graft(model, name)
    audit(model, made, ledger)
    assert same(attnzoo.ungraft(made), model)
    x = images(model)
    with torch.no_grad():
        out = made(x, **stand_ins(x, taken(made)))
        assert out.shape == model(x).shape and out.isfinite().all()
        assert first_difference(model, made) == ledger.difference


def test_an_audit_notices():
    """Of the audit itself: a ledger that leaves a tensor out, or lies about one, does not pass."""
    model = tiny()
    made, ledger = attnzoo.graft(model, "ham_b")
    rows = ledger.rows
    wrong = rows[0].model_copy(update={"graft": rows[1].graft, "graft_shape": rows[1].graft_shape})
    for others in rows[1:], rows[:-1], (wrong, *rows[1:]):
        with pytest.raises(AssertionError):
            audit(model, made, ledger.model_copy(update={"rows": others}))
    with torch.no_grad():
        made.head.weight[0, 0] += 1
    with pytest.raises(AssertionError):
        audit(model, made, ledger)


def kinds(ledger, block: str = "blocks.0.attn.") -> dict[str, list]:
    """Kind and donors of each tensor of a block's attention."""
    found: dict[str, list] = {}
    for row in ledger.rows:
        if row.graft and row.graft.startswith(block):
            donor = row.donor and row.donor.removeprefix(block)
            found.setdefault(row.graft.removeprefix(block), []).append((row.kind, donor))
    return found


def test_projections_go_to_the_projections():
    model = tiny()
    q, k, v = model.blocks[0].attn.qkv.weight.chunk(3)
    made, ledger = attnzoo.graft(model, spec("conv_projection"))
    attn, told = made.blocks[0].attn, kinds(ledger)
    assert torch.equal(attn.q.weight, q) and torch.equal(attn.k.weight, k) and torch.equal(attn.v.weight, v)
    assert told["q.weight"] == told["v.weight"] == [("reshaped", "qkv.weight")]
    assert told["proj.weight"] == [("copied", "proj.weight")]
    made, ledger = attnzoo.graft(model, spec("deformable"))
    assert torch.equal(made.blocks[0].attn.kv.weight, torch.cat([k, v]))
    made, ledger = attnzoo.graft(model, spec("msa_conv"))
    assert torch.equal(made.blocks[0].attn.qkv.weight.flatten(1), model.blocks[0].attn.qkv.weight)
    assert kinds(ledger)["qkv.weight"] == [("reshaped", "qkv.weight")]


def test_what_was_drawn_stays_drawn():
    """`freeze_qk`: queries and keys are compared as they were drawn; values and what comes after are the donor's."""
    model = tiny()
    made, ledger = attnzoo.graft(model, spec({"use": "random_feature_layer", "with": {"qk": "frozen"}}))
    attn, told = made.blocks[0].attn, kinds(ledger)
    assert told["q"] == told["k"] == [("new", None)] and told["v.weight"] == [("reshaped", "qkv.weight")]
    assert torch.equal(attn.v.weight, model.blocks[0].attn.qkv.weight.chunk(3)[2])
    assert not torch.equal(attn.q, model.blocks[0].attn.qkv.weight.chunk(3)[0])


def test_an_lstm_keeps_the_output_projection_where_it_has_one():
    """`bilstm`: in the later version of FAR the donor's; of the first, whose map takes both ways at once, nothing."""
    model = tiny()
    made, ledger = attnzoo.graft(model, spec({"use": "bilstm", "with": {"variant": "head_proj"}}))
    told = kinds(ledger)
    assert told["proj.weight"] == [("copied", "proj.weight")] and told["pre.weight"] == [("new", None)]
    assert torch.equal(made.blocks[0].attn.proj.weight, model.blocks[0].attn.proj.weight)
    assert kinds(attnzoo.graft(model, spec("bilstm"))[1])["post.weight"] == [("new", None)]


def test_branches_on_tokens_all_get_the_projections_but_in_a_series():
    model = tiny()
    two = ["softmax", "elu_linear"]
    _, ledger = attnzoo.graft(model, spec({"fuse": "add", "level": "tokens", "of": two}))
    told = kinds(ledger)
    for branch in two:
        assert told[f"branches.{branch}.qkv.weight"] == [("copied", "qkv.weight")]
    assert ledger.held()["blocks.0.attn.qkv.weight"] == "blocks.0.attn.branches.softmax.qkv.weight"
    _, ledger = attnzoo.graft(model, spec({"fuse": "serial", "level": "tokens", "of": two}))
    told = kinds(ledger)
    assert told["branches.softmax.qkv.weight"] == [("copied", "qkv.weight")]
    assert told["branches.elu_linear.qkv.weight"] == [("new", None)]


def test_biases_that_stand_beside_their_projection():
    model = donor("eva_giant_patch14_224")
    made, ledger = attnzoo.graft(model, "digits_mixture_of_heads")
    attn = model.blocks[0].attn
    expected = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    assert torch.equal(made.blocks[0].attn.qkv.bias, expected)
    assert kinds(ledger)["qkv.bias"] == [("reshaped", "q_bias"), ("reshaped", "v_bias")]
    assert same(attnzoo.ungraft(made), model)


def test_a_pool_of_the_same_class_keeps_its_weights():
    model = donor("vit_base_patch16_siglip_224")
    made, ledger = attnzoo.graft(model, "digits_map_pool")
    x = images(model)
    assert torch.equal(made(x), model(x)) and ledger.counts()["new"] == 0
    _, ledger = attnzoo.graft(model, "digits_lama")
    dropped = {row.donor for row in ledger.rows if row.kind == "dropped"}
    assert dropped == {name for name in model.state_dict() if name.startswith("attn_pool")}
    gap = donor("eva02_tiny_patch14_224")
    assert attnzoo.graft(gap, "digits_map_pool")[1].counts()["dropped"] == 0  # its norm before the head stays


def test_a_donor_that_gives_tokens():
    model = tiny(global_pool="", class_token=False)
    made, ledger = attnzoo.graft(model, "digits_lama")
    x = images(model)
    assert model(x).shape == (2, 16, 5) and made(x).shape == (2, 5)
    assert ledger.difference is None and "cannot be compared" in ledger.notes[-1]
    assert type(ledger).model_validate_json(ledger.model_dump_json()) == ledger


def test_groups_tell_blocks_apart():
    model = tiny(depth=3)
    recipe = spec("softmax", overrides=[{"at": "blocks.1", "put": "squeeze_excite"}])
    groups = attnzoo.graft(model, recipe)[1].groups()
    assert list(dict.fromkeys(group.where for group in groups)) == [
        "outside the blocks",
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]
    assert [group.kind for group in groups if group.where == "blocks.1"] == ["copied", "new", "dropped"]
    plain = attnzoo.graft(model, spec("softmax"))[1].groups()
    assert [(g.where, g.kind, g.blocks) for g in plain] == [
        ("outside the blocks", "copied", 1),
        ("blocks.0 … blocks.2", "copied", 3),
    ]
    assert sum(group.numbers for group in plain) == sum(p.numel() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------- the donor


def test_the_donor_stays_as_it_is():
    model = tiny(drop_path_rate=0.5).train()
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    before, modes = fingerprint(model.state_dict()), [m.training for m in model.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    made, _ = attnzoo.graft(model, "ham_b")
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())
    assert fingerprint(model.state_dict()) == before and [m.training for m in model.modules()] == modes
    assert made.training and not made.head.weight.requires_grad and made.norm.weight.requires_grad
    assert made.blocks[1].drop_path1.drop_prob == 0.5
    with torch.no_grad():
        made.head.weight.add_(1)  # nothing is shared
    assert fingerprint(model.state_dict()) == before


@pytest.mark.parametrize("change", ["classes", "pool", "size", "half", "channels", "rates"])
def test_donors_that_were_changed_as_timm_allows(change):
    model = tiny(
        **{"channels": {"in_chans": 1}, "rates": {"drop_rate": 0.1, "attn_drop_rate": 0.2}}.get(change, {})
    )
    if change == "classes":
        model.reset_classifier(7)
    if change == "pool":
        model.reset_classifier(5, "avg")
    if change == "size":
        model.set_input_size(img_size=48)
    if change == "half":
        model.bfloat16()
    made, _ = attnzoo.graft(model, "ham_b")
    x = images(model).to(model.head.weight.dtype)
    assert torch.equal(made(x), model(x)) and same(attnzoo.ungraft(made), model)
    assert attnzoo.ungraft(made).blocks[0].attn.attn_drop.p == model.blocks[0].attn.attn_drop.p
    gamma = made.blocks[0].attn.inner.fusion.gamma
    assert gamma.dtype == model.head.weight.dtype


def _norm(model):
    model.blocks[0].norm1.eps = 1e-3


def _activation(model):
    model.blocks[0].mlp.act = nn.ReLU()


def _extra(model):
    model.extra = nn.Linear(2, 2)


def _without(model):
    del model.blocks[1]


def _attention(model):
    model.blocks[0].attn.proj = nn.Linear(32, 32, bias=False)


def _nameless(model):
    del model.pretrained_cfg, model.default_cfg


def _meta(model):
    model.to("meta")


@pytest.mark.parametrize(
    "change, why",
    [
        (_norm, "`eps` of `blocks.0.norm1` is 0.001"),
        (_activation, "`blocks.0.mlp.act` is a ReLU, what timm builds has a GELU"),
        (_extra, "the donor has a tensor `extra.weight`"),
        (_without, "what timm builds has a tensor `blocks.1"),
        (_attention, "what timm builds has a tensor `blocks.0.attn.proj.bias`"),
        (_nameless, "names no model of timm"),
        (_meta, "on the device `meta`"),
    ],
)
def test_donors_that_cannot_be_built_again(change, why):
    model = tiny()
    change(model)
    with pytest.raises(ZooError) as error:
        attnzoo.graft(model, "ham_b")
    (fault,) = error.value.diagnostics
    assert fault.code == "AZ940" and why in f"{fault.message} {fault.why}" and fault.help


def test_tables_that_are_not_saved():
    model = donor("vit_small_patch16_dinov3", rope_grid_offset=0.0)
    attnzoo.graft(model, "ham_b")
    name, table = next((n, b) for n, b in model.named_buffers() if n not in model.state_dict())
    with torch.no_grad():
        table.add_(1)
    with pytest.raises(ZooError, match="not saved with it") as error:
        attnzoo.graft(model, "ham_b")
    assert error.value.code == "AZ940" and name in str(error.value)


def test_a_model_that_somebody_wrote():
    with pytest.raises(ZooError, match="how this VisionTransformer was built"):
        attnzoo.graft(
            VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4), "ham_b"
        )


@pytest.mark.parametrize(
    "name, text",
    [
        ("vit_tiny_patch16_22", "did you mean `vit_tiny_patch16_224`"),
        ("local-dir:/nowhere", "timm cannot build"),
        ("nothing:here", "timm cannot read"),
        ("", "timm has no model called"),
    ],
)
def test_names_that_nobody_knows(name, text):
    with pytest.raises(ZooError, match=text) as error:
        attnzoo.graft(name, "ham_b")
    assert error.value.code == "AZ940" and error.value.diagnostics[0].help


@pytest.mark.parametrize(
    "model, recipe, code, text",
    [
        ("resnet18", "ham_b", "AZ941", "the donor `resnet18` cannot be grafted[^>]*it is a ResNet"),
        ("swin_tiny_patch4_window7_224", "ham_b", "AZ941", "SwinTransformer"),
        ("test_vit", "cct_7_3x1", "AZ941", "of kind `cct`"),
        ("test_vit", "induction", "AZ941", "of kind `sequence`"),
        ("cct_7_3x1_32_c100", "ham_b", "AZ941", "of kind `cct`"),
        (
            "vit_tiny_patch16_224",
            spec("softmax", overrides=[{"at": "blocks.12", "put": "cosine"}]),
            "AZ304",
            "no site",
        ),
        ("test_vit", spec("softmax", heads=[3, 3]), "AZ313", "6 layers"),
        ("eva02_tiny_patch14_224", "digits_delta", "AZ302", "rotary"),
    ],
)
def test_recipes_that_do_not_fit(model, recipe, code, text):
    with pytest.raises(ZooError, match=text) as error:
        attnzoo.graft(model, recipe)
    assert error.value.code == code and error.value.diagnostics[0].help
    assert code != "AZ941" or error.value.diagnostics[0].place is None  # nobody wrote a recipe with a fault


def test_a_composed_donor():
    """What was composed, and perhaps trained, is a donor too; its host is that of its recipe."""
    model = lively(attnzoo.compose("digits_softmax")).eval()
    made, ledger = attnzoo.graft(model, "ham_b")
    x = images(model)
    assert torch.equal(made(x), model(x)) and ledger.counts()["dropped"] == 0
    audit(model, made, ledger)
    assert same(attnzoo.ungraft(made), model)
    other, ledger = attnzoo.graft(made, "digits_cosine")
    assert ledger.counts()["dropped"] == 2 * 4 and same(attnzoo.ungraft(other), made)


def test_a_name_without_weights_says_so(tmp_path):
    recipe = spec("softmax")
    (one, told), (two, _) = (attnzoo.graft("test_vit", recipe, seed=3) for _ in range(2))
    assert "knows nothing" in told.notes[0] and same(one, two)
    file = tmp_path / "weights.safetensors"
    save_file(lively(timm.create_model("test_vit")).state_dict(), file)
    made, ledger = attnzoo.graft("test_vit", recipe, weights=file)
    state = load_file(file)
    assert all(torch.equal(state[name], tensor) for name, tensor in made.state_dict().items())
    assert not any("knows nothing" in note for note in ledger.notes)
    save_file({"head.weight": state["head.weight"]}, tmp_path / "part.safetensors")
    _, ledger = attnzoo.graft("test_vit", recipe, weights=tmp_path / "part.safetensors")
    assert "tensors of the donor are not in" in ledger.notes[0]
    with pytest.raises(RecipeError) as error:
        attnzoo.graft("test_vit", recipe, weights=tmp_path / "none.pth")
    assert error.value.code == "AZ606"


# ------------------------------------------------------------------------------------------------------- files, copies


def test_a_folder(tmp_path):
    model, folder = tiny(), tmp_path / "graft"
    made, ledger = attnzoo.graft(model, spec("conv_projection"))
    save_graft(made, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    x = images(model)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(again(x), made(x))
    back = attnzoo.ungraft(folder)
    assert same(back, model) and fingerprint(back.state_dict()) == ledger.donor.sha256
    assert torch.equal(back.eval()(x), model(x)) and described(back) == described(model)
    told = json.loads((folder / "ledger.json").read_text())
    assert len(told["rows"]) == len(ledger.rows) and told["recipe"] == "mine"
    kept = {row.donor for row in ledger.rows if row.kind in ("reshaped", "dropped")}
    assert load_file(folder / "dropped.safetensors").keys() == kept
    made, _ = attnzoo.graft(f"local-dir:{folder}", "digits_cosine")  # a graft is a donor
    assert made(x).shape == (2, 5)


def test_nothing_is_overwritten(tmp_path):
    made, _ = attnzoo.graft(tiny(), "ham_b")
    for name in FILES:
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(RecipeError, match=f"already holds {name}") as error:
            save_graft(made, folder)
        assert error.value.code == "AZ607" and [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "mine"
    with pytest.raises(RecipeError, match="is no folder"):
        save_graft(made, tmp_path / "config" / "config.json")


def test_folders_that_hold_no_graft(tmp_path):
    made, _ = attnzoo.graft(tiny(), spec("conv_projection"))
    save_graft(made, tmp_path / "good")
    faults = {
        "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
        "no ledger": lambda folder: (folder / "ledger.json").unlink(),
        "ledger": lambda folder: (folder / "ledger.json").write_text("{}"),
        "weights": lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"),
        "none": lambda folder: save_file({}, folder / "dropped.safetensors"),
        "other": lambda folder: save_file({"head.weight": torch.zeros(1)}, folder / "dropped.safetensors"),
        "name": lambda folder: (folder / "ledger.json").write_text(
            (folder / "ledger.json").read_text().replace("vit_tiny_patch16_224", "vit_tiny_patch16_22")
        ),
    }
    for fault, harm in faults.items():
        folder = tmp_path / fault
        folder.mkdir()
        for path in (tmp_path / "good").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        harm(folder)
        with pytest.raises(ZooError) as error:
            attnzoo.ungraft(folder)
        assert error.value.code == "AZ943" and error.value.diagnostics[0].help, fault
    with pytest.raises(ZooError) as error:
        attnzoo.ungraft(tmp_path / "nowhere")
    assert error.value.code == "AZ943"


def test_models_that_are_no_graft():
    for model in tiny(), attnzoo.compose("ham_b"):
        for call in (attnzoo.ungraft, lambda model: save_graft(model, "nowhere")):
            with pytest.raises(ZooError, match="is no graft") as error:
                call(model)
            assert error.value.code == "AZ942"
    made, _ = attnzoo.graft(tiny(), "ham_b")
    made.reset_classifier(3)
    with pytest.raises(ZooError, match="`head.weight` of the donor") as error:
        attnzoo.ungraft(made)
    assert error.value.code == "AZ943"


def test_after_training_what_is_held_is_the_trained():
    model = tiny()
    made, _ = attnzoo.graft(model, spec("conv_projection"))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.25)
    back, before, after = attnzoo.ungraft(made), model.state_dict(), made.state_dict()
    for name, tensor in back.state_dict().items():
        kept = name.endswith(("qkv.weight", "qkv.bias"))
        assert torch.equal(tensor, before[name] if kept else after[name]), name


def test_copies_remember():
    model = tiny()
    made, ledger = attnzoo.graft(model, "ham_b")
    for again in copy.deepcopy(made), pickle.loads(pickle.dumps(made)):  # noqa: S301 - our own bytes
        assert same(attnzoo.ungraft(again), model)
        assert isinstance(vars(again)["_graft"], Graft) and vars(again)["_graft"].ledger == ledger
    back = attnzoo.ungraft(made)
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.zero_()
    assert same(attnzoo.ungraft(made), model)  # what came back shares nothing with the graft
    one, _ = attnzoo.graft(model, "digits_cosine")  # two grafts of one donor do not meet
    assert same(attnzoo.ungraft(one), attnzoo.ungraft(made))


def test_a_graft_trains():
    made, _ = attnzoo.graft(tiny().train(), "ham_b")
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for _ in range(2):
        made(images(made)).square().sum().backward()
        optimizer.step()
    assert made.blocks[0].attn.inner.fusion.gamma.abs().sum() > 0
    assert all(p.grad is not None for p in made.parameters())


# ------------------------------------------------------------------------------------------------------- command line


def command(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + (repr(result.exception) if result.exception else "")
    return result


def test_graft_and_ungraft_by_command(tmp_path):
    out = command("graft", "test_vit", "--recipe", "ham_b", "--out", tmp_path / "graft", "--seed", 3).output
    for text in (
        "ham_b in test_vit",
        "80 copied, 0 reshaped, 24 new; 0 of the donor dropped",
        "blocks.0 … blocks.5 (6)",
        "attn.inner.fusion.gamma",
        "knows nothing",
        "bit for bit",
        f"local-dir:{tmp_path / 'graft'}",
    ):
        assert text in out, text
    out = command("ungraft", tmp_path / "graft", "--out", tmp_path / "donor").output
    assert "equal to the donor that was grafted, bit for bit" in out
    with seeded(3):
        model = timm.create_model("test_vit")
    assert same(timm.create_model(f"local-dir:{tmp_path / 'donor'}", pretrained=True), model)
    state = load_file(tmp_path / "graft" / "model.safetensors")
    state["head.bias"] += 1
    save_file(state, tmp_path / "graft" / "model.safetensors")
    data = json.loads(command("ungraft", tmp_path / "graft", "--out", tmp_path / "more", "--json").stdout)
    assert data == {"donor": "test_vit", "tensors": 80, "bit_for_bit": False, "out": str(tmp_path / "more")}


def test_the_ledger_names_layers_not_tensors():
    """Of an LSTM in each of two heads, and of a projection in each: not their 22 tensors."""
    out = " ".join(command("graft", "test_vit", "--recipe", "far").output.split())
    assert "attn.pre, attn.onwards.0 … 1, attn.backwards.0 … 1, attn.head_proj.0 … 1" in out
    assert "norm1, attn.proj, norm2, mlp.fc1, mlp.fc2" in out


def test_graft_as_json(tmp_path):
    data = json.loads(command("graft", "test_vit", "--recipe", "digits_cosine", "--json").stdout)
    assert (
        data["counts"] == {"copied": 80, "reshaped": 0, "new": 6, "dropped": 0} and data["distilled"] is None
    )
    assert len(data["rows"]) == 86 and data["difference"] > 0 and data["donor"]["name"] == "test_vit"
    assert {row["graft"] for row in data["rows"] if row["kind"] == "new"} == {
        row["graft"] for row in data["rows"] if row["donor"] is None
    }
    changed = ["--start", "recipe", "--set", "attention.fuse=mean"]
    data = json.loads(command("graft", "test_vit", "--recipe", "ham_b", "--json", *changed).stdout)
    assert data["difference"] > 0 and not any("fusion" in (row["graft"] or "") for row in data["rows"])


def test_distil_by_command(tmp_path):
    model = tiny(num_classes=10, patch_size=16)
    save(model, tmp_path / "donor")
    arguments = [
        "graft",
        tmp_path / "donor",
        "--recipe",
        "digits_elu_linear",
        "--distil",
        "digits",
        "--epochs",
        1,
    ]
    arguments += ["--finetune", 1, "--set", "train.batch_size=256", "--out", tmp_path / "graft"]
    out = command(*arguments).output
    for text in ("cosine with the donor's", "distilled", "fine-tuned", "of the donor's accuracy recovered"):
        assert text in out, text
    assert "trained since" in command("ungraft", tmp_path / "graft", "--out", tmp_path / "back").output
    data = json.loads(command(*arguments[:-2], "--json").stdout)["distilled"]
    assert [stage["name"] for stage in data["stages"]] == ["graft", "distilled", "fine-tuned"]
    assert data["replaced"] == [0, 1] and data["data"] == "digits"


def test_commands_that_are_refused(tmp_path):
    (tmp_path / "ledger.json").write_text("mine")
    for arguments, code in (
        (["graft", "test_vit", "--recipe", "ham_b", "--out", tmp_path], "AZ607"),
        (["ungraft", tmp_path, "--out", tmp_path], "AZ607"),
        (["ungraft", tmp_path, "--out", tmp_path / "new"], "AZ943"),
        (["graft", "test_vit", "--recipe", "ham_b", "--weights", "x", "--pretrained"], "AZ611"),
        (["graft", "test_vi", "--recipe", "ham_b"], "AZ940"),
        (["graft", tmp_path, "--recipe", "ham_b"], "AZ940"),
        (["graft", "test_vit", "--recipe", "ham_b", "--distil", "digit"], "AZ701"),
    ):
        result = command(*arguments, code=2)
        assert f"error[{code}]" in result.stderr, (arguments, result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]
