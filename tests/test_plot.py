"""Pictures: curves, matrices of heads, files. Heat maps are held by test_heatmap.py and test_text_maps.py."""

import io
import subprocess
import sys
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.plot import (
    Picture,
    check_file,
    comparison_curves,
    encoded,
    growth_curves,
    head_matrix,
    learning_curves,
    lines,
    save,
    svg,
)
from attnzoo.plot.palette import MISSING, SERIES

SVG = "{http://www.w3.org/2000/svg}"


def log(epochs: int, loss: float | None = None, accuracy: float | None = None) -> list[dict]:
    """Rows of a run that learns, or of one that does not."""
    return [
        {"epoch": e, "train_loss": loss or 2 / e, "test_loss": loss or 2.5 / e, "test_accuracy": accuracy or 1 - 0.8 / e}
        for e in range(1, epochs + 1)
    ]  # fmt: skip


def ticks(axis) -> list[str]:
    """What is written along an axis, within its limits."""
    axis.figure.draw_without_rendering()
    low, high = sorted(axis.get_view_interval())
    return [
        label.get_text() for label, at in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
        if low - 1e-9 <= at <= high + 1e-9
    ]  # fmt: skip


@pytest.mark.parametrize("epochs", [1, 2, 3, 12, 50, 400])
def test_epochs_are_whole_numbers_from_one_on(epochs):
    for axes in learning_curves(log(epochs), "run").axes:
        named = ticks(axes.xaxis)
        assert all(float(name) == int(name) and 1 <= int(name) <= epochs for name in named)
        assert len(set(named)) == len(named) >= min(epochs, 2)
        values = ticks(axes.yaxis)
        assert len(set(values)) == len(values) >= 3


def test_one_epoch_is_a_point():
    losses, accuracy = learning_curves(log(1)).axes
    for axes, count in ((losses, 2), (accuracy, 1)):
        assert [line.get_marker() for line in axes.lines] == ["o"] * count
        low, high = axes.get_xlim()
        assert low < 1 < high
    assert learning_curves(log(400)).axes[0].lines[0].get_marker() in ("None", None)
    picture = learning_curves(log(1))
    with Image.open(io.BytesIO(encoded(picture, "png"))) as image:
        seen = {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3)}
    for colour in ("#8a8a8a", "#c2410c", "#1d4ed8"):
        assert tuple(bytes.fromhex(colour[1:])) in seen


def test_a_curve_that_does_not_move_has_ticks_that_differ():
    losses, accuracy = learning_curves(log(9, loss=2.27, accuracy=0.13)).axes
    assert len(set(ticks(losses.yaxis))) >= 3
    assert "13 %" in ticks(accuracy.yaxis)


def test_numbers_that_hardly_differ_are_written_whole():
    assert all(name.startswith("100000") for name in ticks(lines({"a": [100000.02, 100000.06]}).yaxis))


def test_accuracy_is_in_percent_and_no_more_than_all():
    _, accuracy = learning_curves(log(12)).axes
    assert all(name.endswith(" %") and float(name[:-2]) % 5 == 0 for name in ticks(accuracy.yaxis))
    _, perfect = learning_curves(log(5, accuracy=1.0)).axes
    assert ticks(perfect.yaxis)[-1] == "100 %" and perfect.get_ylim()[1] > 1
    zero = lines({"a": [0.0, 0.0]}, percent=True)
    assert ticks(zero.yaxis)[0] == "0 %"
    below = lines({"a": [-0.5, 0.4]}, percent=True)  # of variance explained
    assert below.get_ylim()[0] < -0.5


def test_the_headline_and_the_legend_say_what_is_seen():
    picture = learning_curves(log(3), "a$b$_c")
    assert picture._suptitle.get_text() == "a$b$_c: best accuracy 73.33% in epoch 3"
    assert [[text.get_text() for text in axes.get_legend().get_texts()] for axes in picture.axes] == [
        ["train", "test"], ["test"]]  # fmt: skip
    picture.draw_without_rendering()
    for axes in picture.axes:  # outside of the lines
        assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1 - 1


def test_values_that_are_not_finite_are_gaps():
    rows = log(3)
    rows[1]["train_loss"] = float("nan")
    rows[2]["test_loss"] = float("inf")
    assert encoded(learning_curves(rows), "png").startswith(b"\x89PNG")
    assert encoded(lines({"a": [float("nan")]}, percent=True).figure, "png")


def test_lines_are_drawn_on_axes_of_the_caller():
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], label="theirs")
    given = lines(
        {"_a": [1.0, 2.0], "$b$": torch.tensor([1, 2, 3], dtype=torch.bfloat16)}, axes, xlabel="layer"
    )
    assert given is axes and [list(line.get_ydata()) for line in axes.lines[1:]] == [[1, 2], [1, 2, 3]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["_a", "$b$"]
    assert axes.get_xlabel() == "layer" and ticks(axes.xaxis) == ["0", "1", "2"]
    many = lines({f"line {i}": [i, i] for i in range(2 * len(SERIES))})
    looks = {(to_hex(line.get_color()), line.get_linestyle()) for line in many.lines}
    assert len(looks) == 2 * len(SERIES)


def test_bands_lie_around_lines():
    axes = lines({"a": [1.0, 2.0], "b": [3.0, 3.0]}, bands={"a": ([0.5, 1.5], [1.5, 2.5])})
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].min() == 0.5 and corners[:, 1].max() == 2.5
    assert to_hex(band.get_facecolor()[0]) == SERIES[0] == to_hex(axes.lines[0].get_color())


