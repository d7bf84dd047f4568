"""Given maps: named on a card, handed over with the images, brought to the grid of the tokens."""

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
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor
from typer.testing import CliRunner

import attnzoo
from attnzoo.bench.composition import describe
from attnzoo.cli.app import app
from attnzoo.errors import MissingMap, RecipeError
from attnzoo.hosts.given import on_grid, stand_ins
from attnzoo.lab.maps import collect
from attnzoo.recipe import compose, compose_file
from attnzoo.train import train
from attnzoo.train.settings import prepare

VIT = """
recipe: 1
host: {kind: vit, base: vit_tiny_patch16_224, model: {img_size: 32, patch_size: 8, depth: 2, embed_dim: 24,
       num_heads: 3, num_classes: 5, global_pool: avg%s}}
attention: region_mean
"""
CCT = """
recipe: 1
host: {kind: cct, base: cct_2_3x2, model: {img_size: 16, embed_dim: 24, depth: 2, num_heads: 3, num_classes: 5%s}}
attention: region_mean
"""
BOTH = "attention: {fuse: add, of: [region_mean, lit]}\n"
IMAGE_HOSTS = pytest.mark.parametrize("host", [VIT, CCT], ids=["vit", "cct"])


def made(host: str, more: str = "", **options):
    """A model in eval mode, with all parameters away from where they start."""
    torch.manual_seed(0)
    model = compose(host % more, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 5)
    return model


