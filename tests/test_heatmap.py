"""Heat maps: what is shown, how it is drawn, and the command.

Whole sheets are compared with `heatmap_references.json` by structure, not by bytes: where the panels stand, what is
written beside each, and their mean colours. After a change that is meant: python tests/test_heatmap.py
"""

import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

import attnzoo.train
from attnzoo.cli.app import app
from attnzoo.errors import ZooError
from attnzoo.lab import heatmap
from attnzoo.lab.heatmap import captions, heat_sheet, image_files, notes, read_image, save_sheet, view
from attnzoo.lab.maps import Absent, Map, Maps, collect
from attnzoo.plot import Picture, Shown, attention_map, encoded, heat
from attnzoo.plot import heat_sheet as drawn_sheet
from attnzoo.plot.heat import panel_size
from attnzoo.plot.letters import cut, length, spelled, wrapped
from attnzoo.plot.palette import GREEN, HEAT, MARGIN, MISSING, RED
from attnzoo.recipe import compose, load

RUNNER = CliRunner()


def run(*arguments: object, code: int = 0):
    """A verb in this process; its exit code is checked."""
    result = RUNNER.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + (repr(result.exception) if result.exception else "")
    return result


def grey(size: int = 32, value: int = 128) -> torch.Tensor:
    """An even image (3 y x)."""
    return torch.full((3, size, size), value, dtype=torch.uint8)


def pixels(figure: Figure) -> np.ndarray:
    """What is drawn, (y x 3)."""
    with Image.open(io.BytesIO(encoded(figure, "png"))) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def overlay(values: torch.Tensor, image: torch.Tensor, height: int = 160, width: int = 160) -> np.ndarray:
    """A map over an image, (y x 3)."""
    picture = Picture(width, height)
    attention_map(values, image, picture.panel(0, 0, width, height))
    return pixels(picture)


def colours() -> np.ndarray:
    """The colour scale from least to most, (256 3)."""
    return matplotlib.colormaps[HEAT](np.arange(256), bytes=True)[:, :3].astype(int)


def judged(path: str | Path) -> bool:
    """Whether anything on a sheet, an SVG, is green or red."""
    text = Path(path).read_text(encoding="utf-8")
    return GREEN in text or RED in text


def place(axes: Axes) -> tuple[int, int, int, int]:
    """Left, top, width and height of axes in pixels."""
    width, height = axes.figure.pixels
    box = axes.get_position()
    return (
        round(box.x0 * width), round((1 - box.y1) * height), round(box.width * width), round(box.height * height)
    )  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Maps:
    """Maps of a small HAM on two images."""
    torch.manual_seed(0)
    model = compose("ham_a", edits=["host.model.depth=3"]).eval()
    return collect(model, torch.randn(2, 3, 32, 32))


def test_the_colour_scale_only_gets_brighter():
    brightness = 255 * matplotlib.colormaps[HEAT](np.arange(256))[:, :3] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(brightness) > 0).all() and brightness[0] < 2 and brightness[-1] > 240


@pytest.mark.parametrize(
    ("rows", "columns", "panels", "size"),
    [
        (32, 32, 3, (160, 160)),
        (28, 28, 3, (168, 168)),
        (224, 224, 3, (224, 224)),
        (224, 224, 12, (160, 160)),
        (384, 384, 3, (224, 224)),
        (32, 64, 3, (160, 320)),
        (128, 128, 4, (224, 224)),
    ],
)
def test_panels_are_large_enough(rows, columns, panels, size):
    assert panel_size(rows, columns, panels) == size


def test_heat_lies_where_the_map_is_large():
    values = torch.zeros(8, 8)
    values[:4, :4] = 1.0  # up left
    hot = overlay(values, grey())
    assert hot.shape == (160, 160, 3)
    up_left, up_right, down_left = (
        hot[y : y + 40, x : x + 40].mean(axis=(0, 1)) for x, y in ((10, 10), (110, 10), (10, 110))
    )
    pale = 0.5 * (72 + 64)
    np.testing.assert_allclose(up_left, pale + 0.5 * colours()[255], atol=4)
    np.testing.assert_allclose(up_right, pale + 0.5 * colours()[0], atol=4)
    np.testing.assert_allclose(up_right, down_left, atol=2)


def test_each_map_has_the_whole_scale_and_an_even_map_its_middle():
    ramp = torch.linspace(0, 1, 64).view(8, 8)
    one, other = overlay(ramp, grey()), overlay(5 + 0.01 * ramp, grey())
    assert abs(one - other).max() <= 2
    even = overlay(torch.full((8, 8), 0.3), grey()).mean(axis=(0, 1))
    np.testing.assert_allclose(even, 68 + 0.5 * colours()[128], atol=3)


def test_enlarging_keeps_the_image_where_it_was():
    values = torch.zeros(8, 4)
    values[7, 3] = 1.0
    hot = overlay(values, torch.full((1, 8, 4), 128, dtype=torch.uint8), 320, 160).sum(axis=2)
    assert hot.shape == (320, 160)
    y, x = np.unravel_index(hot.argmax(), hot.shape)
    assert y >= 290 and x >= 130


