"""A comparison as one HTML file that opens from the disk: no script, no network."""

import statistics
from html import escape
from typing import Any

from attnzoo.train.compare import Comparison
from attnzoo.train.settings import Kind, data_kind

COLOURS = ("#555555", "#1d4ed8", "#c2410c", "#047857", "#7c3aed", "#b91c1c", "#0e7490", "#a16207")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 320, 56, 16, 16, 40
"""Of a chart and its margins, in pixels."""

ACCURACY: dict[Kind, str] = {
    "images": "",
    "pairs": "Accuracy is the share of target tokens that are right, given the right ones before.",
    "sequences": "Accuracy is the share of what is asked that is right; of numbers, the share of variance explained.",
}
"""What has to be said of it."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
       background: #ffffff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.better { color: #047857; font-weight: 600; } .worse { color: #b91c1c; font-weight: 600; } .noise { color: #555; }
svg { width: 100%; height: auto; } .key { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; }
.small { color: #555; font-size: .85rem; }
"""


def page(comparison: Comparison, title: str) -> str:
    """The whole page.

    Args:
        comparison: The outcome.
        title: Shown on top.
    """
    colours = {row.recipe: COLOURS[i % len(COLOURS)] for i, row in enumerate(comparison.rows)}
    verdicts = "".join(
        f'<li class="{d.verdict}">{escape(text)}</li>'
        for d, text in zip(comparison.differences, comparison.sentences(), strict=True)
    )
    charts = "".join(
        f"<h2>{escape(name)}</h2>{_chart(comparison, column, colours)}"
        for name, column in (
            ("Test accuracy by epoch", "test_accuracy"),
            ("Training loss by epoch", "train_loss"),
        )
    )
    seeds, kind = comparison.rows[0].seeds, data_kind(comparison.data) or "images"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>{len(comparison.rows)} recipes × {seeds} seeds on {escape(comparison.data)}; the same
{escape(comparison.budget)} for all, and for each seed the same order of {kind}.</p>
<h2>Who is better, and is it noise?</h2><ul>{verdicts or "<li>one recipe alone</li>"}</ul>
<h2>Figures</h2>{_table(comparison, colours, kind)}
<p class="small">Mean ± standard deviation over seeds. “Best” is the best epoch on the test side, which flatters every
recipe; “last” is the end of training. {ACCURACY[kind]}</p>
{f"<p>{escape(speed)}</p>" if (speed := comparison.speed()) else ""}
{_differences(comparison)}
{charts}
<p class="small">Lines are means over seeds, bands run from the worst seed to the best.</p>
</body></html>
"""


def _table(comparison: Comparison, colours: dict[str, str], examples: str) -> str:
    head = "<tr><th>recipe</th><th>best accuracy</th><th>at epoch</th><th>last accuracy</th><th>epochs</th>"
    head += f"<th>parameters</th><th>{examples}/s</th></tr>"
    rows = "".join(
        f'<tr><td><span class="key" style="background:{colours[r.recipe]}"></span>{escape(r.recipe)}</td>'
        f"<td>{r.best:.2%} ± {r.best_spread:.2%}</td><td>{r.best_epoch:.1f}</td>"
        f"<td>{r.last:.2%} ± {r.last_spread:.2%}</td><td>{r.epochs:.0f}</td><td>{r.params:,}</td>"
        f"<td>{r.images_per_second:,.0f}</td></tr>"
        for r in comparison.rows
    )
    return f"<table>{head}{rows}</table>"


def _differences(comparison: Comparison) -> str:
    if not comparison.differences:
        return ""
    head = "<tr><th>difference, in points</th><th>accuracy</th><th>mean</th><th>95 % interval (t)</th>"
    head += "<th>95 % interval (bootstrap)</th><th>verdict</th></tr>"
    rows = "".join(
        f"<tr><td>{escape(d.recipe)} − {escape(d.against)}</td><td>{d.what}</td><td>{100 * d.mean:+.2f}</td>"
        f"<td>{d.interval or 'one seed has none'}</td><td>{d.bootstrap_interval or 'one seed has none'}</td>"
        f'<td class="{d.verdict}">{d.verdict}</td></tr>'
        for d in comparison.differences
    )
    return (
        f"<h2>Differences, seed by seed</h2><table>{head}{rows}</table><p class='small'>A verdict needs both intervals "
        "on one side of zero. Resampling few seeds gives intervals that are too narrow: hence Student's t.</p>"
    )


def _chart(comparison: Comparison, column: str, colours: dict[str, str]) -> str:
    curves = {name: _curve(logs, column) for name, logs in comparison.logs.items()}
    last = max(2, max(len(curve) for curve in curves.values()))
    values = [value for curve in curves.values() for point in curve for value in point[1:]]
    low, high = min(values), max(values)
    high = high if high > low else low + 1.0

    def x(epoch: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (epoch - 1) / (last - 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    drawn = []
    for i in range(5):
        value, epoch = low + (high - low) * i / 4, 1 + (last - 1) * i / 4
        label = f"{value:.0%}" if column.endswith("accuracy") else f"{value:.3g}"
        drawn.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#e5e5e5"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>')
        drawn.append(f'<text x="{x(epoch):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{epoch:.0f}</text>')
    for name, curve in curves.items():
        band = [f"{x(e):.1f},{y(top):.1f}" for e, (_, _, top) in enumerate(curve, start=1)]
        band += [
            f"{x(e):.1f},{y(bottom):.1f}" for e, (_, bottom, _) in reversed(list(enumerate(curve, start=1)))
        ]
        line = " ".join(f"{x(e):.1f},{y(mean):.1f}" for e, (mean, _, _) in enumerate(curve, start=1))
        drawn.append(f'<polygon points="{" ".join(band)}" fill="{colours[name]}" opacity="0.15"/>')
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
    for i, name in enumerate(curves):
        at = f'x="{WIDTH - RIGHT - 8}" text-anchor="end" fill="{colours[name]}"'
        base = (
            TOP + 16 + 16 * i if column == "train_loss" else HEIGHT - BOTTOM - 10 - 16 * (len(curves) - 1 - i)
        )
        drawn.append(f'<text {at} y="{base}">{escape(name)}</text>')
    drawn.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">epoch</text>')
    label = f"{column.replace('_', ' ')} by epoch, a line for each recipe"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="12" role="img" '
        f'aria-label="{label}">{"".join(drawn)}</svg>'
    )


def _curve(logs: list[list[dict[str, Any]]], column: str) -> list[tuple[float, float, float]]:
    """Mean, least and most over the seeds, epoch by epoch, as far as all seeds went."""
    shortest = min(len(log) for log in logs)
    points = []
    for i in range(shortest):
        values = [log[i][column] for log in logs]
        points.append((statistics.fmean(values), min(values), max(values)))
    return points
