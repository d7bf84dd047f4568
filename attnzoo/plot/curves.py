"""Curves: of training, of several recipes side by side, of cost as the number of tokens grows."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from attnzoo.errors import ZooError
from attnzoo.plot.letters import cut, length, spelled
from attnzoo.plot.palette import SERIES, SMALL, TEXT, points
from attnzoo.plot.picture import Numbers, Picture, as_array, axes_for, beside

FEW = 50
"""Up to so many points each has a mark."""
WIDE, LONG = 760, 34
"""Of a picture of several recipes, in pixels; of names that stand side by side in its legend, in letters."""
STYLES, COLUMN = ("-", "--", ":", "-."), 24
"""Styles of lines, of which ten differ in colour; names below each other in a legend beside the panels."""


def lines(
    curves: Mapping[str, Numbers],
    ax: Axes | None = None,
    *,
    x: Sequence[float] | None = None,
    bands: Mapping[str, tuple[Numbers, Numbers]] | None = None,
    colours: Sequence[str] = SERIES,
    xlabel: str = "",
    ylabel: str = "",
    percent: bool = False,
    legend: bool = True,
) -> Axes:
    """Lines over whole numbers such as epochs or layers. One point is a point; the legend stands above all lines.

        lines({"softmax": entropy}, xlabel="layer", ylabel="entropy, nats").figure.savefig("entropy.pdf")

    Args:
        curves: The values of each line by its name; NaN leaves a gap.
        ax: Where they are drawn; a new picture when None.
        x: Where the values stand; 0, 1, ... when None, as far as each line goes.
        bands: Least and most around a line, by its name.
        colours: Of the lines, then the same ones dashed.
        xlabel: What is counted.
        ylabel: What is drawn.
        percent: Whether values are shares, 1 being 100 %.
        legend: Whether names are written.

    Raises:
        ZooError: AZ930, when a line is no row of numbers, or longer than `x`.
    """
    axes, bands = axes_for(ax), bands or {}
    drawn = {name: as_array(values, "n", f"the line `{name}`") for name, values in curves.items()}
    longest = max((len(values) for values in drawn.values()), default=0)
    places = np.arange(longest) if x is None else np.asarray(x)
    if not longest or longest > len(places):
        raise ZooError(
            "AZ930", f"the longest of {len(drawn)} lines has {longest} points, `x` has {len(places)}"
        )
    made: list[Line2D] = []
    for i, (name, values) in enumerate(drawn.items()):
        again, which = divmod(i, len(colours))
        colour, at = colours[which], places[: len(values)]
        if name in bands:
            low, high = (as_array(edge, "n", f"the band of `{name}`") for edge in bands[name])
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        made += axes.plot(
            at, values, color=colour, linestyle=STYLES[again % len(STYLES)], linewidth=1.6,
            marker="o" if len(values) <= FEW else None, markersize=3,
        )  # fmt: skip
    axes.margins(x=0.03)
    left, right = axes.get_xlim()
    axes.set_xlim(max(left, float(places.min()) - 0.5), min(right, float(places.max()) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.ticklabel_format(axis="y", useOffset=False)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        _keep_shares(axes, list(drawn.values()))
    beside(axes.xaxis, xlabel)
    beside(axes.yaxis, ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        _legend(axes, made, list(drawn), loc="lower left", bbox_to_anchor=(0, 1), ncols=min(len(drawn), 3))
    return axes


def _keep_shares(axes: Axes, values: Sequence[np.ndarray]) -> None:
    """No room for shares that cannot be."""
    known = np.concatenate(values)
    known = known[np.isfinite(known)]
    (low, high), least, most = axes.get_ylim(), known.min(initial=0), known.max(initial=0)
    room = 0.03 * (high - low)
    axes.set_ylim(max(low, -room) if least >= 0 else low, min(high, 1 + room) if most <= 1 else high)


def _legend(owner: Any, made: Sequence[Line2D], names: Sequence[str], **how: Any) -> None:
    """A legend on axes or a figure; a name is a name, also `_a`, which some versions of matplotlib leave out."""
    places = [f"line {i}" for i in range(len(names))]
    own = owner.legend(made, places, frameon=False, fontsize=points(TEXT), **how)
    for text, name in zip(own.get_texts(), names, strict=True):
        written, letters = spelled(name)
        text.set(text=written, **letters)


def learning_curves(log: Sequence[Mapping[str, Any]], title: str = "") -> Picture:
    """Losses and test accuracy by epoch.

        attnzoo.plot.learning_curves(open_run("runs/mine").log(), "mine")

    Args:
        log: Rows of `Run.log()`.
        title: What stands above it, before the best accuracy.

    Raises:
        ZooError: AZ930, when there is no epoch.
    """
    if not log:
        raise ZooError("AZ930", "a learning curve of no epoch")
    picture, epochs = Picture(900, 340, layout="constrained"), [row["epoch"] for row in log]
    losses, accuracy = picture.subplots(1, 2)

    def column(name: str) -> list[float]:
        return [row[name] for row in log]

    lines(
        {"train": column("train_loss"), "test": column("test_loss")},
        losses, x=epochs, colours=("#8a8a8a", "#c2410c"), xlabel="epoch", ylabel="loss",
    )  # fmt: skip
    lines(
        {"test": column("test_accuracy")},
        accuracy, x=epochs, colours=("#1d4ed8",), xlabel="epoch", ylabel="test accuracy", percent=True,
    )  # fmt: skip
    text, how = spelled(cut(_headline(log, title), 880, TEXT))
    picture.suptitle(text, fontsize=points(TEXT), **how)
    return picture


def _headline(log: Sequence[Mapping[str, Any]], title: str) -> str:
    best = max(log, key=lambda row: row["test_accuracy"])
    said = f"best accuracy {best['test_accuracy']:.2%} in epoch {best['epoch']}"
    return f"{title}: {said}" if title else said


def comparison_curves(logs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Picture:
    """Test accuracy and training loss by epoch, a line for each recipe.

    Lines are means over seeds, as far as all of them went; bands run from the least to the most.

    Args:
        logs: Of each recipe the rows of `Run.log()` of each seed.

    Raises:
        ZooError: AZ930, when there is no recipe, or a run without an epoch.
    """
    if not logs or not all(runs and all(runs) for runs in logs.values()):
        raise ZooError("AZ930", "a comparison of no recipes, or of a run without an epoch")
    columns = 1 if max(map(len, logs)) > LONG else 3
    picture = Picture(WIDE, 640 + 20 * -(-len(logs) // columns), layout="constrained")
    for axes, (column, label) in zip(
        picture.subplots(2),
        (("test_accuracy", "test accuracy"), ("train_loss", "training loss")),
        strict=True,
    ):
        spread = {name: _over_seeds(runs, column) for name, runs in logs.items()}
        most = max(len(mean) for mean, _, _ in spread.values())
        lines(
            {name: mean for name, (mean, _, _) in spread.items()},
            axes,
            x=range(1, most + 1),
            bands={name: (low, high) for name, (_, low, high) in spread.items()},
            xlabel="epoch",
            ylabel=label,
            percent=column == "test_accuracy",
            legend=False,
        )
    _legend(picture, axes.lines, list(logs), loc="outside upper left", ncols=columns)
    return picture


def _over_seeds(runs: Sequence[Sequence[Mapping[str, Any]]], column: str) -> tuple[list[float], ...]:
    """Mean, least and most over the seeds, epoch by epoch, as far as all seeds went."""
    epochs = [[row[column] for row in rows] for rows in zip(*runs, strict=False)]
    return tuple([of(values) for values in epochs] for of in (statistics.fmean, min, max))


def growth_curves(panels: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Picture:
    """Costs over the number of tokens, with logarithmic axes. The first line is black: the others are held against it.

    Args:
        panels: By what is measured, and by name: values by the number of tokens.

    Raises:
        ZooError: AZ930, when there is no panel or none has a line.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    if not names:
        raise ZooError("AZ930", "curves of nothing")
    columns = -(-len(names) // COLUMN)
    beside = columns * (50 + max(length(name, SMALL) for name in names))
    picture = Picture(340 * len(panels) + beside, 400, layout="constrained")
    sizes = sorted({n for curves in panels.values() for values in curves.values() for n in values})
    for axes, (what, curves) in zip(
        np.atleast_1d(picture.subplots(1, len(panels))), panels.items(), strict=True
    ):
        for i, name in enumerate(names):
            style: dict[str, Any] = {
                "color": f"C{(i - 1) % 10}",
                "linestyle": STYLES[(i - 1) // 10 % len(STYLES)],
            }
            values = sorted(curves.get(name, {}).items())
            axes.plot([n for n, _ in values], [v for _, v in values], marker=".",
                      **style if i else {"color": "black", "linewidth": 3})  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="tokens")
        axes.set_title(what, fontsize=points(TEXT))
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    _legend(picture, axes.lines, names, loc="outside right upper", ncols=columns)
    for text in picture.legends[0].get_texts():
        text.set_fontsize(points(SMALL))
    return picture
