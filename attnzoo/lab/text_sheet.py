"""Sheets of the attention maps of sequences: each map a matrix, queries down and keys across."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from attnzoo.lab.lettering import Font, Lettering
from attnzoo.lab.sheet import (
    _GAP,
    _INK,
    _MARGIN,
    _PALE,
    _PAPER,
    _SMALL,
    _TEXT,
    _TITLE,
    Line,
    _cut,
    _scale,
    _wrapped,
    colours,
)
from attnzoo.lab.text_maps import Example, Side, Stack, TextMaps

TextWhat = Literal["heads", "mechanism"]
TEXT_TITLES: dict[TextWhat, str] = {
    "heads": "where each head looks",
    "mechanism": "where each layer looks, mean over heads",
}
SIDES: dict[Side, str] = {
    "encoder": "Encoder: the source looks at itself",
    "decoder": "Decoder: the target looks at itself",
    "cross": "Cross-attention: the target looks at the source",
    "layers": "The sequence looks at itself",
}
WIDE = 1720
"""Pixels that panels side by side may take, with their margins."""
PITCH = 12
"""Pixels from one name of a token to the next, at least."""

_ABOVE, _BESIDE = 92, 150
"""Pixels of the longest name above a column and beside a row."""
_LINE, _LEAST = 14, 88
"""Size of the lines below the title; pixels that what stands below a panel needs."""
_FORBIDDEN, _RULE = (226, 228, 234), (214, 214, 220)


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
    """All panels of one kind of site.

    Args:
        side: Which kind.
        queries: A name for each row of a map.
        keys: A name for each column of a map.
        rows: From top to bottom.
        causal: Whether what comes after a query is drawn as forbidden.
    """

    side: Side
    queries: Sequence[str]
    keys: Sequence[str]
    rows: tuple[Row, ...]
    causal: bool

    def values(self) -> Float[Tensor, "r k n m"]:
        """Its maps as one tensor, NaN where a row has fewer panels than the longest."""
        most = max(len(row.panels) for row in self.rows)
        out = torch.full((len(self.rows), most, len(self.queries), len(self.keys)), torch.nan)
        for i, row in enumerate(self.rows):
            for j, panel in enumerate(row.panels):
                out[i, j] = panel.heat
        return out


def text_view(
    maps: TextMaps, example: Example, what: TextWhat = "heads", batch: int = 0
) -> tuple[Block, ...]:
    """The maps to be shown.

    `heads`: a row for each layer and branch, a panel for each head. `mechanism`: a row for each branch, a panel for
    each layer, mean over heads.

    Args:
        maps: From `collect_text`; what `only` left.
        example: What they are of.
        what: Which of the two.
        batch: Which sequence of the batch.
    """
    rows = _by_head if what == "heads" else _by_layer
    return tuple(
        Block(
            stack.side,
            example.words[stack.side],
            example.keys(stack.side),
            rows(stack, len(example.words[stack.side]), batch),
            stack.causal,
        )
        for stack in maps.stacks
        if stack.maps
    )


def _by_head(stack: Stack, queries: int, batch: int) -> tuple[Row, ...]:
    several = len(stack.branches()) > 1
    return tuple(
        Row(
            f"layer {one.layer} · {f'{one.branch} · ' if several else ''}{_counted(one.heads, 'head')}",
            tuple(Panel(f"head {i}", heat) for i, heat in enumerate(one.matrix(queries)[batch])),
        )
        for one in stack.maps
    )


def _by_layer(stack: Stack, queries: int, batch: int) -> tuple[Row, ...]:
    rows = []
    for branch in stack.branches():
        here = [one for one in stack.maps if one.branch == branch]
        panels = (
            Panel(
                f"layer {one.layer} · {_counted(one.heads, 'head')}", one.matrix(queries)[batch].mean(dim=0)
            )
            for one in here
        )
        rows.append(Row(branch, tuple(panels)))
    return tuple(rows)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def text_notes(maps: TextMaps, blocks: Sequence[Block], what: TextWhat = "heads") -> list[str]:
    """What must be said about the maps: how to read them, what is implied, what is missing."""
    lines = [
        "A row is a token that looks, a column one that is looked at. Below a map stands its most, which has the"
        " brightest colour; the darkest is 0, or the least where that is below."
    ]
    if any(block.causal for block in blocks):
        lines.append(
            "Grey: tokens to come. The first token sees itself alone, so it does not count for the most."
        )
    if any(block.side == "cross" for block in blocks):
        lines.append("given › next: the decoder is given the first and asked for the second.")
    every = named(cell_size(blocks, what))
    if every > 1:
        lines.append(f"Tokens are many: one in {every} is named.")
    kinds = {
        "implied": "forms no weights; its map is what it does to values, exactly, for these queries and keys.",
        "pooled": "forms one map for all queries: its rows are the same.",
        "gate": "gates: each token keeps its own value, times this.",
    }
    for kind, text in kinds.items():
        names = dict.fromkeys(one.branch for one in maps.maps if one.kind == kind)
        lines += [f"{', '.join(names)} {text}"] if names else []
    for branch, reason in dict.fromkeys((one.branch, one.reason) for one in maps.absent):
        sites = [one.site for one in maps.absent if (one.branch, one.reason) == (branch, reason)]
        where = ", ".join(sites) if len(sites) <= 3 else f"{sites[0]} to {sites[-1]}"
        lines.append(f"{branch} has no map ({where}): {reason}.")
    return lines


def cell_size(blocks: Sequence[Block], what: TextWhat) -> int:
    """Pixels of a cell: large enough for a name of each token as long as a panel stays small enough.

    Args:
        blocks: All of them have the same.
        what: Which view.
    """
    tokens = max(max(len(block.queries), len(block.keys)) for block in blocks)
    panels = max(len(row.panels) for block in blocks for row in block.rows)
    if what == "mechanism":
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
    what: TextWhat,
    title: str,
    lines: Sequence[Line],
    notes: Sequence[str],
) -> Image.Image:
    """The sheet: a block for each kind of site, one below the other.

    Args:
        blocks: From `text_view`.
        what: Which view they are.
        title: First line.
        lines: Below the title: what the maps are of, and what the model says.
        notes: Lines below, small.
    """
    cell, large = cell_size(blocks, what), what == "mechanism"
    asked = [*(text for text, _ in lines), *(name for one in blocks for name in (*one.queries, *one.keys))]
    letters = Lettering.of(asked)
    if letters.plain:
        notes = [*notes, "No font here has all letters: they are drawn without their marks, or as ?."]
    font = letters.font(_LINE)
    placed = [_Placed(block, cell, large, letters) for block in blocks]
    width = max(620, _MARGIN + int(_TITLE.getlength(title)), *(one.width for one in placed)) + _MARGIN
    room = width - 2 * _MARGIN
    words = [(part, colour) for text, colour in lines for part in _wrapped(letters.written(text), room, font)]
    small = [part for note in notes for part in _wrapped(note, room)]
    head = _MARGIN + 32 + 20 * len(words) + 16 * len(small) + 14
    canvas = Image.new("RGB", (width, head + sum(one.height for one in placed) + 44), _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((_MARGIN, _MARGIN - 4), title, _INK, _TITLE)
    top = _MARGIN + 28
    for text, colour in words:
        pen.text((_MARGIN, top + 9), text, colour or _INK, font, anchor="lm")
        top += 20
    for text in small:
        pen.text((_MARGIN, top + 4), text, _PALE, _SMALL)
        top += 16
    top = head
    for one in placed:
        one.draw(canvas, pen, top)
        top += one.height
    _scale(canvas, pen, canvas.height - 36, "0")
    return canvas


class _Placed:
    """A block and where its parts go.

    Args:
        block: What is drawn.
        cell: Pixels of a cell.
        large: Whether each panel has its own names; otherwise those of a line share the names at the left, and those
            of the block the names above.
        letters: What names are written in.
    """

    def __init__(self, block: Block, cell: int, large: bool, letters: Lettering):
        self.block, self.cell, self.large, self.every = block, cell, large, named(cell)
        self.size = len(block.queries) * cell, len(block.keys) * cell  # rows and columns, in pixels
        self.font = letters.font(13 if cell >= 16 else 11)
        self.queries, self.keys = (
            [_cut(letters.written(name.strip() or "·"), room, self.font) for name in names]
            for names, room in ((block.queries, _BESIDE), (block.keys, _ABOVE))
        )
        self.beside = 6 + max(self._length(name) for name in self.queries)
        self.above = 6 + max(16 if self._flat(name) else self._length(name) for name in self.keys)
        self.pitch = max(self.size[1], _LEAST) + (2 * _GAP + self.beside if large else _GAP)
        fit = max((WIDE - 2 * _MARGIN - (0 if large else self.beside)) // self.pitch, 1)
        self.lines = [_lines(row.panels, fit) for row in block.rows]
        longest = max(len(line) for lines in self.lines for line in lines)
        heading = _MARGIN + int(_TEXT.getlength(SIDES[block.side]))
        self.width = max(_MARGIN + self.beside + longest * self.pitch, heading)
        count = sum(map(len, self.lines))
        self.step = self.size[0] + 16 + _GAP  # a line of panels, what stands below them, a gap
        self.height = 36 + 20 * len(block.rows) + count * self.step + (count if large else 1) * self.above

    def _length(self, name: str) -> int:
        return int(self.font.getlength(name))

    def _flat(self, name: str) -> bool:
        """Whether the name of a key has room without being turned."""
        return self._length(name) <= self.cell * self.every - 2

    def draw(self, canvas: Image.Image, pen: ImageDraw.ImageDraw, top: int) -> None:
        """Draw it below `top`."""
        pen.line((_MARGIN, top, canvas.width - _MARGIN, top), _RULE)
        pen.text((_MARGIN, top + 8), SIDES[self.block.side], _INK, _TEXT)
        top, first = top + 30, True
        for row, lines in zip(self.block.rows, self.lines, strict=True):
            pen.text((_MARGIN, top + 8), row.label, _PALE, _TEXT, anchor="lm")
            top += 20
            for line in lines:
                above = self.large or first
                top += self.above if above else 0
                for i, panel in enumerate(line):
                    left = _MARGIN + self.beside + i * self.pitch
                    canvas.paste(matrix(panel.heat, self.cell, self.block.causal), (left, top))
                    self._name_tokens(canvas, pen, left, top, self.large or i == 0, above)
                    text = f"{panel.name}: {_range(panel.heat, self.block.causal)}"
                    pen.text((left, top + self.size[0] + 9), text, _PALE, _SMALL, anchor="lm")
                top, first = top + self.step, False

    def _name_tokens(
        self, canvas: Image.Image, pen: ImageDraw.ImageDraw, left: int, top: int, beside: bool, above: bool
    ) -> None:
        """Names of the tokens of the panel at `left` and `top`: queries beside it, keys above it."""
        middles = [i * self.cell + self.cell / 2 for i in range(max(len(self.queries), len(self.keys)))]
        chosen = slice(None, None, self.every)
        if beside:
            for name, y in zip(self.queries[chosen], middles[chosen], strict=False):
                pen.text((left - 4, top + y), name, _INK, self.font, anchor="rm")
        if above:
            for name, x in zip(self.keys[chosen], middles[chosen], strict=False):
                if self._flat(name):
                    pen.text((left + x, top - 9), name, _INK, self.font, anchor="mm")
                else:
                    _upright(canvas, (left + x, top - 3), name, self.font)


def _bounds(heat: Float[Tensor, "n m"], causal: bool) -> tuple[float, float]:
    """What gets the first and the last colour: 0, or the least below it, and the most. Of a causal map the first row
    does not count, which has no choice."""
    counted = heat[1:] if causal and len(heat) > 1 else heat
    return min(float(heat.min()), 0.0), float(counted.max())


def _range(heat: Float[Tensor, "n m"], causal: bool) -> str:
    low, high = _bounds(heat, causal)
    return f"{low:.2f} to {high:.2f}" if low < -0.005 else f"{high:.2f}"


def matrix(heat: Float[Tensor, "n m"], cell: int, causal: bool = False) -> Image.Image:
    """A map as squares of one colour each: 0, or the least below it, gets the first colour, the most the last.

    Args:
        heat: Any numbers, (n m).
        cell: Pixels of a square.
        causal: Whether what comes after a query is grey, and the first row, which has no choice, does not count for
            the most.
    """
    low, high = _bounds(heat, causal)
    shares = ((heat - low) / (high - low)).clamp(0, 1) if high > low else torch.zeros_like(heat)
    pixels = colours()[(shares * 255).round().long().cpu()]  # (n m 3)
    if causal:
        forbidden = torch.ones(heat.shape, dtype=torch.bool).triu(1)
        pixels[forbidden] = torch.tensor(_FORBIDDEN, dtype=torch.uint8)
    return Image.fromarray(pixels.repeat_interleave(cell, 0).repeat_interleave(cell, 1).numpy())


def _upright(canvas: Image.Image, at: tuple[float, float], text: str, font: Font) -> None:
    """Text from the bottom to the top, centred above a point."""
    height, width = 16, int(font.getlength(text)) + 2
    ink = Image.new("L", (width, height))
    ImageDraw.Draw(ink).text((0, height / 2), text, 255, font, anchor="lm")
    turned = ink.transpose(Image.Transpose.ROTATE_90)
    canvas.paste(_INK, (round(at[0] - height / 2), round(at[1]) - width), turned)


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
