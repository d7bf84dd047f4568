"""`duplicate_token_score`: heads that look at the same token before."""

import pytest
import torch
from planted_sequence import DUPLICATE, WORDS, planted, sequence, twice

import attnzoo
from attnzoo.lab.maps import look
from attnzoo.lab.subject import Subject
from attnzoo.probes import DuplicateTokenScore


def test_hand_earlier_and_the_same():
    pattern = DuplicateTokenScore().pattern(torch.tensor([[5, 7, 5, 5]]))
    assert pattern[0].nonzero().tolist() == [[2, 0], [3, 0], [3, 2]]


def test_on_a_repeated_sequence_it_is_one_diagonal():
    model, ids = sequence(), twice()
    found = attnzoo.probe(model, DuplicateTokenScore(on="data"), inputs=ids, kind="sequences")
    maps = look(model, Subject.of(model, ids, kind="sequences").sites, (ids,)).maps
    wanted = torch.cat([one.weights.diagonal(-WORDS, dim1=2, dim2=3).mean(dim=(0, 2)) for one in maps])
    assert found["match"] == pytest.approx(wanted.tolist(), abs=1e-6)


def test_the_planted_head_is_found_and_no_other():
    found = attnzoo.probe(planted(), "duplicate_token_score", inputs=twice(), kind="sequences")
    best, *others = found.sorted()
    assert (best["layer"], best["head"]) == DUPLICATE and best["match"] > 0.999
    assert max(row["match"] for row in others) < 0.2


def test_untrained_models_have_none():
    scores = [
        value
        for seed in range(5)
        for value in attnzoo.probe(sequence(seed), "duplicate_token_score", inputs=twice(), kind="sequences")[
            "match"
        ]
    ]
    assert max(scores) < 0.2
