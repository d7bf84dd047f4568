"""Scores of translations: equal to sacrebleu's and rapidfuzz's own numbers, over the corpus, the same every time."""

import json
import os
import random
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from sacrebleu import BLEU, CHRF

from attnzoo.errors import DataError
from attnzoo.eval.text_metrics import score
from attnzoo.train.metrics import wilson

WORDS = (
    "el",
    "la",
    "un",
    "una",
    "gato",
    "perro",
    "pájaro",
    "casa",
    "calle",
    "noche",
    "corre",
    "canta",
    "mira",
    "en",
    "y",
)


def corpus(sentences: int = 40, seed: int = 0) -> tuple[list[str], list[str]]:
    """References of 1 to 12 words, and hypotheses that lost, changed or doubled some of them."""
    rng = random.Random(seed)
    references = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(sentences)]
    slip = [lambda w: [], lambda w: [rng.choice(WORDS)], lambda w: [w, w], *[lambda w: [w]] * 12]
    return [" ".join(x for w in line.split() for x in rng.choice(slip)(w)) for line in references], references


def distance(one, other) -> int:
    """Levenshtein's distance by its recurrence: d(i, j) = min(d(i−1, j) + 1, d(i, j−1) + 1, d(i−1, j−1) + [a ≠ b])."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        row, above = [i], row
        for j, b in enumerate(other, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def value(scores, name: str) -> float:
    return getattr(scores, name).value


FIGURES = ("bleu", "chrf", "character_error_rate", "word_error_rate", "exact_match")


@pytest.mark.parametrize(
    ("hypotheses", "references", "bleu"),
    [
        (["el gato", "la casa"], ["el gato", "la casa"], 0.0),  # right, but without any 4-gram
        (["el gato corre en la casa"], ["el perro corre en la casa"], 53.73),
        (["el gato corre en la casa"], ["el gato corre en la casa"], 100.0),
        (["El gato corre en la casa"], ["el gato corre en la casa"], 75.98),  # mixed case counts
        ([""], ["el gato corre en la casa"], 0.0),
    ],
)
def test_known_bleu(hypotheses, references, bleu):
    assert round(score(hypotheses, references).bleu.value, 2) == bleu


def test_perfect_and_empty_translations():
    lines = corpus()[1]
    perfect, empty = score(lines, lines), score([""] * len(lines), lines)
    assert [value(perfect, name) for name in FIGURES] == [pytest.approx(100), 100, 0, 0, 1]
    assert [value(empty, name) for name in FIGURES] == [0, 0, 1, 1, 0]
    assert perfect.bleu.interval == pytest.approx((100, 100)) and empty.word_error_rate.interval == (1, 1)


@pytest.mark.parametrize("metric", [BLEU, CHRF])
@pytest.mark.parametrize("sentences", [2, 7, 60])
@pytest.mark.parametrize("resamples", [2, 39, 40, 200])
def test_sacrebleu_s_own_numbers(metric, sentences, resamples):
    hypotheses, references = corpus(sentences, seed=sentences)
    own = metric()
    expected = own.corpus_score(hypotheses, [references], n_bootstrap=resamples)
    found = getattr(score(hypotheses, references, resamples=resamples), metric.__name__.lower())
    assert found.value == expected.score
    low, high = found.interval
    assert (high - low) / 2 == pytest.approx(
        expected._ci, rel=1e-5, abs=1e-5
    )  # it keeps half the width alone
    assert found.signature == str(own.get_signature())
    assert f"bs:{resamples}|seed:12345" in found.signature


def test_the_draws_are_sacrebleu_s():
    """Not only the width of the interval: every figure of every draw."""
    hypotheses, references = corpus(9)
    with mock.patch("sacrebleu.metrics.base.Score.estimate_ci", autospec=True) as asked:
        BLEU().corpus_score(hypotheses, [references], n_bootstrap=80)
        CHRF().corpus_score(hypotheses, [references], n_bootstrap=80)
    found = score(hypotheses, references, resamples=80)
    for call, measure in zip(asked.call_args_list, (found.bleu, found.chrf), strict=True):
        drawn = sorted(float(one.score) for one in call.args[1])
        assert len(drawn) == 80 and len(set(drawn)) > 40
        assert measure.interval == pytest.approx((drawn[2], drawn[77]), rel=1e-5)


def test_references_are_one_stream():
    hypotheses, references = corpus(3, seed=5)
    right, wrong = (
        BLEU().corpus_score(hypotheses, [references]),
        BLEU().corpus_score(hypotheses, [[r] for r in references]),
    )
    assert score(hypotheses, references).bleu.value == right.score != wrong.score


@pytest.mark.parametrize(("name", "units"), [("character_error_rate", str), ("word_error_rate", str.split)])
def test_rapidfuzz_s_own_numbers(name, units):
    hypotheses, references = corpus()
    pairs = [(units(h), units(r)) for h, r in zip(hypotheses, references, strict=True)]
    length = sum(len(r) for _, r in pairs)
    assert (
        value(score(hypotheses, references), name)
        == sum(Levenshtein.distance(h, r) for h, r in pairs) / length
    )
    assert value(score(hypotheses, references), name) == sum(distance(h, r) for h, r in pairs) / length


def test_spaces_are_characters_and_words_stand_between_spaces():
    joined = score(["elgato"], ["el gato"])
    assert joined.character_error_rate.value == 1 / 7 and joined.word_error_rate.value == 1.0
    wide = score(["el  gato "], ["el gato"])
    assert wide.character_error_rate.value == 2 / 7 and wide.word_error_rate.value == 0.0


def test_error_rates_are_of_the_corpus():
    """One word wrong of one, none of nine: 1/10, where the mean of the sentences would be 1/2."""
    scores = score(["no", "a b c d e f g h i"], ["sí", "a b c d e f g h i"])
    assert scores.word_error_rate.value == 1 / 10 and scores.character_error_rate.value == 2 / 19


def test_an_error_rate_may_exceed_one():
    scores = score(["a long translation of it"], ["sí"])
    assert scores.character_error_rate.value > 1 and scores.word_error_rate.value == 5.0


def test_an_empty_reference_among_others():
    scores = score(["algo", "el gato"], ["", "el gato"], resamples=300)
    assert scores.word_error_rate.value == 1 / 2 and scores.character_error_rate.value == 4 / 7
    low, high = scores.word_error_rate.interval  # draws of the empty one alone have no rate
    assert low == 0 and high == 1 / 2 and json.dumps(scores.as_dict(), allow_nan=False)
    assert score(["", "no"], ["", "el gato"], resamples=300).word_error_rate.interval == (1, 1)


def test_exact_match_has_wilson_s_interval():
    hypotheses, references = corpus()
    hits = sum(h == r for h, r in zip(hypotheses, references, strict=True))
    exact = score(hypotheses, references).exact_match
    assert score(["El gato", "el  gato", "el gato ", "él gato"], ["el gato"] * 4).exact_match.value == 0
    assert 0 < hits < 40 and exact.value == hits / 40 and exact.interval == wilson(hits, 40)


def test_intervals_hold_the_value_and_narrow_with_more_sentences():
    few, many = score(*corpus(30), resamples=400), score(*corpus(1200), resamples=400)
    for name in FIGURES:
        widths = []
        for scores in (few, many):
            low, high = getattr(scores, name).interval
            assert low < value(scores, name) < high
            widths.append(high - low)
        assert widths[1] < widths[0] / 3  # sqrt(40) = 6.3 by the square-root law


def test_intervals_are_functions_of_the_seed():
    pairs = corpus()
    one, again, other = (score(*pairs, resamples=100, seed=seed) for seed in (1, 1, 2))
    assert one == again and one.chrf.interval != other.chrf.interval and one.bleu.value == other.bleu.value
    assert "seed:1|" in one.bleu.signature and "seed:2|" in other.bleu.signature


def test_nothing_global_is_read_or_changed():
    pairs = corpus()
    before = score(*pairs, resamples=50)
    states = np.random.get_state(), random.getstate(), torch.get_rng_state()
    with mock.patch.dict(os.environ, {"SACREBLEU_SEED": "none"}):
        environment = dict(os.environ)
        assert score(*pairs, resamples=50) == before and os.environ == environment
    assert all(np.array_equal(a, b) for a, b in zip(states[0], np.random.get_state(), strict=True))
    assert random.getstate() == states[1] and torch.equal(torch.get_rng_state(), states[2])


def test_without_draws_only_exact_match_has_an_interval():
    for scores in (score(*corpus(), resamples=0), score(["el gato"], ["el gato"])):
        intervals = [getattr(scores, name).interval for name in FIGURES]
        assert intervals[:4] == [None] * 4 and len(intervals[4]) == 2
        assert "bs:" not in scores.bleu.signature and [row[2] for row in scores.rows()][:4] == [""] * 4
    assert value(score(*corpus(), resamples=0), "bleu") == value(score(*corpus()), "bleu")


def test_as_data_and_as_rows():
    scores = score(["el gato corre en la casa", "sí"], ["el perro corre en la casa", "sí"], resamples=100)
    data = json.loads(json.dumps(scores.as_dict()))
    assert set(data) == {"sentences", *FIGURES} and data["sentences"] == 2
    assert data["exact_match"]["value"] == 0.5 and data["bleu"]["signature"] == scores.bleu.signature
    rows = scores.rows()
    assert [row[0] for row in rows] == [
        "BLEU",
        "chrF",
        "character error rate",
        "word error rate",
        "exact match",
    ]
    assert rows[3][1:3] == ["14.29 %", "0.00 to 16.67 %"] and rows[4][1] == "50.00 %"
    assert rows[0][1] == f"{scores.bleu.value:.2f}" and rows[0][3].startswith(
        "nrefs:1|bs:100|seed:12345|case:mixed|eff:no|tok:13a|smooth:exp|version:"
    )


@pytest.mark.parametrize(
    ("hypotheses", "references", "said"),
    [
        (["a"], ["a", "b"], "there are 1 hypotheses, but 2 references"),
        (["a", "b"], [], "there are 2 hypotheses, but 0 references"),
        ([], [], "none of the 0 references has a word"),
        (["a", "b"], ["", ""], "none of the 2 references has a word"),
        (["a"], [" \t"], "none of the 1 references has a word"),
        ("el gato", ["el gato"], "the hypotheses are no list of texts"),
        (["el gato"], "el gato", "the references are no list of texts"),
        (["el gato"], [["el gato"]], "the references are no list of texts"),
        ([None], ["el gato"], "the hypotheses are no list of texts"),
    ],
)
def test_what_cannot_be_scored_is_told(hypotheses, references, said):
    with pytest.raises(DataError) as caught:
        score(hypotheses, references)
    assert caught.value.diagnostics[0].code == "AZ716" and said in str(caught.value)


@pytest.mark.parametrize("name", ["sacrebleu", "rapidfuzz"])
def test_a_missing_library_is_told(name):
    with mock.patch.dict("sys.modules", {name: None}), pytest.raises(DataError) as caught:
        score(["a"], ["a"])
    text = str(caught.value)
    assert caught.value.diagnostics[0].code == "AZ708" and f"`{name}`" in text and "attnzoo[text]" in text


sentence = st.lists(st.sampled_from(WORDS[:6]), max_size=7).map(" ".join)
pairs = st.lists(st.tuples(sentence, sentence), min_size=1, max_size=6).filter(lambda p: any(r for _, r in p))


@settings(max_examples=60, deadline=None)
@given(pairs, st.randoms(use_true_random=False))
def test_the_order_of_sentences_does_not_matter(drawn, rng):
    shuffled = rng.sample(drawn, len(drawn))
    one, other = (score(*zip(*p, strict=True), resamples=0) for p in (drawn, shuffled))
    assert one == other


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_figures_stay_in_their_bounds_and_agree(drawn):
    hypotheses, references = map(list, zip(*drawn, strict=True))
    scores = score(hypotheses, references, resamples=20)
    assert 0 <= scores.bleu.value <= 100 + 1e-9 and 0 <= scores.chrf.value <= 100 + 1e-9
    assert (scores.exact_match.value == 1) == (scores.character_error_rate.value == 0)
    assert scores.bleu.value == BLEU().corpus_score(hypotheses, [references]).score
    assert scores.chrf.value == CHRF().corpus_score(hypotheses, [references]).score
    words = sum(distance(h.split(), r.split()) for h, r in drawn) / sum(len(r.split()) for r in references)
    assert scores.word_error_rate.value == words
    for name in FIGURES:
        interval = getattr(scores, name).interval
        assert interval is None or interval[0] <= interval[1]


@settings(max_examples=40, deadline=None)
@given(pairs)
def test_a_corpus_twice_over_scores_the_same(drawn):
    once, twice = (score(*zip(*p, strict=True), resamples=0) for p in (drawn, drawn * 2))
    for name in ("character_error_rate", "word_error_rate", "exact_match"):
        assert value(once, name) == value(twice, name)
