"""Attention maps of models of sequences: what is collected, what is drawn where, and the command.

Whole sheets are compared with `text_map_references.json` by structure, not by bytes: panels, the colours of their
cells, and what is written beside each. After a change that is meant: python tests/test_text_maps.py
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from PIL import Image
from test_heatmap import TOLERANCE, colours, distance, fixed_model, mean_colours, noisy, pixels, place, run
from torch import nn

import attnzoo.train
from attnzoo.core import Card, Family, Head, Law, MultiHead, Tap, find_taps
from attnzoo.data.pairs import PairData, encoded
from attnzoo.data.sequences import load_sequences
from attnzoo.data.vocabulary import Symbols
from attnzoo.errors import RecipeError, ZooError
from attnzoo.hosts import seq2seq, sequence
from attnzoo.hosts.decode import greedy
from attnzoo.lab.maps import Map
from attnzoo.lab.text_maps import (
    Example,
    TextMaps,
    collect_text,
    pair_example,
    random_example,
    sequence_example,
    translated_example,
)
from attnzoo.lab.text_sheet import text_notes, text_sheet, text_view
from attnzoo.plot import Block, Panel, Picture, Row, svg, token_map
from attnzoo.plot import letters as lettering
from attnzoo.plot import tokens as drawing
from attnzoo.plot.letters import spelled
from attnzoo.plot.palette import FORBIDDEN, GREEN, RED
from attnzoo.plot.tokens import WIDE, cell_size, named
from attnzoo.recipe import compose, load
from attnzoo.zoo import load_zoo

PAIRS = """
recipe: 1
name: small
extends: transformer
host: {{dim: {dim}, mlp_dim: 32, layers: {layers}, vocab: 20, max_length: 16}}
heads: {heads}
{rest}
"""
STACK = "recipe: 1\nname: stack\nextends: recall\nhost: {vocab: 24, outputs: 24, max_length: 16, layers: 2}\nheads: 2\n"
VECTORS = "recipe: 1\nname: vectors\nextends: function_fitting\nhost: {vocab: 0, width: 3, outputs: 2, max_length: 16}\n"
LETTERS = Symbols("abcdefghij")


def pairs(rest: str = "attention: softmax", dim: int = 32, layers: object = 2, heads: object = 4) -> str:
    """A recipe of a small encoder and decoder."""
    return PAIRS.format(rest=rest, dim=dim, layers=layers, heads=heads)


def lively(recipe: str) -> Any:
    """A model in eval mode whose maps are far from flat."""
    model = compose(recipe).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Sources (2 9) and targets (2 7); the second ones end earlier."""
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(4, 20, (2, n), generator=generator) for n in (9, 7))
    source[1, 6:], target[1, 5:] = 0, 0
    return source, target


def by_side(maps: TextMaps) -> dict[str, Any]:
    """The stacks by name."""
    return {stack.side: stack for stack in maps.stacks}


@pytest.mark.parametrize(
    ("at", "side", "queries", "keys"),
    [("encoder.*", "encoder", 9, 9), ("decoder.*.self", "decoder", 7, 7), ("decoder.*.cross", "cross", 7, 9)],
)
@pytest.mark.sample(3)
def test_every_mechanism_has_a_map_or_a_reason(at, side, queries, keys):
    source, target = padded()
    seen = {"weights": 0, "pooled": 0, "implied": 0, "absent": 0}
    length = 5 if side == "decoder" else 6  # of the second one's keys
    for entry in load_zoo().mechanisms.values():
        if entry.plugin != "attnzoo":
            continue
        put = f'attention: softmax\noverrides: [{{at: "{at}", put: {entry.name}}}]'
        try:
            model = lively(pairs(put, layers=1))
        except RecipeError:  # it cannot be put there
            continue
        stack = by_side(collect_text(model, source, target))[side]
        assert len(stack.maps) + len(stack.absent) == 1
        for one in stack.absent:
            assert one.mechanism == entry.name and len(one.reason) > 20
            seen["absent"] += 1
        for one in stack.maps:
            seen[one.kind] += 1
            whole = one.matrix(queries)
            assert whole.shape == (2, one.heads, queries, keys) and whole.isfinite().all()
            assert (whole[1, ..., length:] == 0).all(), f"{entry.name} attends to padding"
            assert whole[0].abs().sum() > 0  # behind rectifiers a head of few channels may be silent
            if side == "decoder":
                assert (whole.triu(1) == 0).all(), f"{entry.name} looks ahead"
            if one.stochastic:
                torch.testing.assert_close(whole.sum(dim=-1), torch.ones(2, one.heads, queries))
                assert (whole >= 0).all()
    assert seen["weights"] >= 4 and seen["implied"], seen
    assert seen["pooled"] or side == "decoder", seen
    assert seen["absent"] or side != "encoder", seen


@pytest.mark.parametrize(
    "rest",
    [
        "attention: softmax",
        "attention: {fuse: gated, of: [softmax, elu_linear]}",
        "attention: softmax\nskip: merged",
        "attention: softmax\nskip: {use: probs_pairmean}",
        "attention: softmax\nskip: cross",
    ],
)
def test_looking_changes_nothing(rest):
    model, inputs = lively(pairs(rest)), padded()
    model.train()
    found = collect_text(model, *inputs)
    assert model.training and not any(type(tap) is Tap and tap.watched for tap in find_taps(model).values())
    assert not any(part._forward_hooks for part in model.modules())
    with torch.no_grad():
        plain = model.eval()(*inputs)
    real = inputs[1] != 0
    assert (found.output - plain)[real].abs().max() <= 1e-6 * plain[real].abs().max()


def test_looking_at_a_stack_changes_nothing():
    model, ids = lively(STACK), torch.randint(24, (2, 11))
    found = collect_text(model, ids)
    with torch.no_grad():
        assert (found.output - model(ids)).abs().max() <= 1e-6 * found.output.abs().max()


