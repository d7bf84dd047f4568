"""`retrieval_score`: heads that copy from the context what the model says."""

import math
from dataclasses import replace

import pytest
import torch
from instruments import images, vit
from planted_sequence import INDUCTION, SHARP, planted, sequence, twice

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.lab.subject import Batch, Subject
from attnzoo.probes import RetrievalScore
from attnzoo.probes.retrieval_score import Runs

WORDS, LENGTH = 12, 12
PAIRS = f"""
recipe: 1
name: pairs
host: {{kind: seq2seq, vocab: {3 + WORDS}, max_length: {LENGTH}, dim: 48, mlp_dim: 0, layers: 1, positions: learned}}
heads: 2
attention: {{use: softmax}}
"""


def next_words() -> torch.Tensor:
    """What follows in the second half of `twice()`, which a model can know."""
    ids = twice()
    targets = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], dim=1)
    targets[:, :12] = -100
    return targets


def copying() -> torch.nn.Module:
    """A translator whose head 1 of the cross-attention looks one place further on in the source, and copies."""
    model = attnzoo.compose(PAIRS).eval()
    word, place, _ = torch.eye(48).split([3 + WORDS, LENGTH, 48 - 3 - WORDS - LENGTH])
    later = place.roll(-1, 0)  # row i says position i + 1
    later[-1] = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1.0)
        model.embed_source.weight.copy_(word / 48**0.5)
        model.embed_target.weight.copy_(word / 48**0.5)
        model.positions.table.copy_(place)
        cross = model.decoder[0].cross
        cross.q.weight[24 : 24 + LENGTH] = SHARP * place
        cross.kv.weight[24 : 24 + LENGTH] = later
        cross.kv.weight[72 : 72 + 3 + WORDS] = word
        cross.proj.weight[:, 24 : 24 + 3 + WORDS] = 4 * word.T
        model.head.weight.copy_(word)
    return model


def sources(count: int = 6) -> torch.Tensor:
    """Beginning, ten words, end, (b 12)."""
    generator = torch.Generator().manual_seed(2)
    words = 3 + torch.rand(count, WORDS, generator=generator).argsort(dim=1)[:, :10]
    return torch.cat([torch.full((count, 1), 1), words, torch.full((count, 1), 2)], dim=1)


@pytest.mark.parametrize("on", ["needle", "data"])
def test_the_planted_head_is_found_and_no_other(on):
    found = attnzoo.probe(
        planted(), RetrievalScore(on=on), inputs=twice(), targets=next_words(), kind="sequences"
    )
    best, *others = found.sorted()
    assert (best["layer"], best["head"]) == INDUCTION and best["score"] == 1 and best["retrieval"]
    assert [row["score"] for row in others] == [0, 0, 0] and not any(row["retrieval"] for row in others)
    figures = found.figures
    assert figures["recall"] == 1 and figures["runs"] == figures["counted"] == {"needle": 40, "data": 88}[on]
    assert figures["recall_without_top"] < 0.1 < 0.5 < figures["recall_without_random"]


@pytest.mark.parametrize("on", ["needle", "data"])
def test_a_translator_that_copies_is_found(on):
    ids = sources()
    found = attnzoo.probe(
        copying(), RetrievalScore(on=on, depths=2, draws=3), inputs=(ids, ids), kind="pairs"
    )
    assert found["site"] == ["decoder.0.cross"] * 2 and found["score"] == [0, 1]
    assert found.figures["recall"] == 1 and found.figures["recall_without_top"] < 0.5
    assert found.figures["recall_without_random"] == 1


def test_of_a_model_that_finds_nothing_nothing_is_said():
    for seed in range(3):
        found = attnzoo.probe(sequence(seed), "retrieval_score", inputs=twice(), kind="sequences")
        assert all(math.isnan(value) for value in found["score"]) and not any(found["retrieval"])
        assert found.figures["counted"] == 0 and "in no run" in found.notes[0]
        assert "recall_without_top" not in found.figures


def test_half_a_needle_counts_where_the_option_says_so():
    model = planted()
    ids = torch.tensor([[0, 1, 2, 3, 4, 0]])
    probe = RetrievalScore(needle=4)
    runs = probe._continued(Subject.of(model, ids, kind="sequences"), ids, 1)
    assert (
        runs.said.tolist() == [[1, 2, 3, 4]] and runs.rows.tolist() == [[5, 6, 7, 8]] and runs.recall == [1]
    )
    said = torch.tensor([[1, 2, 9, 9]])
    for recall, counts in ((0.5, False), (0.4, True)):
        found = RetrievalScore(recall=recall)._found(
            runs.batch, runs.keys, runs.needle[:, 0], runs.rows, said
        )
        assert found.recall == [0.5] and bool(found.counts.any()) == counts


@pytest.mark.parametrize(("dedupe", "wanted"), [(True, [2 / 3, 1 / 3, 0]), (False, [3 / 3, 1 / 3, 0])])
def test_hand_a_word_that_is_copied_twice(dedupe, wanted):
    keys = torch.tensor([[7, 5, 6, 8, 5]])  # the needle is 5 6 8
    needle = torch.tensor([[False, True, True, True, False]])[:, None].expand(1, 3, 5)
    said = torch.tensor([[5, 5, 6]])
    weights = torch.zeros(1, 3, 5, 5)
    looks = [[1, 1, 2], [4, 1, 0], [2, 3, 1]]  # by head, the strongest key of the last three queries
    for head, at in enumerate(looks):
        for step, key in enumerate(at):
            weights[0, head, 2 + step, key] = 1
    counts, batch = torch.ones(1, 3, dtype=torch.bool), Batch((keys,))
    runs = Runs(batch, keys, needle, torch.tensor([[2, 3, 4]]), said, counts, False, [1.0])

    class Found:
        """A map."""

        def matrix(self) -> torch.Tensor:
            return weights

    assert RetrievalScore(dedupe=dedupe)._copied(Found(), runs).tolist() == pytest.approx(wanted)
    assert RetrievalScore(dedupe=dedupe)._copied(Found(), replace(runs, counts=~counts)).tolist() == [0, 0, 0]


def test_the_random_state_and_the_model_are_left_alone():
    model, state = planted(), torch.random.get_rng_state()
    one, two = (
        attnzoo.probe(model, RetrievalScore(ablate=0), inputs=twice(), kind="sequences").columns
        for _ in range(2)
    )
    assert one == two and torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_it_cannot_be_asked_of():
    ids = twice()
    with pytest.raises(ZooError, match="AZ927"):
        attnzoo.probe(vit(), "retrieval_score", inputs=images())
    with pytest.raises(ZooError, match="AZ926"):
        attnzoo.probe(planted(), RetrievalScore(needle=12), inputs=ids, kind="sequences")
    with pytest.raises(ZooError, match="AZ926"):
        attnzoo.probe(planted(), RetrievalScore(on="data"), inputs=ids, kind="sequences")
    other = sequence()
    other.causal = False
    with pytest.raises(ZooError, match="AZ927"):
        attnzoo.probe(other, "retrieval_score", inputs=ids, kind="sequences")
    with pytest.raises(ZooError, match="AZ921"):
        RetrievalScore(on="text")
