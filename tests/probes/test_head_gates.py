"""`head_gates`: which heads a finished model can do without."""

import copy
import math

import numpy as np
import pytest
import torch
from instruments import images, subject, vit
from matplotlib.figure import Figure
from planted_sequence import DUPLICATE, INDUCTION, NOTHING, PREVIOUS, planted, twice

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.lab.gates import gated
from attnzoo.lab.subject import Subject
from attnzoo.probes import HeadGates
from attnzoo.probes.head_gates import gate


def next_words(count: int = 8) -> Subject:
    """The planted model on sequences that stand there twice; the second half is asked, which it can know."""
    ids = twice(count)
    targets = torch.cat([ids[:, 1:], torch.full((count, 1), -100)], dim=1)
    targets[:, :12] = -100
    return Subject.of(planted(), ids, targets, kind="sequences", batch_size=4)


def own_answers(dead: tuple[int, int]) -> Subject:
    """A ViT that is always right, one of whose heads gives nothing to anybody."""
    model = vit()
    layer, head = dead
    with torch.no_grad():
        model.blocks[layer].attn.proj.weight[:, 12 * head : 12 * (head + 1)] = 0
        model.head.weight *= 4
        targets = model(images(24)).argmax(dim=-1)
    return Subject.of(model, images(24), targets, batch_size=12)


def test_hand_the_numbers_of_the_paper():
    probe, zero = HeadGates(), torch.zeros(3)
    assert float(gate(zero)[0]) == pytest.approx(0.5)
    assert float(probe.chance_open(zero)[0]) == pytest.approx(1 / (1 + 11**-0.33), abs=1e-6)
    assert gate(torch.tensor([-2.4, -2.3, 2.3, 2.5])).tolist()[0::3] == [0, 1]


def test_the_chance_of_an_open_gate_is_what_is_penalised():
    probe = HeadGates()
    for log_alpha in (-1.0, 0.0, 1.5):
        alphas = torch.full((100_000,), log_alpha)
        drawn = probe.sampled(alphas, torch.Generator().manual_seed(0))
        assert float((drawn > 0).float().mean()) == pytest.approx(
            float(probe.chance_open(alphas)[0]), abs=0.006
        )
        assert float(drawn.min()) == 0 and float(drawn.max()) == 1


def test_dead_heads_go_first_and_the_circuit_stays():
    found = attnzoo.probe(next_words(), HeadGates(steps=60))
    rank = {(row["layer"], row["head"]): row["rank"] for row in found.rows()}
    kept = {(row["layer"], row["head"]) for row in found.rows() if row["kept"]}
    assert {rank[DUPLICATE], rank[NOTHING]} == {1, 2} and kept == {PREVIOUS, INDUCTION}
    assert found.arrays["heads"].tolist() == [0, 1, 2, 3, 4]
    assert found.arrays["accuracy"][2:].tolist() == [1, 1, 1] and max(found.arrays["accuracy"][:2]) < 0.5
    assert found.figures["accuracy_gated"] == 1 and found.figures["heads_kept"] == 2


@pytest.mark.parametrize("dead", [(0, 2), (1, 3)])
def test_the_dead_head_of_a_vit_goes_first(dead):
    found = attnzoo.probe(own_answers(dead), HeadGates(steps=40))
    first = min(found.rows(), key=lambda row: row["rank"])
    assert (first["layer"], first["head"]) == dead
    assert found.arrays["loss"][-2] == pytest.approx(found.arrays["loss"][-1], abs=1e-6)


def test_a_greater_penalty_leaves_fewer():
    kept = [
        attnzoo.probe(own_answers((0, 0)), HeadGates(steps=20, lr=0.3, penalty=penalty)).figures["heads_kept"]
        for penalty in (1e-4, 100.0)
    ]
    assert kept[0] >= 6 and kept[1] == 0


def test_the_ends_of_the_curve_are_the_model_with_all_heads_and_with_none():
    of = own_answers((0, 0))
    found = attnzoo.probe(of, HeadGates(steps=1, points=3))
    (whole,) = [torch.cat([of.losses(out, b) for out, b in zip(of.outputs(), of.batches, strict=True)])]
    none = of.outputs("ablate_heads")
    none = torch.cat([of.losses(out, batch) for out, batch in zip(none, of.batches, strict=True)])
    assert found.arrays["heads"].tolist() == [0, 3, 5, 8]
    assert found.arrays["loss"][[0, -1]] == pytest.approx([float(none.mean()), float(whole.mean())], rel=1e-5)


def test_open_gates_change_no_bit_and_closed_ones_ablate():
    of = own_answers((0, 0))
    with torch.no_grad():
        plain, (ablated, _) = of.call(of.batches[0]), of.outputs("ablate_heads(heads=[1])")
        with gated(of, of.leaves, torch.ones(8)):
            assert torch.equal(of.call(of.batches[0]), plain)
        with gated(of, of.leaves, torch.tensor([1.0, 0, 1, 1] * 2)):
            assert torch.equal(of.call(of.batches[0]), ablated)


def test_the_model_and_the_random_state_are_left_as_they_were():
    of = own_answers((0, 0))
    of.model.train()
    before, state = copy.deepcopy(of.model.state_dict()), torch.random.get_rng_state()
    one, two = (attnzoo.probe(of, HeadGates(steps=5, seed=seed)) for seed in (0, 0))
    assert all(torch.equal(value, before[name]) for name, value in of.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in of.model.parameters()) and of.model.training
    assert torch.equal(torch.random.get_rng_state(), state) and one["log_alpha"] == two["log_alpha"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in of.model.modules())


def test_they_learn_on_the_training_data():
    of = own_answers((0, 0))
    other = copy.copy(of)
    other.training = [of.batches[1]]
    found = [attnzoo.probe(one, HeadGates(steps=4)) for one in (of, other)]
    assert found[0]["log_alpha"] != found[1]["log_alpha"]
    assert len(found[0].notes) == 1 and not found[1].notes


def test_fused_branches_have_gates_each():
    model = vit("{fuse: mean, of: [softmax, cosine]}")
    found = attnzoo.probe(subject(model), HeadGates(steps=2))
    assert len(found) == 16 and set(found["branch"]) == {"softmax", "cosine"}


def test_it_draws_the_curve():
    found = attnzoo.probe(next_words(), HeadGates(steps=2))
    figure = found.figure()
    assert isinstance(figure, Figure)
    upper, lower = figure.axes
    assert lower.get_xlabel() == "heads left" and upper.get_ylabel() == "loss in nats"
    assert np.array_equal(upper.lines[0].get_xdata(), found.arrays["heads"])
    assert np.array_equal(lower.lines[0].get_ydata(), found.arrays["accuracy"])


def test_what_it_cannot_be_asked_of():
    with pytest.raises(ZooError, match="AZ926"):
        attnzoo.probe(vit(), "head_gates", inputs=images())
    with pytest.raises(ZooError, match="AZ927"):
        attnzoo.probe(
            attnzoo.compose("function_fitting"),
            "head_gates",
            inputs=torch.rand(2, 8, 1),
            targets=torch.rand(2, 8, 1),
            kind="sequences",
        )
    with pytest.raises(ZooError, match="AZ921"):
        HeadGates(penalty=-1.0)
    with pytest.raises(ZooError, match="AZ921"):
        HeadGates(start=math.inf, steps=0)
