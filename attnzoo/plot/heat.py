"""Heat maps over images: one of them, and sheets of images with all their maps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from torch import Tensor

from attnzoo.errors import ZooError
from attnzoo.plot.letters import cut, length, spelled, wrapped
from attnzoo.plot.palette import (
    GAP,
    HEAT,
    INK,
    LINE,
    MARGIN,
    MISSING,
    NOTE,
    PALE,
    SMALL,
    TEXT,
    TITLE,
    Line,
    points,
)
from attnzoo.plot.picture import Numbers, Picture, as_array, axes_for

LEAST, MOST = 160, 224
"""Pixels of a panel's shorter side."""
MANY = 5
"""With more columns than these, panels are as small as they may be."""
ALPHA = 0.5
"""How much of a panel is heat; the rest is the image, in pale grey."""


@dataclass(frozen=True)
class Shown:
    """One image and its maps, as a block of a sheet.

    Args:
        image: Three colours or one, 0 to 255, (c y x).
        captions: Lines below the image, each with its colour; None for the usual ink.
        values: A map for each row and column of the block, (y x), or (m) of tokens in a line, which lie on no
            image; NaN where there is none.
    """

    image: UInt8[Tensor, "c y x"]
    captions: Sequence[Line]
    values: Sequence[Sequence[Tensor]] | Float[Tensor, "r k y x"]


def attention_map(
    heat: Numbers,
    image: Numbers | None = None,
    ax: Axes | None = None,
    *,
    unit: float = 1.0,
    alpha: float = ALPHA,
    cmap: str = HEAT,
) -> Axes:
    """A map in colours over its image in pale grey; its least value gets the first colour, its most the last.

    Below it stand its least and its most value. An even map has the middle colour, a map with NaN is an empty box.

        attention_map(maps[0, 0], image).figure.savefig("map.png")

    Args:
        heat: Any numbers, (y x); enlarged bilinearly.
        image: What it lies on: three colours or one, 0 to 255, (c y x); None for the map alone.
        ax: Where it is drawn; a new picture when None.
        unit: What the numbers below it are divided by: 1 / tokens gives even shares of the attention.
        alpha: How much is heat, the rest is the image.
        cmap: Any of matplotlib's scales.

    Returns:
        The axes, whose `figure` is the picture.

    Raises:
        ZooError: AZ930, when the numbers are no map or the image is none.
    """
    values = as_array(heat, "y x", "a map")
    grey = None if image is None else _grey(image)
    axes = axes_for(ax, 360, 360)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if np.isnan(values).any():
        axes.set_facecolor(MISSING)
        axes.text(0.5, 0.5, "none here", ha="center", va="center", color=PALE, fontsize=points(SMALL),
                  transform=axes.transAxes)  # fmt: skip
        return axes
    rows, columns = values.shape if grey is None else grey.shape
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)  # both lie on the pixels of the image
    if grey is not None:
        # 72 + grey / 2, so that white is not mistaken for heat
        axes.imshow(grey, cmap="gray", vmin=-144, vmax=366, extent=extent, interpolation="bicubic")
    low, high = float(values.min()), float(values.max())
    ends = (low, high) if high > low else (low - 1, high + 1)
    axes.imshow(
        values, cmap=cmap, vmin=ends[0], vmax=ends[1], alpha=1.0 if grey is None else alpha, extent=extent,
        interpolation="bilinear", interpolation_stage="data",
    )  # fmt: skip
    axes.set_xlabel(_range(low / unit, high / unit), color=PALE, fontsize=points(SMALL), labelpad=2)
    return axes