def test_a_comparison_shows_means_over_seeds_as_far_as_all_went():
    logs = {"one": [log(3, accuracy=0.2), log(2, accuracy=0.4)], "two": [log(4)]}
    picture = comparison_curves(logs)
    accuracy, loss = picture.axes
    assert [len(line.get_xdata()) for line in accuracy.lines] == [2, 4]
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [0.3, 0.3], rtol=1e-6)
    assert list(accuracy.lines[1].get_xdata()) == [1, 2, 3, 4]
    low, high = (edge(accuracy.collections[0].get_paths()[0].vertices[:, 1]) for edge in (min, max))
    assert (low, high) == pytest.approx((0.2, 0.4))
    assert [line.get_ydata()[0] for line in loss.lines] == [2, 2]
    (legend,) = picture.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    for missing in ({}, {"one": []}, {"one": [[]]}):
        with pytest.raises(ZooError, match="AZ930|without an epoch"):
            comparison_curves(missing)


def test_long_names_have_room():
    names = [f"a_recipe_with_a_name_of_sixty_four_letters_which_is_the_most_{i:02}" for i in range(12)]
    picture = comparison_curves({name: [log(3)] for name in names})
    picture.draw_without_rendering()
    legend = picture.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= picture.pixels[0]
    assert all(axes.get_window_extent().y1 <= legend.y0 for axes in picture.axes)


def test_growth_is_drawn_over_tokens():
    panels = {
        what: {name: {196: 1.0 + i, 1024: 5.0 + i} for i, name in enumerate(("softmax", "linformer", "soft"))}
        for what in ("forward, ms", "memory, MiB")
    }
    panels["memory, MiB"]["soft"] = {196: 3.0}
    picture = growth_curves(panels)
    assert [axes.get_title() for axes in picture.axes] == list(panels)
    for axes in picture.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log") and ticks(axes.xaxis) == [
            "196",
            "1,024",
        ]
        assert to_hex(axes.lines[0].get_color()) == "#000000" and len(axes.lines) == 3
    assert [list(line.get_xdata()) for line in picture.axes[1].lines] == [[196, 1024], [196, 1024], [196]]
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["softmax", "linformer", "soft"]
    with pytest.raises(ZooError):
        growth_curves({})


def test_a_matrix_has_a_cell_for_each_head():
    values = torch.arange(12.0).view(3, 4)
    axes = head_matrix(values, label="nats", title="$t$", rows=["a", "b", "c"])
    (image,) = axes.images
    assert np.array_equal(image.get_array(), values) and image.get_extent() == [-0.5, 3.5, 2.5, -0.5]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(head, layer): f"{values[layer, head]:.0f}" for layer in range(3) for head in range(4)}
    assert ticks(axes.yaxis) == ["a", "b", "c"] and ticks(axes.xaxis) == ["0", "1", "2", "3"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("head", "layer", "$t$")
    assert axes.figure.axes[1].get_ylabel() == "nats"
    assert len(head_matrix(torch.rand(24, 64)).texts) == 0


def test_numbers_can_be_read_on_their_colours():
    axes = head_matrix([[0.0, 1.0]])
    assert [to_hex(text.get_color()) for text in axes.texts] == ["#ffffff", "#1c1c1e"]  # dark, bright
    assert [text.get_text() for text in head_matrix([[0.001, 0.0023]]).texts] == ["0.001", "0.002"]
    assert [text.get_text() for text in head_matrix([[120.0, 480.0]]).texts] == ["120", "480"]
    assert [text.get_text() for text in head_matrix([[0.5, 0.5]], digits=1).texts] == ["0.5", "0.5"]
    assert [text.get_text() for text in head_matrix([[-0.01, 2.0]]).texts] == ["0.0", "2.0"]  # not -0.0


def test_heads_that_are_not_there_are_grey():
    for given in ([[1.0, 2.0, 3.0], [4.0]], torch.tensor([[1.0, 2, 3], [4, torch.nan, torch.nan]])):
        axes = head_matrix(given)
        (image,) = axes.images
        colours = image.to_rgba(image.get_array())
        assert [to_hex(colours[1, h]) == MISSING for h in range(3)] == [False, True, True]
        assert MISSING not in {to_hex(colour) for colour in colours[0]}
        assert [text.get_text() for text in axes.texts][3:] == ["4.0", "–", "–"]
    assert encoded(head_matrix([[float("nan")]]).figure, "png")


def test_colours_go_equally_far_from_the_centre():
    (image,) = head_matrix([[-1.0, 3.0]], centre=0).images
    assert (image.norm.vmin, image.norm.vmax) == (-3, 3) and image.get_cmap().name == "RdBu_r"
    (image,) = head_matrix([[-1.0, 3.0]], least=0, most=10, cmap="magma").images
    assert (image.norm.vmin, image.norm.vmax) == (0, 10) and image.get_cmap().name == "magma"
    (even,) = head_matrix([[2.0, 2.0]]).images
    assert even.norm.vmin < 2 < even.norm.vmax


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: head_matrix(torch.rand(2, 3, 4)),
        lambda: head_matrix([]),
        lambda: head_matrix([[]]),
        lambda: head_matrix([["a"]]),
        lambda: head_matrix(torch.rand(2, 2), rows=["a"]),
        lambda: head_matrix(torch.rand(2, 2), columns=["a"]),
        lambda: lines({}),
        lambda: lines({"a": []}),
        lambda: lines({"a": [[1.0]]}),
        lambda: lines({"a": [1.0, 2.0]}, x=[1]),
        lambda: learning_curves([]),
    ],
)
def test_what_does_not_fit_is_told(wrong):
    with pytest.raises(ZooError) as caught:
        wrong()
    assert caught.value.code == "AZ930"


