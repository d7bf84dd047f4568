"""What a probe found: a table, arrays beside it, a figure."""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from attnzoo.core.probe import Probe
from attnzoo.errors import ZooError

ROWS = 20
"""Rows that a table shows before it says how many more there are."""


@dataclass(eq=False)
class Finding:
    """What a probe found.

    Args:
        columns: The table, column by column, each of the same length. What is said of heads has `layer`, `site`,
            `branch`, `head` first, as `Subject.about` gives them.
        shows: The column that the figure shows; the last when empty.
        arrays: What is no table, by name: maps, matrices.
        notes: What must be said about it, a sentence each.
        figures: Numbers about the whole, by name.
        probe: What found it; set by whoever ran it.
    """

    columns: Mapping[str, Sequence[Any]]
    shows: str = ""
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: Sequence[str] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    probe: Probe | None = None

    def __post_init__(self):
        lengths = {len(column) for column in self.columns.values()}
        if len(lengths) > 1:
            raise ValueError(f"columns of {', '.join(map(str, sorted(lengths)))} rows are no table")
        self.shows = self.shows or list(self.columns)[-1]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], **more: Any) -> "Finding":
        """A finding of rows, all with the same columns.

        Args:
            rows: At least one.
            more: The other arguments.
        """
        return cls({name: [row[name] for row in rows] for name in rows[0]}, **more)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, column: str) -> list[Any]:
        return list(self.columns[column])

    @property
    def name(self) -> str:
        """What it is called: the probe's name."""
        return self.probe.card.name if self.probe else "finding"

    def rows(self) -> Iterator[dict[str, Any]]:
        """The table, row by row."""
        for values in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, values, strict=True))

    def sorted(self, column: str = "", ascending: bool = False) -> "list[dict[str, Any]]":
        """The rows by the size of what stands in a column, the largest first; what is no number last.

        Args:
            column: By default what the figure shows.
            ascending: The smallest first instead.
        """
        column = column or self.shows
        known = [row for row in self.rows() if _number(row[column])]
        rest = [row for row in self.rows() if not _number(row[column])]
        return sorted(known, key=lambda row: row[column], reverse=not ascending) + rest

    def matrix(self, column: str = "") -> np.ndarray:
        """A column as layers × heads, NaN where there is no such head; branches stand side by side.

        Args:
            column: By default what the figure shows.
        """
        found = np.full((len(self.layers()), len(self.heads())), np.nan)
        layers, heads = self.layers(), self.heads()
        for row in self.rows():
            value = row[column or self.shows]
            found[layers.index(row["site"]), heads.index(_head(row))] = value if _number(value) else np.nan
        return found

    def layers(self) -> list[str]:
        """Names of the sites, in the order of layers."""
        return list(dict.fromkeys(self.columns["site"]))

    def heads(self) -> list[str]:
        """Names of the heads: their numbers, with the branch in front where there are several."""
        names = list(dict.fromkeys(_head(row) for row in self.rows()))
        if len({name[0] for name in names}) == 1:
            return names
        return sorted(names)

    def figure(self) -> Any:
        """The picture of it, a matplotlib `Figure`."""
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        if self.probe:
            self.probe.draw(self, figure)
        else:
            self.draw(figure)
        return figure

    def draw(self, figure: Any) -> None:
        """Layers × heads in colours, for what is said of heads; otherwise a bar for each row.

        Args:
            figure: An empty matplotlib `Figure`.
        """
        from attnzoo import plot

        axes, label = figure.subplots(), self.shows.replace("_", " ")
        if {"site", "head"} <= self.columns.keys():
            values, heads = self.matrix(), self.heads()
            cell = max(0.42, 0.09 * max(map(len, heads)))  # inches; names of branches stand side by side
            figure.set_size_inches(2.4 + cell * max(values.shape[1], 4), 1.6 + 0.36 * max(values.shape[0], 2))
            plot.head_matrix(values, ax=axes, rows=self.layers(), columns=heads, label=label)
        else:
            axes.barh([shown(value) for value in self[next(iter(self.columns))]], self[self.shows])
            axes.invert_yaxis()
            axes.set_xlabel(label)
        axes.set_title(self.name.replace("_", " "))

    def to_csv(self, file: str | Path | None = None) -> str:
        """The table as CSV text, written to a file if one is named.

        Args:
            file: Where.
        """
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(zip(*self.columns.values(), strict=True))
        if file is not None:
            Path(file).write_text(out.getvalue(), encoding="utf-8")
        return out.getvalue()

    def to_pandas(self) -> Any:
        """The table as a pandas `DataFrame`.

        Raises:
            ZooError: AZ925, when pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ZooError(
                "AZ925", "pandas is not installed", help="pip install pandas, or use `columns` or `to_csv()`"
            ) from None
        return pandas.DataFrame({name: list(column) for name, column in self.columns.items()})

    def as_dict(self) -> dict[str, Any]:
        """All of it but the arrays, for `--json`; what is no number is null."""
        return {
            "probe": str(self.probe) if self.probe else "",
            "columns": {name: [_plain(v) for v in column] for name, column in self.columns.items()},
            "shows": self.shows,
            "figures": {name: _plain(value) for name, value in self.figures.items()},
            "notes": list(self.notes),
            "arrays": {name: list(array.shape) for name, array in self.arrays.items()},
        }

    def _cells(self) -> list[list[str]]:
        return [[shown(value) for value in row.values()] for row in self.rows()]

    def __str__(self) -> str:
        rows = [list(self.columns), *self._cells()[:ROWS]]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        more = [f"... {len(self) - ROWS} more rows"] if len(self) > ROWS else []
        facts = [f"{name}: {shown(value)}" for name, value in self.figures.items()]
        return "\n".join([str(self.probe or "finding"), *lines, *more, *facts, *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self._cells()[:ROWS]
        )
        more = f"<p>… {len(self) - ROWS} more rows</p>" if len(self) > ROWS else ""
        facts = "".join(f"<li>{escape(n)}: {escape(shown(v))}</li>" for n, v in self.figures.items())
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        title = escape(str(self.probe or "finding"))
        listed = f"<ul>{facts}{notes}</ul>" if facts or notes else ""
        return f"<h4>{title}</h4><table><tr>{head}</tr>{body}</table>{more}{listed}"


def shown(value: Any) -> str:
    """A value for people: numbers with four digits."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return "–" if value is None else str(value)


def _head(row: Mapping[str, Any]) -> Any:
    branch = row.get("branch", "")
    return f"{branch} {row['head']}" if branch else str(row["head"])


def _number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not math.isnan(value)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