def test_sites_layers_and_heads_have_their_numbers():
    model = lively(pairs(layers="{encoder: 3, decoder: 2}", heads="{encoder: [8, 4, 2], decoder: 4}"))
    maps = collect_text(model, *padded())
    assert {side: stack.heads() for side, stack in by_side(maps).items()} == {
        "encoder": [8, 4, 2], "decoder": [4, 4], "cross": [4, 4]}  # fmt: skip
    assert [(one.site, one.layer) for one in maps.maps] == [
        ("encoder.0", 0), ("encoder.1", 1), ("encoder.2", 2), ("decoder.0.self", 0), ("decoder.1.self", 1),
        ("decoder.0.cross", 0), ("decoder.1.cross", 1)]  # fmt: skip
    assert [stack.causal for stack in maps.stacks] == [False, True, False]
    assert maps.stacks[0].maps[1].weights.shape == (2, 4, 9, 9)
    assert maps.stacks[2].maps[0].weights.shape == (2, 4, 7, 9)


def test_the_map_is_that_of_the_cross_attention():
    model, (source, target) = lively(pairs()), padded()
    part, seen = model.decoder[1].cross, []
    part.register_forward_hook(lambda _part, args, _out: seen.append(args))
    found = by_side(collect_text(model, source, target))["cross"].maps[1].weights
    x, context = seen[0]
    with torch.no_grad():
        q, (k, _) = part.queries(x), part.read(context)
        scores = (q @ k.mT / 8**0.5).masked_fill((source == 0)[:, None, None], -torch.inf)
    torch.testing.assert_close(found, scores.softmax(dim=-1), rtol=1e-4, atol=1e-6)


def test_a_stack_may_be_causal_or_not():
    causal = collect_text(lively(STACK), torch.randint(24, (1, 9))).stacks
    free = collect_text(lively(VECTORS), torch.randn(1, 9, 3)).stacks
    assert [stack.side for stack in (*causal, *free)] == ["layers"] * 2
    assert causal[0].causal and (causal[0].maps[1].weights.triu(1) == 0).all()
    assert not free[0].causal and (free[0].maps[0].weights.triu(1) > 0).any()


def test_choosing_sites_and_layers():
    maps = collect_text(lively(pairs(layers="{encoder: 3, decoder: 2}")), *padded())
    assert [stack.side for stack in maps.only("cross").stacks] == ["cross"]
    one = maps.only(layer=1)
    assert [(found.site, found.layer) for found in one.maps] == [
        ("encoder.1", 1), ("decoder.1.self", 1), ("decoder.1.cross", 1)]  # fmt: skip
    assert [stack.heads() for stack in one.stacks] == [[4], [4], [4]]
    assert [stack.side for stack in maps.only(layer=2).stacks] == ["encoder"]
    with pytest.raises(ZooError, match="the model has 2") as caught:
        maps.only("decoder", 2)
    assert caught.value.code == "AZ904"
    with pytest.raises(ZooError) as caught:
        collect_text(lively(STACK), torch.zeros(1, 3, dtype=torch.long)).only("encoder")
    assert caught.value.code == "AZ908"


def test_a_site_without_a_map_says_why():
    put = 'attention: softmax\noverrides: [{at: "encoder.*", put: squeeze_excite}]'
    maps = collect_text(lively(pairs(put)), *padded())
    with pytest.raises(ZooError, match="channels") as caught:
        maps.only("encoder")
    assert caught.value.code == "AZ903"
    example = random_example(lively(pairs(put)), 0)
    blocks = text_view(collect_text(lively(pairs(put)), *example.inputs).only(), example)
    assert [block.side for block in blocks] == ["decoder", "cross"]
    said = " ".join(text_notes(maps, blocks))
    assert "squeeze_excite has no map (encoder.0, encoder.1): it gates channels" in said


def test_images_are_no_text():
    with pytest.raises(ZooError) as caught:
        collect_text(nn.Linear(3, 3), torch.zeros(1, 3))
    assert caught.value.code == "AZ908" and "Linear" in str(caught.value)


class Shifted(Head):
    """Hand-made: in head k, query i looks at key i + k alone, at the last where there is none; with a causal mask at
    i - k, at the first where there is none."""

    card = Card("shifted", Family.DOT_PRODUCT, "For this test.", taps={"weights": "b h n m"}, masks={"keys", "causal"},
                context=True, laws={Law.STOCHASTIC})  # fmt: skip

    def attend(self, q, k, v, *, mask, layout):
        b, h, n, _ = q.shape
        wanted = torch.stack(
            [target(i, head, k.shape[2], mask.causal) for head in range(h) for i in range(n)]
        )
        weights = nn.functional.one_hot(wanted.view(h, n), k.shape[2]).to(v)
        return self.weights(weights.expand(b, -1, -1, -1)) @ v


def target(query: int, head: int, keys: int, causal: bool) -> torch.Tensor:
    """The key that `Shifted` looks at."""
    return torch.tensor(max(query - head, 0) if causal else min(query + head, keys - 1))


def hand_made() -> seq2seq.Seq2Seq:
    """Two layers with `Shifted` everywhere; 4 heads in the encoder, 2 in the decoder."""
    form = seq2seq.Form(dim=16, mlp_dim=16, encoder=2, decoder=2, source=40, target=40, max_length=20)
    seen = seq2seq.host_info(form, (4, 4), (2, 2))
    return seq2seq.build(seen, lambda site: MultiHead(site, Shifted(site))).eval()


