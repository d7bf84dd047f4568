"""Sheets of the attention maps of sequences: which maps are shown, and what has to be said about them."""

from collections.abc import Sequence
from typing import Literal

from attnzoo.lab.text_maps import Example, Side, Stack, TextMaps
from attnzoo.plot import Block, Panel, Picture, Row
from attnzoo.plot import text_sheet as drawn
from attnzoo.plot.palette import Line
from attnzoo.plot.tokens import cell_size, named

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
            SIDES[stack.side],
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
    every = named(cell_size(blocks, large=what == "mechanism"))
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


def text_sheet(
    blocks: Sequence[Block],
    what: TextWhat,
    title: str,
    lines: Sequence[Line],
    notes: Sequence[str],
) -> Picture:
    """The sheet of a view.

    Args:
        blocks: From `text_view`.
        what: Which view they are.
        title: First line.
        lines: Below the title: what the maps are of, and what the model says.
        notes: From `text_notes`.
    """
    return drawn(blocks, title, lines, notes, large=what == "mechanism")
