"""Maps and rollout of models with two streams and of models in stages, with attention that is planted."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from planted import looking
from torch import nn
from typer.testing import CliRunner

import attnzoo
from attnzoo.cli.app import app
from attnzoo.core import Layout
from attnzoo.errors import ZooError
from attnzoo.lab.heatmap import captions, heat_sheet, notes, view
from attnzoo.lab.maps import Maps, collect
from attnzoo.lab.passage import merged
from attnzoo.lab.rollout import layer_maps, mean_map, rollout
from attnzoo.lab.subject import Subject

F64 = torch.float64
A, B = 65, 17
"""Tokens of `dual_scale`: class tokens, and grids of 8 × 8 and 4 × 4."""


def images(model: nn.Module, count: int = 2) -> torch.Tensor:
    size = model.pretrained_cfg["input_size"]
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


def made(recipe: str, *edits: str) -> nn.Module:
    """A model whose maps are far from even."""
    torch.manual_seed(0)
    model = attnzoo.compose(recipe, edits=edits).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "qkv" in name or ".q." in name or ".kv" in name:
                weight.mul_(8)
    return model


def found_in(recipe: str, *edits: str) -> Maps:
    model = made(recipe, *edits)
    return collect(model, images(model))


def to(n: int, m: int, at: int) -> torch.Tensor:
    """Everybody looks at one token, (n m)."""
    return torch.eye(m)[at].expand(n, m)


def planted() -> Maps:
    """`dual_scale`, in which every site looks at one token."""
    model = made("dual_scale")
    with (
        looking(model, to(A, A, 6), at="a.*.self"),
        looking(model, to(A, B, 3), at="a.*.cross"),
        looking(model, to(B, B, 5), at="b.*.self"),
        looking(model, to(B, A, 9), at="b.*.cross"),
    ):
        return collect(model, images(model))


# ----------------------------------------------------------------------------------------------------------- two streams


def test_each_map_lies_on_the_grid_of_the_tokens_that_are_looked_at():
    shown = view(planted(), "mechanism")
    assert shown.columns == ("a.0.self", "b.0.self", "a.0.cross", "b.0.cross", "a.1.self", "b.1.self",
                             "a.1.cross", "b.1.cross")  # fmt: skip
    where = {
        "a.self": (8, 5),
        "b.self": (4, 4),
        "a.cross": (4, 2),
        "b.cross": (8, 8),
    }  # side, place behind the prefix
    for name, panel, unit in zip(shown.columns, shown.panels[0], shown.units[0], strict=True):
        own, _, kind = name.split(".")
        side, at = where[f"{own}.{kind}"]
        wanted = torch.zeros(side * side)
        wanted[at] = 1
        assert torch.equal(panel, wanted.view(1, side, side).expand(2, -1, -1)), name
        assert unit == 1 / (side * side + 1)


def test_the_rollout_is_that_of_the_joint_tokens():
    """Entry by entry: blocks on the diagonal for self-attention, beside it for cross-attention."""
    found = found_in("dual_scale")
    mean = {one.site: one.weights.to(F64).mean(dim=1) for one in found.maps}
    wanted = torch.eye(A + B, dtype=F64).repeat(2, 1, 1)
    for layer in range(2):
        for kind in ("self", "cross"):
            for sample in range(2):
                step = torch.zeros(A + B, A + B, dtype=F64)
                for i in range(A + B):
                    own, row = ("a", i) if i < A else ("b", i - A)
                    weights = mean[f"{own}.{layer}.{kind}"][sample, row]
                    reads = own if kind == "self" else {"a": "b", "b": "a"}[own]
                    for j, weight in enumerate(weights):
                        step[i, j if reads == "a" else A + j] += weight
                    step[i, i] += 1
                wanted[sample] = (step / step.sum(dim=1, keepdim=True)) @ wanted[sample]
    rolled = rollout(found)
    torch.testing.assert_close(rolled, wanted.float())
    torch.testing.assert_close(rolled.sum(dim=-1), torch.ones(2, A + B))
    answer = (
        wanted[:, 0] + wanted[:, A]
    ) / 2  # the class tokens of both streams, as the classifier reads them
    torch.testing.assert_close(found.asked(rolled), answer[:, 1:A].view(2, 8, 8).float())
    torch.testing.assert_close(found.asked(rolled, of="b"), answer[:, A + 1 :].view(2, 4, 4).float())


def test_hand_one_layer_of_planted_attention():
    """Behind self- and cross-attention a quarter of a's class token is its own, a quarter that of token 6; half comes
    from b's token 3, itself one half its own and one half that of token 5."""
    row = rollout(planted(), layer=0)[0, 0]
    wanted = torch.zeros(A + B)
    wanted[[0, 6, A + 3, A + 5]] = 0.25
    torch.testing.assert_close(row, wanted)


