"""`attention_distance`: how far each head looks."""

import math

import pytest
import torch
from instruments import VIT, images, subject, vit
from matplotlib.figure import Figure
from planted import looking, shifted, sink, uniform

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.lab.maps import collect
from attnzoo.lab.subject import Subject
from attnzoo.probes import AttentionDistance


def by_loop(weights: torch.Tensor, patch: float, renorm: bool) -> list[float]:
    """The mean over samples and grid tokens of each head, one number at a time; (b h n n) behind a class token."""
    side, out = math.isqrt(weights.shape[-1] - 1), []
    for head in range(weights.shape[1]):
        total, rows = 0.0, 0
        for sample in weights[:, head].tolist():
            for i in range(side * side):
                row = sample[1 + i][1:]
                share = sum(row) if renorm else 1.0
                for j, value in enumerate(row):
                    far = math.hypot(i // side - j // side, i % side - j % side)
                    total += value / share * patch * far
                rows += 1
        out.append(total / rows)
    return out


@pytest.mark.parametrize("renorm", [False, True])
def test_equals_the_loop(renorm):
    model = vit()
    found = attnzoo.probe(subject(model), AttentionDistance(renorm=renorm))
    maps = collect(model, images()).maps
    wanted = [value for one in maps for value in by_loop(one.weights.double(), 4, renorm)]
    assert found["distance"] == pytest.approx(wanted, rel=1e-6)
    assert found["head"] == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    ("size", "patch", "wanted"),
    [(8, 1.0, (2 + math.sqrt(2)) / 4), (8, 4.0, 2 + math.sqrt(2)), (32, None, 16.546)],
)
def test_hand_a_uniform_head(size, patch, wanted):
    model = attnzoo.compose(VIT.format(attention="softmax", depth=1).replace("16", str(size))).eval()
    tokens = (size // 4) ** 2
    there = Subject.of(model, torch.zeros(2, 3, size, size))
    with looking(model, uniform(tokens + 1)):
        renormed = attnzoo.probe(there, AttentionDistance(renorm=True, patch=patch))
        plain = attnzoo.probe(there, AttentionDistance(patch=patch))
    assert renormed["distance"] == pytest.approx([wanted] * 4, rel=1e-4)
    assert plain["distance"] == pytest.approx([wanted * tokens / (tokens + 1)] * 4, rel=1e-4)
    assert plain["share"] == pytest.approx([1.0] * 4)


def test_planted_heads_are_told_apart():
    """Itself: 0. The token before: 4 pixels, where it is not a line further up, 3 · 4 pixels away and one up."""
    model = vit()
    with looking(model, torch.eye(17), shifted(17, 1), sink(17), uniform(17)):
        found = attnzoo.probe(subject(model), "attention_distance")
    before = (12 * 4 + 3 * math.hypot(12, 4)) / 16  # the first token looks at the class token
    assert found["distance"][:3] == pytest.approx([0, before, 0], abs=1e-5)
    assert found["share"][3] == pytest.approx(1)


def test_random_heads_look_everywhere():
    assert all(0.85 < share < 1.15 for share in attnzoo.probe(subject(vit()), "attention_distance")["share"])


def test_pixels_of_oblong_images_and_options():
    model = vit()
    whole = attnzoo.probe(subject(model), "attention_distance")
    once = attnzoo.probe(subject(model), AttentionDistance(patch=1.0))
    assert whole["distance"] == pytest.approx([4 * value for value in once["distance"]])
    probe, layout = AttentionDistance(), attnzoo.core.Layout((2, 2))
    far = probe.distances(layout, torch.zeros(1, 3, 8, 32))
    assert far[0].tolist() == pytest.approx([0, 16, 4, math.hypot(16, 4)])
    with pytest.raises(ZooError, match="AZ921"):
        AttentionDistance(patch=0.0)


def test_sequences_are_measured_in_tokens_without_padding(pairs):
    source, target = torch.tensor([[1, 5, 6, 7, 0, 0, 0], [1, 5, 6, 7, 8, 9, 2]]), torch.ones(2, 4).long()
    with looking(pairs, shifted(7, 1), at="encoder.*"):
        found = attnzoo.probe(pairs, "attention_distance", inputs=(source, target), kind="pairs")
    encoder = [row["distance"] for row in found.rows() if row["site"].startswith("encoder")]
    assert encoder == pytest.approx(
        [(3 + 6) / 11] * len(encoder)
    )  # of 4 and 7 tokens the first looks at itself
    assert "other grids" in found.notes[0]


def test_branches_and_implied_maps():
    found = attnzoo.probe(subject(vit("{fuse: add, of: [softmax, elu_linear]}")), "attention_distance")
    assert set(found["branch"]) == {"softmax", "elu_linear"} and all(value > 0 for value in found["distance"])


def test_the_picture():
    found = attnzoo.probe(subject(vit()), "attention_distance")
    figure = found.figure()
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "layer" and len(axes.collections[0].get_offsets()) == 8
    assert [int(tick) for tick in axes.get_xticks()] == [0, 1]
