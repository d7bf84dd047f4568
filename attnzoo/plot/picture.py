"""A figure that is laid out in pixels, and the files that it is written to."""

import io
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_mixed import MixedModeRenderer
from matplotlib.backends.backend_svg import FigureCanvasSVG, RendererSVG
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from attnzoo.errors import ZooError
from attnzoo.plot.letters import spelled
from attnzoo.plot.palette import DPI, INK, PAPER, points

FINE = 200
"""Pixels of an inch of what has to be drawn as pixels in SVG and PDF."""
FORMATS = ("png", "svg", "pdf")
Numbers = Tensor | np.ndarray | Sequence[Any]


class Picture(Figure):
    """A figure whose size is in pixels, and which notebooks show without pyplot.

    Args:
        width: In pixels.
        height: In pixels.
        layout: `constrained`, or None where panels are placed by hand.
    """

    def __init__(self, width: float, height: float, layout: Any = None):
        super().__init__(
            figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER, edgecolor=PAPER, layout=layout
        )
        self.pixels = width, height

    def panel(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes without frame and ticks, in pixels from the upper left corner."""
        all_x, all_y = self.pixels
        axes = self.add_axes((left / all_x, 1 - (top + height) / all_y, width / all_x, height / all_y))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    def write(self, left: float, top: float, text: str, size: float, colour: str = INK) -> None:
        """A text, in pixels from the upper left corner.

        Args:
            left: Where it begins.
            top: Its middle.
            text: As it is, see `spelled`.
            size: Of the letters, in pixels.
            colour: Any of matplotlib's.
        """
        x, y = left / self.pixels[0], 1 - top / self.pixels[1]
        written, how = spelled(text)
        self.text(x, y, written, fontsize=points(size), color=colour, va="center_baseline", **how)

    def _repr_png_(self) -> bytes:
        return encoded(self, "png")


def beside(axis: Axis, text: str, **how: Any) -> None:
    """What stands beside an axis.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`.
        text: As it is, see `spelled`.
        **how: Properties of a `matplotlib.text.Text`.
    """
    written, letters = spelled(text)
    axis.set_label_text(written, **letters | how)


def axes_for(ax: Axes | None, width: float = 480, height: float = 360) -> Axes:
    """The axes to draw on: those that are given, or those of a new picture.

    Args:
        ax: Of the caller.
        width: Of a new picture, in pixels.
        height: Of a new picture, in pixels.
    """
    return Picture(width, height, layout="constrained").add_subplot() if ax is None else ax


def figure_of(ax: Axes) -> Figure | SubFigure:
    """The figure that axes belong to."""
    figure = ax.figure
    assert figure is not None, "axes that were removed"
    return figure


def as_array(values: Numbers, axes: str, what: str) -> np.ndarray:
    """Numbers as matplotlib takes them: on the CPU, in single precision, without a gradient.

    Args:
        values: A tensor of any type and device, an array or nested lists.
        axes: What they must lie along, in the shape letters.
        what: What to call them.

    Raises:
        ZooError: AZ930, when they have other axes, none of a length, or are no numbers.
    """
    try:
        found = torch.as_tensor(values)
        array = found.detach().to("cpu", torch.float32).numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ZooError("AZ930", f"{what} is no table of numbers: {error}") from None
    if array.ndim != len(axes.split()) or not array.size:
        shape = " × ".join(map(str, array.shape)) or "a single number"
        raise ZooError("AZ930", f"{what} has the axes ({axes}), but these numbers are {shape}")
    return array


def check_file(out: str | os.PathLike) -> Path:
    """Where a picture goes.

    Args:
        out: A file that ends in `.png`, `.svg` or `.pdf`.

    Raises:
        ZooError: AZ905, when it ends otherwise.
    """
    path = Path(out)
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise ZooError(
            "AZ905",
            f"a picture is written as PNG, SVG or PDF, not as `{path.name}`",
            help="name a file that ends in .png, .svg or .pdf",
        )
    return path


def save(figure: Figure, out: str | os.PathLike) -> Path:
    """Write a figure; folders are made, an older file is replaced. The same picture gives the same bytes.

    Args:
        figure: A `Picture`, or any figure.
        out: A file that ends in `.png`, `.svg` or `.pdf`.

    Raises:
        ZooError: AZ905, when it ends otherwise or cannot be written there.
    """
    path = check_file(out)
    content = encoded(figure, path.suffix.lower().removeprefix("."))  # whole, before anything is touched
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise ZooError(
            "AZ905",
            f"cannot write `{path}`: {(error.strerror or str(error)).lower()}",
            help="name another file with --out",
        ) from None
    return path


def svg(figure: Figure, title: str = "") -> str:
    """A figure as SVG without a prolog, as a page holds it; its text is text.

    Args:
        figure: A `Picture`, or any figure.
        title: What is said to those who do not see it.
    """
    text = encoded(figure, "svg", title).decode()
    return text[text.index("<svg") :]


def encoded(figure: Figure, kind: str, title: str = "") -> bytes:
    """What a file of a figure holds; nothing in it says when it was made, or by which version of matplotlib.

    Args:
        figure: A `Picture`, or any figure.
        kind: `png`, `svg` or `pdf`.
        title: What is said to those who do not see it.
    """
    silent = {"png": ["Software"], "svg": [], "pdf": ["CreationDate", "Creator", "Producer"]}
    said: dict[str, Any] = dict.fromkeys(silent[kind]) | ({"Title": title} if title else {})
    out = io.BytesIO()
    if kind != "svg":
        figure.savefig(out, format=kind, dpi=FINE if kind == "pdf" else figure.dpi, metadata=said)
        return out.getvalue()
    before = figure.canvas
    try:
        _SVGCanvas(figure).print_figure(out, format="svg", dpi=FINE, metadata=said)
    finally:
        figure.set_canvas(before)
    return out.getvalue()


class _SVGRenderer(RendererSVG):
    """Writes text as text, names parts by what they are, and of metadata only a title.

    rcParams offers the first two, but to all threads at once.
    """

    def _draw_text_as_path(self, *given: Any, **named: Any) -> None:
        self._draw_text_as_text(*given, **named)

    def _write_metadata(self, metadata: dict[str, Any] | None) -> None:
        if metadata:
            self.writer.element("title", metadata["Title"])

    def _make_id(self, type: str, content: Any) -> str:
        return f"{type}{sha256(str(content).encode()).hexdigest()[:10]}"


class _SVGCanvas(FigureCanvasSVG):
    """matplotlib's own, with that renderer."""

    def print_svg(
        self, filename: Any, *, bbox_inches_restore: Any = None, metadata: Any = None, **_: Any
    ) -> None:
        figure, out = self.figure, io.StringIO()
        width, height = figure.get_size_inches()
        dpi, figure.dpi = figure.dpi, 72  # a point is a pixel
        own = _SVGRenderer(72 * width, 72 * height, out, image_dpi=dpi, metadata=metadata)
        renderer: Any = MixedModeRenderer(
            figure, width, height, dpi, own, bbox_inches_restore=bbox_inches_restore
        )
        figure.draw(renderer)
        renderer.finalize()
        filename.write(out.getvalue().encode())
