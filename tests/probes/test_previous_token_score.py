"""`previous_token_score`: heads that look at the token before."""

import pytest
import torch
from planted_sequence import PREVIOUS, planted, sequence, twice

import attnzoo
from attnzoo.lab.maps import look
from attnzoo.lab.subject import Subject
from attnzoo.probes import PreviousTokenScore


def test_hand_the_diagonal_below():
    pattern = PreviousTokenScore().pattern(torch.zeros(2, 4, dtype=torch.long))
    assert pattern[1].nonzero().tolist() == [[1, 0], [2, 1], [3, 2]] and pattern.shape == (2, 4, 4)


def test_is_the_mean_below_the_diagonal():
    model, ids = sequence(), twice()
    found = attnzoo.probe(model, PreviousTokenScore(on="data"), inputs=ids, kind="sequences")
    maps = look(model, Subject.of(model, ids, kind="sequences").sites, (ids,)).maps
    wanted = torch.cat([one.weights.diagonal(-1, dim1=2, dim2=3).mean(dim=(0, 2)) for one in maps])
    assert found["match"] == pytest.approx(wanted.tolist(), abs=1e-6)


def test_the_planted_head_is_found_and_no_other():
    found = attnzoo.probe(planted(), "previous_token_score", inputs=twice(), kind="sequences")
    best, *others = found.sorted()
    assert (best["layer"], best["head"]) == PREVIOUS and best["match"] > 0.999
    assert best["mul"] == pytest.approx(23 / 24) == best["abs"]  # the first of 24 tokens has none before it
    assert max(row["match"] for row in others) < 0.2


def test_untrained_models_have_none():
    scores = [
        value
        for seed in range(5)
        for value in attnzoo.probe(sequence(seed), "previous_token_score", inputs=twice(), kind="sequences")[
            "match"
        ]
    ]
    assert max(scores) < 0.25