def test_layers_of_two_streams_are_blocks():
    found = planted()
    assert found.passage.depth == 2
    assert view(found, "heads", layer=1).rows == ("a.1.self", "b.1.self", "a.1.cross", "b.1.cross")
    shown = view(found, "rollout", layer=0)
    assert (shown.columns, shown.rows) == (("up to *.0.self", "up to *.0.cross"), ("a", "b"))
    torch.testing.assert_close(shown.panels[0][1], found.asked(rollout(found, layer=0)))
    with pytest.raises(ZooError, match="there is no layer 2; the model has 2"):
        view(found, layer=2)


def test_the_sheet_of_both_streams():
    found = found_in("dual_scale")
    shown = view(found)
    assert shown.columns == ("a.self", "a.cross", "b.self", "b.cross", "rollout a", "rollout b")
    torch.testing.assert_close(shown.panels[0][1], mean_map(found, "softmax", group="a.cross"))
    assert shown.units == [(1 / A, 1 / B, 1 / B, 1 / A, 1 / (A + B), 1 / (A + B))]
    by_grid = shown.arrays()
    assert {name: tuple(values.shape) for name, values in by_grid.items()} == {
        "8x8": (2, 1, 6, 8, 8), "4x4": (2, 1, 6, 4, 4)}  # fmt: skip
    there = by_grid["8x8"].isnan().flatten(3).all(dim=-1)[0, 0]
    assert there.tolist() == [False, True, True, False, False, True]
    text = "\n".join(notes(found))
    assert "the class token of a and the class token of b" in text and "of a rollout 1/82" in text
    assert "branches averaged" not in text and "1/65" in text


def test_a_stream_that_the_answer_does_not_read():
    """Learnt tokens that nobody changes: the answer is a's, and what it has of b came by cross-attention."""
    found = found_in("dual_prior_cross")
    assert found.reads == "the class token" and found.shares().nonzero().tolist() == [[0, 0]]
    rolled = rollout(found)
    torch.testing.assert_close(found.asked(rolled, of="b"), rolled[:, 0, A:])
    torch.testing.assert_close(rolled[:, A:, A:], torch.eye(16).expand(2, -1, -1))


def test_tokens_in_a_line_are_drawn_without_the_image():
    found = found_in("dual_prior_cross")
    shown, pixels = view(found), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert [tuple(panel.shape[1:]) for panel in shown.panels[0]] == [(8, 8), (16,), (8, 8), (16,)]
    sheet = heat_sheet(found, shown, pixels, captions(found, ["x", "y"], None, None), "t", notes(found))
    layers = [len(axes.images) for axes in sheet.axes if axes.get_label() != "scale"]
    assert layers == [1, 2, 1, 2, 1] * 2  # of an image; of heat over an image; of heat alone


def test_images_in_pairs_are_alone_in_eval_mode():
    found = found_in("dual_pair")
    assert {one.site: one.reason for one in found.absent} == dict.fromkeys(
        ("a.0.cross", "a.1.cross"), "nothing calls it in eval mode"
    )
    assert view(found).columns == ("a.self", "rollout")
    wanted = rollout(found)
    assert wanted.shape == (2, A, A)
    assert attnzoo.probe(Subject.of(made("dual_pair"), images(made("dual_pair"))), "entropy")["site"]


