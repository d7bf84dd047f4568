"""What a layer costs as tokens grow, beside softmax: FLOPs that are counted, times that were measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.ticker import FuncFormatter

from attnzoo.alone.build import create
from attnzoo.bench.cost import flops
from attnzoo.bench.mechanisms import Growth
from attnzoo.errors import ZooError
from attnzoo.gallery.network import LINES, reads_context, spec_of
from attnzoo.plot.palette import INK, PALE, SERIES, SMALL, TEXT, points
from attnzoo.plot.picture import Picture
from attnzoo.zoo import Entry, load_zoo

DIM, HEADS, SIDES = 384, 6, (14, 28, 56)
"""Of the layer that is counted, as of ViT-S; tokens along an edge."""
BASELINE = "softmax"
NAMES = ("FLOPs", "forward, ms")


@dataclass(frozen=True)
class Cost:
    """What one layer costs.

    Args:
        name: Of the component.
        flops: By the number of tokens, two per multiply-add, projections included; empty where it cannot be counted.
        baseline: The same of softmax.
        why: Why it cannot be counted, or what it leaves out.
        params: Number of parameters of the layer at 196 tokens; None where it cannot be built.
        times: Measured milliseconds of a forward by the number of tokens.
        baseline_times: The same of softmax.
    """

    name: str
    flops: dict[int, int]
    baseline: dict[int, int]
    why: str = ""
    params: int | None = None
    times: dict[int, float] = field(default_factory=dict)
    baseline_times: dict[int, float] = field(default_factory=dict)


def cost(entry: Entry, measured: Mapping[str, Growth] | None = None) -> Cost:
    """Count the FLOPs of one layer on the meta device.

    Args:
        entry: A mechanism, pool or fusion of the zoo.
        measured: Times by name, as `attnzoo.bench.mechanisms.read_csv` gives them.
    """
    counted, params, why = _counted(entry)
    baseline, _, _ = _counted(load_zoo().mechanisms[BASELINE])
    growth = measured or {}
    times = {
        name: {n: point.forward[0] for n, point in sorted(growth[name].points.items())}
        if name in growth
        else {}
        for name in (entry.name, BASELINE)
    }
    if counted and not any(counted.values()):
        why = "it has no matrix product, convolution or attention kernel, which alone are counted"
    return Cost(entry.name, counted, baseline, why, params, times[entry.name], times[BASELINE])


def _counted(entry: Entry) -> tuple[dict[int, int], int | None, str]:
    """FLOPs by tokens, the number of parameters, and why there is no more."""
    found: dict[int, int] = {}
    params, why = None, ""
    for side in SIDES:
        try:
            layer, tokens = _layer(entry, side)
            if params is None:
                params = sum(p.numel() for p in layer.parameters())
            found[side**2] = flops(layer, *tokens)[""]
        except ZooError as error:
            why = error.diagnostics[0].message
        except Exception as error:  # a meta tensor has no numbers, of which some choose
            why = f"without numbers it cannot run ({type(error).__name__})"
            break
    return found, params, "" if found else why


def _layer(
    entry: Entry, side: int
) -> tuple[torch.nn.Module, tuple[list[torch.Tensor], dict[str, torch.Tensor]]]:
    """A layer on the meta device, and what it takes."""
    card = entry.value.card
    wanted = getattr(card, "grid", None)
    grid: tuple[int, ...] = (side, side)
    if wanted in LINES:
        grid = (side**2,) if wanted == 1 else (side // 7, 7 * side // 2, 2)
    context: dict[str, Any] = {"context_dim": DIM, "context_grid": grid} if reads_context(entry) else {}
    error: ZooError | None = None
    for prefix in (0, 1):
        try:
            layer = create(
                spec_of(entry), DIM, HEADS, grid=grid, prefix=prefix or None, device="meta", **context
            )
            break
        except ZooError as refused:
            error = error or refused
    else:
        assert error is not None
        raise error
    tokens = [torch.zeros(1, side**2 + prefix, DIM, device="meta")]
    if context:
        tokens.append(torch.zeros(1, side**2, DIM, device="meta"))
    given = {
        name: torch.zeros(1, *grid, device="meta", dtype=torch.long if kind == "labels" else torch.float32)
        for name, kind in getattr(card, "given", {}).items()
    }
    return layer, (tokens, given)


def draw(found: Cost) -> Picture:
    """Against the number of tokens, both axes logarithmic; softmax in grey.

    Args:
        found: Has FLOPs or times.
    """
    panels: list[tuple[str, Mapping[int, float], Mapping[int, float]]] = [
        (title, own, other)
        for title, own, other in (
            (NAMES[0], found.flops, found.baseline),
            (NAMES[1], found.times, found.baseline_times),
        )
        if any(own.values())
    ]
    curves = 1 if found.name == BASELINE else 2
    picture = Picture(400 if len(panels) > 1 else 300, 230, layout="constrained")
    for axes, (title, own, other) in zip(
        picture.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for values, colour, wide, mark in ((other, "#a1a1aa", 2.6, "o"), (own, SERIES[2], 1.6, "s"))[:curves]:
            shown = {n: value for n, value in values.items() if value > 0}
            axes.plot(
                list(shown), list(shown.values()), color=colour, linewidth=wide, marker=mark, markersize=3.5
            )
        sizes = sorted({*own, *other})
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(sizes, [f"{n / 1000:.0f}k" if n > 9999 else str(n) for n in sizes])
        axes.minorticks_off()
        axes.tick_params(labelsize=points(SMALL), color=PALE)
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
        axes.set_title(title, fontsize=points(TEXT), color=INK)
        axes.set_xlabel("tokens", fontsize=points(SMALL))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    names = [BASELINE, found.name][:curves]
    made = picture.axes[0].lines[:curves]
    legend = picture.legend(
        made, names, loc="outside lower center", ncols=2, frameon=False, fontsize=points(SMALL)
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return picture


def _short(value: float, _: Any) -> str:
    """A power of ten as people say it: 10 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"