@dataclass
class Drawn:
    """A sheet, and its panels in the order of drawing.

    Args:
        picture: The sheet.
    """

    picture: Picture

    @property
    def panels(self) -> list[Axes]:
        """All maps."""
        return [axes for axes in self.picture.axes if axes.get_label() != "scale"]

    def cells(self, panel: int) -> np.ndarray:
        """Colours of the squares of a panel, (n m 3)."""
        return cells(self.panels[panel])

    def beside(self, panel: int) -> list[tuple[str, int]]:
        """Names at the left of a panel, each with its row."""
        axis = self.panels[panel].yaxis
        return [
            (text.get_text(), at) for text, at in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
        ]

    def above(self, panel: int) -> list[tuple[str, int]]:
        """Names above a panel, each with its column."""
        axis = self.panels[panel].xaxis
        assert all(
            tick.label2.get_visible() and not tick.label1.get_visible() for tick in axis.get_major_ticks()
        )
        names = [tick.label2.get_text() for tick in axis.get_major_ticks()]
        return list(zip(names, axis.get_ticklocs(), strict=True))

    def below(self) -> list[str]:
        """What stands below the panels."""
        return [axes.get_xlabel() for axes in self.panels]

    def words(self) -> str:
        """All that is written, but at panels."""
        return " ".join(text.get_text() for text in self.picture.texts)


def cells(axes: Axes) -> np.ndarray:
    """Colours of the squares of a map, (n m 3)."""
    (image,) = axes.images
    return image.to_rgba(image.get_array(), bytes=True)[..., :3].astype(int)


def drawn(
    blocks: tuple[Block, ...], what: Any, title: str = "title", lines: Any = (), notes: Any = ()
) -> Drawn:
    """The sheet of a view."""
    return Drawn(text_sheet(blocks, what, title, lines, notes))


GREY = tuple(round(255 * part) for part in to_rgb(FORBIDDEN))
LARGE = {"heads": False, "mechanism": True}


def test_each_head_is_drawn_where_it_looks():
    model = hand_made()
    example = random_example(model, 0)
    blocks = text_view(collect_text(model, *example.inputs), example)
    sheet, at = drawn(blocks, "heads"), 0
    dark, bright = colours()[0].tolist(), colours()[255].tolist()
    for block, heads in zip(blocks, (4, 2, 2), strict=True):
        for _layer in range(2):
            for head in range(heads):
                found = sheet.cells(at).tolist()
                for i in range(len(block.queries)):
                    wanted = target(i, head, len(block.keys), block.causal)
                    for j in range(len(block.keys)):
                        there = list(GREY) if block.causal and j > i else bright if j == wanted else dark
                        assert found[i][j] == there, (block.side, head, i, j)
                at += 1
    assert at == len(sheet.panels) == 16


@pytest.mark.parametrize("what", ["heads", "mechanism"])
def test_names_stand_at_their_tokens(what):
    model = hand_made()
    example = random_example(model, 0)
    blocks = text_view(collect_text(model, *example.inputs), example, what)
    sheet, at = drawn(blocks, what), 0
    for block in blocks:
        for row, _ in enumerate(block.rows):
            for column, _ in enumerate(block.rows[row].panels):
                beside = what == "mechanism" or not column
                assert sheet.beside(at) == (
                    list(zip(block.queries, range(20), strict=False)) if beside else []
                )
                first = what == "mechanism" or not row
                assert sheet.above(at) == (list(zip(block.keys, range(20), strict=False)) if first else [])
                at += 1
    arrows = blocks[2].queries
    given = blocks[1].keys
    assert [arrow.split(" › ")[0] for arrow in arrows] == list(given)
    assert [arrow.split(" › ")[1] for arrow in arrows] == [*given[1:], "</s>"]
    assert blocks[0].keys == blocks[2].keys and blocks[0].keys[0] == "<s>" and blocks[0].keys[-1] == "</s>"


def one_block(queries: list[str], keys: list[str]) -> tuple[Block]:
    """One map, without any order of time."""
    row = Row("r", (Panel("p", torch.eye(len(queries), len(keys))),))
    return (Block("layers", "They look", queries, keys, (row,)),)


def test_a_turned_name_ends_at_its_column():
    """Where a name is too long all are turned, each above the middle of its column; otherwise none is."""
    sheet = drawn(one_block(["a", "b"], ["on", "longer names"]), "mechanism")
    left, top, _, _ = place(sheet.panels[0])
    ink = pixels(sheet.picture)[top - 76 : top - 2, left : left + 60].min(axis=2) < 128
    for first in (0, 30):
        columns = ink[:, first : first + 30].any(axis=0).nonzero()[0]
        assert columns.min() >= 6 and columns.max() <= 23, "the turned name is not above its column"
        assert ink[:, first : first + 30].any(axis=1).nonzero()[0].max() > 62, "it does not end at the panel"
    assert ink[:50, :30].sum() == 0 and ink[:20, 30:].any()
    for names, turned in ((["on", "longer names"], 90), (["on", "b"], 0)):
        axes = drawn(one_block(["a", "b"], names), "mechanism").panels[0]
        assert {tick.label2.get_rotation() for tick in axes.xaxis.get_major_ticks()} == {turned}


def test_the_number_of_heads_stands_at_each_layer():
    model = lively(
        pairs(dim=64, layers=6, heads="{encoder: {schedule: halving, first: 64, last: 2}, decoder: 8}")
    )
    example = random_example(model, 0)
    maps = collect_text(model, *example.inputs)
    blocks = text_view(maps, example)
    sheet = drawn(blocks, "heads")
    assert len(sheet.panels) == 64 + 32 + 16 + 8 + 4 + 2 + 2 * 6 * 8
    labels = [text.get_text() for text in sheet.picture.texts if text.get_text().startswith("layer ")]
    assert labels[:6] == [f"layer {i} · {2 ** (6 - i)} heads" for i in range(6)]
    assert labels[6:] == [f"layer {i} · 8 heads" for _ in range(2) for i in range(6)]
    rows = sorted({place(axes)[1] for axes in sheet.panels[:64]})
    assert len(rows) > 3, "64 heads are not wrapped"
    assert sheet.picture.pixels[0] <= WIDE + 40
    under = {text.split(":")[0] for text in sheet.below()}
    assert under == {f"head {i}" for i in range(64)}
    means = drawn(text_view(maps, example, "mechanism"), "mechanism")
    assert len(means.panels) == 18
    assert {f"layer {i} · {2 ** (6 - i)} heads" for i in range(6)} <= {
        text.split(":")[0] for text in means.below()
    }


