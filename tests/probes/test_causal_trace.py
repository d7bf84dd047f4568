"""`causal_trace`: what is spoilt, and what mends it."""

import math

import pytest
import torch
from instruments import images, subject, vit
from torch.nn import functional as F

import attnzoo
from attnzoo.core import Layout
from attnzoo.errors import ZooError
from attnzoo.lab.subject import Subject
from attnzoo.probes import CausalTrace


def cells(found, component: str) -> dict:
    """Recovery by layer and group."""
    rows = (row for row in found.rows() if row["component"] == component)
    return {(row["layer"], row["tokens"]): row["recovery"] for row in rows}


def through_one_layer(layer: int = 1) -> torch.nn.Module:
    """A ViT in which the class token hears of the image in the attention of one layer alone."""
    model = vit()
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            for linear in [block.mlp.fc2, *([] if i == layer else [block.attn.proj])]:
                linear.weight.zero_()
                linear.bias.zero_()
    return model


def test_the_layer_that_carries_the_answer_is_found():
    found = attnzoo.probe(subject(through_one_layer()), CausalTrace(corrupt="input", copies=2))
    attention, mlp, hidden = (cells(found, name) for name in ("attention", "mlp", "hidden"))
    assert attention[1, "class"] == attention[1, "all"] == pytest.approx(1, abs=1e-5)
    rest = [attention[0, name] for name in ("class", "object", "other", "all")]
    rest += [attention[1, "object"], attention[1, "other"], *mlp.values(), hidden[0, "class"]]
    assert rest == pytest.approx([0] * len(rest), abs=1e-5)
    assert hidden[1, "class"] == pytest.approx(1, abs=1e-5)
    assert hidden[0, "object"] != pytest.approx(0, abs=1e-3) and hidden[0, "other"] != pytest.approx(
        0, abs=1e-3
    )
    few = {"corrupt": "input", "copies": 1, "components": ["attention", "mlp"]}
    plain = attnzoo.probe(subject(vit()), CausalTrace(**few))
    assert min(abs(cells(plain, "mlp")[0, name]) for name in ("class", "object", "other")) > 1e-4
    assert min(abs(cells(plain, "attention")[1, name] - 1) for name in ("class", "all")) > 1e-3


def test_all_that_a_layer_gives_is_the_whole_answer_and_nothing_is_none():
    found = attnzoo.probe(subject(vit()), CausalTrace(groups={"none": [], "two": [0, -1]}))
    for layer in range(2):
        assert cells(found, "hidden")[layer, "all"] == pytest.approx(1, abs=1e-5)
        for component in ("hidden", "attention", "mlp"):
            assert cells(found, component)[layer, "none"] == pytest.approx(0, abs=1e-6)
    assert cells(found, "hidden")[1, "two"] == pytest.approx(1, abs=1e-5)  # the class is read from token 0
    assert found.figures["total_effect"] == pytest.approx(
        found.figures["p_clean"] - found.figures["p_corrupted"]
    )


def test_without_noise_nothing_is_to_be_recovered():
    found = attnzoo.probe(subject(vit()), CausalTrace(noise=0, copies=1))
    assert found["p"] == pytest.approx([found.figures["p_clean"]] * len(found), abs=1e-6)
    assert all(map(math.isnan, found["recovery"])) and any(
        "nothing to recover" in note for note in found.notes
    )


def test_a_cell_by_hand():
    """One sample, one draw, absolute noise on the embeddings; the MLP of layer 0 is put back for token 3."""
    model, image = vit(), images(1)
    found = attnzoo.probe(
        model,
        CausalTrace(noise=0.7, unit="absolute", copies=1, groups={"three": [3]}),
        inputs=image,
        targets=torch.tensor([2]),
    )
    noise = 0.7 * torch.randn(1, 17, 48, generator=torch.Generator().manual_seed(1))
    seen = []
    handle = model.blocks[0].mlp.register_forward_hook(lambda _, args, out: seen.append(out))
    model(image)
    handle.remove()

    def put(_module, _args, out):
        out = out.clone()
        out[:, 3] = seen[0][:, 3]
        return out

    handles = [model.blocks[0].register_forward_pre_hook(lambda _, args: (args[0] + noise, *args[1:]))]
    with torch.no_grad():
        corrupted = float(model(image).softmax(dim=1)[0, 2])
        handles.append(model.blocks[0].mlp.register_forward_hook(put))
        patched = float(model(image).softmax(dim=1)[0, 2])
    for handle in handles:
        handle.remove()
    assert found.figures["p_corrupted"] == pytest.approx(corrupted, abs=1e-6)
    row = next(
        row for row in found.rows() if (row["component"], row["layer"], row["tokens"]) == ("mlp", 0, "three")
    )
    assert row["p"] == pytest.approx(patched, abs=1e-6) and row["effect"] == pytest.approx(
        patched - corrupted, abs=1e-6
    )


