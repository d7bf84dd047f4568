"""The attention rollout that a ViT makes for who asks: against its equation and `attnzoo.lab`, and nothing kept or lost."""

import copy
import io
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import pytest
import timm
import torch
from own_components import own_zoo  # noqa: F401 - for all tests here
from timm.models import save_for_hf
from torchvision.models.feature_extraction import create_feature_extractor
from typer.testing import CliRunner

from attnzoo.bench.composition import describe
from attnzoo.cli.app import app
from attnzoo.core import Layout, find_taps, watch
from attnzoo.errors import MissingMap, RecipeError, ZooError
from attnzoo.hosts import rollout as hosted
from attnzoo.hosts.rollout import Rolling, rolled
from attnzoo.lab.maps import collect
from attnzoo.lab.rollout import rollout
from attnzoo.recipe import compose, compose_file

F64 = torch.float64
VIT = """
recipe: 1
host: {kind: vit, base: vit_tiny_patch16_224, model: {img_size: 16, patch_size: 4, depth: 4, embed_dim: 16, num_heads: 2,
       num_classes: 3, global_pool: avg%s}}
attention: %s
overrides: [{at: blocks.3, put: {use: global_local_cross, with: {share: 0.3}}}]
"""


def made(attention: str = "softmax", more: str = "", recipe: str = VIT, **options):
    """A model in float64 and eval mode, with all parameters away from where they start."""
    torch.manual_seed(0)
    model = compose(recipe % (more, attention), **options).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 5)
    return model


def images(batch: int = 2, rows: int = 16, columns: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, rows, columns, dtype=F64)


def asked(model, *args, block: int = 3, **options) -> torch.Tensor:
    """The map that a block's component is handed in a forward."""
    found = []
    handle = model.blocks[block].attn.register_forward_hook(
        lambda _m, _args, given, _out: found.append(given["given"]["rollout"]), with_kwargs=True
    )
    model(*args, **options)
    handle.remove()
    (one,) = found
    return one


def near(one, other) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-10)


# -------------------------------------------------------------------------------------------------------- the equation


def weights(b: int = 2, h: int = 3, n: int = 5) -> torch.Tensor:
    return torch.randn(b, h, n, n, dtype=F64).softmax(-1)


def by_hand(layers) -> torch.Tensor:
    """Ŝ = S̄_L … S̄_1, S̄ = ½ S + ½ E, S the mean over heads: entry by entry."""
    b, h, n, _ = layers[0].shape
    out = torch.stack([torch.eye(n, dtype=F64)] * b)
    for layer in layers:
        new = torch.zeros(b, n, n, dtype=F64)
        for s in range(b):
            for i in range(n):
                for j in range(n):
                    for k in range(n):
                        mean = sum(layer[s, head, i, k] for head in range(h)) / h
                        new[s, i, j] += (0.5 * mean + 0.5 * (i == k)) * out[s, k, j]
        out = new
    return out


def through(layers) -> torch.Tensor:
    out = None
    for layer in layers:
        out = rolled(layer, out)
    return out


def test_the_equation():
    layers = [weights() for _ in range(3)]
    assert near(through(layers), by_hand(layers))
    assert near(through(layers).sum(-1), torch.ones(2, 5, dtype=F64))


def test_layers_that_look_at_themselves_alone():
    eye = torch.eye(5, dtype=F64).expand(2, 3, 5, 5)
    assert torch.equal(through([eye] * 4), eye[:, 0])


def test_rows_sum_to_one_whatever_the_weights_are():
    """Of who may attend to nothing, where rows are empty, and of signed weights."""
    some, signed = weights(), torch.randn(2, 3, 5, 5, dtype=F64)
    some[:, :, 2] = 0
    for layers in ([some, some], [signed, some], [signed, signed]):
        assert near(through(layers).sum(-1), torch.ones(2, 5, dtype=F64)) and (through(layers) >= 0).all()
    assert near(through([some])[:, 2], torch.eye(5, dtype=F64)[2].expand(2, 5))


