"""Attention maps of sequences: each map a matrix, queries down and keys across."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.colors import Colormap
from matplotlib.lines import Line2D
from torch import Tensor

from attnzoo.errors import ZooError
from attnzoo.plot.heat import scale
from attnzoo.plot.letters import cut, length, spelled, unwritten, wrapped
from attnzoo.plot.palette import (
    FORBIDDEN,
    GAP,
    HEAT,
    INK,
    MARGIN,
    NOTE,
    PALE,
    RULE,
    SMALL,
    TEXT,
    TITLE,
    Line,
    points,
)
from attnzoo.plot.picture import Numbers, Picture, as_array, axes_for

WIDE = 1720
"""Pixels that panels side by side may take, with their margins."""
PITCH = 12
"""Pixels from one name of a token to the next, at least."""

_ABOVE, _BESIDE = 92, 150
"""Pixels of the longest name above a column and beside a row."""
_LEAST = 88
"""Pixels that what stands below a panel needs."""


@dataclass(frozen=True)
class Panel:
    """One map.

    Args:
        name: Written below it.
        heat: (n m).
    """

    name: str
    heat: Float[Tensor, "n m"]


@dataclass(frozen=True)
class Row:
    """Panels that belong together.

    Args:
        label: Written above them: `layer 0 · 64 heads`.
        panels: Side by side, in several lines if need be.
    """

    label: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Block:
    """All panels of one kind.

    Args:
        side: What it is called: `encoder`.
        title: Written above it.
        queries: A name for each row of a map.
        keys: A name for each column of a map.
        rows: From top to bottom.
        causal: Whether what comes after a query is drawn as forbidden.
    """

    side: str
    title: str
    queries: Sequence[str]
    keys: Sequence[str]
    rows: tuple[Row, ...]
    causal: bool = False

    def values(self) -> Float[Tensor, "r k n m"]:
        """Its maps as one tensor, NaN where a row has fewer panels than the longest."""
        most = max(len(row.panels) for row in self.rows)
        out = torch.full((len(self.rows), most, len(self.queries), len(self.keys)), torch.nan)
        for i, row in enumerate(self.rows):
            for j, panel in enumerate(row.panels):
                out[i, j] = panel.heat
        return out


def token_map(
    heat: Numbers,
    queries: Sequence[str] = (),
    keys: Sequence[str] = (),
    ax: Axes | None = None,
    *,
    causal: bool = False,
    name: str = "",
    cmap: str | Colormap = HEAT,
) -> Axes:
    """A map as squares of one colour each: 0, or the least below it, gets the first colour, the most the last.

    The most stands below it, after its name.

        token_map(weights[0, 3], words, words, causal=True).figure.savefig("head3.pdf")

    Args:
        heat: Any numbers, (n m).
        queries: A name for each row, at the left; none when empty.
        keys: A name for each column, above; none when empty.
        ax: Where it is drawn; a new picture when None.
        causal: Whether what comes after a query is grey, and the first row, which has no choice, does not count for
            the most.
        name: Of the map.
        cmap: Any of matplotlib's scales.

    Returns:
        The axes, whose `figure` is the picture.

    Raises:
        ZooError: AZ930, when the numbers are no map, or names and tokens are not equally many.
    """
    values = as_array(heat, "n m", "a map")
    for names, count, what in ((queries, values.shape[0], "rows"), (keys, values.shape[1], "columns")):
        if len(names) not in (0, count):
            raise ZooError("AZ930", f"{len(names)} names for {count} {what} of a map")
    axes = axes_for(ax, 420, 400)
    low, high = _bounds(values, causal)
    hidden = np.triu(np.ones(values.shape, dtype=bool), 1) & causal
    colours = matplotlib.colormaps[cmap] if isinstance(cmap, str) else cmap
    axes.imshow(
        np.ma.array(values, mask=hidden), cmap=colours.with_extremes(bad=FORBIDDEN), vmin=low,
        vmax=high if high > low else low + 1, aspect="auto" if ax is not None else "equal", interpolation="none",
    )  # fmt: skip
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    said = _range(low, high)
    below, how = spelled(f"{name}: {said}" if name else said)
    axes.set_xlabel(below, color=PALE, fontsize=points(SMALL), loc="left", labelpad=3, **how)
    if queries:
        _name(axes.yaxis, list(enumerate(queries)), points(SMALL))
    if keys:
        _name(axes.xaxis, list(enumerate(keys)), points(SMALL), turned=True)
    return axes


def _name(axis: Axis, names: Sequence[tuple[int, str]], size: float, turned: bool = False) -> None:
    """Names of tokens at the left or above.

    Args:
        axis: Along which the tokens lie.
        names: Places and names.
        size: Of the letters.
        turned: Whether they run upwards.
    """
    _, how = spelled("".join(name for _, name in names))
    axis.set_ticks(
        [at for at, _ in names], [spelled(name)[0] for _, name in names], color=INK, fontsize=size, **how
    )
    if isinstance(axis, XAxis):
        axis.set_tick_params(labeltop=True, labelbottom=False)
    axis.set_tick_params(length=0, pad=points(4))
    if turned:
        for text in axis.get_ticklabels():
            text.set(rotation=90, rotation_mode="anchor", ha="left", va="center")


def cell_size(blocks: Sequence[Block], large: bool) -> int:
    """Pixels of a cell: large enough for a name of each token as long as a panel stays small enough.

    Args:
        blocks: All of them have the same.
        large: Whether panels are few and large.
    """
    tokens = max(max(len(block.queries), len(block.keys)) for block in blocks)
    panels = max(len(row.panels) for block in blocks for row in block.rows)
    if large:
        least, most, limit = 330, 560, 30  # of a panel with few tokens, of one with many, of a cell
    else:
        least, most, limit = (150 if panels <= 16 else 100), max(288, min(480, 1200 // panels)), 22
    cell = max(PITCH, min(least // tokens, limit))
    return cell if cell * tokens <= most else max(most // tokens, 1)


def named(cell: int) -> int:
    """One in how many tokens has its name beside the panel."""
    return -(-PITCH // cell)


def text_sheet(
    blocks: Sequence[Block],
    title: str,
    lines: Sequence[Line] = (),
    notes: Sequence[str] = (),
    large: bool = False,
) -> Picture:
    """A block for each kind of site, one below the other.

    Args:
        blocks: What is drawn.
        title: First line.
        lines: Below the title: what the maps are of, and what the model says.
        notes: Lines below, small.
        large: Whether panels are few and large, each with names of its own; otherwise those of a line share the names
            at the left, and those of a block the names above.

    Raises:
        ZooError: AZ930, when there is no block.
    """
    if not any(row.panels for block in blocks for row in block.rows):
        raise ZooError("AZ930", "a sheet without a map")
    cell = cell_size(blocks, large)
    texts = [*(text for text, _ in lines), *(name for one in blocks for name in (*one.queries, *one.keys))]
    if unwritten("".join(texts)):
        notes = [*notes, "No font here has all letters: those that are missing are drawn as ?."]
    placed = [_Placed(block, cell, large) for block in blocks]
    width = max(620, MARGIN + math.ceil(length(title, TITLE)), *(one.width for one in placed)) + MARGIN
    room = width - 2 * MARGIN
    words = [(part, colour) for text, colour in lines for part in wrapped(text, room, TEXT)]
    small = [part for note in notes for part in wrapped(note, room)]
    head = MARGIN + 32 + 20 * len(words) + NOTE * len(small) + 14
    sheet = Picture(width, head + sum(one.height for one in placed) + 44)
    sheet.write(MARGIN, MARGIN + 8, title, TITLE)
    top = MARGIN + 37
    for text, colour in words:
        sheet.write(MARGIN, top, text, TEXT, colour or INK)
        top += 20
    for text in small:
        sheet.write(MARGIN, top, text, SMALL, PALE)
        top += NOTE
    top = head
    for one in placed:
        one.draw(sheet, top)
        top += one.height
    scale(sheet, "0")
    return sheet


class _Placed:
    """A block and where its parts go.

    Args:
        block: What is drawn.
        cell: Pixels of a cell.
        large: Whether each panel has its own names.
    """

    def __init__(self, block: Block, cell: int, large: bool):
        self.block, self.cell, self.large, self.every = block, cell, large, named(cell)
        self.size = len(block.queries) * cell, len(block.keys) * cell  # rows and columns, in pixels
        self.letter = 12 if cell >= 16 else 10
        self.queries, self.keys = (
            [cut(name.strip() or "·", room, self.letter) for name in names]
            for names, room in ((block.queries, _BESIDE), (block.keys, _ABOVE))
        )
        chosen = [self._length(name) for name in self.keys[:: self.every]]
        self.turned = max(chosen) > cell * self.every - 2
        self.beside = 6 + max(map(self._length, self.queries))
        self.above = 6 + (max(chosen) if self.turned else 16)
        self.pitch = max(self.size[1], _LEAST) + (2 * GAP + self.beside if large else GAP)
        fit = max((WIDE - 2 * MARGIN - (0 if large else self.beside)) // self.pitch, 1)
        self.lines = [_lines(row.panels, fit) for row in block.rows]
        longest = max(len(line) for lines in self.lines for line in lines)
        self.width = max(
            MARGIN + self.beside + longest * self.pitch, MARGIN + math.ceil(length(block.title, TEXT))
        )
        count = sum(map(len, self.lines))
        self.step = self.size[0] + 16 + GAP  # a line of panels, what stands below them, a gap
        self.height = 36 + 20 * len(block.rows) + count * self.step + (count if large else 1) * self.above

    def _length(self, name: str) -> int:
        return math.ceil(length(name, self.letter))

    def draw(self, sheet: Picture, top: int) -> None:
        """Draw it below `top`."""
        across, down = sheet.pixels
        sheet.add_artist(
            Line2D([MARGIN / across, 1 - MARGIN / across], [1 - top / down] * 2, color=RULE, linewidth=0.8)
        )
        sheet.write(MARGIN, top + 15, self.block.title, TEXT)
        top, first = top + 30, True
        for row, lines in zip(self.block.rows, self.lines, strict=True):
            sheet.write(MARGIN, top + 8, row.label, TEXT, PALE)
            top += 20
            for line in lines:
                above = self.large or first
                top += self.above if above else 0
                for i, panel in enumerate(line):
                    axes = sheet.panel(MARGIN + self.beside + i * self.pitch, top, self.size[1], self.size[0])
                    token_map(panel.heat, ax=axes, causal=self.block.causal, name=panel.name)
                    if self.large or i == 0:
                        self._name(axes.yaxis, self.queries)
                    if above:
                        self._name(axes.xaxis, self.keys, self.turned)
                top, first = top + self.step, False

    def _name(self, axis: Axis, names: Sequence[str], turned: bool = False) -> None:
        _name(axis, list(enumerate(names))[:: self.every], points(self.letter), turned)


def _bounds(heat: np.ndarray, causal: bool) -> tuple[float, float]:
    """What gets the first and the last colour: 0, or the least below it, and the most. Of a causal map the first row
    does not count, which has no choice."""
    counted = heat[1:] if causal and len(heat) > 1 else heat
    return min(float(heat.min()), 0.0), float(counted.max())


def _range(low: float, high: float) -> str:
    return f"{low:.2f} to {high:.2f}" if low < -0.005 else f"{high:.2f}"


def _lines(panels: Sequence[Panel], fit: int) -> list[Sequence[Panel]]:
    """Panels in lines of at most `fit`."""
    per = _per_line(len(panels), fit)
    return [panels[i : i + per] for i in range(0, len(panels), per)]


def _per_line(panels: int, fit: int) -> int:
    """How many of them stand side by side: as many as fit, in lines of the same length where that wastes little."""
    if panels <= fit:
        return panels
    even = next(per for per in range(fit, 0, -1) if panels % per == 0)
    return even if 5 * even >= 3 * fit else -(-panels // -(-panels // fit))
