"""The data flow of a component, drawn from one forward of it: nobody draws it by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve
from torch import Tensor

from attnzoo.core import Fusion, Head, Layout, Pool, Site, watch
from attnzoo.errors import ZooError
from attnzoo.gallery.tracing import Box, Flow, Recorder, Stand, boxes_of
from attnzoo.plot.letters import cut, length, spelled, wrapped
from attnzoo.plot.palette import GAP, INK, MARGIN, PALE, SMALL, TEXT, points
from attnzoo.plot.picture import Picture
from attnzoo.zoo import Entry

BATCH, HEADS = 5, 8
"""Of the traced forward; few lengths are equal, so that they can be told apart."""
PLACES = ((14, 0, 96), (14, 1, 96), (16, 0, 64), (16, 1, 64))
"""Where a component is tried: tokens along an edge, special tokens, channels."""
GRIDS = {1: (196,), 3: (4, 7, 7)}
COLOURS = {
    "input": "#dbe7fb",
    "branch": "#e9ddf7",
    "learnt": "#fde6cf",
    "tap": "#d8f0e0",
    "operation": "#ffffff",
    "output": "#e8e8ec",
}
SAYS = {
    "input": "goes in",
    "branch": "a branch",
    "learnt": "learnt",
    "tap": "can be looked at",
    "operation": "computed",
}
WIDEST, HIGH, BETWEEN, APART, THIN = 150, 42, 26, 12, 14
"""In pixels: a box at most, and its height; between rows, between boxes, and the room of an arrow that passes."""


def flow(entry: Entry) -> Picture:
    """The data flow of a component.

        flow(load_zoo().mechanisms["softmax"])

    Args:
        entry: A mechanism, pool or fusion of the zoo.
    """
    return draw(trace(entry))


def trace(entry: Entry) -> Flow:
    """What goes where in a component, by one forward at a small site.

    Args:
        entry: A mechanism, pool or fusion of the zoo.
    """
    reason = ""
    for side, prefix, dim in PLACES:
        try:
            return _traced(entry, side, prefix, dim)
        except ZooError as error:
            reason = reason or error.diagnostics[0].message
        except Exception as error:  # what is foreign may fail in any way
            reason = reason or f"{type(error).__name__}: {error}"
    return _unseen(entry, reason)


def _unseen(entry: Entry, reason: str) -> Flow:
    """What is known of a component that cannot be followed: what goes in, its taps, what comes out."""
    cls, card = entry.value, entry.value.card
    names = (
        ["branch 1", "branch 2"]
        if issubclass(cls, Fusion)
        else ["q", "k", "v"]
        if issubclass(cls, Head)
        else ["x"]
    )
    if getattr(card, "context_grid", None) is not None:
        names.append("context")
    names += list(getattr(card, "given", {}))
    taps = [Box(name, "tap", axes) for name, axes in getattr(card, "taps", {}).items()][:6]
    boxes = [
        *(Box(name, "input") for name in names),
        *taps,
        Box(entry.name, "operation"),
        Box("output", "output"),
    ]
    own, first = len(boxes) - 2, len(names)
    arrows = {(i, own) for i in range(first)} | {(own, i) for i in range(first, own)} | {(own, own + 1)}
    return Flow(tuple(boxes), frozenset(arrows), f"Its inside could not be followed: {reason}.")


def _traced(entry: Entry, side: int, prefix: int, dim: int) -> Flow:
    cls, card = entry.value, entry.value.card
    wanted = getattr(card, "grid", None)
    layout = Layout(GRIDS.get(wanted, (side, side)), prefix)  # type: ignore[arg-type]
    site = Site("flow", dim, HEADS, layout)
    reads = getattr(card, "context_grid", None) is not None or getattr(card, "context", False) == "beside"
    if reads:
        site = replace(site, context_dim=dim, context_layout=layout)
    random = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if issubclass(cls, Fusion):
            return _fusion(cls(site, 2), cls, site, tensor(BATCH, layout.length, dim))
        component: Any = cls(site).eval()
        n, m = layout.length, (site.context_layout or layout).length
        if isinstance(component, Head):
            sources = {
                name: (tensor(BATCH, HEADS, n, dim // HEADS), axes)
                for name, axes in (("q", "b h n d"), ("k", "b h m d"), ("v", "b h m d"))
            }
        else:
            sources = {"x": (tensor(BATCH, n, dim), "b n c")}
            if reads:
                sources["context"] = (tensor(BATCH, m, dim), "b m c")
        given = {
            name: (torch.randint(0, 3, (BATCH, *layout.grid), generator=random) if kind == "labels"
                   else tensor(BATCH, *layout.grid), "b y x")
            for name, kind in card.given.items()
        }  # fmt: skip
        where: dict[str, Any] = {"layout": layout}
        if given:
            where["given"] = {name: values for name, (values, _) in given.items()}
        if reads:
            where["context_layout"] = layout
        recorder = Recorder(component)
        for name, (values, axes) in (sources | given).items():
            recorder.source(values, name, axes)

        def recorded() -> Tensor:
            return component(*(values for values, _ in sources.values()), **where)

        with torch.no_grad(), watch(component, None, lambda name, seen: None), recorder.parts(), recorder:
            out = recorded()
    axes = "b c" if isinstance(component, Pool) else "b h n d" if isinstance(component, Head) else "b n c"
    return _seen(recorder, out, axes, layout, dim)


def _fusion(fusion: Any, cls: type[Fusion], site: Site, x: Tensor) -> Flow:
    fusion.eval().requires_grad_(True)
    fusion.branch_1, fusion.branch_2 = (Stand(one.dim) for one in cls.sites(site, 2))
    recorder = Recorder(fusion)
    recorder.source(x, "x", "b n c")

    def recorded() -> Tensor:
        outs: list[Tensor] = []
        for branch, part in zip((fusion.branch_1, fusion.branch_2), fusion.split(x, -1), strict=True):
            outs.append(branch(fusion.feed(part, outs)))
        return fusion(outs, x)

    with torch.no_grad(), watch(fusion, None, lambda name, seen: None), recorder.parts(), recorder:
        out = recorded()
    return _seen(recorder, out, "b n c", site.layout, site.dim)


def _seen(recorder: Recorder, out: Tensor, axes: str, layout: Layout, dim: int) -> Flow:
    if not recorder.known(out):
        raise RuntimeError("its result comes from where PyTorch's calls cannot be seen")
    recorder.result(out, axes)
    letters = {BATCH: "b", HEADS: "h", dim: "c", dim // HEADS: "d", layout.length: "n"}
    if len(layout.grid) == 2:
        letters[layout.grid[0]] = "y"
    for node in recorder.nodes:  # what taps know of slots and windows
        for letter, size in zip(node.axes.split(), node.shape, strict=False):
            if letter in "rwk":
                letters.setdefault(size, letter)
    products = {2 * dim: "2c", 3 * dim: "3c", 4 * dim: "4c", dim // 2: "c/2", 2 * (dim // HEADS): "2d"}
    products |= {BATCH * HEADS: "(b h)", BATCH * layout.length: "(b n)"}
    letters = products | letters
    return boxes_of(recorder.nodes, letters)


# Drawing


def draw(found: Flow) -> Picture:
    """Boxes in rows, from what goes in to what comes out; arrows never run through a box.

    Args:
        found: What goes where.
    """
    names = names_of(found)
    widths = [wide(name, box) for name, box in zip(names, found.boxes, strict=True)]
    rows, chains = _rows(found)
    centres = _centres(rows, chains, widths)
    half = {item: widths[item] / 2 if isinstance(item, int) else THIN / 2 for item in centres}
    left = min(centres[item] - half[item] for item in centres)
    right = max(centres[item] + half[item] for item in centres)
    loops = [(i, j) for i, j in found.arrows if j <= i]
    right += 30 * bool(loops)
    legend = [kind for kind in SAYS if any(box.kind == kind for box in found.boxes)]
    below = sum(26 + length(SAYS[kind], SMALL) for kind in legend)
    total = max(right - left, below, 300) + 2 * MARGIN
    shift = (total - (right - left)) / 2 - left
    step = HIGH + BETWEEN
    notes = wrapped(found.note, total - 2 * MARGIN) if found.note else []
    high = MARGIN + len(rows) * step - BETWEEN + 44 + 16 * len(notes)
    picture = Picture(total, high)
    axes = picture.panel(0, 0, total, high)
    axes.set(xlim=(0, total), ylim=(high, 0))
    level = {item: at for at, row in enumerate(rows) for item in row}

    def top(item: Any) -> float:
        return MARGIN + level[item] * step

    for chain in chains:
        _arrow(axes, chain, {item: centres[item] + shift for item in chain}, top)
    for i, j in loops:
        _loop(axes, centres[i] + widths[i] / 2 + shift, top(i), centres[j] + widths[j] / 2 + shift, top(j))
    for i, (box, name) in enumerate(zip(found.boxes, names, strict=True)):
        x, y = centres[i] + shift, top(i)
        axes.add_patch(
            FancyBboxPatch(
                (x - widths[i] / 2 + 3, y + 3), widths[i] - 6, HIGH - 6, boxstyle="round,pad=2,rounding_size=6",
                facecolor=COLOURS[box.kind], edgecolor=PALE, linewidth=0.8, zorder=3,
            )
        )  # fmt: skip
        written, how = spelled(name)
        middle = y + HIGH / 2 - (8 if box.shape else 0)
        axes.text(
            x, middle, written, ha="center", va="center", fontsize=points(TEXT), color=INK, zorder=4, **how
        )
        if box.shape:
            axes.text(x, y + HIGH / 2 + 9, box.shape, ha="center", va="center", fontsize=points(SMALL),
                      color="#55555c", zorder=4)  # fmt: skip
    at, line = float(MARGIN), MARGIN + len(rows) * step - BETWEEN + 20
    for kind in legend:
        axes.add_patch(
            FancyBboxPatch((at + 1, line - 5), 11, 10, boxstyle="round,pad=0,rounding_size=2",
                           facecolor=COLOURS[kind], edgecolor=PALE, linewidth=0.8)
        )  # fmt: skip
        axes.text(at + 17, line, SAYS[kind], va="center", fontsize=points(SMALL), color="#55555c")
        at += 26 + length(SAYS[kind], SMALL)
    for k, text in enumerate(notes):
        picture.write(MARGIN, line + 20 + 16 * k, text, SMALL, "#55555c")
    return picture


def names_of(found: Flow) -> list[str]:
    """What stands in each box, as much of it as fits.

    Args:
        found: What goes where.
    """
    return [
        cut(f"{box.label} ({box.times} ×)" if box.times > 1 else box.label, WIDEST, TEXT)
        for box in found.boxes
    ]


def wide(name: str, box: Box) -> float:
    """How wide a box is, in pixels.

    Args:
        name: What stands in it.
        box: It.
    """
    return max(length(name, TEXT), length(box.shape, SMALL), 34) + 2 * GAP


def _rows(found: Flow) -> tuple[list[list[Any]], list[list[Any]]]:
    """Boxes row by row, with places for arrows that pass, in an order with few crossings; and the way of each arrow.

    Sugiyama's method: a row is the longest way from what goes in; rows are ordered by the middle of their neighbours.
    """
    forward = sorted((i, j) for i, j in found.arrows if i < j)
    level = [0] * len(found.boxes)
    for i, j in forward:  # sorted, so that all that leads to i was seen
        level[j] = max(level[j], level[i] + 1)
    level[-1] = max([*level[:-1], level[-1] - 1], default=0) + 1
    rows: list[list[Any]] = [[] for _ in range(level[-1] + 1)]
    for i, at in enumerate(level):
        rows[at].append(i)
    chains = []
    for i, j in forward:
        passing = [(i, j, at) for at in range(level[i] + 1, level[j])]
        for passes in passing:
            rows[passes[2]].append(passes)
        chains.append([i, *passing, j])
    above: dict[Any, list[Any]] = {}
    below: dict[Any, list[Any]] = {}
    for chain in chains:
        for one, other in zip(chain, chain[1:], strict=False):
            below.setdefault(one, []).append(other)
            above.setdefault(other, []).append(one)
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for turn in range(16):
        down = turn % 2 == 0
        for at in range(1, len(rows)) if down else range(len(rows) - 2, -1, -1):
            place = {item: k for k, item in enumerate(rows[at - 1 if down else at + 1])}
            near = above if down else below

            def middle(item: Any, place: dict = place, near: dict = near, row: list = rows[at]) -> float:
                seen = [place[other] for other in near.get(item, [])]
                return sum(seen) / len(seen) if seen else row.index(item)

            keys = {item: middle(item) for item in rows[at]}
            rows[at].sort(key=keys.__getitem__)
        now = _crossings(rows, below)
        if now < fewest:
            best, fewest = [list(row) for row in rows], now
    return best, chains


def _crossings(rows: Sequence[Sequence[Any]], below: dict[Any, list[Any]]) -> int:
    count = 0
    for row, after in zip(rows, rows[1:], strict=False):
        place = {item: k for k, item in enumerate(after)}
        ends = [sorted(place[other] for other in below.get(item, [])) for item in row]
        flat = [(k, e) for k, those in enumerate(ends) for e in those]
        count += sum(a < c and b > d for a, b in flat for c, d in flat)
    return count


def _centres(
    rows: Sequence[Sequence[Any]], chains: Sequence[Sequence[Any]], widths: Sequence[float]
) -> dict[Any, float]:
    """Where each box and each place of an arrow has its middle: near its neighbours, apart from the next in its row."""

    def wide(item: Any) -> float:
        return widths[item] if isinstance(item, int) else THIN

    near: dict[Any, list[Any]] = {item: [] for row in rows for item in row}
    for chain in chains:
        for one, other in zip(chain, chain[1:], strict=False):
            near[one].append(other)
            near[other].append(one)
    centres: dict[Any, float] = {}
    for row in rows:
        at = -sum(wide(item) + APART for item in row) / 2
        for item in row:
            centres[item] = at + wide(item) / 2
            at += wide(item) + APART

    def pull(one: Any, other: Any) -> int:
        """How straight an arrow is to be: where it passes boxes, very."""
        passing = isinstance(one, tuple) + isinstance(other, tuple)
        return (3, 1, 8)[passing]

    for turn in range(200):
        for row in rows if turn % 2 == 0 else reversed(rows):
            wished = [
                sum(pull(item, o) * centres[o] for o in near[item]) / sum(pull(item, o) for o in near[item])
                if near[item]
                else centres[item]
                for item in row
            ]
            offsets = [0.0]
            for one, other in zip(row, row[1:], strict=False):
                offsets.append(offsets[-1] + (wide(one) + wide(other)) / 2 + APART)
            for item, at, offset in zip(
                row, _ascending([w - o for w, o in zip(wished, offsets, strict=True)]), offsets, strict=True
            ):
                centres[item] = at + offset
    return centres


def _ascending(values: Sequence[float]) -> list[float]:
    """The nearest row of numbers that never falls: neighbours that fall become their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            other, more = blocks.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


