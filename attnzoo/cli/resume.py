"""`attnzoo resume RUN`: go on where a run was stopped."""

from pathlib import Path
from typing import Annotated

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson
from attnzoo.cli.train import CheckpointEvery, Device, Minutes, Workers


def resume(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", autocompletion=completion.runs)],
    minutes: Minutes = None,
    checkpoint_every: CheckpointEvery = None,
    workers: Workers = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Go on where a run was stopped; `--minutes` counts from its beginning, and without it all epochs are done."""
    from attnzoo.cli.train import carry_out
    from attnzoo.train import open_run

    found = open_run(run)
    changed = {
        "minutes": minutes,
        "checkpoint_every": checkpoint_every or found.settings.checkpoint_every,
        "workers": workers,
        "device": device,
    }
    carry_out(found.loaded, found.settings.model_copy(update=changed), run, as_json)
