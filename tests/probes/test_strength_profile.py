"""`strength_profile`: how strongly each head looks at neighbours of each distance."""

import numpy as np
import pytest
import torch
from instruments import images, subject, vit
from planted import looking, shifted, sink, uniform

import attnzoo
from attnzoo.core import Layout
from attnzoo.lab.maps import collect
from attnzoo.lab.subject import Subject
from attnzoo.probes.strength_profile import hops


def by_loop(weights: torch.Tensor, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums and means of one head by hop, one number at a time: (b n n) behind a class token."""
    sums, means, rings = np.zeros(side), np.zeros(side), np.zeros(side)
    for sample in weights.tolist():
        for i in range(side * side):
            mass, size = np.zeros(side), np.zeros(side)
            for j in range(side * side):
                k = max(abs(i // side - j // side), abs(i % side - j % side))
                mass[k] += sample[1 + i][1 + j]
                size[k] += 1
            sums += mass / (len(weights) * side * side)
            means[size > 0] += mass[size > 0] / size[size > 0]
            rings[size > 0] += 1
    return sums, means / rings


def test_equals_the_loop():
    model = vit()
    found = attnzoo.probe(subject(model), "strength_profile")
    heads = [one.weights[:, head].double() for one in collect(model, images()).maps for head in range(4)]
    wanted = [by_loop(head, 4) for head in heads]
    assert found.arrays["sums"] == pytest.approx(np.stack([sums for sums, _ in wanted]), abs=1e-6)
    assert found.arrays["means"] == pytest.approx(np.stack([means for _, means in wanted]), abs=1e-6)
    assert found["from_prefix"] == pytest.approx([float(a[:, 0, 1:].sum(-1).mean()) for a in heads], rel=1e-5)
    assert found["own"] == found.arrays["sums"][:, 0].tolist()


@pytest.mark.parametrize("attention", ["softmax", "elu_linear", "{fuse: add, of: [softmax, cosine]}"])
def test_rings_and_the_class_token_make_one(attention):
    found = attnzoo.probe(subject(vit(attention)), "strength_profile")
    assert found.arrays["sums"].sum(axis=1) + found["to_prefix"] == pytest.approx(np.ones(len(found)))


def test_a_uniform_head_gives_every_token_the_same():
    model = vit()
    with looking(model, uniform(17)):
        found = attnzoo.probe(subject(model), "strength_profile")
    assert found.arrays["means"] == pytest.approx(np.full((8, 4), 1 / 17))
    assert found["to_prefix"] == pytest.approx([1 / 17] * 8)
    assert found["from_prefix"] == pytest.approx([16 / 17] * 8)


def test_planted_heads_are_told_apart_and_random_ones_are_none_of_them():
    model, there = vit(), subject(vit())
    ring = hops(Layout((4, 4)))[..., 1].float()
    around = torch.nn.functional.pad(ring / ring.sum(dim=1, keepdim=True), (1, 0, 1, 0))
    with looking(model, torch.eye(17), around, sink(17), shifted(17, 1)):
        found = attnzoo.probe(subject(model), "strength_profile")
    own, near, to_prefix = (np.array(found[name])[:4] for name in ("own", "near", "to_prefix"))
    assert own == pytest.approx([1, 0, 0, 0])
    assert near == pytest.approx([0, 1, 0, 12 / 16])  # the token before is near but at the start of a line
    assert to_prefix == pytest.approx([0, 0, 1, 1 / 16])
    plain = attnzoo.probe(there, "strength_profile")
    assert max(plain["own"]) < 0.2 and max(plain["near"]) < 0.6 and max(plain["to_prefix"]) < 0.3


def test_sequences_count_what_may_be_seen(pairs):
    model = attnzoo.compose("task_switching")
    lower = torch.ones(6, 6).tril()
    with looking(model, lower / lower.sum(dim=1, keepdim=True), at="layers.*"):
        there = Subject.of(model, torch.zeros(2, 6).long(), kind="sequences")
        found = attnzoo.probe(there, "strength_profile")
    by_hop = [np.mean([1 / (i + 1) for i in range(k, 6)]) for k in range(6)]
    assert found.arrays["means"][0] == pytest.approx(by_hop)
    source = torch.tensor([[1, 5, 6, 7, 0, 0, 0]])
    with looking(pairs, shifted(7, 1), at="encoder.*"):
        inputs = source, torch.ones(1, 4).long()
        found = attnzoo.probe(pairs, "strength_profile", inputs=inputs, kind="pairs")
    assert found.arrays["sums"][0].tolist() == [0.25, 0.75, 0, 0, 0, 0, 0]
    assert "other grids" in found.notes[0] and np.isnan(found["from_prefix"][0])


def test_the_picture():
    found = attnzoo.probe(subject(vit(depth=3)), "strength_profile")
    mean, total, tokens = found.figure().axes
    assert [len(line.get_xdata()) for line in mean.lines] == [4] * 3 and len(total.lines) == 3
    assert [text.get_text() for text in tokens.get_legend().get_texts()] == [
        "own",
        "near",
        "to prefix",
        "from prefix",
    ]
    assert mean.get_xlabel() == "hops" and tokens.get_xlabel() == "layer"
