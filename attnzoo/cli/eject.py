"""`attnzoo eject RECIPE|RUN`: a model as one Python file that needs torch and timm alone."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson


def eject(
    source: Annotated[
        str,
        typer.Argument(
            help="A recipe's name (ham_b) or file, or the folder of a run.",
            metavar="RECIPE|RUN",
            autocompletion=completion.runs_and_recipes,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The Python file; weights of a run lie beside it.")],
    edits: Annotated[
        list[str], typer.Option("--set", help="Change a value: attention.with.start=identity")
    ] = [],  # noqa: B006
    which: Annotated[
        Literal["best", "last"], typer.Option(help="Of a run: weights of the best or the last epoch.")
    ] = "best",
    as_json: AsJson = False,
) -> None:
    """Write a model as one readable Python file that needs torch and timm alone."""
    from attnzoo.cli.render import say, say_json, say_next
    from attnzoo.ejecting import eject as ejected
    from attnzoo.ejecting import refuse_taken
    from attnzoo.errors import RecipeError

    beside = [out.parent / f"{out.stem}.safetensors"] if Path(source).is_dir() else []
    refuse_taken(out, [out, *beside])
    if edits and beside:
        raise RecipeError(
            "AZ611", "--set belongs to recipes; a run is ejected as it was trained", help="leave it out"
        )
    made = ejected(source, edits=edits, which=which)
    written = made.save(out)
    lines = made.text.count("\n")
    if as_json:
        say_json({"name": made.name, "lines": lines, "written": [str(path) for path in written]})
        return
    say(f"written: {', '.join(map(str, written))}")
    say(f"{lines} lines, which import torch and timm alone; `{made.name}()` builds the model")
    say_next(f"python {out}", f"in Python: from {out.stem} import {made.name}")
