"""HeadHunter: guidance by perturbation, and the greedy search for heads."""

import itertools

import pytest
import torch
from instruments import images, pairs, sentences, subject, vit

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.interventions import AblateHeads, SoftIdentity
from attnzoo.lab.head_hunter import guided, head_hunter
from attnzoo.lab.subject import Subject


def test_guidance_is_the_equation():
    model = vit()
    with torch.no_grad():
        plain = model(images())
        with attnzoo.intervene(model, SoftIdentity(at="blocks.1", heads=[2])):
            perturbed = model(images())
        found = guided(model, images(), SoftIdentity(at="blocks.1", heads=[2]), weight=1.5)
        assert torch.allclose(found, 2.5 * plain - 1.5 * perturbed, atol=1e-5)
        assert not torch.allclose(found, plain, atol=1e-2)


@pytest.mark.parametrize(("strength", "weight"), [(0.0, 2.0), (1.0, 0.0)])
def test_without_weight_or_strength_it_is_the_model(strength, weight):
    model = vit()
    with torch.no_grad():
        found = guided(model, images(), SoftIdentity(strength=strength), weight=weight)
        assert torch.allclose(found, model(images()), atol=0 if weight == 0 else 1e-6)


def first_class(logits: torch.Tensor, _batch) -> torch.Tensor:
    """More of class 0."""
    return logits.softmax(dim=-1)[:, 0]


def mean_score(model: torch.nn.Module, heads: list[tuple[int, int]], weight: float | None) -> float:
    """The objective with these heads (layer, head) perturbed, without the search."""
    changes = [
        SoftIdentity(at=f"blocks.{layer}", heads=[head for other, head in heads if other == layer])
        for layer in {layer for layer, _ in heads}
    ]
    with torch.no_grad():
        plain = model(images())
        with attnzoo.intervene(model, *changes):
            out = model(images())
        out = out if weight is None else (1 + weight) * plain - weight * out
        return float(first_class(out, None).double().mean())


@pytest.mark.parametrize("weight", [1.0, None])
def test_greedy_rounds_equal_those_by_hand(weight):
    model = vit()
    hunt = head_hunter(subject(model), first_class, rounds=2, top=2, weight=weight)
    taken, scores = [], []
    for _ in range(2):
        rest = [head for head in itertools.product(range(2), range(4)) if head not in taken]
        values = {head: mean_score(model, [*taken, head], weight) for head in rest}
        scores += values.values()
        taken += sorted(values, key=lambda head: -values[head])[:2]
    rows = list(hunt.finding.rows())
    assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-5)
    assert [(row["layer"], row["head"]) for row in rows if row["chosen"]] == sorted(taken[:2]) + sorted(
        taken[2:]
    )
    assert hunt.finding.figures["as it is"] == pytest.approx(mean_score(model, [], None))
    assert hunt.finding.figures["after round 2"] == pytest.approx(mean_score(model, taken, weight), abs=1e-5)
    named = {(one.at, head) for one in hunt.interventions for head in one.heads}
    assert named == {(f"blocks.{layer}", head) for layer, head in taken}


def test_a_planted_head_is_found():
    """One head alone is read by its projection: taking any other away changes nothing."""
    model, generator = vit(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
        wanted = model(images())
        model.blocks[1].attn.proj.weight[:, 24:36] = 0.5 * torch.randn(48, 12, generator=generator)

    def nearness(logits: torch.Tensor, batch) -> torch.Tensor:
        (place,) = [i for i in (0, 3) if torch.equal(batch.inputs[0], images()[i : i + 3])]
        return -(logits - wanted[place : place + 3]).norm(dim=-1)

    hunt = head_hunter(subject(model), nearness, by=AblateHeads(), top=1, weight=None)
    (found,) = hunt.interventions
    assert (found.at, list(found.heads)) == ("blocks.1", [2])
    scores = hunt.finding["score"]
    assert scores[6] == pytest.approx(0, abs=1e-4)
    assert all(scores[i] == pytest.approx(hunt.finding.figures["as it is"]) for i in range(8) if i != 6)
    assert hunt.finding.figures["as it is"] < -0.1


def test_of_pairs_only_self_attention_takes_part():
    data = Subject.of(pairs(), sentences(), kind="pairs")
    hunt = head_hunter(data, lambda logits, _: logits.std(dim=(1, 2)), top=2)
    assert set(hunt.finding["site"]) == {"encoder.0", "encoder.1", "decoder.0.self", "decoder.1.self"}
    assert len(hunt.finding) == 16


@pytest.mark.parametrize("options", [{"rounds": 0}, {"top": 0}, {"rounds": 3, "top": 3}, {"by": "strange"}])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ZooError, match="AZ921|AZ201"):
        head_hunter(subject(vit()), first_class, **options)


def test_the_model_is_as_before_even_after_a_fault():
    model = vit()
    before = model(images())

    def broken(_logits, _batch):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        head_hunter(subject(model), broken)
    assert torch.equal(model(images()), before)
