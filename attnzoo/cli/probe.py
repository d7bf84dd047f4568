"""`attnzoo probe RUN NAME...`: what is measured of a trained model."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attnzoo.cli import completion
from attnzoo.cli.eval import With
from attnzoo.cli.list import AsJson

SHOWN = 12
"""Rows of each table that are printed; all are in the CSV."""


def probe(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", autocompletion=completion.runs)],
    probes: Annotated[
        list[str],
        typer.Argument(
            help="Names of probes, or NAME(option=value, ...).",
            metavar="PROBE...",
            autocompletion=completion.probes,
        ),
    ],
    count: Annotated[
        int,
        typer.Option(
            min=1, help="Most examples of the test side, drawn at random, and of the training side."
        ),
    ] = 256,
    which: Annotated[
        Literal["best", "last"], typer.Option(help="Weights of the best or the last epoch.")
    ] = "best",
    data: Annotated[str | None, typer.Option(help="Other data of the same kind.", show_default=False)] = None,
    with_: With = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="Folder of tables and pictures; RUN-probes when left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure something of a trained model: tables, CSV, pictures and one HTML page."""
    from attnzoo.cli.render import say, say_json, say_next
    from attnzoo.lab.intervening import intervene, intervention
    from attnzoo.lab.probing import probe as measured
    from attnzoo.lab.probing import probe_of
    from attnzoo.lab.report import write
    from attnzoo.lab.subject import Subject
    from attnzoo.train import open_run

    asked, changes = [probe_of(text) for text in probes], [intervention(text) for text in with_]
    found_run = open_run(run)
    subject = Subject.of_run(found_run, which, count, seed, data)
    changed = f", with {', '.join(map(str, changes))}" if changes else ""
    examples = sum(len(batch) for batch in subject.batches)
    about = f"{found_run.loaded.name}, {which} epoch, {examples} {subject.kind} of the test side{changed}"
    if not as_json:
        for note in found_run.notes():
            say(note, style="dim")
        say(about, style="bold")
    findings = []
    with intervene(subject.model, *changes):
        for one in asked:
            found = measured(subject, one)
            findings.append(found)
            if not as_json:
                _print(found)
    written = write(findings, out or Path(f"{subject.name}-probes"), f"{subject.name}: probes", about)
    if as_json:
        said = {"run": str(run), "which": which, "examples": examples, "with": [str(c) for c in changes]}
        say_json(said | {"findings": [f.as_dict() for f in findings], "written": [str(p) for p in written]})
        return
    say(f"written: {written[0]}, with {', '.join(path.name for path in written[1:])}")
    say_next(
        f"attnzoo heatmap {run}" if found_run.pictured else "attnzoo list probes",
        "attnzoo list interventions",
    )


def _print(found: Any) -> None:
    """The strongest rows of a finding, and what must be said about it."""
    from attnzoo.cli.render import Column, facts, say, table
    from attnzoo.lab.finding import shown

    rows = list(found.rows()) if len(found) <= SHOWN else found.sorted()[:SHOWN]
    names = [name for name in found.columns if any(row[name] != "" for row in rows)]
    if "layer" in names and "site" in names:
        names.remove("layer")
    columns = [
        Column(name, right=not isinstance(rows[0][name], str), rank=_rank(found, name)) for name in names
    ]
    title = (
        f"{found.probe}"
        if len(found) <= SHOWN
        else f"{found.probe}: {SHOWN} of {len(found)}, by {found.shows}"
    )
    say()
    table(columns, [[shown(row[name]) for name in names] for row in rows], title=title)
    facts([(name.replace("_", " "), shown(value)) for name, value in found.figures.items()])
    for note in found.notes:
        say(note, style="dim")


def _rank(found: Any, name: str) -> int:
    """How early a column is dropped where there is little room: what is shown and where it is, never."""
    return 0 if name in ("site", "branch", "head", found.shows) or name == next(iter(found.columns)) else 1
