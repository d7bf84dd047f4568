"""Layers side by side as the number of tokens grows: what is computed from the figures, and the command."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from attnzoo.bench import mechanisms, rivals
from attnzoo.bench.mechanisms import Growth, Point, layer_of, measure, ratio
from attnzoo.cli.app import app
from attnzoo.cli.bench import _files, _named
from attnzoo.errors import ZooError


def growth(power: float, factor: float = 1.0, sizes=(256, 1024, 4096, 16384)) -> Growth:
    """Figures that grow with a power of the number of tokens."""
    spent = {n: factor * n**power for n in sizes}
    return Growth({n: Point("made", n, (t, t, t), (2 * t, t, t), t, 3 * t) for n, t in spent.items()})


def forward(point: Point) -> float:
    return point.forward[0]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_slopes_are_powers(power):
    assert growth(power).slope(forward) == pytest.approx(power)
    assert growth(power, sizes=(196, 1024)).slope(forward) is None  # below 1024 products with weights decide


def test_small_sizes_do_not_count():
    made = growth(1.0)
    made.points[256] = Point("made", 256, (9e9, 0, 0), (1, 1, 1), 1, 1)
    assert made.slope(forward) == pytest.approx(1.0)


def test_crossover():
    """c n = n² at n = c."""
    square = growth(2.0)
    assert growth(1.0, 700.0).faster_from(square, forward) == pytest.approx(700)
    assert growth(1.0, 0.5).faster_from(square, forward) == 256
    assert growth(1.0, 1e9).faster_from(square, forward) is None
    assert square.faster_from(square, forward) is None
    assert ratio(square.points[1024], growth(1.0), forward) == pytest.approx(1024)
    assert ratio(square.points[1024], growth(1.0, sizes=(256,)), forward) is None


def test_what_would_take_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(mechanisms, "PATIENCE", 0.0)
    found = measure(["softmax"], tokens=(4, 9), dim=8, heads=2, rounds=2)["softmax"]
    assert list(found.points) == [4] and found.left_out[9].startswith("would take")


def test_memory_of_what_grows_linearly_is_no_reason(monkeypatch):
    monkeypatch.setattr(mechanisms, "ROOM", 1.0)
    linear, square = growth(1.0), growth(2.0)
    assert "GiB" in mechanisms._too_much(square, 2**17) and "GiB" not in mechanisms._too_much(linear, 2**17)


def test_the_command(tmp_path):
    arguments = (
        "bench mechanisms linformer neighborhood region --tokens 12 --tokens 30 --dim 16 --heads 2 --rounds 2"
    )
    result = CliRunner().invoke(app, [*arguments.split(), "--json", "--out", str(tmp_path / "made")])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert list(data["mechanisms"]) == ["softmax", "linformer", "neighborhood", "region"]
    for name in ("softmax", "linformer", "neighborhood"):
        points = data["mechanisms"][name]["points"]
        assert [p["tokens"] for p in points] == [12, 30] and not data["mechanisms"][name]["left_out"]
        for p in points:
            assert (
                0 < p["forward"][1] <= p["forward"][0] <= p["forward"][2]
                and 0 < p["memory"] < p["step_memory"]
            )
    assert "map" in data["mechanisms"]["region"]["left_out"]["12"]  # nobody hands it over
    rows = list(csv.DictReader((tmp_path / "made" / "mechanisms.csv").open(encoding="utf-8")))
    assert [(row["mechanism"], row["tokens"]) for row in rows[:2]] == [("softmax", "12"), ("softmax", "30")]
    assert float(rows[0]["forward_ms"]) == data["mechanisms"]["softmax"]["points"][0]["forward"][0]
    again = mechanisms.read_csv(tmp_path / "made" / "mechanisms.csv")
    assert list(again) == ["softmax", "linformer", "neighborhood"]
    for name, growth in again.items():
        for p in data["mechanisms"][name]["points"]:
            point = growth.points[p["tokens"]]
            assert {key: list(v) if isinstance(v, tuple) else v for key, v in vars(point).items()} == p


def test_out_is_a_folder_or_a_picture(tmp_path):
    assert _files(tmp_path / "new") == [tmp_path / "new" / f"mechanisms.{kind}" for kind in ("csv", "png")]
    assert _files(tmp_path / "v1.5")[0].parent.name == "v1.5"
    (tmp_path / "old.svg").mkdir()
    assert _files(tmp_path / "old.svg")[1] == tmp_path / "old.svg" / "mechanisms.png"
    for kind in ("svg", "PDF"):
        assert _files(tmp_path / "a" / f"b.{kind}") == [
            tmp_path / "a" / "b.csv",
            tmp_path / "a" / f"b.{kind}",
        ]
    (tmp_path / "file").write_text("kept")
    for out, said in (("a.jpg", "PNG, SVG or PDF"), ("file", "cannot write"), ("file/a.png", "cannot write")):
        with pytest.raises(ZooError, match=said) as caught:
            _files(tmp_path / out)
        assert caught.value.code == "AZ905" and (tmp_path / "file").read_text() == "kept"


def test_families_are_added():
    names = _named(["softmax_one"], ["additive", "recurrent"], "softmax")
    assert names[:2] == ["softmax", "softmax_one"] and {"soft", "delta", "retention"} < set(names)


def test_specs_and_another_baseline():
    spec = "{use: linformer, with: {rank: 3}}"
    more = "--tokens 9 --dim 8 --heads 2 --rounds 2 --against soft"
    result = CliRunner().invoke(app, ["bench", "mechanisms", spec, *more.split()], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "rank: 3" in result.output and "over soft" in result.output, (
        result.output
    )


@pytest.mark.parametrize(
    "arguments", ["bench mechanisms", "bench ham_a linformer --against ham_b", "bench decode --tokens 3"]
)
def test_refusals(arguments):
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 2 and "AZ613" in result.output and "attnzoo bench mechanisms" in result.output


def test_rivals_take_turns_and_missing_ones_are_named(monkeypatch):
    """timm's are there; of a package that is not nothing is said but how to get it."""
    some = [rival for rival in rivals.RIVALS if not rival.package]
    absent = replace(
        rivals.RIVALS[0], make=lambda n, c, h: rivals._from("no_such_package_of_anybody", "Layer")()
    )
    monkeypatch.setattr(rivals, "RIVALS", (*some, absent))
    duels = rivals.measure((64,), dim=16, heads=2, rounds=2)
    assert [duel.rival.name for duel in duels] == [*(rival.name for rival in some), absent.name]
    for duel in duels[:-1]:
        assert duel.ours.tokens == 64 and duel.over(forward) == duel.ours.forward[0] / duel.theirs.forward[0]
    assert duels[-1].ours is None and duels[-1].over(forward) is None
    result = CliRunner().invoke(
        app, ["bench", "rivals", "--tokens", "64", "--rounds", "2"], env={"COLUMNS": "120"}
    )
    assert result.exit_code == 0 and f"pip install {absent.package}" in result.output, result.output
    assert "timm's WindowAttention" in result.output


