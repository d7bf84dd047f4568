"""What notebooks show of cards, recipes and compositions: a title, a line and a table, as plain HTML."""

from collections.abc import Mapping
from html import escape

_LEFT = "style='text-align:left;vertical-align:top'"


def fact_sheet(title: str, summary: str, facts: Mapping[str, str], text: str = "") -> str:
    """HTML of a few facts; whatever is said in them is text.

    Args:
        title: First line, bold.
        summary: Below it.
        facts: Names and values; those without a value are left out.
        text: Below the table, its lines as they are.
    """
    rows = "".join(
        f"<tr><th {_LEFT}>{escape(name)}</th><td {_LEFT}>{escape(value).replace(chr(10), '<br/>')}</td></tr>"
        for name, value in facts.items()
        if value
    )
    below = f"<pre>{escape(text)}</pre>" if text else ""
    return f"<b>{escape(title)}</b><p>{escape(summary)}</p><table>{rows}</table>{below}"
