"""`head_roles`: what heads are for."""

import math

import pytest
import torch
from instruments import images, subject, vit
from matplotlib.figure import Figure
from planted_sequence import (
    DUPLICATE,
    INDUCTION,
    LENGTH,
    NOTHING,
    PREVIOUS,
    SHARP,
    WORDS,
    planted,
    sequence,
    twice,
)

import attnzoo
from attnzoo.core import Layout
from attnzoo.errors import ZooError
from attnzoo.lab.maps import collect
from attnzoo.probes import HeadRoles
from attnzoo.probes.head_roles import neighbour

PAIRS = """
recipe: 1
name: pairs
host: {kind: seq2seq, vocab: 20, max_length: 16, dim: 16, mlp_dim: 0, layers: 1}
heads: 2
attention: {use: softmax}
"""


def shuffled_twice(count: int = 8) -> torch.Tensor:
    """Twelve words in random order, then in another, so that the same word is at no fixed distance, (b 24)."""
    generator = torch.Generator().manual_seed(5)
    return torch.cat([torch.rand(count, WORDS, generator=generator).argsort(dim=1) for _ in range(2)], dim=1)


def relations(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """`same`: where the word of the second half stood in the first; `after`: the place behind it."""
    place = ids[:, :WORDS].argsort(dim=1).gather(1, ids[:, WORDS:])
    none = torch.full_like(place, -1)
    return {"same": torch.cat([none, place], dim=1), "after": torch.cat([none, place + 1], dim=1)}


def roles(finding) -> dict[tuple[int, int], str | None]:
    """By layer and head."""
    return {(row["layer"], row["head"]): row["role"] for row in finding.rows()}


def test_hand_neighbours_on_a_line_and_on_a_grid():
    assert neighbour(Layout((4,)), (-1,)).tolist() == [-1, 0, 1, 2]
    # 0 is the class token; 1 2 3 above 4 5 6
    assert neighbour(Layout((2, 3), prefix=1), (1, -1)).tolist() == [-1, -1, 4, 5, -1, -1, -1]


def test_confidence_and_offsets_of_images_equal_the_loop():
    model = vit()
    found = attnzoo.probe(subject(model), "head_roles")
    wanted, best = [], []
    for one in collect(model, images()).maps:
        for head in range(4):
            a = one.weights[:, head]
            wanted.append(float(a.double().max(dim=-1).values.mean()))
            shares = []
            for dy, dx in ((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x):
                hits = [
                    int(a[s, 1 + 4 * y + x].argmax()) == 1 + 4 * (y + dy) + x + dx
                    for s in range(6) for y in range(4) for x in range(4)
                    if 0 <= y + dy < 4 and 0 <= x + dx < 4
                ]  # fmt: skip
                shares.append(sum(hits) / len(hits))
            best.append(max(shares))
    assert found["confidence"] == pytest.approx(wanted, abs=1e-6)
    assert found["positional"] == pytest.approx(best)
    assert all(math.isnan(value) for value in found["rare"]) and "syntactic" not in found.columns


def test_the_planted_heads_have_their_roles_and_the_other_none():
    ids = shuffled_twice()
    found = attnzoo.probe(
        planted(), HeadRoles(dependencies=relations(ids)), inputs=ids, kind="sequences", batch_size=3
    )
    rows = {(row["layer"], row["head"]): row for row in found.rows()}
    assert roles(found) == {
        PREVIOUS: "positional",
        DUPLICATE: "syntactic",
        NOTHING: None,
        INDUCTION: "syntactic",
    }
    assert rows[PREVIOUS]["offset"] == "-1" and rows[PREVIOUS]["positional"] == 1
    assert rows[PREVIOUS]["confidence"] == pytest.approx(1, abs=1e-4)
    assert rows[DUPLICATE]["relation"] == "same" and rows[DUPLICATE]["syntactic"] == 1
    after = rows[INDUCTION]
    assert after["relation"] == "after" and after["syntactic"] > 0.9 and after["baseline"] < 0.3


def test_what_a_fixed_offset_does_as_well_is_no_grammar():
    ids = twice()
    found = attnzoo.probe(planted(), HeadRoles(dependencies=relations(ids)), inputs=ids, kind="sequences")
    assert found["baseline"] == [1.0] * 4
    assert roles(found) == {PREVIOUS: "positional", DUPLICATE: None, NOTHING: None, INDUCTION: None}


def test_a_planted_head_for_rare_words():
    model, generator = planted(), torch.Generator().manual_seed(0)
    attn = model.layers[1].attn
    with torch.no_grad():
        attn.qkv.bias[0] = SHARP  # head 0 asks everywhere for word 7
        attn.qkv.weight[72, 7] = 1
    ids = torch.randint(6, (8, LENGTH), generator=generator)
    ids[:, 0] = 7
    found = attnzoo.probe(model, "head_roles", inputs=ids, kind="sequences")
    rows = {(row["layer"], row["head"]): row for row in found.rows()}
    assert roles(found) == {PREVIOUS: "positional", DUPLICATE: None, NOTHING: "rare", INDUCTION: None}
    assert rows[NOTHING]["rare"] == 1
    seen = sum(1 / n for n in range(1, LENGTH + 1)) / LENGTH  # one of the n words that the n-th may see
    assert rows[NOTHING]["chance"] == pytest.approx(seen)
    two = attnzoo.probe(model, HeadRoles(rarest=2), inputs=ids, kind="sequences")
    assert two["chance"][0] > seen + 0.05


def test_untrained_models_have_no_roles():
    ids = shuffled_twice()
    for seed in range(5):
        found = attnzoo.probe(
            sequence(seed), HeadRoles(dependencies=relations(ids)), inputs=ids, kind="sequences"
        )
        assert set(roles(found).values()) == {None}


def test_padding_and_the_end_count_nowhere():
    model = attnzoo.compose(PAIRS).eval()
    ids = torch.tensor([[1, 5, 6, 5, 7, 6, 2], [1, 4, 4, 8, 9, 8, 2]])
    padded = torch.nn.functional.pad(ids, (0, 4))
    ends = {
        "same": torch.tensor(
            [[-1, 3, 5, 1, -1, 2, -1, -1, -1, -1, -1], [-1, 2, 1, 5, -1, 3, -1, -1, -1, -1, -1]]
        )
    }
    probe = HeadRoles(dependencies=ends)
    one, two = (attnzoo.probe(model, probe, inputs=(x, x), kind="pairs") for x in (ids, padded))
    for name in ("confidence", "rare", "chance"):
        assert one[name] == pytest.approx(two[name], abs=1e-6), name
    assert one["positional"][:4] == two["positional"][:4] and one["syntactic"][:2] == two["syntactic"][:2]
    assert all(math.isnan(value) for value in one["positional"][4:])  # of the cross-attention
    assert all(math.isnan(value) for value in one["syntactic"][2:])  # sources have the dependencies
    a = collect_weights(model, ids)[:, :, :6, :6]  # without the end, as query or key
    assert one["confidence"][:2] == pytest.approx(a.double().max(dim=-1).values.mean(dim=(0, 2)).tolist())


def collect_weights(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The map of the encoder, (b h n n)."""
    from attnzoo.lab.subject import Subject

    _, maps = next(iter(Subject.of(model, (ids, ids), kind="pairs").maps()))
    return maps[0][1].weights


def test_ids_may_be_ignored():
    ids = shuffled_twice()
    whole, without = (
        attnzoo.probe(sequence(), HeadRoles(ignore=ignore), inputs=ids, kind="sequences")
        for ignore in (None, [3, 4])
    )
    assert all(a > b for a, b in zip(whole["confidence"], without["confidence"], strict=True))


def test_it_draws_roles():
    ids = shuffled_twice()
    figure = attnzoo.probe(
        planted(), HeadRoles(dependencies=relations(ids)), inputs=ids, kind="sequences"
    ).figure()
    assert isinstance(figure, Figure)
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.texts] == ["-1", "same", "", "after"]
    assert bar.get_ylabel() == "confidence" and axes.get_xlabel() == "head"


def test_what_it_cannot_be_asked_of():
    ids = shuffled_twice()
    with pytest.raises(ZooError, match="AZ921"):
        attnzoo.probe(planted(), HeadRoles(dependencies={"same": ids[:3]}), inputs=ids, kind="sequences")
    with pytest.raises(ZooError, match="AZ921"):
        attnzoo.probe(
            planted(), HeadRoles(dependencies={"same": [[1], [1, 2]]}), inputs=ids, kind="sequences"
        )
    with pytest.raises(ZooError, match="AZ927"):
        attnzoo.probe(subject(vit()), HeadRoles(dependencies={"same": torch.zeros(6, 17)}))
    with pytest.raises(ZooError, match="AZ921"):
        HeadRoles(positional=90.0)
    with pytest.raises(ZooError, match="AZ921"):
        HeadRoles(dependencies={"same": "all"})
    assert str(HeadRoles(dependencies={"same": ids})) == "head_roles"