def test_one_head_is_one_head():
    example = random_example(lively(pairs(heads=1)), 0)
    maps = collect_text(lively(pairs(heads=1)), *example.inputs)
    assert text_view(maps, example)[0].rows[0].label == "layer 0 · 1 head"


def test_branches_have_rows_of_their_own():
    model = lively(pairs("attention: {fuse: gated, of: [softmax, elu_linear]}"))
    example = random_example(model, 0)
    maps = collect_text(model, *example.inputs)
    block = text_view(maps, example)[0]
    assert [row.label for row in block.rows] == [
        f"layer {i} · {branch} · 4 heads" for i in range(2) for branch in ("softmax", "elu_linear")
    ]
    assert [row.label for row in text_view(maps, example, "mechanism")[0].rows] == ["softmax", "elu_linear"]
    assert "elu_linear forms no weights" in " ".join(text_notes(maps, (block,)))
    values = block.values()
    assert values.shape == (4, 4, 10, 10)
    torch.testing.assert_close(values[0], maps.maps[0].weights[0])
    means = text_view(maps, example, "mechanism")[0].values()
    torch.testing.assert_close(means[1, 0], maps.maps[1].weights[0].mean(dim=0))


def test_fewer_heads_leave_nan():
    model = lively(pairs(heads="{encoder: [4, 2], decoder: 4}"))
    example = random_example(model, 0)
    values = text_view(collect_text(model, *example.inputs), example)[0].values()
    assert values.isnan().all(dim=-1).all(dim=-1).tolist() == [[False] * 4, [False, False, True, True]]


def test_a_pooled_map_is_the_same_for_all_queries():
    weights = torch.tensor([[[0.1, 0.2, 0.7]]])
    one = Map("decoder.0.cross", 0, "soft", "soft", "pooled", weights, True)
    assert torch.equal(one.matrix(5), weights[:, :, None].expand(1, 1, 5, 3))
    model = lively(pairs('attention: softmax\noverrides: [{at: "decoder.*.cross", put: soft}]'))
    example = random_example(model, 0)
    maps = collect_text(model, *example.inputs)
    blocks = text_view(maps, example)
    assert blocks[2].rows[0].panels[0].heat.shape == (9, 10)
    assert "soft forms one map for all queries" in " ".join(text_notes(maps, blocks))


def test_colours_of_a_matrix():
    table = colours()
    found = cells(token_map(torch.tensor([[0.0, 0.5], [0.25, 0.125]])))
    assert (found == [[table[0], table[255]], [table[128], table[64]]]).all()
    signed = token_map(torch.tensor([[-0.5, 0.0, 0.5]]))
    assert (cells(signed) == [[table[0], table[128], table[255]]]).all()
    assert signed.get_xlabel() == "-0.50 to 0.50"
    assert (cells(token_map(torch.zeros(2, 2))) == table[0]).all()


def test_the_first_token_of_a_causal_map_does_not_set_the_scale():
    table = colours()
    heat = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.4, 0.0], [0.2, 0.1, 0.4]])
    axes = token_map(heat, causal=True, name="head 0")
    assert (
        cells(axes)
        == [[table[255], GREY, GREY], [table[192], table[255], GREY], [table[128], table[64], table[255]]]
    ).all()
    assert axes.get_xlabel() == "head 0: 0.40" and token_map(heat).get_xlabel() == "1.00"


def test_a_matrix_by_itself_has_names():
    axes = token_map(torch.eye(2, 3), ["a$x$", "b"], ["c", "d", "e"])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a$x$", "b"]
    assert [tick.label2.get_text() for tick in axes.xaxis.get_major_ticks()] == ["c", "d", "e"]
    assert ">a$x$<" in svg(axes.figure)
    for given in ((torch.eye(2), ["a"]), (torch.eye(2), [], ["a"]), (torch.ones(2), [])):
        with pytest.raises(ZooError) as caught:
            token_map(*given)
        assert caught.value.code == "AZ930"
    with pytest.raises(ZooError, match="without a map"):
        drawing.text_sheet((), "t")


@pytest.mark.parametrize("what", ["heads", "mechanism"])
@pytest.mark.parametrize("tokens", [1, 12, 24, 40, 47, 90, 350])
@pytest.mark.sample(4)
def test_names_never_overlap_and_sheets_stay_small(tokens, what):
    heat = torch.eye(tokens)
    panels = tuple(Panel(f"head {i}", heat) for i in range(8))
    names = [f"word{i}" for i in range(tokens)]
    block = Block("layers", "They look", names, names, (Row("layer 0 · 8 heads", panels),), True)
    cell = cell_size((block,), LARGE[what])
    assert cell * named(cell) >= drawing.PITCH and cell * tokens <= 600
    sheet = drawn((block,), what, notes=text_notes(TextMaps((), torch.zeros(0)), (block,), what))
    assert [text for text, _ in sheet.beside(0)] == names[:: named(cell)]
    assert ("is named" in sheet.words()) == (named(cell) > 1)
    assert sheet.picture.pixels[0] <= WIDE + 40
    seen = pixels(sheet.picture)
    for edge in (seen[:8], seen[-8:], seen[:, :8], seen[:, -8:]):
        assert (edge == 255).all()
    if tokens <= 24 or (what == "mechanism" and tokens <= 40):
        assert named(cell) == 1


def test_panels_do_not_touch():
    model = hand_made()
    example = random_example(model, 0)
    maps = collect_text(model, *example.inputs)
    for what in ("heads", "mechanism"):
        boxes = [place(axes) for axes in drawn(text_view(maps, example, what), what).panels]
        for i, (x, y, w, h) in enumerate(boxes):
            for u, v, ww, hh in boxes[:i]:
                assert x >= u + ww + 8 or u >= x + w + 8 or y >= v + hh + 8 or v >= y + h + 8