def test_single_precision_at_least_and_no_gradient():
    layers = [weights().bfloat16().requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = through(layers)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert torch.allclose(found, through([one.double() for one in layers]).float(), atol=1e-6)


# ------------------------------------------------------------------------------------------------------- in the model


FRONTS = {
    "softmax": "softmax", "one_map_for_all": "additive", "of_projections": "grouped_query", "no_softmax": "random_feature_layer",
    "of_neighbours": "neighborhood", "of_mixed_heads": "talking_heads", "of_chosen_heads": "mixture_of_heads",
    "of_twice": "twicing",
}  # fmt: skip


@pytest.mark.parametrize("more", ["", ", reg_tokens: 2", ", qk_norm: true, no_embed_class: true"])
@pytest.mark.parametrize("front", ["softmax", "grouped_query"])
def test_it_is_that_of_the_lab(front, more):
    model, x = made(front, more), images()
    prefix = model.num_prefix_tokens
    found, maps = asked(model, x), collect(model, x)
    assert found.shape == (2, 4, 4) and found.dtype == F64
    assert near(found, rollout(maps, layer=2)[:, 0, prefix:].unflatten(1, (4, 4)))
    for layer in (0, 1):
        assert not near(found, rollout(maps, layer=layer)[:, 0, prefix:].unflatten(1, (4, 4)))


@pytest.mark.parametrize("front", FRONTS.values(), ids=FRONTS)
def test_it_is_that_of_the_lab_behind_every_kind_of_map(front):
    model, x = made(front), images()
    assert near(asked(model, x), rollout(collect(model, x), layer=2)[:, 0, 1:].unflatten(1, (4, 4)))


def test_heads_by_layer_and_a_distillation_token():
    text = VIT.replace("base: vit_tiny_patch16_224", "base: deit_tiny_distilled_patch16_224")
    model, x = made(recipe=text.replace(", global_pool: avg", "") + "heads: [4, 1, 2, 2]\n"), images()
    assert near(asked(model, x), rollout(collect(model, x), layer=2)[:, 0, 2:].unflatten(1, (4, 4)))


WRONG = {
    "the other way round": lambda s, before: s if before is None else before @ s,
    "the last layer alone": lambda s, before: s,
    "without heads": lambda s, before: s,
    "without the residual": lambda s, before: s if before is None else s @ before,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_rollout_is_seen(wrong, monkeypatch):
    def other(layer, before):
        s = layer.amax(1) if wrong == "without heads" else layer.mean(1)
        residual = 0 if wrong == "without the residual" else torch.eye(s.shape[-1], dtype=F64)
        s = (s + residual) / (1 if wrong == "without the residual" else 2)
        return WRONG[wrong](s, before)

    model, x = made(), images()
    due = rollout(collect(model, x), layer=2)[:, 0, 1:].unflatten(1, (4, 4))
    monkeypatch.setattr(hosted, "rolled", other)
    assert not near(asked(model, x), due)


def test_what_the_last_block_does_with_it():
    """The class token and ⌈0.3 · 16⌉ patches are changed by attention; which, follows from the layers before."""
    model, x = made(), images(8)
    seen = {}
    handle = model.blocks[3].attn.register_forward_hook(lambda _m, _a, out: seen.update(out=out))
    best = asked(model, x).flatten(1).topk(5).indices
    handle.remove()
    for sample in range(8):
        changed = seen["out"][sample].abs().sum(-1).nonzero().flatten().tolist()
        assert changed == [0, *sorted((1 + best[sample]).tolist())]
    assert len({tuple(row.sort().values.tolist()) for row in best}) > 1


def test_samples_do_not_see_each_other():
    model, x = made(), images(3)
    says = model(x)
    for i in range(3):
        assert near(model(x[i : i + 1]), says[i : i + 1])


def test_masks_count():
    model, x = made(), images()
    mask = torch.rand(17, 17) < 0.7
    mask[5] = False
    seen: list[torch.Tensor] = []
    with watch(model.blocks[:3], "weights", lambda _name, w: seen.append(w)):
        found = asked(model, x, mask)
    assert len(seen) == 3 and not seen[0][:, :, 5].any()
    assert near(found, through(seen)[:, 0, 1:].unflatten(1, (4, 4))) and not near(found, asked(model, x))


def test_what_hooks_make_of_weights_counts_and_dropout_does_not():
    model, x = made(more=", attn_drop_rate: 0.5").train(), images()
    seen: list[torch.Tensor] = []
    with watch(model.blocks[:3], "weights", lambda _name, w: seen.append(w)):
        found = asked(model, x)
    assert near(found, through(seen)[:, 0, 1:].unflatten(1, (4, 4)))
    assert (seen[0] > 0).all() and not near(model(x), model(x))
    eye = torch.eye(17, dtype=F64).expand(2, 2, 17, 17)
    with watch(model.blocks[:3], "weights", lambda _name, w: eye):
        assert not asked(model, x).any()
    plain = made("softmax", ", attn_drop_rate: 0.5", VIT.partition("overrides")[0]).train()
    model.load_state_dict(plain.state_dict())
    for p in (model, plain):  # the same weights are dropped as without a rollout
        torch.manual_seed(1)
        p.got = p.blocks[0](torch.ones(2, 17, 16, dtype=F64))
    assert near(model.got, plain.got)


def test_who_asks_in_several_places():
    """A pool of somebody, behind all layers; and a head that has a map itself, so that one behind it can ask too."""
    text = VIT.partition("overrides")[0].replace(", global_pool: avg", "") + "pool: looked_pool\n"
    model, x = made(recipe=text), images()
    maps = collect(model, x)
    row = rollout(maps)[:, 0, 1:]
    tokens = model.forward_features(x)
    assert near(model(x), model.head(model.fc_norm((row[..., None] * tokens[:, 1:]).sum(1))))
    with pytest.raises(ZooError, match="AZ410.*asks for the rollout"):
        model.forward_head(tokens)
    text = VIT.replace("overrides: [", "overrides: [{at: blocks.1, put: looking}, ")
    model = made(recipe=text)
    maps = collect(model, x)
    for block, layer in ((1, 0), (3, 2)):
        assert near(asked(model, x, block=block), rollout(maps, layer=layer)[:, 0, 1:].unflatten(1, (4, 4)))
    model = made(recipe=VIT.replace("put: {use: global_local_cross, with: {share: 0.3}}",
                                    "put: {fuse: mean, of: [softmax, global_local_cross]}"))  # fmt: skip
    assert near(asked(model, x), rollout(collect(model, x), layer=2)[:, 0, 1:].unflatten(1, (4, 4)))


def test_who_does_not_ask_pays_nothing():
    """Blocks behind the last one that asks, and models in which nobody does, are as they were."""
    model = made(recipe=VIT.replace("blocks.3", "blocks.2"))
    rolls = [isinstance(tap, Rolling) for tap in find_taps(model, "weights").values()]
    assert rolls == [True, True, False, False]
    assert [block.carries for block in model.blocks] == [True, True, False, False]
    plain = made(recipe=VIT.partition("overrides")[0])
    assert not any(isinstance(part, Rolling) for part in plain.modules())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert find_taps(made()).keys() - find_taps(plain).keys() == {
        "blocks.3.attn.scores", "blocks.3.attn.weights",
    }  # fmt: skip


# -------------------------------------------------------------------------------------------- what the caller hands over


def test_the_caller_hands_nothing_over():
    model, x = made(), images()
    assert model.given == {} and "rollout" not in signature(model.forward).parameters
    with pytest.raises(TypeError, match="takes no maps"):
        model(x, rollout=torch.rand(2, 4, 4))
    composition = compose_file(VIT % ("", "softmax"))
    assert composition.given == {} and describe(composition).arguments == "images (b 3 16 16)"
    text = VIT.replace("blocks.3", "blocks.0, put: softmax}, {at: blocks.1")
    other = made("region_mean", recipe=text)
    assert list(other.given) == ["regions"]
    with pytest.raises(MissingMap, match="`regions`"):
        other(x)
    assert asked(other, x, regions=torch.randint(0, 3, (2, 4, 4)), block=1).shape == (2, 4, 4)


def test_in_the_words_of_compose(tmp_path):
    file = tmp_path / "looked.yaml"
    file.write_text(VIT % ("", "softmax"))
    done = CliRunner().invoke(app, ["compose", str(file)])
    assert done.exit_code == 0 and "rollout" not in done.output, done.output
    done = CliRunner().invoke(app, ["compose", str(file), "--json"])
    said = json.loads(done.stdout)
    assert said["run"]["without_gradient"] == [] and "rollout" not in said["arguments"]


def test_elsewhere_it_is_the_callers():
    """A CCT hands on no rollout: there the map is one like others."""
    host = "{kind: cct, base: cct_2_3x2, model: {img_size: 16, embed_dim: 16, depth: 2, num_heads: 2}}"
    model = compose(f"recipe: 1\nhost: {host}\nattention: global_local_cross\n").eval()
    x = torch.randn(2, 3, 16, 16)
    assert model(x, rollout=torch.rand(2, 16, 16)).shape == (2, 100)
    with pytest.raises(MissingMap, match="`rollout` \\(scores\\)"):
        model(x)
    for kind in "sequence", "seq2seq", "dual":
        host = (
            f"{{kind: {kind}}}" if kind == "dual" else f"{{kind: {kind}, dim: 24, layers: 2, max_length: 12}}"
        )
        with pytest.raises(RecipeError, match="the map `rollout` from the caller") as caught:
            compose_file(f"recipe: 1\nhost: {host}\nattention: global_local_cross\n")
        assert caught.value.code == "AZ302"


# ------------------------------------------------------------------------------------- nothing lies on the shared model


def broken_off(model, x) -> None:
    """A forward that raises half way."""

    def fail(*_):
        raise RuntimeError("half way")

    handle = model.blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        model(x)
    handle.remove()


def test_nothing_is_left():
    model, x = made(), images(3)
    says = model(x)
    broken_off(model, x)
    assert near(model(x[:1]), says[:1])
    broken_off(model.train(), x)
    file = io.BytesIO()
    torch.save(model.eval(), file)
    file.seek(0)
    pickled = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
    for other in copy.deepcopy(model), torch.load(file, weights_only=False), pickled:
        assert torch.equal(other(x), says) and sum(isinstance(m, Rolling) for m in other.modules()) == 3
    assert torch.equal(model(x), says)


@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpointing"])
def test_many_threads(again):
    """One model, eight threads, images of several sizes: bit for bit what a thread alone gets."""
    model = made(more=", dynamic_img_size: true")
    model.set_grad_checkpointing(again)
    inputs = [images(1 + i % 3, 8 + 4 * (i % 4), 8 + 8 * (i % 3)) for i in range(6)]
    alone = [model(x) for x in inputs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(lambda i: torch.equal(model(inputs[i % 6]), alone[i % 6]), range(64)))
    finally:
        sys.setswitchinterval(interval)


def test_a_block_on_its_own():
    """One that asks is refused without those before it; those give what they give."""
    model, x = made(), torch.randn(2, 17, 16, dtype=F64)
    plain = made(recipe=VIT.partition("overrides")[0])
    plain.load_state_dict(model.state_dict())
    for one, other in zip(model.blocks[:3], plain.blocks, strict=False):
        assert near(one(x), other(x))
    with pytest.raises(ZooError, match="asks for the rollout") as caught:
        model.blocks[3](x)
    assert caught.value.code == "AZ410"
    assert model.blocks[3].attn(x, layout=Layout((4, 4), 1), given={"rollout": torch.rand(2, 4, 4)}).any()


# --------------------------------------------------------------------------------------------------- tools of PyTorch


def test_checkpointing_changes_nothing():
    """Two forwards of different sizes before the backward of both; and blocks are computed again indeed."""
    model = made(more=", dynamic_img_size: true").train()
    pictures, grads = (images(2), images(1, 8, 20)), []
    for again in (False, True):
        model.set_grad_checkpointing(again)
        model.zero_grad()
        one, other = (model(x).square().sum() for x in pictures)
        (one + 2 * other).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    calls = []
    handle = model.blocks[3].attn.register_forward_hook(lambda *_: calls.append(1))
    model(pictures[0]).sum().backward()
    handle.remove()
    assert len(calls) == 2


def test_all_parameters_get_finite_gradients():
    model, x = compose(VIT % ("", "softmax")).train(), images().float()
    for _ in range(2):
        model(x).square().mean().backward()
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all()) and p.grad.any() for p in model.parameters()
    )