def inputs(host: str, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and a map of four regions in which the patches are whole."""
    side = 32 if host is VIT else 16
    coarse = torch.randint(0, 4, (batch, 4, 4))
    return torch.randn(batch, 3, side, side), coarse.repeat_interleave(side // 4, 1).repeat_interleave(
        side // 4, 2
    )


def coarse(regions: torch.Tensor) -> torch.Tensor:
    """Its entries on the grid of four by four."""
    step = regions.shape[1] // 4
    return regions[:, ::step, ::step]


# ---------------------------------------------------------------------------------------------------------- the models


@IMAGE_HOSTS
def test_every_way_of_calling(host):
    """At the images' resolution or the grid's: the same. And it is the regions that count, not their numbers."""
    model, (x, regions) = made(host), inputs(host)
    says = model(x, regions=regions)
    assert torch.equal(model(x, regions=coarse(regions)), says)
    assert torch.equal(model(x, regions=9 - regions), says)
    assert not torch.allclose(model(x, regions=regions * 0), says, atol=1e-3)
    tokens = model.forward_features(x, regions=regions)
    assert torch.equal(model.forward_head(tokens), says)
    final, inner = model.forward_intermediates(x, regions=regions)
    assert torch.equal(final, tokens) and len(inner) == 2
    maps = compose(host % "", features_only=True, out_indices=(0, 1)).eval()
    maps.model.load_state_dict(model.state_dict(), strict=False)
    assert all(torch.equal(one, other) for one, other in zip(maps(x, regions=regions), inner, strict=True))


def test_what_reaches_the_head():
    """The first block's values are averaged over the regions of each sample."""
    model, (x, regions) = made(VIT), inputs(VIT)
    seen = {}
    model.blocks[0].attn.inner.register_forward_hook(lambda _m, args, out: seen.update(v=args[2], out=out))
    model(x, regions=regions)
    v, out, labels = seen["v"][:, :, 1:], seen["out"][:, :, 1:], coarse(regions).flatten(1)
    for sample in range(2):
        for token in range(16):
            members = labels[sample] == labels[sample, token]
            assert torch.allclose(out[sample, :, token], v[sample][:, members].mean(1), atol=1e-5)


def test_several_maps():
    model = made(VIT.replace("attention: region_mean\n", BOTH))
    (x, regions), light = inputs(VIT), torch.rand(2, 32, 32)
    says = model(x, regions=regions, light=light)
    assert torch.allclose(model(x, regions=regions, light=F.avg_pool2d(light, 8)), says, atol=1e-5)
    with pytest.raises(MissingMap, match="`light` \\(scores\\)"):
        model(x, regions=regions)


FAULTS = {
    "none": ({}, "model(images, regions=...)"),
    "another size": ({"regions": torch.zeros(2, 5, 5, dtype=torch.long)}, "(2, 32, 32) or (2, 4, 4)"),
    "another batch": ({"regions": torch.zeros(1, 4, 4, dtype=torch.long)}, "(1, 4, 4)"),
    "an axis of channels": ({"regions": torch.zeros(2, 1, 4, 4, dtype=torch.long)}, "(2, 1, 4, 4)"),
    "no whole numbers": ({"regions": torch.zeros(2, 4, 4)}, "long()"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "words"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("call", ["forward", "forward_features", "forward_intermediates"])
def test_a_map_that_does_not_fit(given, words, call):
    with pytest.raises(MissingMap) as error:
        getattr(made(VIT), call)(torch.randn(2, 3, 32, 32), **given)
    assert error.value.code == "AZ409" and words in str(error.value)


@IMAGE_HOSTS
def test_a_map_that_nobody_asks_for(host):
    x, regions = inputs(host)
    with pytest.raises(TypeError, match="'region'; this model takes the maps regions"):
        made(host)(x, region=regions)
    with pytest.raises(TypeError, match="takes no maps"):
        made(host.replace("region_mean", "softmax"))(x, regions=regions)


# ------------------------------------------------------------------------------------------------- to the tokens' grid


def test_labels_are_those_of_the_middle():
    labels = torch.arange(2 * 12 * 8).reshape(2, 12, 8)
    out = on_grid({"a": labels}, "a", "labels", 2, (12, 8), (12, 8), (3, 2))
    assert torch.equal(out, labels[:, 2::4, 2::4])
    large = labels + 2**60  # more than a float holds
    assert torch.equal(
        on_grid({"a": large}, "a", "labels", 2, (12, 8), (12, 8), (3, 2)), large[:, 2::4, 2::4]
    )
    flags = labels > 50
    assert torch.equal(
        on_grid({"a": flags}, "a", "labels", 2, (12, 8), (12, 8), (3, 2)), flags[:, 2::4, 2::4]
    )


def test_scores_are_means():
    scores = torch.rand(2, 12, 8)
    out = on_grid({"a": scores}, "a", "scores", 2, (12, 8), (12, 8), (3, 2))
    for y in range(3):
        for x in range(2):
            assert torch.allclose(out[:, y, x], scores[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean((1, 2)))
    whole = torch.randint(0, 255, (2, 12, 8), dtype=torch.uint8)
    assert on_grid({"a": whole}, "a", "scores", 2, (12, 8), (12, 8), (3, 2)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["labels", "scores"])
def test_images_whose_sides_are_no_multiples(kind):
    """Padded patches repeat the edge; pixels without a patch have no say."""
    values = torch.arange(10).repeat(1, 10, 1)
    values = values if kind == "labels" else values.double()
    padded = on_grid({"a": values}, "a", kind, 1, (10, 10), (12, 12), (3, 3))
    cropped = on_grid({"a": values}, "a", kind, 1, (10, 10), (8, 8), (2, 2))
    expected = [2, 6, 9] if kind == "labels" else [1.5, 5.5, (8 + 9 + 9 + 9) / 4]
    assert padded[0, 0].tolist() == expected and cropped[0, 0].tolist() == expected[:2]


@pytest.mark.parametrize("more", ["", ", dynamic_img_pad: true"])
def test_images_of_any_size(more):
    model = made(VIT, ", dynamic_img_size: true" + more)
    x, regions = torch.randn(2, 3, 16, 40), torch.randint(0, 3, (2, 16, 40))
    assert torch.equal(model(x, regions=regions), model(x, regions=regions[:, 4::8, 4::8]))
    if more:
        assert model(x[..., :37], regions=regions[..., :37]).shape == (2, 5)
    with pytest.raises(MissingMap):
        model(x, regions=regions.mT)


# -------------------------------------------------------------------------------------------------------------- tools


@IMAGE_HOSTS
@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.sample(3)
def test_many_threads(host, again):
    model = made(host)
    model.set_grad_checkpointing(again)
    calls = [inputs(host, 1 + i % 2) for i in range(7)]
    alone = [model(x, regions=regions) for x, regions in calls]

    def same(i: int) -> bool:
        x, regions = calls[i % 7]
        return torch.equal(model(x, regions=regions), alone[i % 7])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(same, range(112)))
    finally:
        sys.setswitchinterval(interval)


@IMAGE_HOSTS
def test_checkpointing_finds_the_map_again(host):
    """Two forwards with different maps before one backward."""
    model = made(host).train()
    (x, one), other = inputs(host), inputs(host)[1]
    grads = []
    for again in (False, True):
        model.set_grad_checkpointing(again)
        model.zero_grad()
        torch.manual_seed(1)
        (model(x, regions=one) + 2 * model(x, regions=other)).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


@IMAGE_HOSTS
@pytest.mark.sample(3)
def test_compile_export_and_fx(host):
    model, (x, regions) = made(host), inputs(host)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x, regions=regions)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x, regions=regions), expected, atol=1e-5)
        batch = torch.export.Dim("batch", min=1, max=64)
        shapes = {"x": {0: batch}, "regions": {0: batch}}
        program = torch.export.export(model, (x,), {"regions": regions}, dynamic_shapes=shapes).module()
        more, other = inputs(host, 3)
        assert torch.allclose(program(more, regions=other), model(more, regions=other), atol=1e-5)
        graph = create_feature_extractor(model, return_nodes={"head": "out"})
        assert torch.allclose(graph(more, regions=other)["out"], model(more, regions=other), atol=1e-5)
        with pytest.raises(MissingMap):
            graph(more)
        with pytest.raises(TypeError, match="region'"):
            graph(more, regions=other, region=other)


