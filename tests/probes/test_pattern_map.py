"""`pattern_map`: which heads attend in the same pattern."""

import numpy as np
import pytest
import torch
from instruments import images, subject, vit
from planted import looking, shifted, sink, uniform

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.lab.maps import collect
from attnzoo.lab.subject import Subject
from attnzoo.probes import PatternMap

FEW = {"size": 8, "steps": 60}


@pytest.fixture(scope="module")
def plain():
    """A random model, and what is found of it."""
    torch.manual_seed(0)
    model = vit(depth=3)
    return model, attnzoo.probe(subject(model), PatternMap(**FEW))


def test_planted_patterns_are_the_clusters(plain):
    """Twelve heads of four patterns, in another order in each layer."""
    model, found = plain
    patterns = torch.eye(17), uniform(17), shifted(17, 4), sink(17, at=9)
    orders = [(0, 1, 2, 3), (3, 1, 0, 2), (2, 2, 1, 0)]
    noise = torch.rand(3, 4, 17, 17, generator=torch.Generator().manual_seed(0)) / 50
    layers = [torch.stack([patterns[i] for i in order]) + noise[at] for at, order in enumerate(orders)]
    with (
        looking(model, *layers[0], at="blocks.0"),
        looking(model, *layers[1], at="blocks.1"),
        looking(model, *layers[2], at="blocks.2"),
    ):
        planted = attnzoo.probe(subject(model), PatternMap(**FEW))
    true = [pattern for order in orders for pattern in order]
    pairs = set(zip(true, planted["cluster"], strict=True))
    assert len(pairs) == 4 and planted.figures["silhouette"] > 0.9 and planted.figures["explained"] > 0.8
    assert planted["cluster"].count(0) == 4 and planted["cluster"].count(3) == 2
    assert found.figures["silhouette"] < 0.6  # random heads are no clusters


def test_squares_are_the_maps_made_small(plain):
    model, found = plain
    weights = (
        collect(model, images()).maps[1].weights[:, 2, 1:, 1:].double()
    )  # (b 16 16), rows without class token
    pooled = weights.view(6, 8, 2, 8, 2).mean(dim=(2, 4)) * 2  # what a bin of keys gets
    assert found.arrays["maps"][6] == pytest.approx(pooled.sqrt().mean(dim=0).numpy(), abs=1e-5)
    same = found.arrays["maps"][np.array(found["cluster"]) == 1].mean(axis=0)
    assert found.arrays["clusters"][1] == pytest.approx(same)


def test_axes_are_the_principal_components(plain):
    codes = plain[1].arrays["codes"]
    _, _, vt = np.linalg.svd(codes - codes.mean(axis=0))
    wanted = (codes - codes.mean(axis=0)) @ vt[:2].T
    assert abs(np.array([plain[1]["x"], plain[1]["y"]]).T) == pytest.approx(abs(wanted), abs=1e-6)


def test_the_same_seed_gives_the_same_and_no_other_chance_is_touched(plain):
    model, found = plain
    before = torch.random.get_rng_state()
    with torch.no_grad():
        again = attnzoo.probe(subject(model), PatternMap(**FEW))
    assert torch.equal(before, torch.random.get_rng_state())
    assert again["x"] == found["x"] and again["cluster"] == found["cluster"]
    other = attnzoo.probe(subject(model), PatternMap(seed=1, **FEW))
    assert other["x"] != found["x"]


def test_few_heads_and_few_patterns():
    model = vit(depth=1)
    with looking(model, uniform(17)):
        found = attnzoo.probe(subject(model), PatternMap(size=8, steps=2))
    assert found["cluster"] == [0] * 4 and np.isnan(found.figures["silhouette"])
    assert attnzoo.probe(Subject.of(model, images(1)), PatternMap(size=8, steps=2)).figure().axes
    first = attnzoo.probe(subject(model), PatternMap(samples=4, **FEW)).arrays["maps"]
    only = attnzoo.probe(Subject.of(model, images(6)[:4]), PatternMap(**FEW)).arrays["maps"]
    assert first == pytest.approx(only, abs=1e-6)


def test_sequences_and_pairs(pairs):
    source = torch.tensor([[1, 5, 6, 7, 0, 0], [1, 5, 6, 7, 8, 2]])
    found = attnzoo.probe(pairs, PatternMap(**FEW), inputs=(source, torch.ones(2, 4).long()), kind="pairs")
    assert "other grids" in found.notes[0] and (found.arrays["maps"][0] > 0).any()
    with pytest.raises(ZooError, match="AZ924"):
        attnzoo.probe(subject(vit("squeeze_excite")), PatternMap(**FEW))
    with pytest.raises(ZooError, match="AZ921"):
        PatternMap(size=12)


def test_the_picture(plain):
    axes, *panels = plain[1].figure().axes
    assert len(axes.artists) == 12 and axes.get_xlabel() == "first component"
    assert panels[0].get_title().startswith("cluster 0: ") and len(panels) == 4
