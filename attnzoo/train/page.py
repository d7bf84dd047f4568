"""A comparison as one HTML file that opens from the disk: no script, no network."""

from html import escape

from attnzoo.plot.palette import SERIES
from attnzoo.train.compare import Comparison
from attnzoo.train.settings import Kind, data_kind

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
    from attnzoo.plot import comparison_curves, svg

    colours = {row.recipe: SERIES[i % len(SERIES)] for i, row in enumerate(comparison.rows)}
    verdicts = "".join(
        f'<li class="{d.verdict}">{escape(text)}</li>'
        for d, text in zip(comparison.differences, comparison.sentences(), strict=True)
    )
    curves = svg(
        comparison_curves(comparison.logs), "Test accuracy and training loss by epoch, a line for each recipe"
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
<h2>Test accuracy and training loss by epoch</h2>
{curves}<p class="small">Lines are means over seeds, bands run from the worst seed to the best.</p>
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