def test_compile_export_and_fx():
    model, x, more = made(), images(), images(3)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert near(compiled(x), model(x))
        broken_off(model, x)
        assert near(compiled(x), model(x))
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}).module()
        assert near(program(more), model(more))
        graph = create_feature_extractor(model, return_nodes={"blocks.3.attn": "mixed", "head": "out"})
        for one in x, more:
            assert near(graph(one)["out"], model(one))
        assert graph(x)["mixed"].shape == (2, 17, 16)


def test_autocast_does_not_tie_scores():
    """The same patches are chosen inside autocast, from weights in half precision, as their rollout in single precision says."""
    model, x = made().float(), images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen: list[torch.Tensor] = []
        with watch(model.blocks[:3], "weights", lambda _name, w: seen.append(w)):
            found = asked(model, x)
    assert found.dtype == torch.float32
    assert torch.allclose(found, through(seen)[:, 0, 1:].unflatten(1, (4, 4)).float(), atol=1e-7)


def test_feature_maps():
    model, x = made(), images()
    final, inner = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and torch.equal(model.forward_head(final), model(x))
    early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(early, inner, strict=False))
    for wanted in (0, 3), (0, 1):
        maps = compose(VIT % ("", "softmax"), features_only=True, out_indices=wanted).double().eval()
        maps.model.load_state_dict(model.state_dict(), strict=False)
        assert all(torch.equal(one, inner[i]) for i, one in zip(wanted, maps(x), strict=True))


