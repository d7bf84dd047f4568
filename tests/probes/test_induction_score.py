"""`induction_score`, and what it shares with `previous_token_score` and `duplicate_token_score`."""

import math

import pytest
import torch
from instruments import images, vit
from planted_sequence import INDUCTION, LENGTH, RECIPE, WORDS, planted, sequence, twice
from torch.nn import functional as F

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.lab.maps import look
from attnzoo.lab.subject import Subject
from attnzoo.lab.token_pattern import repeated
from attnzoo.probes import InductionScore

PAIRS = """
recipe: 1
name: pairs
host: {kind: seq2seq, vocab: 20, max_length: 16, dim: 16, mlp_dim: 0, layers: 1}
heads: 2
attention: {use: softmax}
"""


def few(count: int = 5, words: int = 6) -> torch.Tensor:
    """Sequences of few words, so that they repeat by chance, (b 24)."""
    return torch.randint(words, (count, LENGTH), generator=torch.Generator().manual_seed(3))


def head(finding, layer: int, number: int, column: str = "match") -> float:
    """What a finding says of a head."""
    (row,) = [row for row in finding.rows() if (row["layer"], row["head"]) == (layer, number)]
    return row[column]


def by_loop(weights: torch.Tensor, ids: torch.Tensor, first: bool, current: bool) -> dict[str, list[float]]:
    """The three scores of each head, one number at a time."""
    found = {"match": [], "mul": [], "abs": []}
    for h in range(weights.shape[1]):
        of_rows, of_mul, of_abs = [], [], []
        for a, t in zip(weights[:, h].tolist(), ids.tolist(), strict=True):
            n, good, total, off = len(t), 0.0, 0.0, 0.0
            for i in range(n):
                row, asked = 0.0, False
                for j in range(n):
                    if (first and j == 0) or (current and i == j):
                        continue
                    expected = 0 < j <= i and t[j - 1] == t[i]
                    row, asked = row + a[i][j] * expected, asked or expected
                    total, off = total + a[i][j], off + abs(a[i][j] - expected)
                good += row
                of_rows += [row] if asked else []
            of_mul.append(good / total)
            of_abs.append(1 - off / n)
        for name, values in (("match", of_rows), ("mul", of_mul), ("abs", of_abs)):
            found[name].append(sum(values) / len(values))
    return found


def test_hand_a_b_c_a_b_c():
    pattern = InductionScore().pattern(torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert pattern[0].nonzero().tolist() == [[3, 1], [4, 2], [5, 3]]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("current", [False, True])
def test_equals_the_loop(first, current):
    model, ids = sequence(), few()[:, :20]
    found = attnzoo.probe(
        model,
        InductionScore(on="data", exclude_first=first, exclude_current=current),
        inputs=ids,
        kind="sequences",
        batch_size=3,
    )
    maps = look(model, Subject.of(model, ids, kind="sequences").sites, (ids,)).maps
    for name in ("match", "mul", "abs"):
        wanted = [value for one in maps for value in by_loop(one.weights.double(), ids, first, current)[name]]
        assert found[name] == pytest.approx(wanted, abs=1e-6), name


def test_is_prefix_matching_at_a_fixed_distance():
    model = sequence(seed=1)
    subject = Subject.of(model, twice(), kind="sequences")
    (batch,) = (shown := repeated(subject, InductionScore())).batches
    ids = batch.inputs[0]
    assert torch.equal(ids[:, :WORDS], ids[:, WORDS:]) and all(len(set(row)) == WORDS for row in ids.tolist())
    maps = look(model, shown.sites, (ids,)).maps
    offset = [one.weights.diagonal(-(WORDS - 1), dim1=2, dim2=3)[..., 1:].mean(dim=(0, 2)) for one in maps]
    found = attnzoo.probe(subject, "induction_score")
    assert found["match"] == pytest.approx(torch.cat(offset).tolist(), abs=1e-6)


def test_the_planted_head_is_found_and_no_other():
    found = attnzoo.probe(planted(), "induction_score", inputs=twice(), kind="sequences")
    assert head(found, *INDUCTION) > 0.999
    assert head(found, *INDUCTION, "mul") == pytest.approx(0.5, abs=1e-3)  # half of the queries have no match
    others = [value for value, row in zip(found["match"], found.rows(), strict=True) if row["head"] != 1]
    assert max(others) < 0.1 and head(found, 0, 1) < 0.1
    assert found.figures["in_context_score"] < -10


def test_untrained_models_have_none():
    scores = []
    for seed in range(5):
        found = attnzoo.probe(sequence(seed), "induction_score", inputs=twice(), kind="sequences")
        scores += found["match"]
        assert abs(found.figures["in_context_score"]) < 0.5
    assert max(scores) < 0.15


def test_heads_that_look_everywhere_alike_score_uniform():
    model = sequence()
    with torch.no_grad():
        for layer in model.layers:
            layer.attn.qkv.weight[:144] = 0  # queries and keys
            layer.attn.qkv.bias[:144] = 0
    for by in ("match", "mul", "abs"):
        found = attnzoo.probe(model, InductionScore(by=by), inputs=twice(), kind="sequences")
        assert found[by] == pytest.approx(found["uniform"], abs=1e-6) and found.shows == by


def test_in_context_score_is_a_difference_of_losses():
    model, ids = sequence(seed=2), few()
    targets = torch.cat([ids[:, 1:], torch.full((5, 1), -100)], dim=1)
    with torch.no_grad():
        losses = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="none").view(5, -1)
    for options, late, early in (
        ({"early": 2, "late": 20}, losses[:, 20].mean(), losses[:, 2].mean()),
        ({}, losses[:, 12:23].mean(), losses[:, :12].mean()),
    ):
        found = attnzoo.probe(
            model, InductionScore(on="data", **options), inputs=ids, targets=targets, kind="sequences"
        )
        assert found.figures["in_context_score"] == pytest.approx(float(late - early), abs=1e-5)
    assert not attnzoo.probe(model, InductionScore(on="data"), inputs=ids, kind="sequences").figures