@pytest.fixture
def fonts(monkeypatch):
    """No fonts but matplotlib's own, and `theirs`, which has one letter; nothing is remembered."""
    lettering._fonts_of.cache_clear()
    own = lettering._letters
    there = {"theirs.ttf": frozenset("日"), "other.ttf": frozenset("語")}
    monkeypatch.setattr(lettering, "_machine", lambda: (("Other", "other.ttf"), ("Theirs", "theirs.ttf")))
    monkeypatch.setattr(lettering, "_letters", lambda file: there.get(file) or own(file))
    yield
    lettering._fonts_of.cache_clear()


def test_letters_come_from_a_font_that_has_them(fonts):
    own = spelled("the dog")[1]["family"]
    assert spelled("¿ mañana, corazón ß ?") == ("¿ mañana, corazón ß ?", spelled("")[1])
    assert spelled("日") == ("日", spelled("")[1] | {"family": [*own, "Theirs"]})
    assert spelled("日本")[0] == "日?" and lettering.unwritten("本") and not lettering.unwritten("日")
    sheet = drawn(one_block(["a", "本"], ["o", "no"]), "mechanism", lines=[("el corazón", None)])
    assert sheet.beside(0) == [("a", 0), ("?", 1)]
    assert "el corazón" in sheet.words() and "No font here" in sheet.words()
    assert "No font here" not in drawn(one_block(["a", "b"], ["o", "no"]), "mechanism").words()


def test_fonts_that_cannot_be_read_have_no_letters(tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert lettering._letters(str(tmp_path / "broken.ttf")) == frozenset()
    assert not any(name.startswith("Last Resort") for name, _ in lettering._machine())


def data(longest: int = 16) -> PairData:
    """Strings and their reversals."""
    texts = [(" ".join(line), " ".join(reversed(line))) for line in ("abc", "defg", "hij", "abcdefgh", "jj")]
    sides = encoded(texts, LETTERS, LETTERS, longest)[0]
    return PairData("reversed", LETTERS, LETTERS, sides, sides)


def letters() -> Any:
    """A model that has an answer for letters: its weights are random."""
    return lively(pairs().replace("vocab: 20", f"vocab: {LETTERS.size}"))


def test_a_test_pair_is_shown_with_its_true_target():
    model = letters()
    example = pair_example(model, data(), 1)
    assert example.words["encoder"] == ["<s>", "d", "e", "f", "g", "</s>"]
    assert example.words["decoder"] == ["<s>", "g", "f", "e", "d"]
    assert example.words["cross"] == ["<s> › g", "g › f", "f › e", "e › d", "d › </s>"]
    assert example.inputs[0].tolist() == [[1, 7, 8, 9, 10, 2]] and example.inputs[1].tolist() == [
        [1, 10, 9, 8, 7]
    ]
    assert example.lines[0] == ("source: d e f g", None) and example.lines[1] == (
        "true target: g f e d",
        None,
    )
    assert example.lines[2][0].startswith("the model says: ") and example.lines[2][1] == RED
    assert example.name == "test pair 1" and example.keys("cross") == example.words["encoder"]


def test_a_right_translation_is_green():
    model, words = letters(), (LETTERS, LETTERS)
    model.head.bias.data[:] = 0
    model.head.bias.data[2] = 1e4  # the end at once
    right = translated_example(model, words, [4, 5], [], name="x", true=True)
    assert right.lines[-1] == ("the model says: ", GREEN)
    assert translated_example(model, words, [4, 5], [4], name="x", true=True).lines[-1][1] == RED
    assert translated_example(model, words, "a b", "a", name="x").lines[1:] == (
        ("given target: a", None), ("the model says: ", None))  # fmt: skip


def test_without_a_target_the_decoder_is_given_the_models_own():
    model = letters()
    example = translated_example(model, (LETTERS, LETTERS), "a b c", name="text 1")
    found = greedy(model, example.inputs[0], 15).best[0]
    whole = [1, *found.tokens, *([2] if found.ended else [])]
    assert example.inputs[1].tolist() == [whole[:-1]]
    assert ("without an end" in example.lines[1][0]) == (not found.ended)
    never = letters()
    never.head.bias.data[2] = -1e4
    endless = translated_example(never, (LETTERS, LETTERS), "a b c", name="text 1")
    assert "without an end" in endless.lines[1][0] and endless.inputs[1].shape == (1, 15)
    assert "</s>" not in endless.words["cross"][-1]


def test_random_ids_for_a_recipe():
    model = lively(pairs())
    one, again, other = (random_example(model, seed) for seed in (0, 0, 1))
    assert one.inputs[0].shape == (1, 10) and one.inputs[1].shape == (1, 9) and one.lines == ()
    assert torch.equal(one.inputs[0], again.inputs[0]) and not torch.equal(one.inputs[0], other.inputs[0])
    assert one.inputs[0][0, 0] == 1 and one.inputs[0][0, -1] == 2 and (one.inputs[0][0, 1:-1] >= 4).all()
    assert random_example(lively(STACK), 0).inputs[0].shape == (1, 10)
    assert random_example(lively(VECTORS), 0).inputs[0].shape == (1, 10, 3)
    short = random_example(lively(pairs().replace("max_length: 16", "max_length: 4")), 0)
    assert short.inputs[0].shape == (1, 4)


def test_a_test_sequence_is_shown_with_its_answers():
    source = load_sequences("recall:pairs=2,length=8,vocab=12,train=4,test=4")
    recipe = "recipe: 1\nname: r\nextends: recall\nhost: {vocab: 12, outputs: 12, max_length: 8}\n"
    model = lively(recipe)
    example = sequence_example(model, source, 2)
    ids, answers = source.test.batch(torch.tensor([2]))
    places = (answers[0] >= 0).nonzero()[:, 0].tolist()
    assert (
        list(example.words["layers"]) == [source.words[i] for i in ids[0]]
        and example.name == "test sequence 2"
    )
    assert example.lines[0][0] == f"asked at {places[0]}, {places[1]}, counted from 0"
    assert example.lines[1][0] == "true: " + " ".join(source.words[answers[0, i]] for i in places)
    guesses = model(ids)[0].argmax(dim=-1)
    assert example.lines[2][0] == "the model says: " + " ".join(source.words[guesses[i]] for i in places)
    assert example.lines[2][1] == (GREEN if all(guesses[i] == answers[0, i] for i in places) else RED)
    typed = sequence_example(model, source, "k1 v6 · k1", "text 1")
    assert typed.inputs[0].tolist() == [[1, 6, 0, 1]] and len(typed.lines) == 1


def test_vectors_are_numbered():
    source = load_sequences("fitting:train=4,test=4")
    n, e = source.test.inputs.shape[1:]
    recipe = f"recipe: 1\nname: r\nextends: function_fitting\nhost: {{vocab: 0, width: {e}, outputs: {source.outputs}, max_length: {n}}}\n"
    example = sequence_example(lively(recipe), source, 0)
    assert list(example.words["layers"]) == [str(i) for i in range(n)]
    assert "mean squared error" in example.lines[0][0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a z", "`z` is no symbol"),
        ("", "is empty"),
        ("  ", "is empty"),
        ("a " * 20, "20 tokens; the model reads 14"),
    ],
)
def test_texts_that_cannot_be_read(text, said):
    with pytest.raises(ZooError, match=said) as caught:
        translated_example(letters(), (LETTERS, LETTERS), text, name="x")
    assert caught.value.code == "AZ908"
    with pytest.raises(ZooError, match="target"):
        translated_example(letters(), (LETTERS, LETTERS), "a", text, name="x")