def test_images_of_other_sizes():
    model, other = made(), made(more=", dynamic_img_size: true")
    other.load_state_dict(model.state_dict())
    x, wide = images(), images(1, 12, 28)
    assert near(other(x), model(x)) and asked(other, wide).shape == (1, 3, 7)
    model.set_input_size((12, 28))
    assert asked(model, wide).shape == (1, 3, 7)


def test_folders(tmp_path):
    model, x = compose(VIT % ("", "softmax")).eval(), images().float()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x)) and near(asked(again, x), asked(model, x))
    with pytest.raises(RecipeError, match="AZ324.*class token"):
        timm.create_model("attnzoo_vit", recipe=VIT % ("", "softmax"), class_token=False)


# ------------------------------------------------------------------------------------------------------------ refusals


def last(
    front: str, more: str = "", put: str = "global_local_cross", at: str = "blocks.3", tail: str = ""
) -> str:
    """A recipe with something in front and something at some sites."""
    return (VIT.partition("overrides")[0] % (more, front)) + f"overrides: [{{at: {at}, put: {put}}}]\n{tail}"


REFUSED = {
    "everywhere": (last("global_local_cross"), "AZ324", 5, 12, "`global_local_cross` at blocks.0 asks for the rollout of the layers before"),
    "first": (last("softmax", at="blocks.0"), "AZ324", 6, 33, "put it at a later site: overrides: [{at: blocks.3, put: global_local_cross}]"),
    "first_in_a_fusion": (
        last("softmax", at="blocks.0", put="{fuse: add, of: [softmax, global_local_cross]}"), "AZ324", 6, 59, "and there are none",
    ),
    "no_class_token": (last("softmax", ", class_token: false"), "AZ324", 6, 33, "leave `class_token: false` out"),
    "registers_are_none": (last("softmax", ", class_token: false, reg_tokens: 1"), "AZ324", 6, 33, "asks where the class token looked"),
    "no_map": (last("fourier"), "AZ324", 5, 12, "`fourier` at blocks.0 forms no map of tokens for each head, or several"),
    "several": (last("agent"), "AZ324", 5, 12, "`global_local_cross` at blocks.3 asks for the rollout of the layers before"),
    "slots": (last("linformer"), "AZ324", 5, 12, "put `softmax` there"),
    "pooled": (last("soft"), "AZ324", 5, 12, "`soft` at blocks.0"),
    "a_fusion": (last("{fuse: add, of: [softmax, soft]}"), "AZ324", 5, 19, "`add` at blocks.0"),
    "twice": (last("softmax", at="'blocks.[23]'"), "AZ324", 6, 38, "`global_local_cross` at blocks.2 forms no map"),
    "one_in_between": (
        last("softmax", put="fourier}, {at: blocks.3, put: global_local_cross", at="blocks.1"), "AZ324", 6, 33, "`fourier` at blocks.1 forms no map",
    ),
    "a_skip": (last("softmax", tail="skip: merged_post\n"), "AZ324", 6, 33, "`skip: merged_post` hands on something else from layer to layer"),
    "a_skip_in_front": (last("softmax", tail="skip: {use: probs_pairmean, at: 'blocks.[01]'}\n"), "AZ324", 6, 33, "leave one of the two out"),
    "dropped_patches": (last("softmax", ", patch_drop_rate: 0.5"), "AZ302", 6, 33, "needs every token in its place"),
    "as_labels": (last("softmax", put="looked_labels"), "AZ302", 6, 33, "asks for the map `rollout` as labels | the model makes one of that name, of scores | rename it"),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "code", "line", "column", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(recipe, code, line, column, words):
    with pytest.raises(RecipeError) as caught:
        compose_file(recipe)
    (fault,) = caught.value.diagnostics
    said = f"{fault.message} | {fault.why} | {fault.help}"
    assert (fault.code, fault.place.line, fault.place.column) == (code, line, column), said
    assert words in said and fault.help or code == "AZ302" and words in said


def test_each_layer_that_cannot_is_named_once():
    recipe = last(
        "softmax",
        put="fourier}, {at: blocks.1, put: agent}, {at: blocks.3, put: global_local_cross",
        at="'blocks.[02]'",
    )
    with pytest.raises(RecipeError) as caught:
        compose_file(recipe)
    said = [d.message.split(" forms")[0] for d in caught.value.diagnostics]
    assert said == ["`fourier` at blocks.0", "`agent` at blocks.1"]


def test_behind_who_asks_everything_goes():
    for behind in "fourier", "agent", "{fuse: add, of: [softmax, soft]}":
        recipe = last(behind, put="softmax}, {at: blocks.1, put: global_local_cross", at="blocks.0")
        model = compose(recipe).eval()
        assert asked(model, images().float(), block=1).shape == (2, 4, 4)