def _arrow(axes: Any, chain: Sequence[Any], x: dict[Any, float], top: Any) -> None:
    """A smooth way from the lower edge of a box, through its places, to the upper edge of another."""
    stops = [(x[chain[0]], top(chain[0]) + HIGH)]
    for item in chain[1:-1]:
        stops += [(x[item], top(item)), (x[item], top(item) + HIGH)]
    stops.append((x[chain[-1]], top(chain[-1]) + 1))
    points_, codes = [stops[0]], [Curve.MOVETO]
    for k, ((x0, y0), (x1, y1)) in enumerate(zip(stops, stops[1:], strict=False)):
        if k % 2:
            points_, codes = [*points_, (x1, y1)], [*codes, Curve.LINETO]
        else:
            half = (y1 - y0) / 2
            points_ += [(x0, y0 + half), (x1, y1 - half), (x1, y1)]
            codes += [Curve.CURVE4] * 3
    axes.add_patch(
        FancyArrowPatch(path=Curve(points_, codes), arrowstyle="-|>", mutation_scale=8, color="#4a4a50",
                        linewidth=1.1, shrinkA=0, shrinkB=0, zorder=2)
    )  # fmt: skip


def _loop(axes: Any, x0: float, y0: float, x1: float, y1: float) -> None:
    """What goes back to an earlier box, at the right."""
    away = max(x0, x1) + 22
    low, high = y0 + HIGH / 2 + 6, y1 + HIGH / 2 - 6
    curve = Curve([(x0, low), (away, low), (away, high), (x1 + 1, high)], [1, 4, 4, 4])
    axes.add_patch(
        FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=8, color=PALE, linewidth=1.1,
                        linestyle=(0, (3, 2)), shrinkA=0, shrinkB=0, zorder=2)
    )  # fmt: skip