def test_files_of_three_kinds(tmp_path):
    picture = learning_curves(log(2), "<mine>")
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG")):
        file = save(picture, tmp_path / "new" / f"a.{kind}")
        assert file.read_bytes().startswith(start)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.size == picture.pixels


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_picture_gives_the_same_bytes(kind):
    once, again = (encoded(learning_curves(log(3), "mine"), kind) for _ in range(2))
    assert once == again and encoded(learning_curves(log(4), "mine"), kind) != once


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.svgz", "a.png.txt", ".png"])
def test_other_files_are_refused(name, tmp_path):
    for refuse in (check_file, lambda path: save(Picture(10, 10), path)):
        with pytest.raises(ZooError) as caught:
            refuse(tmp_path / name)
        assert caught.value.code == "AZ905" and ".png, .svg or .pdf" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ZooError, match="cannot write"):
        save(Picture(10, 10), tmp_path / "file" / "a.png")
    assert (tmp_path / "file").read_text() == "kept"


def test_text_in_svg_is_text():
    text = svg(learning_curves(log(2), "<mine> & $yours$"), "A curve & more")
    page = ET.fromstring(text)
    written = {one.text for one in page.iter(f"{SVG}text")}
    assert {"<mine> & $yours$: best accuracy 60.00% in epoch 2", "epoch", "loss", "train", "test"} <= written
    assert page[0].tag == f"{SVG}title" and page[0].text == "A curve & more" and text.startswith("<svg")
    assert "<script" not in text and "http" not in text.replace("http://www.w3.org", "")


def test_no_setting_of_matplotlib_is_changed_and_none_is_forced():
    before = dict(matplotlib.rcParams)
    figure = Figure()
    canvas = figure.canvas
    lines({"a": [1.0]}, figure.add_subplot())
    svg(figure), encoded(figure, "pdf"), encoded(figure, "png"), learning_curves(log(2)), head_matrix([[1.0]])
    assert (
        dict(matplotlib.rcParams) == before and figure.canvas is canvas and figure.dpi == before["figure.dpi"]
    )
    out = io.StringIO()
    figure.savefig(out, format="svg")
    assert "<text" not in out.getvalue()  # theirs: text is drawn
    with matplotlib.rc_context({"svg.fonttype": "path", "figure.facecolor": "black"}):
        assert encoded(learning_curves(log(2)), "svg") == encoded(learning_curves(log(2)), "svg")
        assert "<text" in svg(learning_curves(log(2), "a_b"))


def test_threads_draw_side_by_side():
    alone = [encoded(learning_curves(log(n), f"run {n}"), kind) for n in (1, 4) for kind in ("png", "svg")]
    with ThreadPoolExecutor(4) as pool:
        together = [
            pool.submit(lambda n=n, kind=kind: encoded(learning_curves(log(n), f"run {n}"), kind))
            for n in (1, 4) for kind in ("png", "svg")
        ]  # fmt: skip
        assert [one.result() for one in together] == alone


def test_a_picture_is_shown_and_copied():
    picture = learning_curves(log(2))
    shown = picture._repr_png_()
    assert shown.startswith(b"\x89PNG") and deepcopy(picture)._repr_png_() == shown


@pytest.mark.slow  # a process imports torch
def test_matplotlib_is_loaded_when_something_is_drawn():
    code = (
        "import sys, attnzoo, attnzoo.plot, attnzoo.train, attnzoo.lab.maps, attnzoo.lab.text_maps, attnzoo.bench.mechanisms\n"
        "attnzoo.load_zoo(); attnzoo.list_recipes(); dir(attnzoo.plot)\n"
        "assert 'matplotlib' not in sys.modules\n"
        "attnzoo.plot.head_matrix([[1.0]])\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(attnzoo.__file__).parent.parent)
    assert attnzoo.plot.head_matrix is head_matrix and set(attnzoo.plot.__all__) == set(dir(attnzoo.plot))
    with pytest.raises(AttributeError, match="chart"):
        attnzoo.plot.chart  # noqa: B018
