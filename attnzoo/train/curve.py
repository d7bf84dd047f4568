"""The learning curve: losses and test accuracy by epoch, as SVG without any library and as PNG with matplotlib."""

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from attnzoo.train.checkpoint import replace

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 360, 260, 56, 40, 44
"""Of a panel and its margins, in pixels."""
PANELS = (("loss", ("train_loss", "test_loss")), ("test accuracy", ("test_accuracy",)))
COLOURS = {"train_loss": "#8a8a8a", "test_loss": "#c2410c", "test_accuracy": "#1d4ed8"}
TICKS = 4


def curve_svg(log: Sequence[dict[str, Any]], title: str) -> str:
    """The chart as SVG.

    Args:
        log: Rows of `Run.log()`, at least one.
        title: What stands above it.
    """
    panels = [_panel(log, name, columns, WIDTH * i) for i, (name, columns) in enumerate(PANELS)]
    best = max(log, key=lambda row: row["test_accuracy"])
    text = f"{title}: best accuracy {best['test_accuracy']:.2%} in epoch {best['epoch']}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{HEIGHT}" '
            f'viewBox="0 0 {2 * WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11" role="img">',
            f"<title>{escape(text)}</title>",
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="{LEFT}" y="18" font-size="13">{escape(text)}</text>',
            *panels,
            "</svg>\n",
        ]
    )


def _panel(log: Sequence[dict[str, Any]], name: str, columns: Sequence[str], offset: int) -> str:
    """One coordinate system with its lines."""
    last = max(2, log[-1]["epoch"])
    values = [row[column] for row in log for column in columns]
    low, high = min(values), max(values)
    high = high if high > low else low + 1.0

    def x(epoch: float) -> float:
        return offset + LEFT + (WIDTH - LEFT - 16) * (epoch - 1) / (last - 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    drawn = []
    for i in range(TICKS + 1):
        value, epoch = low + (high - low) * i / TICKS, 1 + (last - 1) * i / TICKS
        drawn.append(f'<path d="M{x(1):.1f} {y(value):.1f}H{x(last):.1f}" stroke="#e5e5e5"/>')
        drawn.append(f'<text x="{x(1) - 6:.1f}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        drawn.append(
            f'<text x="{x(epoch):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{epoch:.0f}</text>'
        )
    for i, column in enumerate(columns):
        points = " ".join(f"{x(row['epoch']):.1f},{y(row[column]):.1f}" for row in log)
        colour = COLOURS[column]
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        where = f'x="{x(last):.1f}" y="{TOP + 12 + 14 * i}" text-anchor="end" fill="{colour}"'
        drawn.append(f"<text {where}>{column.replace('_', ' ')}</text>")
    drawn.append(f'<text x="{x((1 + last) / 2):.1f}" y="{HEIGHT - 8}" text-anchor="middle">epoch</text>')
    return f'<g aria-label="{name}">{"".join(drawn)}</g>'


def curve_png(log: Sequence[dict[str, Any]], title: str, file: Path) -> bool:
    """Write the chart as an image.

    Args:
        log: Rows of `Run.log()`, at least one.
        title: What stands above it.
        file: Where.

    Returns:
        Whether matplotlib is there (extra `plot`); without it nothing is written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(title)
    for axes, (name, columns) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for column in columns:
            label = column.replace("_", " ")
            axes.plot([r["epoch"] for r in log], [r[column] for r in log], color=COLOURS[column], label=label)
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    replace(file, drawn.getvalue())
    return True
