"""`attention_flow`: how much can flow to what the answer is read from."""

import itertools
import math

import numpy as np
import pytest
import torch
from instruments import VIT, images, subject, vit
from planted import looking, shifted, sink

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.lab.maps import collect
from attnzoo.lab.rollout import layer_maps, roll, rollout
from attnzoo.lab.subject import Subject
from attnzoo.probes import AttentionFlow
from attnzoo.probes.attention_flow import max_flows


def least_cut(hats, top, target: int) -> float:
    """The capacity of the least cut, which is the most that can flow: every way of parting the nodes is tried."""
    n, depth = len(top), len(hats)
    best = math.inf
    inner = [(layer, i) for layer in range(depth) for i in range(n)]  # behind layer 0, ..., behind the last
    for sides in itertools.product((True, False), repeat=len(inner)):
        above = dict(zip(inner, sides, strict=True))  # on the side of the node above
        cut = sum(top[i] for i in range(n) if not above[depth - 1, i])
        for layer in range(depth):
            for i, j in itertools.product(range(n), repeat=2):
                below = above[layer - 1, j] if layer else j != target
                if layer == 0 and j != target:
                    continue  # other first tokens lead nowhere, so they cost nothing on the upper side
                cut += hats[layer][i, j] if above[layer, i] and not below else 0
        best = min(best, cut)
    return best


def random_hats(n: int, depth: int, seed: int) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(depth, n, n, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    return [(0.5 * layer + 0.5 * torch.eye(n)).numpy() for layer in a]


@pytest.mark.parametrize("seed", range(3))
def test_the_most_that_flows_is_the_least_cut(seed):
    n, depth = 3, 3
    hats = random_hats(n, depth, seed)
    for top in (np.array([1.0, 0, 0]), np.full(n, 1 / n)):
        found = max_flows(hats, top)
        assert found == pytest.approx([least_cut(hats, top, target) for target in range(n)], abs=1e-7)


def test_hand_two_layers():
    """Two ways lead from token 0 to token 1: through token 0, .5 then .3, and through token 1, .5 then .9."""
    upper, lower = np.array([[0.5, 0.5], [0, 1]]), np.array([[0.7, 0.3], [0.1, 0.9]])
    assert max_flows([lower, upper], np.array([1.0, 0])) == pytest.approx([0.6, 0.8])


def test_one_layer_is_its_row():
    found = attnzoo.probe(subject(vit(depth=1)), "attention_flow")
    assert found.arrays["flow"] == pytest.approx(found.arrays["rollout"], abs=1e-7)


def test_it_is_of_the_model_and_never_below_its_rollout():
    model = vit()
    found = attnzoo.probe(subject(model), "attention_flow")
    maps = collect(model, images())
    rolled = rollout(maps)[:4, 0].double().numpy()
    assert found.arrays["rollout"] == pytest.approx(rolled, abs=1e-6)
    assert (found.arrays["flow"] >= rolled - 1e-6).all() and (found.arrays["flow"] <= 1 + 1e-9).all()
    hats = [roll([layer.double()])[2].numpy() for layer in layer_maps(maps)]
    assert found.arrays["flow"][2] == pytest.approx(max_flows(hats, np.eye(17)[0]), abs=1e-6)
    assert found.figures["samples"] == 4 and 0.5 < found.figures["rank correlation with rollout"] <= 1
    assert found["place"][:3] == ["prefix", "0, 0", "0, 1"] and len(found) == 17
    assert found["flow"] == pytest.approx(found.arrays["flow"].mean(axis=0))


def test_planted_sinks_are_found():
    model = vit()
    with looking(model, sink(17, at=5)):
        found = attnzoo.probe(subject(model), "attention_flow")
    assert found["flow"][5] == pytest.approx(1) and found["flow"][0] == pytest.approx(0.5)
    assert sum(found["flow"]) == pytest.approx(1.5)
    random = attnzoo.probe(subject(model), "attention_flow")
    assert max(random["flow"][1:]) < 0.6


def test_an_answer_that_is_read_from_the_mean_has_a_node_of_its_own():
    recipe = VIT.format(attention="softmax", depth=1).replace("num_classes", "global_pool: avg, num_classes")
    model = attnzoo.compose(recipe).eval()
    with looking(model, torch.eye(17)):
        found = attnzoo.probe(Subject.of(model, images(1)), "attention_flow")
    assert found["flow"] == pytest.approx([0, *[1 / 16] * 16], abs=1e-8)
    with looking(model, torch.eye(17)):
        found = attnzoo.probe(Subject.of(model, images(1)), AttentionFlow(token=3))
    assert found["flow"] == pytest.approx(np.eye(17)[3].tolist())


def test_sequences_ask_their_last_token(pairs):
    source = torch.tensor([[1, 5, 6, 7, 0, 0], [1, 5, 6, 7, 8, 2]])
    with looking(pairs, shifted(6, 1), at="encoder.*"):
        inputs = source, torch.ones(2, 4).long()
        found = attnzoo.probe(pairs, "attention_flow", inputs=inputs, kind="pairs")
    assert found.arrays["flow"][0].tolist() == pytest.approx([0, 0.5, 1, 0.5, 0, 0])  # two ways lead one down
    assert found.arrays["flow"][1].tolist() == pytest.approx([0, 0, 0, 0.5, 1, 0.5])
    assert len(found.figure().axes[0].lines) == 2


def test_what_is_too_large_or_not_there_is_refused():
    with pytest.raises(ZooError, match="17 tokens are too many") as error:
        attnzoo.probe(subject(vit()), AttentionFlow(limit=16))
    assert "limit=17" in str(error.value)
    with pytest.raises(ZooError, match="no token 17"):
        attnzoo.probe(subject(vit()), AttentionFlow(token=17))
    with pytest.raises(ZooError, match="AZ921"):
        AttentionFlow(samples=0)


def test_the_picture():
    found = attnzoo.probe(subject(vit()), AttentionFlow(samples=2))
    assert [axes.get_title() for axes in found.figure().axes[:2]] == ["sample 0", "sample 1"]
