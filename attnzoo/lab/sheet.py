"""A sheet of images and heat maps, drawn with Pillow alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

LEAST, MOST = 160, 224
"""Pixels of a panel's shorter side."""
MANY = 5
"""With more columns than these, panels are as small as they may be."""
ALPHA = 0.5
"""How much of a panel is heat; the rest is the image, in pale grey."""

_STOPS = ("000004", "210c4a", "56106e", "89226a", "bb3754", "e35932", "f98c0a", "f9c932", "fcffa4")
_INK, _PALE, _EMPTY, _PAPER = (28, 28, 30), (118, 118, 124), (238, 238, 240), (255, 255, 255)
_MARGIN, _GAP = 16, 8
_TITLE, _TEXT, _SMALL = (ImageFont.load_default(size=size) for size in (20, 14, 12))
_LINE, _NOTE = 18, 16

GREEN, RED = (16, 124, 54), (196, 30, 40)
Line = tuple[str, tuple[int, int, int] | None]
"""A line of text and its colour; None for the usual ink."""


def colours() -> UInt8[Tensor, "256 3"]:
    """The colour scale from least to most: nine colours of `inferno`, straight lines between; brightness only grows."""
    stops = torch.tensor([[int(stop[i : i + 2], 16) for i in (0, 2, 4)] for stop in _STOPS])
    return F.interpolate(stops.T[None].float(), 256, mode="linear", align_corners=True)[0].T.round().byte()


@dataclass(frozen=True)
class Shown:
    """One image and its maps, as a block of the sheet.

    Args:
        image: Three colours or one, 0 to 255, (c y x).
        captions: Lines below the image, each with its colour; None for the usual ink.
        values: A map for each row and column of the block, (rows columns y x); NaN where there is none.
    """

    image: UInt8[Tensor, "c y x"]
    captions: Sequence[Line]
    values: Float[Tensor, "r k y x"]


def overlay(image: UInt8[Tensor, "c y x"], heat: Float[Tensor, "v u"], size: tuple[int, int]) -> Image.Image:
    """A map in colours over its image in grey; the least value gets the first colour, the most the last.

    Args:
        image: 0 to 255, (c y x).
        heat: Any numbers, (v u); enlarged bilinearly to the panel.
        size: Rows and columns of the panel, in pixels.
    """
    span = heat.max() - heat.min()
    scaled = (heat - heat.min()) / span if span > 0 else torch.full_like(heat, 0.5)
    fine = F.interpolate(scaled[None, None].cpu().float(), size, mode="bilinear", align_corners=False)[0, 0]
    hot = Image.fromarray(colours()[(fine * 255).round().long()].numpy())
    # white is not mistaken for heat
    pale = enlarge(image, size).convert("L").point(lambda grey: 72 + 0.5 * grey)
    return Image.blend(pale.convert("RGB"), hot, ALPHA)


def enlarge(image: UInt8[Tensor, "c y x"], size: tuple[int, int]) -> Image.Image:
    """An image at the size of a panel, smoothly.

    Args:
        image: 0 to 255, (c y x), c = 1 or 3.
        size: Rows and columns of the panel, in pixels.
    """
    rgb = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(rgb).resize(size[::-1], Image.Resampling.BICUBIC)


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


def draw(
    shown: Sequence[Shown],
    columns: Sequence[str],
    rows: Sequence[str],
    title: str,
    notes: Sequence[str],
    unit: float,
) -> Image.Image:
    """The sheet: a block for each image, the image first, then its maps.

    Below each map stand its least and most value. Each map has the whole colour scale to itself.

    Args:
        shown: The blocks, with as many rows and columns of maps each.
        columns: Names of the columns of maps.
        rows: Names of the rows of maps; not drawn when there is one.
        title: First line.
        notes: Lines below the title, wrapped.
        unit: What the numbers below the maps are divided by.
    """
    y, x = shown[0].image.shape[1:]
    height, width = panel_size(y, x, len(columns))
    label = int(max(_TEXT.getlength(name) for name in rows)) + _GAP if len(rows) > 1 else 0
    first = _MARGIN + width + 2 * _GAP + label
    lefts = [first + i * (width + _GAP) for i in range(len(columns))]
    total = max(lefts[-1] + width, 560, _MARGIN + int(_TITLE.getlength(title))) + _MARGIN
    lines = [line for note in notes for line in _wrapped(note, total - 2 * _MARGIN)]
    head = _MARGIN + 30 + len(lines) * _NOTE + 12
    row_height = height + _LINE + _GAP
    block = max(len(rows) * row_height, height + _LINE * max(len(one.captions) for one in shown)) + 14
    canvas = Image.new("RGB", (total, head + _LINE + len(shown) * block + 44), _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((_MARGIN, _MARGIN - 4), title, _INK, _TITLE)
    for i, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + 26 + i * _NOTE), line, _PALE, _SMALL)
    for left, name in zip(lefts, columns, strict=True):
        pen.text((left + width / 2, head + 8), _cut(name, width), _INK, _TEXT, anchor="mm")
    for i, one in enumerate(shown):
        top = head + _LINE + i * block
        canvas.paste(enlarge(one.image, (height, width)), (_MARGIN, top))
        for j, (text, colour) in enumerate(one.captions):
            line_top = top + height + 3 + j * _LINE
            pen.text((_MARGIN, line_top), _cut(text, width), colour or _INK, _TEXT)
        for r, maps in enumerate(one.values):
            row_top = top + r * row_height
            if label:
                pen.text((first - _GAP, row_top + height / 2), rows[r], _INK, _TEXT, anchor="rm")
            for left, heat in zip(lefts, maps, strict=True):
                _panel(canvas, pen, (left, row_top), one.image, heat, (height, width), unit)
    _scale(canvas, pen, canvas.height - 36)
    return canvas


def _panel(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    at: tuple[int, int],
    image: Tensor,
    heat: Tensor,
    size: tuple[int, int],
    unit: float,
) -> None:
    """One map and its least and most value; an empty box where there is none."""
    (left, top), (height, width) = at, size
    if heat.isnan().any():
        pen.rectangle((left, top, left + width - 1, top + height - 1), fill=_EMPTY)
        pen.text((left + width / 2, top + height / 2), "none here", _PALE, _SMALL, anchor="mm")
        return
    canvas.paste(overlay(image, heat, size), at)
    low, high = float(heat.min()) / unit, float(heat.max()) / unit
    digits = 2 if high == low else min(max(1 - math.floor(math.log10(high - low)), 0), 5)
    text = f"{low:.{digits}f} to {high:.{digits}f}"
    pen.text((left + width / 2, top + height + 10), text, _PALE, _SMALL, anchor="mm")


def _scale(canvas: Image.Image, pen: ImageDraw.ImageDraw, top: int, least: str = "least") -> None:
    """The colour scale, from the least to the most value of a map."""
    left = _MARGIN + int(_SMALL.getlength(least)) + _GAP
    strip = Image.fromarray(colours()[None].repeat(14, 1, 1).numpy())
    canvas.paste(strip, (left, top))
    pen.text((_MARGIN, top + 7), least, _INK, _SMALL, anchor="lm")
    pen.text((left + 256 + _GAP, top + 7), "most, of each map", _INK, _SMALL, anchor="lm")


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont | None = None) -> str:
    """The text, or as much of it as fits."""
    while text and (font or _TEXT).getlength(text) > width:
        text = text[:-2].rstrip("… ") + "…"
    return text


def _wrapped(
    text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont | None = None
) -> list[str]:
    """The text in lines that fit."""
    words, lines = text.split(), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and (font or _SMALL).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