def test_noise_is_in_standard_deviations_and_the_same_in_every_cut():
    model, few = vit(), {"components": ["mlp"], "copies": 2, "groups": {}}
    targets = torch.arange(6) % 5
    one, two, three = (
        attnzoo.probe(
            model, CausalTrace(seed=seed, **few), inputs=images(), targets=targets, batch_size=size
        )["p"]
        for size, seed in ((2, 1), (6, 1), (6, 3))
    )
    assert one == pytest.approx(two, abs=1e-6) and one != pytest.approx(three, abs=1e-4)
    spread = float(images().double().std(correction=0))
    relative = attnzoo.probe(subject(model), CausalTrace(corrupt="input", noise=2, **few))
    absolute = attnzoo.probe(
        subject(model), CausalTrace(corrupt="input", noise=2 * spread, unit="absolute", **few)
    )
    assert relative["p"] == pytest.approx(absolute["p"], abs=1e-6)


def test_a_window_puts_back_its_neighbours():
    model = vit(depth=3)
    few = {"components": ["attention"], "groups": {}, "copies": 1}
    narrow, two, wide = (
        cells(attnzoo.probe(subject(model, 2), CausalTrace(window=w, **few)), "attention") for w in (1, 2, 3)
    )
    assert wide[0, "all"] == two[1, "all"] and wide[2, "all"] != two[1, "all"]  # layers 0 and 1
    assert wide[2, "all"] == two[2, "all"]  # layers 1 and 2
    assert two[0, "all"] == narrow[0, "all"] and len({wide[1, "all"], wide[0, "all"], narrow[1, "all"]}) == 3


def test_the_object_is_where_pixels_differ():
    image = torch.full((2, 3, 16, 16), 2.0)  # bright, but all alike
    image[0, :, 4:8, 8:12] = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    image[1, :, 12:, :4] = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    of = subject(vit())
    chosen = CausalTrace(object_share=1 / 16)._object(image, of.layout)
    assert chosen.nonzero().tolist() == [[0, 6], [1, 12]]
    assert F.one_hot(torch.tensor([6, 12]), 16).bool().equal(chosen)


def test_spans_of_a_sequence():
    trace = CausalTrace()
    spans = [
        trace._mask(name, 9, Layout((9,)), None)[0].nonzero().flatten().tolist()
        for name in ("early", "late", "last")
    ]
    assert spans == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_its_own_answer_needs_no_targets():
    found = attnzoo.probe(vit(), CausalTrace(answer="own"), inputs=images())
    assert found.figures["p_clean"] > found.figures["p_corrupted"]
    with pytest.raises(ZooError, match="AZ926"):
        attnzoo.probe(vit(), "causal_trace", inputs=images())


def test_sequences_and_pairs():
    ids = torch.randint(3, 12, (3, 9), generator=torch.Generator().manual_seed(0))
    targets = torch.where(torch.arange(9) < 8, -100, ids)  # the last alone is asked
    of = Subject.of(attnzoo.compose("task_switching").eval(), ids, targets, kind="sequences")
    found = attnzoo.probe(of, CausalTrace(noise=10))
    assert list(dict.fromkeys(found["tokens"])) == ["early", "late", "last", "all"]
    hidden = cells(found, "hidden")
    assert hidden[0, "all"] == hidden[1, "last"] == pytest.approx(1, abs=1e-4)
    assert hidden[1, "early"] == hidden[1, "late"] == pytest.approx(0, abs=1e-4)  # nobody reads them any more
    edits = ["host.dim=16", "host.mlp_dim=16", "host.layers=1", "heads=2", "host.vocab=20"]
    of = Subject.of(attnzoo.compose("transformer", edits=edits), (ids, ids), ids, kind="pairs")
    pairs = attnzoo.probe(of, CausalTrace(noise=10, copies=1))
    assert pairs["component"][0] == "hidden" and pairs["recovery"][3] == pytest.approx(1, abs=1e-3)
    assert {site.partition(".")[0] for site in pairs["site"]} == {"encoder", "decoder"}


def test_branches_share_what_is_around_them():
    model = vit("{fuse: hadamard, of: [softmax, elu_linear]}")
    found = attnzoo.probe(subject(model), CausalTrace(copies=1))
    assert len(found) == 3 * 2 * 4 and set(found["branch"]) == {""}


def test_it_is_drawn():
    figure = attnzoo.probe(subject(vit(), 2), CausalTrace(copies=1)).figure()
    panels = figure.axes[:3]
    assert [axes.get_title() for axes in panels] == ["hidden", "attention", "mlp"]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["class", "object", "other", "all"]
    assert panels[0].images[0].get_array().shape == (2, 4) and figure.axes[3].get_ylabel() == "recovery"


def test_nothing_is_left_behind():
    model = vit()
    of = subject(model)
    with pytest.raises(ZooError, match="AZ923.*token 40"):
        attnzoo.probe(of, CausalTrace(groups={"far": [40]}))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_is_refused():
    with pytest.raises(ZooError, match="AZ921.*no group `last`"):
        attnzoo.probe(subject(vit()), CausalTrace(corrupt="last"))
    with pytest.raises(ZooError, match="AZ927"):
        ids = torch.ones(2, 5, dtype=torch.long)
        attnzoo.probe(
            attnzoo.compose("task_switching"),
            CausalTrace(corrupt="input"),
            inputs=ids,
            targets=ids,
            kind="sequences",
        )
    with pytest.raises(ZooError, match="AZ921"):
        CausalTrace(components=["heads"])
    with pytest.raises(ZooError, match="AZ921"):
        CausalTrace(noise=-1)