def test_a_map_of_another_grid_lies_on_the_whole_image():
    axes = attention_map(torch.eye(4), grey(32))
    below, above = axes.images
    assert below.get_extent() == above.get_extent() == [-0.5, 31.5, 31.5, -0.5]
    assert below.get_array().shape == (32, 32) and above.get_array().shape == (4, 4)
    assert (above.get_alpha(), above.get_cmap().name, above.get_interpolation()) == (0.5, HEAT, "bilinear")
    alone = attention_map(torch.eye(4))
    assert [image.get_alpha() for image in alone.images] == [1.0]


def blocks(images: int, rows: int, columns: int) -> list[Shown]:
    """Black images whose maps are all even, but for one that is missing."""
    values = torch.ones(rows, columns, 8, 8)
    values[-1, -1] = torch.nan
    return [Shown(grey(value=0), [("truth", None), ("guess", GREEN)], values)] * images


@pytest.mark.parametrize(("images", "rows", "columns"), [(1, 1, 3), (4, 1, 3), (1, 3, 4), (2, 4, 8)])
def test_the_sheet_has_a_panel_for_every_map(images, rows, columns):
    names = [f"layer {i}" for i in range(rows)]
    sheet = drawn_sheet(blocks(images, rows, columns), ["softmax"] * columns, names, "title", ["note"])
    panels = [axes for axes in sheet.axes if axes.get_label() != "scale"]
    kinds = [len(axes.images) for axes in panels]
    assert kinds.count(2) == images * (rows * columns - 1) and kinds.count(1) == kinds.count(0) == images
    for axes in panels:
        if not axes.images:
            assert [text.get_text() for text in axes.texts] == ["none here"]
            assert to_hex(axes.get_facecolor()) == MISSING
    ink = np.zeros((int(sheet.pixels[1]), int(sheet.pixels[0])), dtype=int)
    for x, y, w, h in map(place, panels):
        assert (w, h) == (160, 160) and x >= MARGIN and y >= MARGIN
        assert x + w <= sheet.pixels[0] - MARGIN and y + h <= sheet.pixels[1] - MARGIN
        ink[y : y + h, x : x + w] += 1
    assert ink.max() == 1, "panels overlap"


def test_nothing_is_drawn_over_the_edge():
    names = ["a very long name of a branch, longer than its panel"] * 3
    long = " ".join(["words"] * 200)
    endless = "x" * 400
    drawn = pixels(
        drawn_sheet(blocks(2, 2, 3), names, ["one", "two"], "a title of words " * 6, [long, endless])
    )
    for edge in (drawn[:8], drawn[-8:], drawn[:, :8], drawn[:, -8:]):
        assert (edge == 255).all()


def test_names_that_do_not_fit_are_cut():
    assert cut("softmax", 160, 13) == "softmax"
    short = cut("a very long name of a branch", 100, 13)
    assert short.endswith("…") and length(short, 13) <= 100 and short.startswith("a very")
    assert cut("softmax", 1, 13) == ""


def test_lines_are_as_long_as_fits():
    text = "one word after another " * 9
    lines = wrapped(text, 200)
    assert " ".join(lines) == text.strip() and all(length(line, 11) <= 200 for line in lines)
    assert all(length(f"{a} {b.split()[0]}", 11) > 200 for a, b in zip(lines, lines[1:], strict=False))
    broken = wrapped("字" * 90 + "x" * 90, 200)
    assert "".join(broken) == "字" * 90 + "x" * 90 and all(length(line, 11) <= 200 for line in broken)


def test_names_are_written_as_they_are():
    """No mathematics, no LaTeX, no signs that a file cannot hold."""
    assert spelled("a$b_c$")[0] == "a$b_c$" and not spelled("$x$")[1]["parse_math"]
    assert spelled("a\tb\x00c\x1b")[0] == "a b?c?" and spelled("\U0010ffff")[0] == "?"
    one = [Shown(grey(), [("$x$", None), ("<a&b>\x00", RED)], torch.rand(1, 1, 8, 8))]
    text = encoded(drawn_sheet(one, ["$y_1$"], [""], "$z", ["\\frac{1}{2}"]), "svg").decode()
    for said in (">$x$<", "&lt;a&amp;b&gt;?<", ">$y_1$<", ">$z<", ">\\frac{1}{2}<"):
        assert said in text


def test_names_and_maps_are_equally_many():
    for shown, columns, rows in (
        (blocks(1, 2, 3), ["a"] * 3, ["b"]), (blocks(1, 2, 3), ["a"], ["b"] * 2), ([], ["a"], ["b"]),
    ):  # fmt: skip
        with pytest.raises(ZooError) as caught:
            drawn_sheet(shown, columns, rows, "t")
        assert caught.value.code == "AZ930"
    for values, image in ((torch.rand(3), None), (torch.rand(2, 0), None), (torch.eye(2), torch.eye(2)),
                          (torch.eye(2), torch.rand(5, 4, 4)), ([["a"]], None)):  # fmt: skip
        with pytest.raises(ZooError) as caught:
            attention_map(values, image)
        assert caught.value.code == "AZ930"


