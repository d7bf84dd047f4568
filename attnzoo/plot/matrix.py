"""A number for each head: layers down, heads across."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from attnzoo.errors import ZooError
from attnzoo.plot.letters import spelled
from attnzoo.plot.palette import INK, MISSING, PALE, SMALL, points
from attnzoo.plot.picture import Numbers, as_array, axes_for, beside, figure_of

SMALL_TABLE = 200
"""Up to so many cells, and columns that leave room, numbers are written into them."""
WIDEST = 16


def head_matrix(
    values: Numbers,
    ax: Axes | None = None,
    *,
    label: str = "",
    title: str = "",
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    xlabel: str = "head",
    ylabel: str = "layer",
    centre: float | None = None,
    least: float | None = None,
    most: float | None = None,
    cmap: str | None = None,
    digits: int | None = None,
) -> Axes:
    """A table of numbers as colours: layers down, heads across. Numbers are written into a small one; NaN is grey.

        head_matrix(entropy, label="entropy, nats")
        head_matrix(change, label="points of accuracy", centre=0)

    Args:
        values: A number for each layer and head, (layers heads); rows may be shorter where a layer has fewer heads.
        ax: Where it is drawn; a new picture when None.
        label: What the numbers are, beside the scale.
        title: What stands above.
        rows: Names of the layers; their numbers when None.
        columns: Names of the heads; their numbers when None.
        xlabel: What a column is.
        ylabel: What a row is.
        centre: The number that is white; colours on both sides then go equally far. None for a scale that only grows.
        least: Number of the first colour; the least that there is when None.
        most: Number of the last colour; the most that there is when None.
        cmap: Any of matplotlib's scales; `viridis`, or `RdBu_r` around a centre.
        digits: After the point, of what is written; as many as tell the numbers apart when None.

    Raises:
        ZooError: AZ930, when the numbers are no table, or names and numbers are not equally many.
    """
    table = as_array(_even(values), "layers heads", "a table of heads")
    layers, heads = table.shape
    for names, count, what in ((rows, layers, "layers"), (columns, heads, "heads")):
        if names is not None and len(names) != count:
            raise ZooError("AZ930", f"{len(names)} names for {count} {what}")
    axes = axes_for(ax, max(360, 150 + 42 * min(heads, WIDEST)), max(240, 120 + 30 * min(layers, 24)))
    known = np.ma.masked_invalid(table)
    bounds = _bounds(known, centre, least, most)
    colours = matplotlib.colormaps[cmap or ("viridis" if centre is None else "RdBu_r")].with_extremes(
        bad=MISSING
    )
    image = axes.imshow(known, cmap=colours, norm=Normalize(*bounds), aspect="auto", interpolation="none")
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        if names is None:
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        else:
            _, how = spelled("".join(names))
            axis.set_ticks(range(len(names)), [spelled(name)[0] for name in names], **how)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    beside(axes.xaxis, xlabel)
    beside(axes.yaxis, ylabel)
    beside(figure_of(axes).colorbar(image, ax=axes).ax.yaxis, label)
    text, how = spelled(title)
    axes.set_title(text, **how)
    if table.size <= SMALL_TABLE and heads <= WIDEST:
        _write(axes, known, image, digits)
    return axes


def _even(values: Numbers) -> Numbers:
    """Rows of equal length: shorter ones are filled with NaN."""
    if hasattr(values, "shape") or not all(hasattr(row, "__len__") for row in values):
        return values
    longest = max(map(len, values), default=0)
    return [[*row, *[float("nan")] * (longest - len(row))] for row in values]


def _bounds(
    known: np.ma.MaskedArray, centre: float | None, least: float | None, most: float | None
) -> tuple[float, float]:
    """Numbers of the first and the last colour."""
    there = known.compressed() if known.count() else np.zeros(1)
    low = float(there.min()) if least is None else least
    high = float(there.max()) if most is None else most
    if centre is not None:
        far = max(abs(low - centre), abs(high - centre))
        low, high = centre - far, centre + far
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _write(axes: Axes, known: np.ma.MaskedArray, image, digits: int | None) -> None:
    """Each number in its cell, dark on bright and bright on dark; a dash where there is none."""
    span = float(np.ptp(known.compressed())) if known.count() else 0.0
    places = (
        digits if digits is not None else 2 if not span else int(np.clip(2 - np.ceil(np.log10(span)), 0, 3))
    )
    for (layer, head), value in np.ndenumerate(known.filled(np.nan)):
        red, green, blue, _ = image.cmap(image.norm(value)) if np.isfinite(value) else (1, 1, 1, 1)
        bright = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5
        text = f"{value:z.{places}f}" if np.isfinite(value) else "–"
        colour = PALE if not np.isfinite(value) else INK if bright else "white"
        axes.text(head, layer, text, ha="center", va="center", color=colour, fontsize=points(SMALL))