# the command


@pytest.fixture
def stand_in(monkeypatch, tmp_path) -> Callable[..., Path]:
    """Makes a folder that opens as a run."""

    def made(recipe: str, model: Any, held: Any) -> Path:
        opened = SimpleNamespace(
            loaded=load(recipe), data=lambda: held, model=lambda which: model,
            vocabularies=lambda: (LETTERS, LETTERS))  # fmt: skip
        monkeypatch.setattr(attnzoo.train, "open_run", lambda folder: opened)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine").mkdir()
        return tmp_path / "mine"

    return made


@pytest.fixture
def translating(stand_in) -> Path:
    """A run on pairs."""
    return stand_in(pairs(), letters(), data())


@pytest.fixture
def recalling(stand_in) -> Path:
    """A run on single sequences."""
    source = load_sequences("recall:pairs=2,length=8,vocab=12,train=4,test=4")
    recipe = "recipe: 1\nname: r\nextends: recall\nhost: {vocab: 12, outputs: 12, max_length: 8}\n"
    return stand_in(recipe, lively(recipe), source)


def test_a_run_of_pairs(translating):
    output = run("heatmap", translating).output
    assert "written: mine-heads.png" in output and "source: " in output and "true target: " in output
    assert "heads by layer: encoder 4 4 · decoder 4 4 · cross 4 4 · small, best epoch" in output
    assert output.splitlines()[-1] == f"next: attnzoo heatmap {translating} --what mechanism"
    with Image.open("mine-heads.png") as image:
        assert image.width > 400 and image.height > 600
    drawn_first, again, other = (
        json.loads(run("heatmap", translating, "--json", "--seed", seed).stdout)["sheets"][0]["example"]
        for seed in (0, 0, 1)
    )
    assert drawn_first == again != other


def test_texts_and_targets(translating):
    given = ["--text", "a b", "--text", "c", "--target", "b a", "--target", "c c", "--what", "mechanism"]
    found = json.loads(run("heatmap", translating, *given, "--json", "--npy", "--out", "new/x.png").stdout)
    one, other = found["sheets"]
    assert one["written"] == [
        "new/x-1.png",
        "new/x-1-encoder.npy",
        "new/x-1-decoder.npy",
        "new/x-1-cross.npy",
    ]
    assert other["written"][0] == "new/x-2.png" and all(Path(path).exists() for path in other["written"])
    assert one["tokens"]["encoder"] == ["<s>", "a", "b", "</s>"] and one["lines"][1] == "given target: b a"
    assert one["heads"] == {"encoder": [4, 4], "decoder": [4, 4], "cross": [4, 4]}
    assert np.load("new/x-1-cross.npy").shape == (1, 2, 3, 4)
    assert len(one["maps"]) == 6 and one["absent"] == []
    with Image.open("new/x-2.png") as image:
        assert other["size"] == list(image.size)


def test_one_site_and_one_layer(translating):
    found = json.loads(run("heatmap", translating, "--site", "cross", "--layer", 1, "--npy", "--json").stdout)
    (sheet,) = found["sheets"]
    assert sheet["heads"] == {"cross": [4]} and [one["site"] for one in sheet["maps"]] == ["decoder.1.cross"]
    assert sheet["written"] == ["mine-heads.png", "mine-heads-cross.npy"]
    assert len(json.loads(run("heatmap", translating, "--count", 3, "--json").stdout)["sheets"]) == 3


def test_a_run_of_single_sequences(recalling):
    output = run("heatmap", recalling).output
    assert "asked at" in output and "heads by layer: layers 1 1" in output
    found = json.loads(run("heatmap", recalling, "--text", "k1 v6 k1", "--json").stdout)["sheets"][0]
    assert found["tokens"] == {"layers": ["k1", "v6", "k1"]}