def test_captions_are_green_when_right(found):
    right = int(found.logits[0].argmax())
    first, second = captions(
        found, [], [right, (int(found.logits[1].argmax()) + 1) % 10], [f"c{i}" for i in range(10)]
    )
    assert first[0] == (f"c{right}", None) and first[1][1] == GREEN and second[1][1] == RED
    assert first[1][0].startswith(f"c{right}, ") and first[1][0].endswith(" %")
    unknown = captions(found, ["a.png", "b.png"], None, None)
    assert (
        unknown[0][0] == ("a.png", None)
        and unknown[0][1][1] is None
        and unknown[0][1][0].startswith("class ")
    )


VIEWS = {
    "model": (("softmax", "soft", "rollout"), ("",)),
    "rollout": (("up to blocks.0", "up to blocks.1", "up to blocks.2"), ("",)),
    "mechanism": (("blocks.0", "blocks.1", "blocks.2"), ("softmax", "soft")),
    "heads": (
        tuple(f"{b} {i}" for b in ("softmax", "soft") for i in range(4)),
        ("blocks.0", "blocks.1", "blocks.2"),
    ),
}


@pytest.mark.parametrize("what", VIEWS)
def test_views(found, what):
    columns, rows = VIEWS[what]
    shown = view(found, what)
    assert (shown.columns, shown.rows) == (columns, rows)
    assert shown.values.shape == (2, len(rows), len(columns), 8, 8) and shown.values.isfinite().all()
    assert any("65" in line for line in notes(found, what))


def test_views_show_the_same_maps(found):
    heads, branches, model = (view(found, what).values for what in ("heads", "mechanism", "model"))
    torch.testing.assert_close(heads[:, :, :4].mean(dim=2), branches[:, 0])
    torch.testing.assert_close(heads[:, :, 4:].mean(dim=2), branches[:, 1])
    torch.testing.assert_close(branches.mean(dim=2), model[:, 0, :2])
    torch.testing.assert_close(view(found, "rollout").values[:, 0, -1], model[:, 0, 2])
    torch.testing.assert_close(view(found, "heads", layer=1).values, heads[:, 1:2])
    torch.testing.assert_close(
        view(found, "rollout", layer=1).values, view(found, "rollout").values[:, :, 1:2]
    )


def test_a_branch_that_is_not_everywhere():
    text = "recipe: 1\nname: mixed\nextends: ham_classic\nhost: {model: {depth: 2}}\n"
    text += 'attention: softmax\noverrides: [{at: "blocks.1", put: {use: luong_global}}]\n'
    maps = collect(compose(text), torch.randn(1, 3, 32, 32))
    heads, branches = view(maps, "heads"), view(maps, "mechanism")
    assert heads.columns == ("softmax 0", "softmax 1", "softmax 2", "softmax 3", "luong_global 0")
    missing = heads.values.isnan().all(dim=-1).all(dim=-1)[0]
    assert missing.tolist() == [[False] * 4 + [True], [True] * 4 + [False]]
    assert branches.values.isnan().all(dim=-1).all(dim=-1)[0].tolist() == [[False, True], [True, False]]
    drawn = heat_sheet(
        maps, heads, grey()[None], captions(maps, ["x"], None, None), "mixed", notes(maps, "heads")
    )
    assert drawn.pixels[0] > 6 * 160


def test_notes_say_what_is_implied_and_what_is_missing(found):
    flat = torch.full((1, 1, 5), 0.2)
    maps = Maps(
        (Map("b.0", 0, "mine", "mine", "gate", flat, True), Map("b.0", 0, "lin", "lin", "implied", flat, False)),
        (Absent("b.0", 0, "other", "other", "because"),), ("b.0",), found.layout, False, torch.zeros(1, 2),
    )  # fmt: skip
    text = "\n".join(notes(maps))
    assert "mine gates" in text and "lin forms no weights" in text and "other has no map: because" in text
    assert "mean of the grid tokens" in text and "class token" not in text


def test_images_of_a_folder(tmp_path):
    for name in ("b.png", "a.jpg", "c.PNG"):
        Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in image_files([tmp_path], 8, 0)] == ["a.jpg", "b.png", "c.PNG"]
    few = [image_files([tmp_path], 2, seed) for seed in range(8)]
    assert all(len(files) == 2 for files in few) and len({tuple(files) for files in few}) > 1
    assert few[3] == image_files([tmp_path], 2, 3)
    colour = read_image(tmp_path / "b.png", (3, 16, 8))
    assert colour.shape == (3, 16, 8) and colour.dtype == torch.uint8
    assert colour[:, 5, 5].tolist() == [200, 10, 10]
    assert read_image(tmp_path / "b.png", (1, 16, 8)).shape == (1, 16, 8)