@pytest.mark.parametrize("rival", [r for r in rivals.RIVALS if not r.package], ids=lambda r: r.name)
def test_what_rivals_are_given_has_the_shape_of_ours(rival):
    x = torch.randn(2, 256, 24)
    ours = layer_of(rival.ours, 256, 24, 3, torch.device("cpu"))
    assert ours(x).shape == rival.make(256, 24, 3)(x).shape == x.shape


def test_a_window_of_timms_sees_its_window_alone():
    layer = rivals.OnPlane(rivals.Windows(8, 2, 4), 8, channels_last=True)
    x = torch.randn(1, 64, 8, requires_grad=True)
    layer(x)[0, 0].sum().backward()
    seen = x.grad[0].abs().sum(-1).view(8, 8) > 0
    assert seen[:4, :4].all() and seen.sum() == 16
    maps = rivals.OnPlane(torch.nn.AvgPool2d(3, 1, 1), 8)
    assert torch.allclose(maps(x)[0, 0], x.view(8, 8, 8)[:2, :2].sum((0, 1)) / 9, atol=1e-6)


def test_specs_of_a_plane_get_one():
    layer = layer_of("{use: halo, with: {block: 2}}", 16, 8, 2, torch.device("cpu"))
    assert layer(torch.zeros(1, 16, 8)).shape == (1, 16, 8)