def test_what_the_caller_hands_over_has_maps():
    found = found_in("dual_given")
    assert "a.cross" in view(found).columns and {one.branch for one in found.absent} == {"window_cross"}


# ---------------------------------------------------------------------------------------------------------------- stages


def test_hand_merges_share_as_their_weights_do():
    """A 2 × 2 convolution whose weights are 3, 1, 0 and 0 takes three quarters of the token above left; a 3 × 3 one of
    ones takes alike of what is on the image."""
    conv = nn.Conv2d(1, 1, 2, 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[[3.0, -1.0], [0.0, 0.0]]]]))
    rows = merged(conv, Layout((2, 4)))
    assert rows.tolist() == [[0.75, 0.25, 0, 0, 0, 0, 0, 0], [0, 0, 0.75, 0.25, 0, 0, 0, 0]]
    overlap = nn.Conv2d(5, 7, 3, 2, 1)
    nn.init.ones_(overlap.weight)
    rows = merged(overlap, Layout((4, 4)))
    torch.testing.assert_close(rows[0].view(4, 4)[:2, :2], torch.full((2, 2), 0.25))
    torch.testing.assert_close(rows[3].view(4, 4)[1:, 1:], torch.full((3, 3), 1 / 9))
    torch.testing.assert_close(rows.sum(dim=1), torch.ones(4))


def test_a_merge_is_measured_by_the_norm_of_its_weights():
    """Channels count together: the norm is that of the whole matrix at a place."""
    conv = nn.Conv2d(3, 4, 2, 2)
    norms = torch.tensor([[conv.weight[:, :, y, x].detach().norm() for x in range(2)] for y in range(2)])
    torch.testing.assert_close(merged(conv, Layout((2, 2)))[0], (norms / norms.sum()).flatten())


def test_each_stage_has_its_grid():
    found = found_in("pyramid_softmax")
    shown = view(found)
    assert shown.columns == ("stages.0", "stages.1", "stages.2", "rollout")
    assert [tuple(panel.shape) for panel in shown.panels[0]] == [(2, 8, 8), (2, 4, 4), (2, 2, 2), (2, 8, 8)]
    assert shown.units == [(1 / 64, 1 / 16, 1 / 4, 1 / 64)]
    last = found.maps[-1].weights.mean(dim=(1, 2)).view(2, 2, 2)
    torch.testing.assert_close(shown.panels[0][2], last)
    assert [panel.shape[-1] for panel in view(found, "heads").panels[1]] == [4] * 4


def test_the_rollout_goes_through_merges():
    """Heads that look at themselves leave what the merges do; others stand between them."""
    model = made("pyramid_softmax")
    first, second = (stage.merge for stage in model.stages[1:])
    merges = [merged(first, Layout((8, 8))), merged(second, Layout((4, 4)))]
    with (
        looking(model, torch.eye(64), at="stages.0.*"),
        looking(model, torch.eye(16), at="stages.1.*"),
        looking(model, torch.eye(4), at="stages.2.*"),
    ):
        rolled = rollout(collect(model, images(model)))
    torch.testing.assert_close(rolled, (merges[1] @ merges[0]).expand(2, -1, -1))
    found = collect(model, images(model))
    maps = [one.weights.mean(dim=1) for one in found.maps]
    hats = [(a + torch.eye(a.shape[-1])) / 2 for a in maps]
    wanted = hats[2] @ merges[1] @ hats[1] @ merges[0] @ hats[0]
    torch.testing.assert_close(rollout(found), wanted)
    torch.testing.assert_close(rollout(found, layer=1), hats[1] @ merges[0] @ hats[0])
    torch.testing.assert_close(rollout(found).sum(dim=-1), torch.ones(2, 4))
    torch.testing.assert_close(view(found, "rollout").panels[0][2], wanted.mean(dim=1).view(2, 8, 8))