def test_a_image_keeps_its_orientation(tmp_path):
    image = Image.new("RGB", (32, 32), (0, 0, 0))
    image.paste((255, 0, 0), (16, 0, 32, 16))  # up right
    image.save(tmp_path / "corner.png")
    read = read_image(tmp_path / "corner.png", (3, 8, 16))
    assert read[0, 2, 12] > 240 and read[0, 6, 4] < 15 and read[0, 2, 4] < 15 and read[2].max() < 15


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["ham_a", "--images", "empty"], "AZ901", "no image in `empty`"),
        (["ham_a", "--images", "text.png"], "AZ902", "no image that can be read"),
        (["ham_a", "--images", "none.png"], "AZ902", "no such file"),
        (["five.yaml"], "AZ902", "5 channels"),
        (["fourier.yaml"], "AZ903", "`fourier`: it mixes tokens without weights"),
        (["ham_a", "--layer", "4"], "AZ904", "the model has 4"),
        (["ham_a", "--layer", "-1"], "AZ904", "choose from 0 to 3"),
        (["ham_a", "--out", "x.jpg"], "AZ905", "PNG, SVG or PDF"),
        (["ham_a", "--out", "x"], "AZ905", "PNG, SVG or PDF"),
        (["ham_a", "--out", "text.png/x.png"], "AZ905", "cannot write"),
        (["empty", "--init-from", "x.pth"], "AZ907", "is a run"),
        (["ham_c"], "AZ204", "did you mean"),
        (["empty"], "AZ801", "no run"),
    ],
)
def test_faults_are_told(arguments, code, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("words")
    small = "recipe: 1\nname: {}\nextends: ham_classic\n"
    (tmp_path / "fourier.yaml").write_text(
        small.format("fourier") + "host: {model: {depth: 1}}\nattention: fourier\n"
    )
    (tmp_path / "five.yaml").write_text(
        small.format("five") + "host: {model: {depth: 1, in_chans: 5}, mean: null, std: null}\n"
    )
    output = run("heatmap", *arguments, code=2).output
    assert code in output and said in output and "Traceback" not in output
    assert not list(tmp_path.glob("*.npy")) and {p.name for p in tmp_path.glob("*.png")} == {"text.png"}


def test_a_recipe_without_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run("heatmap", "ham_a", "--npy").output
    assert "written: ham_a-model.png" in output and "untrained, seed 0" in output
    assert output.splitlines()[-1] == "next: attnzoo heatmap ham_a --what heads"
    maps = np.load("ham_a-model.npy")
    assert maps.shape == (1, 1, 3, 8, 8) and maps.dtype == np.float32
    assert np.allclose(maps[0, 0, :2].mean(axis=(1, 2)), 1 / 65, rtol=0.02)  # before training all is even
    with Image.open("ham_a-model.png") as image:
        assert image.mode == "RGBA" and image.width > 4 * 160 and image.height > 250
    run("heatmap", "ham_a", "--out", "ham_a.svg")
    assert not judged("ham_a.svg")  # nobody knows what is right


def test_json_says_what_was_written(tmp_path):
    out = tmp_path / "new" / "sheet.png"
    data = json.loads(run("heatmap", "ham_b", "--what", "heads", "--layer", 2, "--out", out, "--json").stdout)
    assert data["written"] == [str(out)] and out.exists() and data["rows"] == ["blocks.2"]
    with Image.open(out) as image:
        assert data["size"] == list(image.size)
    assert len(data["maps"]) == 8 and data["absent"] == [] and data["images"] == ["lighthouse.png"]
    one = data["maps"][0]
    assert (one["site"], one["branch"], one["kind"], one["heads"]) == ("blocks.0", "softmax", "weights", 4)
    assert one["least_sum"] == pytest.approx(1, abs=1e-5) and 0.9 < one["entropy"] <= 1.001


def test_weights_from_a_file(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(7)
    model = compose("ham_a").eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    run("heatmap", "ham_a", "--init-from", tmp_path / "w.safetensors", "--npy", "--out", tmp_path / "a.png")
    run("heatmap", "ham_a", "--seed", 7, "--npy", "--out", tmp_path / "b.png")
    run("heatmap", "ham_a", "--seed", 8, "--npy", "--out", tmp_path / "c.png")
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    assert np.array_equal(a, b) and not np.allclose(a, c, atol=1e-9)


@dataclass(frozen=True)
class Test:
    """Twenty images of one colour each; the classes alternate."""

    __test__ = False

    def __len__(self):
        return 20

    def batch(self, indices):
        shades = (indices * 12).to(torch.uint8)[:, None, None, None]
        return shades.expand(-1, 3, 32, 32), indices % 10


@pytest.fixture
def trained(monkeypatch, tmp_path) -> Path:
    """A folder that opens as a run."""
    data = SimpleNamespace(test=Test(), mean=(0.5,) * 3, std=(0.25,) * 3, image=(3, 32, 32),
                           classes=tuple(f"class_{i}" for i in range(10)))  # fmt: skip
    stand_in = SimpleNamespace(
        loaded=load("ham_a"), data=lambda: data, model=lambda which: compose("ham_a").eval(), folder=tmp_path
    )
    monkeypatch.setattr(attnzoo.train, "open_run", lambda folder: stand_in)
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def test_a_run_shows_its_test_images(trained, monkeypatch):
    monkeypatch.chdir(trained.parent)
    data = json.loads(run("heatmap", trained, "--json", "--npy").stdout)
    assert data["written"] == ["mine-model.png", "mine-model.npy"] and len(data["images"]) == 8
    again, other = (
        json.loads(run("heatmap", trained, "--json", "--seed", seed).stdout)["images"] for seed in (0, 1)
    )
    assert again == data["images"] != other
    assert np.load("mine-model.npy").shape == (8, 1, 3, 8, 8)
    run("heatmap", trained, "--out", "mine.svg")
    assert judged("mine.svg")
    assert len(json.loads(run("heatmap", trained, "--json", "--what", "heads").stdout)["images"]) == 1
    assert (
        "best epoch" in run("heatmap", trained).output
        and "last epoch" in run("heatmap", trained, "--which", "last").output
    )


def test_a_sheet_is_replaced(tmp_path):
    sheet = drawn_sheet(blocks(1, 1, 1), ["a"], ["b"], "t")
    for _ in range(2):
        assert save_sheet(sheet, tmp_path / "s.png", torch.zeros(1, 1, 1, 2, 2)) == [
            tmp_path / "s.png",
            tmp_path / "s.npy",
        ]
    with pytest.raises(ZooError):
        save_sheet(sheet, tmp_path / "s")


REFERENCES = Path(__file__).with_name("heatmap_references.json")
CELLS, TOLERANCE = 8, 5
"""A panel is compared as 8 × 8 cells; their mean colours, from 0 to 255, may differ so much."""
TOP_SLACK, LABEL_SLACK = 40, 24
"""Pixels that another font may move: two more lines of notes, wider names of rows."""

SMALL = "recipe: 1\nname: small\nextends: {}\nhost: {{model: {{depth: {}, {}}}}}\n"
MIXED = 'attention: softmax\noverrides: [{at: "blocks.1", put: {use: luong_global}}]\n'
SHEETS: dict[str, tuple[str, Any, tuple[int, int, int, int], list[int] | None]] = {
    "model": (SMALL.format("ham_a", 3, "img_size: 32"), "model", (2, 3, 32, 32), [7, 1]),
    "rollout": (SMALL.format("ham_a", 3, "img_size: 32"), "rollout", (1, 3, 32, 32), None),
    "mechanism": (SMALL.format("ham_a", 2, "img_size: [32, 48]"), "mechanism", (2, 3, 32, 48), None),
    "heads": (SMALL.format("ham_a", 2, "img_size: 32"), "heads", (1, 3, 32, 32), None),
    "not everywhere": (SMALL.format("ham_classic", 2, "img_size: 32") + MIXED, "heads", (1, 3, 32, 32), None),
}
"""Recipe, what is shown, size of the images (b c y x), true classes."""


def fixed_model(recipe: str) -> torch.nn.Module:
    """A model in float64 whose matrices are functions of their names: the same on every machine and for every version.

    They are large enough for maps of strong contrast, so that no colour hangs on last bits.
    """
    model = compose(recipe).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                normal = np.random.RandomState(
                    zlib.crc32(name.replace(".inner.", ".head.").encode())
                ).standard_normal(tuple(weight.shape))
                weight.copy_(torch.from_numpy(1.5 * normal / weight[0].numel() ** 0.5))
    return model


def fixed_images(count: int, channels: int, rows: int, columns: int) -> torch.Tensor:
    """Smooth images (b c y x) that no flip or exchange of colours leaves as they are; never white."""
    y, x = torch.meshgrid(
        torch.linspace(0, 1, rows, dtype=torch.float64), torch.linspace(0, 1, columns, dtype=torch.float64), indexing="ij"
    )  # fmt: skip
    planes = [
        20 + 80 * x + 50 * y**2 + 80 * torch.sin((5 + 2 * c) * x + (9 - 2 * b) * y**2 + c + 2 * b) ** 2
        for b in range(count) for c in range(channels)
    ]  # fmt: skip
    return torch.stack(planes).view(count, channels, rows, columns).round().byte()


@cache
def subject(name: str) -> tuple:
    """What `heat_sheet` is given for a stored sheet."""
    recipe, what, shape, truths = SHEETS[name]
    images = fixed_images(*shape)
    maps = collect(fixed_model(recipe), images.double() / 40 - 3)
    shown = view(maps, what)
    known = shown.values[~shown.values.isnan()].view(-1, shown.values[0, 0, 0].numel()) * maps.layout.length
    assert (known.amax(dim=1) - known.amin(dim=1)).min() > 0.1, "too even for a reference"
    files = None if truths else [f"{i}.png" for i in range(shape[0])]
    classes = [f"animal {i}" for i in range(10)] if truths else None
    lines = captions(maps, files or [], truths, classes)
    return (
        maps,
        shown,
        images,
        lines,
        f"{name}: {heatmap.TITLES[what]}",
        ["fixed weights", *notes(maps, what)],
    )


def mean_colours(pixels: np.ndarray, rows: int, columns: int) -> list[str]:
    """Mean colours of equal cells of (y x 3), a line of hexadecimal digits for each row of cells."""
    y, x = pixels.shape[:2]
    means = pixels.reshape(rows, y // rows, columns, x // columns, 3).mean(axis=(1, 3)).round().astype(int)
    return [" ".join("{:02x}{:02x}{:02x}".format(*cell) for cell in line) for line in means]


def structure(name: str) -> dict[str, Any]:
    """A stored sheet, drawn anew, as it is compared: its panels, what is written at each, and its pixels."""
    sheet = heat_sheet(*subject(name))
    drawn = pixels(sheet)
    shown, images = subject(name)[1:3]
    scales = [place(axes) for axes in sheet.axes if axes.get_label() == "scale"]
    every = [axes for axes in sheet.axes if axes.get_label() != "scale"]
    (left, top, _, _), (heat, _, _, _) = place(every[0]), place(every[1])
    panels = []
    for axes in every:
        x, y, w, h = place(axes)
        at = f"{y - top} {'image' if x == left else x - heat} {w} {h}"
        texts = [("above", axes.title), ("left", axes.yaxis.label), ("below", axes.xaxis.label)]
        texts += [("caption" if x == left else "inside", text) for text in axes.texts]
        written = [
            f"{text.get_text()} | {where} {to_hex(text.get_color())}"
            for where, text in texts
            if text.get_text()
        ]
        cells = drawn[y : y + h // CELLS * CELLS, x : x + w // CELLS * CELLS]
        panels.append({"at": at, "texts": written, "colours": mean_colours(cells, CELLS, CELLS)})
    return {
        "panel": list(panel_size(images.shape[2], images.shape[3], len(shown.columns))),
        "left": left,
        "top": top,
        "label": heat - left - place(every[0])[2],
        "right": round(sheet.pixels[0]) - max(x + w for x, _, w, _ in map(place, every)),
        "bottom": round(sheet.pixels[1]) - max(y + h for _, y, _, h in map(place, every)),
        "words": " ".join(text.get_text() for text in sheet.texts),
        "inks": sorted({to_hex(text.get_color()) for text in sheet.texts}),
        "scale": [
            [round(sheet.pixels[1]) - y, *mean_colours(drawn[y : y + h, x : x + w], 1, 16)]
            for x, y, w, h in scales
        ],
        "panels": panels,
    }


def differences(found: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """What another machine or another font does not explain."""
    slack = {"top": TOP_SLACK, "label": LABEL_SLACK}
    told = []
    for key, value in stored.items():
        if key in slack:
            same = key in found and abs(found[key] - value) <= slack[key]
        elif key == "scale":
            same = len(found.get(key, [])) == len(value) and all(
                a[0] == b[0] and distance(a[1:], b[1:]) <= TOLERANCE
                for a, b in zip(found[key], value, strict=True)
            )
        elif key == "panels":
            same = len(found[key]) == len(value)
        else:
            same = found.get(key) == value
        told += [] if same else [f"{key}: {found.get(key) if key != 'panels' else len(found[key])}"]
    for i, (one, other) in enumerate(zip(found["panels"], stored["panels"], strict=False)):
        told += [f"panel {i} {key}: {one[key]}" for key in ("at", "texts") if one[key] != other[key]]
        if (far := distance(one["colours"], other["colours"])) > TOLERANCE:
            told.append(f"panel {i} colours: {far} of 255 apart")
    return told


def distance(one: list[str], other: list[str]) -> int:
    """The largest difference between lines of colours, from 0 to 255."""
    values = [
        np.frombuffer(bytes.fromhex(" ".join(lines)), dtype=np.uint8).astype(int) for lines in (one, other)
    ]
    return int(abs(values[0] - values[1]).max())


@pytest.mark.parametrize("name", SHEETS)
def test_a_sheet_is_as_stored(name):
    stored = json.loads(REFERENCES.read_text(encoding="utf-8"))
    assert set(stored) == set(SHEETS)
    told = differences(structure(name), stored[name])
    assert told == [], "if it is meant: python tests/test_heatmap.py"


def test_the_references_hold_what_there_is_to_see():
    """The file itself: one panel for each image and map, names where they belong, colours of the scale."""
    stored = json.loads(REFERENCES.read_text(encoding="utf-8"))
    for name, sheet_of in stored.items():
        shown, images = subject(name)[1:3]
        assert len(sheet_of["panels"]) == len(images) * (1 + len(shown.rows) * len(shown.columns))
        first = sheet_of["panels"][1 : 1 + len(shown.columns)]
        heads = [text.split(" | ")[0] for p in first for text in p["texts"] if " | above " in text]
        assert heads == list(shown.columns)
        written = " ".join(text for p in sheet_of["panels"] for text in p["texts"])
        assert all(row in written for row in shown.rows)
        (strip,) = sheet_of["scale"]
        assert strip[1].split()[0] < "0a0a20" and strip[1].split()[-1] > "f0f080"
    assert [text.split()[-1] for p in stored["model"]["panels"] for text in p["texts"] if "%" in text] == [
        GREEN, RED]  # fmt: skip
    assert sum("none here" in " ".join(p["texts"]) for p in stored["not everywhere"]["panels"]) == 5


Change = Callable[[pytest.MonkeyPatch], None]


def redrawn(change: Callable[..., dict]) -> Change:
    """`heat_sheet` of the plots is called with other arguments."""

    def called(shown, columns, rows, title, notes, unit):
        given = {
            "shown": shown,
            "columns": list(columns),
            "rows": list(rows),
            "title": title,
            "notes": notes,
            "unit": unit,
        }
        return drawn_sheet(**given | change(**given))

    return lambda patch: patch.setattr(heatmap, "drawn_sheet", called)


def other_values(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """All blocks have other maps, (rows columns y x)."""
    return redrawn(lambda shown, **_: {"shown": [replace(one, values=change(one.values)) for one in shown]})


def exchanged(values: list) -> list:
    """The first two places changed."""
    return [values[1], values[0], *values[2:]]


def other_panels(change: Callable[..., dict]) -> Change:
    """`attention_map` is called with other arguments."""

    def called(values, image, ax, **how):
        attention_map(**{"heat": values, "image": image, "ax": ax} | how | change(values, image, ax))

    return lambda patch: patch.setattr(heat, "attention_map", called)


def elsewhere(left: float = 0, top: float = 0, wider: float = 0) -> Change:
    """All maps stand elsewhere, by pixels."""

    def moved(values, image, ax):
        across, down = ax.figure.pixels
        box = ax.get_position()
        ax.set_position((box.x0 + left / across, box.y0 - top / down, box.width + wider / across, box.height))
        return {}

    return other_panels(moved)


def other_captions(change: Callable[[list], list]) -> Change:
    """All blocks have other lines below the image."""
    return redrawn(
        lambda shown, **_: {"shown": [replace(one, captions=change(list(one.captions))) for one in shown]}
    )


def set_to(**names: Any) -> Change:
    """Names of the module that draws mean something else."""

    def patched(patch):
        for name, value in names.items():
            patch.setattr(heat, name, value)

    return patched


def seen_as(method: str, change: Callable[[torch.Tensor], torch.Tensor], argument: bool = False) -> Change:
    """A method of `Maps` is given another tensor, or gives another one."""
    own = getattr(Maps, method)

    def other(self, given, *more):
        return own(self, change(given), *more) if argument else change(own(self, given, *more))

    def patched(patch):
        patch.setattr(Maps, method, other)
        patch.setitem(globals(), "subject", subject.__wrapped__)  # nothing kept from before

    return patched


EVERY, TABLES, TWO = tuple(SHEETS), ("mechanism", "heads", "not everywhere"), ("model", "mechanism")
MUTANTS: dict[str, tuple[Change, tuple[str, ...], str]] = {
    "maps transposed": (other_values(lambda v: v.mT), EVERY, "colours"),
    "maps upside down": (other_values(lambda v: v.flip(-2)), EVERY, "colours"),
    "maps mirrored": (other_values(lambda v: v.flip(-1)), EVERY, "colours"),
    "maps negated": (other_values(lambda v: -v), EVERY, "colours"),
    "maps by their logarithm": (other_values(lambda v: v.log()), EVERY, "colours"),
    "one grid row further": (other_values(lambda v: v.roll(1, dims=-2)), EVERY, "colours"),
    "what is given, not what is received": (seen_as("read", lambda w: w.mT, argument=True), EVERY, "colours"),
    "the class token forgotten": (seen_as("read", lambda w: w.roll(1, dims=-2), argument=True), EVERY, "colours"),
    "heads in another order": (seen_as("on_grid", lambda maps: maps.flip(1)), ("heads", "not everywhere"), "colours"),
    "columns of maps exchanged": (other_values(lambda v: torch.stack(exchanged(list(v.unbind(1))), dim=1)), EVERY, "colours"),
    "columns and names exchanged": (
        redrawn(lambda shown, columns, **_: {
            "columns": exchanged(columns),
            "shown": [replace(s, values=torch.stack(exchanged(list(s.values.unbind(1))), dim=1)) for s in shown]}), EVERY, "texts"),
    "rows of maps exchanged": (other_values(lambda v: v.flip(0)), TABLES, "colours"),
    "names of columns exchanged": (redrawn(lambda columns, **_: {"columns": exchanged(columns)}), EVERY, "texts"),
    "names of rows exchanged": (redrawn(lambda rows, **_: {"rows": exchanged(rows)}), TABLES, "texts"),
    "the last row missing": (
        redrawn(lambda shown, rows, unit, **_: {
            "rows": rows[:-1], "unit": unit[:-1], "shown": [replace(s, values=s.values[:-1]) for s in shown]}), TABLES, "panels"),
    "the last column missing": (
        redrawn(lambda shown, columns, unit, **_: {
            "columns": columns[:-1], "unit": unit[:, :-1], "shown": [replace(s, values=s.values[:, :-1]) for s in shown]}), EVERY, "panels"),
    "the last image missing": (redrawn(lambda shown, **_: {"shown": shown[:-1]}), TWO, "panels"),
    "images exchanged": (redrawn(lambda shown, **_: {"shown": exchanged(shown)}), TWO, "colours"),
    "maps of the other image": (
        redrawn(lambda shown, **_: {"shown": [replace(a, values=b.values) for a, b in zip(shown, exchanged(shown), strict=True)]}), TWO, "colours"),
    "colours reversed": (other_panels(lambda *_: {"cmap": f"{HEAT}_r"}), EVERY, "colours"),
    "colours grey": (other_panels(lambda *_: {"cmap": "gray"}), EVERY, "colours"),
    "another scale": (set_to(HEAT="magma"), EVERY, "scale"),
    "no heat over the image": (other_panels(lambda *_: {"alpha": 0.0}), EVERY, "colours"),
    "no image under the heat": (other_panels(lambda v, image, ax: {"image": None}), EVERY, "colours"),
    "heat over a mirrored image": (other_panels(lambda v, image, ax: {"image": image.flip(-1)}), EVERY, "colours"),
    "colours of images exchanged": (
        redrawn(lambda shown, **_: {"shown": [replace(s, image=s.image.flip(0)) for s in shown]}), EVERY, "colours"),
    "panels moved": (elsewhere(left=5), EVERY, "right"),
    "panels lower": (elsewhere(top=5), EVERY, "at"),
    "panels narrower": (elsewhere(wider=-2), EVERY, "at"),
    "wider gaps": (set_to(GAP=12), EVERY, "at"),
    "another margin": (set_to(MARGIN=12), EVERY, "left"),
    "nothing missing": (other_values(lambda v: v.nan_to_num(0.0)), ("not everywhere",), "colours"),
    "no scale": (set_to(scale=lambda *_: None), EVERY, "scale"),
    "another unit": (redrawn(lambda unit, **_: {"unit": 2 * unit}), EVERY, "texts"),
    "no title": (redrawn(lambda **_: {"title": ""}), EVERY, "words"),
    "a note missing": (redrawn(lambda notes, **_: {"notes": notes[1:]}), EVERY, "words"),
    "a caption missing": (other_captions(lambda lines: lines[:-1]), EVERY, "texts"),
    "captions exchanged": (other_captions(exchanged), EVERY, "texts"),
    "right and wrong exchanged": (
        other_captions(lambda lines: [(text, RED if colour == GREEN else GREEN) for text, colour in lines]), ("model",), "texts"),
    "white ink": (set_to(INK="#ffffff"), EVERY, "texts"),
    "pale ink": (set_to(PALE="#ffffff"), EVERY, "inks"),
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
@pytest.mark.sample(6)
def test_a_wrong_sheet_is_caught(mutant, name, monkeypatch):
    change, _, said = MUTANTS[mutant]
    change(monkeypatch)
    told = differences(structure(name), json.loads(REFERENCES.read_text(encoding="utf-8"))[name])
    assert any(said in line.partition(":")[0] for line in told), told


def noisy(values: torch.Tensor) -> torch.Tensor:
    """Maps as another machine may compute them."""
    return values * (1 + 1e-6 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0)))


LEGITIMATE: dict[str, Change] = {
    "last bits": other_values(noisy),
    "single precision": other_values(lambda v: v.float()),
    "a smaller font": set_to(TITLE=17, TEXT=12, SMALL=10),
    "a larger font": set_to(TITLE=20, TEXT=14, SMALL=12),
    "another interpolation": lambda patch: patch.setattr(
        Axes,
        "imshow",
        lambda axes, data, interpolation=None, own=Axes.imshow, **how: own(
            axes, data, interpolation={"bicubic": "lanczos"}.get(interpolation, interpolation), **how
        ),
    ),
}


@pytest.mark.parametrize("name", SHEETS)
@pytest.mark.parametrize("change", LEGITIMATE)
@pytest.mark.sample(4)
def test_another_machine_is_no_fault(change, name, monkeypatch):
    LEGITIMATE[change](monkeypatch)
    assert differences(structure(name), json.loads(REFERENCES.read_text(encoding="utf-8"))[name]) == []


if __name__ == "__main__":
    REFERENCES.write_text(
        json.dumps({name: structure(name) for name in SHEETS}, indent=1) + "\n", encoding="utf-8"
    )
