"""`attnzoo eval RUN`: how good a trained model is."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from attnzoo.cli.list import AsJson


def eval_(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    which: Annotated[
        Literal["best", "last"], typer.Option(help="Weights of the best or the last epoch.")
    ] = "best",
    data: Annotated[
        str | None, typer.Option(help="Other data with the same classes.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Test a trained model: accuracy with its 95 % interval, loss, and both by class."""
    from attnzoo.cli.render import say, say_json, say_next, table
    from attnzoo.train import open_run

    found = open_run(run)
    notes, result = found.notes(), found.evaluate(which, data)
    if as_json:
        say_json({"run": str(run), "which": which, "data": data or found.settings.data} | result.as_dict())
        return
    for note in notes:
        say(note, style="dim")
    low, high = result.interval
    say(f"{run}: {100 * result.accuracy:.2f} % ({100 * low:.2f} to {100 * high:.2f} %) "
        f"of {result.images} pictures, loss {result.loss:.4f}", style="bold")  # fmt: skip
    table(
        ["class", "images", "correct", "accuracy", "loss"],
        [[c.name, str(c.images), str(c.correct), f"{100 * c.correct / max(1, c.images):.2f} %", f"{c.loss:.4f}"]
         for c in result.classes],
        right=["images", "correct", "accuracy", "loss"],
    )  # fmt: skip
    say(
        "95 % interval by Wilson's score; it knows of the test pictures only, not of other seeds", style="dim"
    )
    say_next(f"attnzoo heatmap {run}")