def test_discarding_leaves_merges_alone():
    found = found_in("pyramid_softmax")
    shapes = [tuple(layer.shape[1:]) for layer in layer_maps(found, ratio=0.9)]
    assert shapes == [(64, 64), (16, 64), (16, 16), (4, 16), (4, 4)]
    for kept, merge in zip(layer_maps(found, ratio=0.9)[1::2], layer_maps(found)[1::2], strict=True):
        assert torch.equal(kept, merge)


def test_stages_without_attention_come_before_the_first_tokens():
    found = found_in("pyramid_shvit")
    assert found.passage.steps[0].name == "stages.1.0" and found.layout.grid == (4, 4)
    assert view(found).columns == ("stages.1", "stages.2", "rollout")


def test_where_a_merge_looks_elsewhere_for_each_image_there_is_no_rollout():
    found = found_in("pyramid_lit")
    assert view(found).columns == ("stages.1", "stages.2")
    assert any("deformable" in line for line in notes(found))
    with pytest.raises(ZooError, match="deformable") as caught:
        view(found, "rollout")
    assert caught.value.code == "AZ924"


def test_blocks_that_share_weights_are_called_several_times():
    model = made("pyramid_softmax", "host.model.shared=true", "host.model.depths=[2, 1, 1]")
    found = collect(model, images(model))
    assert [(one.site, one.reason) for one in found.absent] == [
        ("stages.0.0", "it is called several times in a forward, with one map each")
    ]


# --------------------------------------------------------------------------------------------------------------- recipes