@pytest.mark.sample(2)
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    model, (x, regions) = made(VIT), inputs(VIT)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), kwargs={"regions": regions}, dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    image, labels = (one.name for one in session.get_inputs())
    (out,) = session.run(None, {image: x.numpy(), labels: regions.numpy()})
    assert torch.allclose(torch.from_numpy(out), model(x, regions=regions), atol=1e-4)


@IMAGE_HOSTS
def test_copies_and_folders(host, tmp_path):
    model, (x, regions) = made(host), inputs(host)
    says = model(x, regions=regions)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),  # noqa: S301 - our own bytes
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
    ):
        assert torch.equal(again(x, regions=regions), says)


# -------------------------------------------------------------------------------------------------------- in a recipe


@pytest.mark.parametrize(
    ("host", "why"),
    [("{kind: sequence, dim: 24, layers: 2, max_length: 12}", "a model of kind sequence takes a sequence alone"),
     ("{kind: seq2seq, dim: 24, layers: 2, max_length: 12}", "a model of kind seq2seq takes a source and a target alone")],
)  # fmt: skip
@pytest.mark.parametrize("attention", ["lit", "{fuse: add, of: [softmax, lit]}"])
def test_refused_where_no_map_can_be_handed_over(host, why, attention):
    with pytest.raises(RecipeError) as caught:
        compose_file(f"recipe: 1\nhost: {host}\nattention: {attention}\n")
    fault = next(d for d in caught.value.diagnostics if "map" in d.why)
    assert fault.code == "AZ302" and fault.place.line == 3 and "`light`" in fault.why and why in fault.why
    assert "`lit" not in fault.help


def test_one_map_of_two_kinds():
    with pytest.raises(RecipeError) as caught:
        compose_file(VIT % "" + "overrides: [{at: blocks.0, put: lit}, {at: blocks.1, put: lit_labels}]\n")
    (fault,) = caught.value.diagnostics
    assert (fault.code, fault.place.line) == ("AZ302", 6)
    assert "takes the map `light` as labels, `lit` as scores" in fault.message


def test_a_map_called_like_an_argument():
    with pytest.raises(RecipeError) as caught:
        compose_file(VIT.replace("region_mean", "lit_norm") % "")
    (fault,) = caught.value.diagnostics
    assert (fault.code, fault.place.line) == ("AZ302", 5) and "`norm`" in fault.message


def test_patches_that_are_dropped():
    with pytest.raises(RecipeError) as caught:
        compose_file(VIT % ", patch_drop_rate: 0.5")
    assert caught.value.code == "AZ302" and "every token in its place" in str(caught.value)


@IMAGE_HOSTS
def test_compose_tries_it(host, tmp_path):
    file = tmp_path / "mapped.yaml"
    file.write_text(host.replace("attention: region_mean\n", BOTH) % "")
    assert compose_file(str(file)).given == {"regions": "labels", "light": "scores"}
    assert describe(compose_file(str(file))).flops > 0
    done = CliRunner().invoke(app, ["compose", str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["run"]["without_gradient"] == []


def test_a_plausible_map():
    image = torch.linspace(0, 1, 16).reshape(1, 1, 4, 4).repeat(2, 3, 1, 1) - 5
    assert stand_ins(image, {"m": "labels"})["m"].unique().tolist() == [0, 1, 2, 3]
    assert stand_ins(image, {"m": "scores"})["m"].aminmax() == (0, 1)
    two = torch.cat([image[:1], image[:1] / 9])
    assert torch.allclose(*stand_ins(two, {"m": "scores"})["m"].unbind())  # of each image on its own
    assert stand_ins(torch.zeros(1, 3, 4, 4), {"m": "labels"})["m"].dtype == torch.long


@pytest.mark.sample(2)
def test_train_and_look_without_a_map(tmp_path):
    """No data set hands maps over: what the images themselves say stands for them, in words too."""
    loaded, settings = prepare("digits_region", ["train.epochs=1", "train.batch_size=512"])
    run = train(loaded, settings, tmp_path / "run")
    assert len(run.log()) == 1
    result = CliRunner().invoke(app, ["heatmap", str(tmp_path / "run"), "--out", str(tmp_path / "sheet.png")])
    assert result.exit_code == 0 and "`regions` is the brightness of the images" in result.output, (
        result.output
    )
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    model, x = attnzoo.compose("digits_region").eval(), torch.rand(2, 3, 32, 32)
    one = collect(model, x).maps[0].weights
    regions = torch.arange(32)[None, :, None].expand(2, 32, 32) // 16
    other = collect(model, x, {"regions": regions}).maps[0].weights
    assert not torch.equal(one, other) and not other[0, 0, 0, 32:].any()
