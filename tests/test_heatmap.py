"""Heat maps: what is shown, how it is drawn, and the command. Pictures are compared by structure, not by bytes."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import attnzoo.train
from attnzoo.cli.app import app
from attnzoo.errors import ZooError
from attnzoo.lab import sheet
from attnzoo.lab.heatmap import captions, heat_sheet, notes, picture_files, read_picture, save_sheet, view
from attnzoo.lab.maps import Absent, Map, Maps, collect
from attnzoo.lab.sheet import GREEN, RED, Shown, colours, draw, overlay, panel_size
from attnzoo.recipe import compose, load

RUNNER = CliRunner()


def run(*arguments: object, code: int = 0):
    """A verb in this process; its exit code is checked."""
    result = RUNNER.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + (repr(result.exception) if result.exception else "")
    return result


def grey(size: int = 32, value: int = 128) -> torch.Tensor:
    """An even picture (3 y x)."""
    return torch.full((3, size, size), value, dtype=torch.uint8)


def judged(path: str | Path) -> bool:
    """Whether anything on a sheet is green or red."""
    with Image.open(path) as image:
        used = {colour for _, colour in image.getcolors(2**24)}
    return bool(used & {GREEN, RED})


def mean_colour(image: Image.Image, left: int, top: int, right: int, bottom: int) -> torch.Tensor:
    """Of a region, (3,)."""
    return torch.from_numpy(np.asarray(image.crop((left, top, right, bottom)), dtype=float)).mean(dim=(0, 1))


@pytest.fixture(scope="module")
def found() -> Maps:
    """Maps of a small HAM on two pictures."""
    torch.manual_seed(0)
    model = compose("ham_a", edits=["host.model.depth=3"]).eval()
    return collect(model, torch.randn(2, 3, 32, 32))


def test_the_colour_scale_only_gets_brighter():
    table = colours()
    assert table.shape == (256, 3) and table.dtype == torch.uint8
    brightness = table.double() @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    assert (brightness.diff() > 0).all() and brightness[0] < 2 and brightness[-1] > 240
    assert len(table.unique(dim=0)) == 256


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
    heat = torch.zeros(8, 8)
    heat[:4, :4] = 1.0  # up left
    hot = overlay(grey(), heat, (160, 160))
    assert hot.size == (160, 160)
    up_left, up_right, down_left = (
        mean_colour(hot, x, y, x + 40, y + 40) for x, y in ((10, 10), (110, 10), (10, 110))
    )
    pale = 0.5 * (72 + 64)
    torch.testing.assert_close(up_left, pale + 0.5 * colours()[255].double(), rtol=0, atol=4)
    torch.testing.assert_close(up_right, pale + 0.5 * colours()[0].double(), rtol=0, atol=4)
    torch.testing.assert_close(up_right, down_left, rtol=0, atol=2)


def test_each_map_has_the_whole_scale_and_an_even_map_its_middle():
    ramp = torch.linspace(0, 1, 64).view(8, 8)
    one, other = (
        np.asarray(overlay(grey(), heat, (160, 160)), dtype=int) for heat in (ramp, 5 + 0.01 * ramp)
    )
    assert abs(one - other).max() <= 2
    even = mean_colour(overlay(grey(), torch.full((8, 8), 0.3), (160, 160)), 0, 0, 160, 160)
    torch.testing.assert_close(even, 68 + 0.5 * colours()[128].double(), rtol=0, atol=3)


def test_enlarging_keeps_the_picture_where_it_was():
    heat = torch.zeros(8, 4)
    heat[7, 3] = 1.0
    hot = np.asarray(overlay(torch.full((1, 8, 4), 128, dtype=torch.uint8), heat, (320, 160)), dtype=int).sum(
        axis=2
    )
    assert hot.shape == (320, 160)
    y, x = np.unravel_index(hot.argmax(), hot.shape)
    assert y >= 290 and x >= 130


def blocks(pictures: int, rows: int, columns: int) -> list[Shown]:
    """Black pictures whose maps are all even, but for one that is missing."""
    values = torch.ones(rows, columns, 8, 8)
    values[-1, -1] = torch.nan
    return [Shown(grey(value=0), [("truth", None), ("guess", GREEN)], values)] * pictures


@pytest.mark.parametrize(("pictures", "rows", "columns"), [(1, 1, 3), (4, 1, 3), (1, 3, 4), (2, 4, 8)])
def test_the_sheet_has_a_panel_for_every_map(pictures, rows, columns):
    names = [f"layer {i}" for i in range(rows)]
    drawn = draw(blocks(pictures, rows, columns), ["softmax"] * columns, names, "title", ["note"], unit=1.0)
    pixels = torch.from_numpy(np.asarray(drawn).copy()).int()
    panel = torch.tensor(overlay(grey(value=0), torch.ones(8, 8), (160, 160)).getpixel((0, 0)))
    empty = torch.tensor(sheet._EMPTY)
    count = {
        name: int((pixels == colour.int()).all(dim=-1).sum()) / 160**2
        for name, colour in {"picture": torch.zeros(3), "map": panel, "none": empty}.items()
    }
    assert count["map"] == pictures * (rows * columns - 1)
    assert count["picture"] == pytest.approx(pictures, rel=0.01)
    assert count["none"] == pytest.approx(pictures, rel=0.05)  # a few words stand on it
    lefts = (pixels == panel.int()).all(dim=-1).any(dim=0)
    starts = int((lefts[1:] & ~lefts[:-1]).sum())
    assert starts == (columns if rows > 1 else columns - 1), "panels touch or overlap"


def test_nothing_is_drawn_over_the_edge():
    names = ["a very long name of a branch, longer than its panel"] * 3
    long = " ".join(["words"] * 200)
    drawn = draw(blocks(2, 2, 3), names, ["one", "two"], "a title of words " * 6, [long, long], unit=1.0)
    pixels = np.asarray(drawn)
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert (edge == 255).all()


def test_names_that_do_not_fit_are_cut():
    assert sheet._cut("softmax", 160) == "softmax"
    short = sheet._cut("a very long name of a branch", 100)
    assert short.endswith("…") and sheet._TEXT.getlength(short) <= 100 and short.startswith("a very")


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
    assert drawn.width > 6 * 160


def test_notes_say_what_is_implied_and_what_is_missing(found):
    flat = torch.full((1, 1, 5), 0.2)
    maps = Maps(
        (Map("b.0", 0, "mine", "mine", "gate", flat, True), Map("b.0", 0, "lin", "lin", "implied", flat, False)),
        (Absent("b.0", 0, "other", "other", "because"),), ("b.0",), found.layout, False, torch.zeros(1, 2),
    )  # fmt: skip
    text = "\n".join(notes(maps))
    assert "mine gates" in text and "lin forms no weights" in text and "other has no map: because" in text
    assert "mean of the grid tokens" in text and "class token" not in text


def test_pictures_of_a_folder(tmp_path):
    for name in ("b.png", "a.jpg", "c.PNG"):
        Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [path.name for path in picture_files([tmp_path], 8, 0)] == ["a.jpg", "b.png", "c.PNG"]
    few = [picture_files([tmp_path], 2, seed) for seed in range(8)]
    assert all(len(files) == 2 for files in few) and len({tuple(files) for files in few}) > 1
    assert few[3] == picture_files([tmp_path], 2, 3)
    colour = read_picture(tmp_path / "b.png", (3, 16, 8))
    assert colour.shape == (3, 16, 8) and colour.dtype == torch.uint8
    assert colour[:, 5, 5].tolist() == [200, 10, 10]
    assert read_picture(tmp_path / "b.png", (1, 16, 8)).shape == (1, 16, 8)


def test_a_picture_keeps_its_orientation(tmp_path):
    image = Image.new("RGB", (32, 32), (0, 0, 0))
    image.paste((255, 0, 0), (16, 0, 32, 16))  # up right
    image.save(tmp_path / "corner.png")
    read = read_picture(tmp_path / "corner.png", (3, 8, 16))
    assert read[0, 2, 12] > 240 and read[0, 6, 4] < 15 and read[0, 2, 4] < 15 and read[2].max() < 15


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["ham_a", "--images", "empty"], "AZ901", "no picture in `empty`"),
        (["ham_a", "--images", "text.png"], "AZ902", "no picture that can be read"),
        (["ham_a", "--images", "none.png"], "AZ902", "no such file"),
        (["five.yaml"], "AZ902", "5 channels"),
        (["fourier.yaml"], "AZ903", "`fourier`: it mixes tokens without weights"),
        (["ham_a", "--layer", "4"], "AZ904", "the model has 4"),
        (["ham_a", "--layer", "-1"], "AZ904", "choose from 0 to 3"),
        (["ham_a", "--out", "x.jpg"], "AZ905", "PNG"),
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


def test_a_recipe_without_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run("heatmap", "ham_a", "--npy").output
    assert "written: ham_a-model.png" in output and "untrained, seed 0" in output
    assert output.splitlines()[-1] == "next: attnzoo heatmap ham_a --what heads"
    maps = np.load("ham_a-model.npy")
    assert maps.shape == (1, 1, 3, 8, 8) and maps.dtype == np.float32
    assert np.allclose(maps[0, 0, :2].mean(axis=(1, 2)), 1 / 65, rtol=0.02)  # before training all is even
    with Image.open("ham_a-model.png") as image:
        assert image.mode == "RGB" and image.width > 4 * 160 and image.height > 250
    assert not judged("ham_a-model.png")  # nobody knows what is right


def test_json_says_what_was_written(tmp_path):
    out = tmp_path / "new" / "sheet.png"
    data = json.loads(run("heatmap", "ham_b", "--what", "heads", "--layer", 2, "--out", out, "--json").stdout)
    assert data["written"] == [str(out)] and out.exists() and data["rows"] == ["blocks.2"]
    with Image.open(out) as image:
        assert data["size"] == list(image.size)
    assert len(data["maps"]) == 8 and data["absent"] == [] and data["pictures"] == ["lighthouse.png"]
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
    """Twenty pictures of one colour each; the classes alternate."""

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


def test_a_run_shows_its_test_pictures(trained, monkeypatch):
    monkeypatch.chdir(trained.parent)
    data = json.loads(run("heatmap", trained, "--json", "--npy").stdout)
    assert data["written"] == ["mine-model.png", "mine-model.npy"] and len(data["pictures"]) == 8
    again, other = (
        json.loads(run("heatmap", trained, "--json", "--seed", seed).stdout)["pictures"] for seed in (0, 1)
    )
    assert again == data["pictures"] != other
    assert np.load("mine-model.npy").shape == (8, 1, 3, 8, 8) and judged("mine-model.png")
    assert len(json.loads(run("heatmap", trained, "--json", "--what", "heads").stdout)["pictures"]) == 1
    assert (
        "best epoch" in run("heatmap", trained).output
        and "last epoch" in run("heatmap", trained, "--which", "last").output
    )


def test_a_sheet_is_replaced(tmp_path):
    image = Image.new("RGB", (4, 4))
    for _ in range(2):
        assert save_sheet(image, tmp_path / "s.png", torch.zeros(1, 1, 1, 2, 2)) == [
            tmp_path / "s.png",
            tmp_path / "s.npy",
        ]
    with pytest.raises(ZooError):
        save_sheet(image, tmp_path / "s")
