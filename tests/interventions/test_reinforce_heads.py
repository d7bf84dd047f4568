"""`reinforce_heads`: VHR, and which heads are chosen."""

import pytest
import torch
from instruments import images, pairs, sentences, subject, vit

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.interventions import ReinforceHeads
from attnzoo.lab.calibration import reinforced_heads
from attnzoo.lab.subject import Subject


def test_equals_a_projection_that_reads_these_heads_louder():
    model, louder = vit(), vit()
    with torch.no_grad():
        for head in (1, 2):
            louder.blocks[1].attn.proj.weight[:, 12 * head : 12 * (head + 1)] *= 3.0
        with attnzoo.intervene(model, ReinforceHeads(at="blocks.1", heads=[1, 2], strength=3.0)):
            out = model(images())
        assert torch.allclose(out, louder(images()), atol=1e-4)
        assert not torch.allclose(out, model(images()), atol=1e-2)


def constant(model: torch.nn.Module, layer: int, heads: list[int]) -> torch.nn.Module:
    """The same, but these heads give what no token says: their values are biases alone."""
    with torch.no_grad():
        for head in heads:
            rows = slice(96 + 12 * head, 96 + 12 * (head + 1))
            model.blocks[layer].attn.qkv.weight[rows] = 0
    return model


@pytest.mark.parametrize("without", ["zero", "mean"])
def test_heads_that_ignore_the_image_are_never_chosen(without):
    model = constant(constant(vit(), 0, [0, 3]), 1, [1, 2])
    found = reinforced_heads(subject(model), without=without, strength=1.5, outliers=False)
    assert [(one.at, one.heads, one.strength) for one in found] == [
        ("blocks.0", [1, 2], 1.5),
        ("blocks.1", [0, 3], 1.5),
    ]


def test_at_most_half_of_the_heads_and_the_model_as_before():
    model = vit(depth=3)
    with torch.no_grad():
        before = model(images())
        found = reinforced_heads(subject(model))
        assert torch.equal(model(images()), before)
    assert found and all(1 <= len(one.heads) <= 2 for one in found)


def test_layers_before_are_reinforced_when_a_layer_is_looked_at():
    """With heads of the first layer much louder the choice of the second is that of a model built so."""
    differs = []
    for seed in range(5):
        model, louder = vit(seed=seed), vit(seed=seed)
        first, second = reinforced_heads(subject(model), strength=50.0, outliers=False)
        with torch.no_grad():
            for head in first.heads:
                louder.blocks[0].attn.proj.weight[:, 12 * head : 12 * (head + 1)] *= 50.0
        assert reinforced_heads(subject(louder), at="blocks.1", outliers=False)[0].heads == second.heads
        differs.append(
            reinforced_heads(subject(model), at="blocks.1", outliers=False)[0].heads != second.heads
        )
    assert any(differs)


def test_an_outlier_is_left_out():
    """A head that says much whatever it sees, and whose output changes with it."""
    model = vit()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[96 + 24 : 96 + 36] *= 50
        model.blocks[0].attn.qkv.bias[96 + 24 : 96 + 36] *= 50
    there = reinforced_heads(subject(model), at="blocks.0", outliers=False)
    gone = reinforced_heads(subject(model), at="blocks.0")
    assert 2 in there[0].heads and 2 not in gone[0].heads


def test_a_sequence_without_its_source():
    model = pairs()
    data = Subject.of(model, sentences(), kind="pairs")
    found = reinforced_heads(data, at="decoder.*")
    assert found and not any(
        one.at == "decoder.0.self" for one in found
    )  # it comes before the source is read
    assert any(one.at == "decoder.0.cross" for one in found)


def test_of_a_sequence_it_asks_what_is_to_be_left_out():
    model = attnzoo.compose("task_switching")
    ids = torch.randint(1, 5, (3, 9), generator=torch.Generator().manual_seed(0))
    data = Subject.of(model, ids, kind="sequences")
    with pytest.raises(ZooError, match="AZ927"):
        reinforced_heads(data)
    later = torch.arange(9) > 4

    def without(batch):
        return type(batch)((batch.inputs[0] * later,))

    assert reinforced_heads(data, without=without, queries="last")


def test_a_model_without_heads_has_none_to_choose():
    with pytest.raises(ZooError, match="AZ924"):
        reinforced_heads(subject(vit("squeeze_excite")))