def heat_sheet(
    shown: Sequence[Shown],
    columns: Sequence[str],
    rows: Sequence[str],
    title: str,
    notes: Sequence[str] = (),
    unit: float | Numbers = 1.0,
) -> Picture:
    """A block for each image, the image first, then its maps.

    Each map has the whole colour scale to itself.

    Args:
        shown: The blocks, with as many rows and columns of maps each.
        columns: Names of the columns of maps.
        rows: Names of the rows of maps; not drawn when there is one.
        title: First line.
        notes: Lines below the title, wrapped.
        unit: What the numbers below the maps are divided by; one for all, or one for each, (rows columns).

    Raises:
        ZooError: AZ930, when there is no block, or names and maps are not equally many.
    """
    for one in shown:
        there = len(one.values), max((len(row) for row in one.values), default=0)
        if there != (len(rows), len(columns)):
            raise ZooError(
                "AZ930",
                f"{len(rows)} names of rows and {len(columns)} of columns, "
                f"but maps in {there[0]} rows and {there[1]} columns",
            )
    if not shown:
        raise ZooError("AZ930", "a sheet without an image")
    units = np.broadcast_to(np.asarray(unit, dtype=float), (len(rows), len(columns)))
    height, width = panel_size(shown[0].image.shape[1], shown[0].image.shape[2], len(columns))
    label = int(max(length(name, TEXT) for name in rows)) + GAP if len(rows) > 1 else 0
    first = MARGIN + width + 2 * GAP + label
    lefts = [first + i * (width + GAP) for i in range(len(columns))]
    total = max(lefts[-1] + width, 560, MARGIN + math.ceil(length(title, TITLE))) + MARGIN
    lines = [line for note in notes for line in wrapped(note, total - 2 * MARGIN)]
    head = MARGIN + 30 + len(lines) * NOTE + 12
    step = height + LINE + GAP
    block = max(len(rows) * step, height + LINE * max(len(one.captions) for one in shown)) + 14
    sheet = Picture(total, head + LINE + len(shown) * block + 44)
    sheet.write(MARGIN, MARGIN + 8, title, TITLE)
    for i, line in enumerate(lines):
        sheet.write(MARGIN, MARGIN + 33 + i * NOTE, line, SMALL, PALE)
    for i, one in enumerate(shown):
        top = head + LINE + i * block
        _image(sheet.panel(MARGIN, top, width, height), one, width)
        for r, maps in enumerate(one.values):
            for k, heat in enumerate(maps):
                axes = sheet.panel(lefts[k], top + r * step, width, height)
                if len(heat.shape) == 1:
                    attention_map(heat[None], None, axes, unit=units[r, k]).set_aspect("auto")
                    for strip in axes.images:
                        strip.set_interpolation("nearest")  # who stands beside whom says nothing
                else:
                    attention_map(heat, one.image, axes, unit=units[r, k])
                if not i and not r:
                    name, how = spelled(cut(columns[k], width, TEXT))
                    axes.set_title(name, color=INK, fontsize=points(TEXT), pad=4, **how)
                if not k and label:
                    name, how = spelled(rows[r])
                    axes.set_ylabel(name, color=INK, fontsize=points(TEXT), labelpad=points(GAP), **how)
                    axes.yaxis.label.set(rotation=0, ha="right", va="center")
    scale(sheet, "least")
    return sheet


def panel_size(rows: int, columns: int, panels: int = 1) -> tuple[int, int]:
    """Rows and columns of a panel in pixels, in the shape of the image.

    Args:
        rows: Rows of the image, in pixels.
        columns: Columns of the image, in pixels.
        panels: How many panels stand side by side.
    """
    short, most = min(rows, columns), MOST if panels <= MANY else LEAST
    side = min(-(-LEAST // short) * short, most)  # a small image grows by a whole factor
    return round(rows * side / short), round(columns * side / short)


def scale(sheet: Picture, least: str) -> None:
    """The colours at the lower edge of a sheet, from the least to the most value of a map.

    Args:
        sheet: Has room for it.
        least: What the first colour says.
    """
    top = sheet.pixels[1] - 36
    left = MARGIN + math.ceil(length(least, SMALL)) + GAP
    axes = sheet.panel(left, top, 256, 14)
    axes.set_label("scale")
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=HEAT, aspect="auto")
    sheet.write(MARGIN, top + 7, least, SMALL)
    sheet.write(left + 256 + GAP, top + 7, "most, of each map", SMALL)


def _image(axes: Axes, one: Shown, width: float) -> None:
    """The image, and what is said below it."""
    pixels = as_array(one.image, "c y x", "an image").transpose(1, 2, 0)
    axes.imshow(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.uint8), interpolation="bicubic")
    for j, (text, colour) in enumerate(one.captions):
        said, how = spelled(cut(text, width, TEXT))
        axes.annotate(
            said, (0, 0), (0, -points(11 + j * LINE)), "axes fraction", "offset points",
            color=colour or INK, fontsize=points(TEXT), va="center_baseline", annotation_clip=False, **how
        )  # fmt: skip


def _grey(image: Numbers) -> np.ndarray:
    """How bright an image is, 0 to 255, (y x), as ITU-R BT.601 weighs its colours."""
    pixels = as_array(image, "c y x", "an image")
    if len(pixels) not in (1, 3):
        raise ZooError("AZ930", f"an image has 1 or 3 colours, (c y x), not {len(pixels)}")
    return pixels[0] if len(pixels) == 1 else np.tensordot(np.array([0.299, 0.587, 0.114]), pixels, 1)


def _range(low: float, high: float) -> str:
    """Two numbers, with as many digits as tell them apart."""
    digits = 2 if high == low else min(max(1 - math.floor(math.log10(high - low)), 0), 5)
    return f"{low:.{digits}f} to {high:.{digits}f}"
