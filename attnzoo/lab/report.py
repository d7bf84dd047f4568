"""What probes found, as files: tables, arrays, pictures, and one HTML page that opens from the disk."""

import io
import os
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
       background: #ffffff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5; }
img { max-width: 100%; } .small { color: #555; font-size: .85rem; } code { background: #f3f3f3; padding: 0 .2rem; }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head><body>{body}</body></html>
"""


def write(findings: Sequence[Finding], folder: str | os.PathLike, title: str, about: str) -> list[Path]:
    """A CSV and a PNG for each finding, its arrays as `.npz` where it has any, and `index.html` with all of them.

    Args:
        findings: At least one.
        folder: Is made; files of the same names are replaced.
        title: Of the page.
        about: What was measured, a sentence.

    Returns:
        What was written, the page first.

    Raises:
        ZooError: AZ905, when it cannot be written there.
    """
    place = Path(folder)
    names = _names(findings)
    written = [place / "index.html"]
    try:
        place.mkdir(parents=True, exist_ok=True)
        sections = []
        for name, found in zip(names, findings, strict=True):
            picture = io.BytesIO()
            found.figure().savefig(picture, format="png", dpi=140)
            written += [place / f"{name}.csv", place / f"{name}.png"]
            found.to_csv(place / f"{name}.csv")
            (place / f"{name}.png").write_bytes(picture.getvalue())
            if found.arrays:
                written.append(place / f"{name}.npz")
                arrays: dict[str, Any] = dict(found.arrays)
                np.savez_compressed(written[-1], **arrays)
            sections.append(_section(found, picture.getvalue()))
        body = f"<h1>{escape(title)}</h1><p>{escape(about)}</p>{''.join(sections)}"
        written[0].write_text(PAGE.format(title=escape(title), style=STYLE, body=body), encoding="utf-8")
    except OSError as error:
        raise ZooError(
            "AZ905",
            f"cannot write `{place}`: {(error.strerror or str(error)).lower()}",
            help="name another folder with --out",
        ) from None
    return written


def _names(findings: Sequence[Finding]) -> list[str]:
    """A name for each; the second of a name gets a number."""
    names: list[str] = []
    for found in findings:
        before = sum(name == found.name or name.startswith(f"{found.name}-") for name in names)
        names.append(f"{found.name}-{before + 1}" if before else found.name)
    return names


def _section(found: Finding, picture: bytes) -> str:
    card = found.probe.card if found.probe else None
    source = b64encode(picture).decode()
    summary = f"<p>{escape(card.summary)}</p>" if card else ""
    if card and card.equation:
        summary += f"<p><code>{escape(card.equation)}</code></p>"
    paper = f'<p class="small">{escape(str(card.paper))}</p>' if card and card.paper else ""
    image = f'<img alt="{escape(found.name.replace("_", " "))}" src="data:image/png;base64,{source}">'
    return f"<h2>{escape(found.name)}</h2>{summary}{image}{found._repr_html_()}{paper}"