def test_a_seed_makes_the_same_sequences_and_no_random_state_is_touched():
    model = sequence()
    state = torch.random.get_rng_state()
    one, two, three = (
        attnzoo.probe(model, InductionScore(seed=seed), inputs=few(), kind="sequences")["match"]
        for seed in (1, 1, 2)
    )
    assert one == two != three
    assert torch.equal(torch.random.get_rng_state(), state)


def test_more_repeats_and_few_words():
    probe = InductionScore(length=5, repeats=4, count=3)
    (batch,) = repeated(Subject.of(sequence(), few(), kind="sequences"), probe).batches
    assert batch.inputs[0].shape == (3, 20)
    assert torch.equal(batch.inputs[0][:, :5], batch.inputs[0][:, 15:])
    note = attnzoo.probe(sequence(), "induction_score", inputs=few(), kind="sequences").notes[0]
    assert "12 words, some of them alike, 2 times" in note


def test_pairs_are_looked_at_side_by_side_and_padding_counts_nowhere():
    model = attnzoo.compose(PAIRS).eval()
    ids = torch.tensor([[1, 5, 6, 5, 7, 6, 2], [1, 4, 4, 8, 9, 8, 2]])
    probe = InductionScore(on="data")
    found = attnzoo.probe(model, probe, inputs=(ids, ids), kind="pairs")
    assert found["site"] == ["encoder.0"] * 2 + ["decoder.0.self"] * 2
    assert "between two sequences" in found.notes[0]
    padded = attnzoo.probe(model, probe, inputs=(F.pad(ids, (0, 4)), F.pad(ids, (0, 4))), kind="pairs")
    for name in ("match", "mul", "abs"):
        assert padded[name] == pytest.approx(found[name], abs=1e-6)
    made = repeated(Subject.of(model, (ids, ids), kind="pairs"), InductionScore()).batches[0].inputs
    assert all((side[:, 0] == 1).all() and (side[:, 1:] > 2).all() and side.shape == (32, 7) for side in made)


def test_a_model_without_weights_shows_what_its_heads_do_to_values():
    model = attnzoo.compose(RECIPE.replace("use: softmax", "use: elu_linear")).eval()
    found = attnzoo.probe(model, "induction_score", inputs=twice(), kind="sequences")
    assert len(found) == 4 and all(0 <= value <= 1 for value in found["match"])


def test_without_a_match_it_says_so():
    ids = torch.arange(WORDS)[None]
    found = attnzoo.probe(sequence(), InductionScore(on="data"), inputs=ids, kind="sequences")
    assert all(math.isnan(value) for value in found["match"])
    assert found.notes == ["Nowhere in these sequences is such attention expected."]


def test_what_it_cannot_be_asked_of():
    with pytest.raises(ZooError, match="AZ927"):
        attnzoo.probe(vit(), "induction_score", inputs=images())
    with pytest.raises(ZooError, match="AZ927"):
        attnzoo.probe(
            attnzoo.compose("function_fitting"),
            "induction_score",
            inputs=torch.rand(2, 8, 1),
            kind="sequences",
        )
    with pytest.raises(ZooError, match="AZ926"):
        attnzoo.probe(sequence(), "induction_score", inputs=twice()[:, :1], kind="sequences")
    with pytest.raises(ZooError, match="AZ921"):
        InductionScore(by="sum")
    with pytest.raises(ZooError, match="AZ407"):
        attnzoo.probe(sequence(), InductionScore(length=20), inputs=twice(), kind="sequences")