RECIPES = [
    *attnzoo.list_recipes("dual_*", plugin="attnzoo"),
    *attnzoo.list_recipes("pyramid_*", plugin="attnzoo"),
]
NOTHING = {"pyramid_van", "pyramid_halonet", "pyramid_hat_net", "pyramid_reduced", "dual_pairwise_cross"}
"""Their mechanisms form no map of all tokens."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_drawn_or_says_why_not(recipe):
    model = attnzoo.compose(recipe).eval()
    found = collect(model, images(model, 1))
    if recipe in NOTHING:
        with pytest.raises(ZooError, match="no mechanism of this model has an attention map"):
            view(found)
        return
    for what in ("model", "mechanism", "heads", "rollout"):
        if what == "rollout" and found.passage.unknown:
            continue
        shown = view(found, what)
        known = [panel for row in shown.panels for panel in row if not panel.isnan().all()]
        assert known and all(panel.isfinite().all() for panel in known)


def test_the_command_writes_a_file_for_each_grid(tmp_path):
    out = tmp_path / "maps.png"
    told = CliRunner().invoke(app, ["heatmap", "dual_scale", "--npy", "--out", str(out), "--json"])
    assert told.exit_code == 0, told.output
    said = json.loads(told.stdout)
    assert said["written"] == [str(tmp_path / name) for name in ("maps.png", "maps-8x8.npy", "maps-4x4.npy")]
    assert np.load(tmp_path / "maps-4x4.npy").shape == (1, 1, 6, 4, 4)


# ---------------------------------------------------------------------------------------------------------------- probes


def test_the_probe_follows_both_streams():
    model = made("dual_scale")
    x = images(model)
    found, maps = attnzoo.probe(Subject.of(model, x), "rollout"), collect(model, x)
    wanted = rollout(maps)
    assert found["site"] == ["*.0.self", "*.0.cross", "*.1.self", "*.1.cross"]
    assert torch.from_numpy(found.arrays["maps"]).float() == pytest.approx(maps.asked(wanted), abs=1e-6)
    assert torch.from_numpy(found.arrays["maps_b"]).float() == pytest.approx(
        maps.asked(wanted, of="b"), abs=1e-6
    )
    assert found["own"][-1] == pytest.approx(float(wanted.diagonal(dim1=1, dim2=2).mean()), rel=1e-5)
    special = (wanted[:, [0, A]][:, :, [0, A]]).sum(dim=2).mean()
    assert found["prefix"][-1] == pytest.approx(float(special), rel=1e-5)


def test_the_probe_follows_merges():
    model = made("pyramid_softmax")
    found = attnzoo.probe(Subject.of(model, images(model)), "rollout")
    assert np.isfinite(found["own"][0]) and np.isnan(found["own"][1:]).all()
    assert found.arrays["maps"].shape == (2, 8, 8) and found.arrays["maps"].sum(axis=(1, 2)) == pytest.approx(
        1
    )
    assert any("own" in note for note in found.notes)


def test_flow_is_no_more_than_what_the_answer_reads():
    """Two streams and stages: behind planted attention all flows by the edges that are there."""
    model = made("dual_scale", "host.model.patch_size=8", "host.model.b.patch_size=16", "host.model.depth=1")
    n = 17 + 5
    with (
        looking(model, to(17, 17, 6), at="a.*.self"),
        looking(model, to(5, 5, 2), at="b.*.self"),
        looking(model, to(17, 5, 3), at="a.*.cross"),
        looking(model, to(5, 17, 9), at="b.*.cross"),
    ):
        found = attnzoo.probe(Subject.of(model, images(model)), "attention_flow")
    flow = found.arrays["flow"][0]
    assert flow.shape == (n,) and found["place"][0] == "a prefix" and found["place"][18] == "b 0, 0"
    carried = {0, 6, 9, 17, 17 + 2, 17 + 3}
    assert {i for i in range(n) if flow[i] > 1e-6} == carried


def test_flow_goes_through_merges():
    """Of 2 × 2 patches there is one way from each first token, as wide as its narrowest pipe."""
    model = made("pyramid_softmax", "host.model.merge=patch")
    low, high = (
        merged(stage.merge, layout) for stage, layout in zip(model.stages[1:], model.layouts, strict=False)
    )
    with (
        looking(model, torch.eye(64), at="stages.0.*"),
        looking(model, torch.eye(16), at="stages.1.*"),
        looking(model, torch.eye(4), at="stages.2.*"),
    ):
        found = attnzoo.probe(Subject.of(model, images(model)), "attention_flow")
    above = low.argmax(dim=0)  # of each first token
    pipes = torch.stack([low.amax(dim=0), high.amax(dim=0)[above], torch.full((64,), 1 / 4)])
    assert found.arrays["flow"] == pytest.approx(pipes.amin(dim=0).expand(2, -1).numpy(), abs=1e-6)


@pytest.mark.parametrize("recipe", ["dual_scale", "pyramid_softmax"])
@pytest.mark.parametrize("probe", ["entropy", "attention_distance", "rollout"])
def test_probes_of_maps_work(recipe, probe):
    model = made(recipe)
    assert len(attnzoo.probe(Subject.of(model, images(model)), probe)) > 0


def test_gradients_go_through_both_streams():
    model = made("dual_scale")
    found = attnzoo.probe(Subject.of(model, images(model)), attnzoo.probes.Rollout(gradient=True))
    maps = found.arrays["by_layer"]
    assert np.isfinite(maps).all() and all((one != other).any() for one, other in pairwise(maps))


def test_what_compares_two_layers_by_place_refuses_several_grids():
    from attnzoo.lab.calibration import salient_tokens

    model = made("pyramid_softmax")
    with pytest.raises(ZooError, match="AZ903"):
        salient_tokens(model, images(model))


def test_hand_flow_through_a_merge():
    """Four tokens become one: each is a pipe of its own, unless the layer before lets less through."""
    from attnzoo.probes.attention_flow import max_flows

    merge = np.array([[0.5, 0.25, 0.15, 0.1]])
    narrow = np.diag([1, 1, 0.05, 1])
    assert max_flows([narrow, merge, np.eye(1)], np.ones(1)) == pytest.approx([0.5, 0.25, 0.05, 0.1])
