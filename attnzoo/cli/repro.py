"""`attnzoo repro RUN`: train a run again from its record, and name the first difference."""

from pathlib import Path
from typing import Annotated

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson


def repro(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", autocompletion=completion.runs)],
    steps: Annotated[
        int | None,
        typer.Option(min=0, help="Train no further than this step.", show_default="as far as the run went"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Keep what is trained in this empty folder.", show_default="nothing is kept"),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Where data sets lie.", show_default="as for the run")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a run again from its record, elsewhere, and name the first difference. Ends with 1 when there is one."""
    from attnzoo.cli.render import progress, say, say_json, say_next
    from attnzoo.train.repro import repro as train_again

    with progress(quiet=as_json) as report:
        found = train_again(run, steps, out=out, data_root=data_root, report=report)
    if as_json:
        say_json(found.as_dict())
    else:
        if found.first:
            say(f"first difference: {found.first} (recorded → here)", style="red")
        for difference in found.differences[1:]:
            say(f"also: {difference}")
        say(found.reached, style="green" if found.same else "")
        for note in found.notes:
            say(note, style="dim")
        if out:
            say(f"written: {out}")
        plugin = found.first is not None and found.first.about in ("plugin", "source")
        say_next("attnzoo plugins" if plugin else f"attnzoo eval {run}")
    if not found.same:
        raise typer.Exit(1)