@pytest.mark.parametrize("recipe", [pairs(), STACK, VECTORS])
def test_an_untrained_recipe(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = f"{load(recipe).name}.yaml"
    Path(file).write_text(recipe)
    output = run("heatmap", file, "--out", "a.png").output
    assert "untrained, seed 0" in output and Path("a.png").exists()
    run("heatmap", file, "--out", "b.png")
    run("heatmap", file, "--out", "c.png", "--seed", 1)
    a, b, c = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


FAULTS = [
    (["--images", "x.png"], "`--images` is for images"),
    (["--what", "model"], "`--what model` is for images"),
    (["--what", "rollout"], "`--what rollout` is for images"),
    (["--fusion", "max"], "`--fusion` is for images"),
    (["--discard", "0.5"], "`--discard` is for images"),
    (["--target", "a"], "1 targets were given for 0 texts"),
    (["--text", "a", "--text", "b", "--target", "a"], "1 targets were given for 2 texts"),
    (["--text", "a", "--count", "2"], "`--count` is for examples that are drawn"),
    (["--text", "z"], "`z` is no symbol of the sources"),
    (["--text", "a", "--target", "z"], "`z` is no symbol of the targets"),
    (["--text", ""], "is empty"),
]


@pytest.mark.parametrize(("arguments", "said"), FAULTS)
def test_faults_are_told(translating, arguments, said):
    output = run("heatmap", translating, *arguments, code=2).output
    assert "AZ908" in output and said in output and "Traceback" not in output
    assert not list(Path().glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--site", "encoder"], "AZ908", "is one stack"),
        (["--target", "a", "--text", "k1"], "AZ908", "`--target` is for pairs"),
        (["--text", "k99"], "AZ908", "`k99` is no token"),
        (["--text", "k1 " * 9], "AZ908", "9 tokens; the model reads 8"),
        (["--layer", "2"], "AZ904", "the model has 2"),
        (["--out", "x.jpg"], "AZ905", "PNG"),
        (["--init-from", "x.pth"], "AZ907", "is a run"),
    ],
)
def test_faults_of_single_sequences(recalling, arguments, code, said):
    output = run("heatmap", recalling, *arguments, code=2).output
    assert code in output and said in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ham_a", "--text", "a"], "`--text` is for models of text"),
        (["ham_a", "--target", "a"], "`--target` is for models of text"),
        (["ham_a", "--site", "cross"], "`--site` is for models of text"),
        (["recall", "--text", "a"], "`--text` is for runs"),
        (["recall", "--target", "a"], "`--target` is for pairs"),
        (["recall", "--init-from", "x.pth"], "`--init-from` is for images"),
    ],
)
def test_faults_of_recipes(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run("heatmap", *arguments, code=2).output
    assert "AZ908" in output and said in output and "Traceback" not in output


# whole sheets, as stored

REFERENCES = Path(__file__).with_name("text_map_references.json")
MECHANISMS = (
    'attention: softmax\noverrides: [{at: "encoder.1", put: elu_linear}, {at: "decoder.*.cross", put: soft}]'
)
SHEETS: dict[str, tuple[str, Any]] = {
    "heads": (pairs(), "heads"),
    "mechanism": (pairs(), "mechanism"),
    "several": (pairs(MECHANISMS, heads="{encoder: [8, 4], decoder: 2}"), "heads"),
    "stack": (STACK, "heads"),
}
"""Recipe, what is shown."""
SLACK = 30
"""Pixels that another font may move: names beside and above panels are wider or narrower."""


def example_of(model: Any) -> Example:
    """Tokens that do not change when the drawing of random numbers does."""
    if isinstance(model, sequence.SequenceModel):
        ids = [3, 1, 4, 1, 5, 9, 2, 6]
        return Example(
            "x", (torch.tensor([ids]),), {"layers": [f"t{i}" for i in ids]}, (("true", None), ("says", GREEN))
        )
    source, target = [1, 4, 9, 16, 7, 5, 2], [1, 12, 6, 18, 11]
    words: dict[Any, Any] = {
        "encoder": ["<s>", "four", "nine", "16", "seven", "5", "</s>"],
        "decoder": ["<s>", "doce", "6", "18", "once"],
        "cross": ["<s> › doce", "doce › 6", "6 › 18", "18 › once", "once › </s>"],
    }
    return Example(
        "x", (torch.tensor([source]), torch.tensor([target])), words, (("source", None), ("says", RED))
    )


def structure(name: str) -> dict[str, Any]:
    """A stored sheet, drawn anew, as it is compared."""
    recipe, what = SHEETS[name]
    model = fixed_model(recipe)
    example = example_of(model)
    maps = collect_text(model, *example.inputs)
    blocks = text_view(maps, example, what)
    sheet = drawn(blocks, what, f"{name}: a title", example.lines, text_notes(maps, blocks, what))
    seen, cell = pixels(sheet.picture), cell_size(blocks, LARGE[what])
    first, panels = place(sheet.panels[0]), []
    for i, axes in enumerate(sheet.panels):
        x, y, w, h = place(axes)
        texts = [f"{text} | left {at:g}" for text, at in sheet.beside(i)]
        texts += [f"{text} | above {at:g}" for text, at in sheet.above(i)]
        inks = {to_hex(text.get_color()) for text in (*axes.get_xticklabels(), *axes.get_yticklabels())}
        texts += [f"{axes.get_xlabel()} | below {to_hex(axes.xaxis.label.get_color())}", *sorted(inks)]
        found = mean_colours(seen[y : y + h, x : x + w], h // cell, w // cell)
        panels.append({"at": [x - first[0], y - first[1]], "texts": texts, "colours": found})
    return {
        "cell": cell,
        "words": sheet.words(),
        "inks": sorted({to_hex(text.get_color()) for text in sheet.picture.texts}),
        "panels": panels,
    }


def differences(found: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """What another machine or another font does not explain."""
    told = [f"{key}: {found[key]}" for key in ("cell", "words", "inks") if found[key] != stored[key]]
    if len(found["panels"]) != len(stored["panels"]):
        return [*told, f"panels: {len(found['panels'])}"]
    for i, (one, other) in enumerate(zip(found["panels"], stored["panels"], strict=True)):
        if max(abs(a - b) for a, b in zip(one["at"], other["at"], strict=True)) > SLACK * (1 + i // 2):
            told.append(f"panel {i} at: {one['at']}")
        if one["texts"] != other["texts"]:
            told.append(f"panel {i} texts: {one['texts']}")
        if [len(line) for line in one["colours"]] != [len(line) for line in other["colours"]]:
            told.append(f"panel {i} shape")
        elif (far := distance(one["colours"], other["colours"])) > TOLERANCE:
            told.append(f"panel {i} colours: {far} of 255 apart")
    return told


def stored() -> dict[str, Any]:
    return json.loads(REFERENCES.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SHEETS)
def test_a_sheet_is_as_stored(name):
    assert set(stored()) == set(SHEETS)
    assert differences(structure(name), stored()[name]) == [], (
        "if it is meant: python tests/test_text_maps.py"
    )


def test_the_references_hold_what_there_is_to_see():
    """The file itself: labels of rows, names of tokens, colours that differ."""
    held = stored()
    assert len(held["heads"]["panels"]) == 24 and len(held["mechanism"]["panels"]) == 6
    assert len(held["several"]["panels"]) == 12 + 4 + 4 and len(held["stack"]["panels"]) == 4
    for name, labels in (
        ("heads", ["layer 0 · 4 heads", "layer 1 · 4 heads"]),
        ("several", ["layer 0 · softmax · 8 heads", "layer 1 · elu_linear · 4 heads", "layer 1 · 2 heads"]),
        ("stack", ["layer 0 · 2 heads", "layer 1 · 2 heads"]),
    ):
        written = held[name]["words"] + " ".join(
            text for one in held[name]["panels"] for text in one["texts"]
        )
        assert all(label in written for label in labels)
    first = " ".join(held["heads"]["panels"][0]["texts"])
    assert all(word in first for word in ("seven", "nine", "head 0: "))
    for one in held.values():
        for panel in one["panels"]:
            assert len({cell for line in panel["colours"] for cell in line.split()}) > 3, (
                "too even for a reference"
            )


def changed(change: Callable[[torch.Tensor], torch.Tensor], **other: Any) -> Callable:
    """`token_map` is given another map."""

    def patched(patch):
        patch.setattr(drawing, "token_map", lambda heat, **how: token_map(change(heat), **how | other))

    return patched


def other_blocks(change: Callable[[Block], Block]) -> Callable:
    """`text_view` gives other blocks."""
    own = text_view

    def patched(patch):
        patch.setitem(globals(), "text_view", lambda *given: tuple(change(block) for block in own(*given)))

    return patched


def other_rows(change: Callable[[tuple], tuple]) -> Callable:
    """The panels of each row are others."""
    return other_blocks(
        lambda block: replace(
            block, rows=tuple(replace(row, panels=change(row.panels)) for row in block.rows)
        )
    )


EVERY = tuple(SHEETS)
MUTANTS: dict[str, tuple[Callable, tuple[str, ...], str]] = {
    "maps upside down": (changed(lambda heat: heat.flip(0)), EVERY, "colours"),
    "maps mirrored": (changed(lambda heat: heat.flip(1)), EVERY, "colours"),
    "maps transposed": (changed(lambda heat: heat.mT if heat.shape[0] == heat.shape[1] else heat), EVERY, "colours"),
    "one key further": (changed(lambda heat: heat.roll(1, dims=1)), EVERY, "colours"),
    "one query further": (changed(lambda heat: heat.roll(1, dims=0)), EVERY, "colours"),
    "nothing grey": (changed(lambda heat: heat, causal=False), EVERY, "colours"),
    "heads in another order": (other_rows(lambda p: p[::-1]), EVERY, "colours"),
    "the last head missing": (other_rows(lambda p: p[:-1]), EVERY, "panels"),
    "maps of another head": (
        other_rows(lambda p: tuple(replace(a, heat=b.heat) for a, b in zip(p, p[::-1], strict=True))), EVERY, "colours"),
    "layers in another order": (other_blocks(lambda b: replace(b, rows=b.rows[::-1])), ("heads", "several", "stack"), "colours"),
    "names of queries reversed": (other_blocks(lambda b: replace(b, queries=b.queries[::-1])), EVERY, "texts"),
    "names of keys reversed": (other_blocks(lambda b: replace(b, keys=b.keys[::-1])), EVERY, "texts"),
    "counts of heads missing": (
        other_blocks(lambda b: replace(b, rows=tuple(replace(r, label=r.label.partition(" · ")[0]) for r in b.rows))),
        ("heads", "several", "stack"), ""),
    "colours reversed": (changed(lambda heat: heat, cmap="inferno_r"), EVERY, "colours"),
    "white ink": (lambda patch: patch.setattr(drawing, "INK", "#ffffff"), EVERY, "texts"),
    "pale ink": (lambda patch: patch.setattr(drawing, "PALE", "#ffffff"), EVERY, "inks"),
}  # fmt: skip
"""A fault of drawing, the sheets that must show it, and what must be told."""


@pytest.mark.parametrize(
    ("mutant", "name"),
    [  # one sheet each is enough for every day
        pytest.param(mutant, name, marks=pytest.mark.slow if i else ())
        for mutant, (_, names, _) in MUTANTS.items()
        for i, name in enumerate(names)
    ],
)
@pytest.mark.sample(3)
def test_a_wrong_sheet_is_caught(mutant, name, monkeypatch):
    change, _, said = MUTANTS[mutant]
    change(monkeypatch)
    told = differences(structure(name), stored()[name])
    assert any(said in line.partition(": ")[0] for line in told), told


def sized(factor: float) -> Callable:
    """All letters are wider or narrower."""
    own = lettering.length

    def patched(patch):
        for module in (lettering, drawing):
            patch.setattr(module, "length", lambda text, size: factor * own(text, size))

    return patched


LEGITIMATE = {
    "last bits": changed(lambda heat: noisy(heat)),
    "single precision": changed(lambda heat: heat.float()),
    "a smaller font": sized(0.92),
    "a larger font": sized(1.08),
}


@pytest.mark.parametrize("name", SHEETS)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, marks=pytest.mark.slow if change in ("last bits", "a larger font") else ())
        for change in LEGITIMATE
    ],
)
@pytest.mark.sample(4)
def test_another_machine_is_no_fault(change, name, monkeypatch):
    LEGITIMATE[change](monkeypatch)
    assert differences(structure(name), stored()[name]) == []


if __name__ == "__main__":
    REFERENCES.write_text(
        json.dumps({name: structure(name) for name in SHEETS}, indent=1) + "\n", encoding="utf-8"
    )
