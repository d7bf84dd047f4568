"""`attnzoo eval RUN`: how good a trained model is."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attnzoo.cli.list import AsJson


def eval_(
    runs: Annotated[list[Path], typer.Argument(help="Folder of the run; of several with --committee.")],
    which: Annotated[
        Literal["best", "last"], typer.Option(help="Weights of the best or the last epoch.")
    ] = "best",
    data: Annotated[
        str | None, typer.Option(help="Other data with the same classes.", show_default=False)
    ] = None,
    committee: Annotated[bool, typer.Option("--committee", help="Let all runs decide together.")] = False,
    vote: Annotated[
        Literal["probability", "logit", "majority"], typer.Option(help="How a committee decides.")
    ] = "probability",
    standardise: Annotated[
        bool, typer.Option("--standardise", help="Bring the members' logits to one scale first.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Test a trained model: accuracy with its 95 % interval, loss, and both by class; or a committee of models."""
    from attnzoo.cli.render import say, say_json, say_next, table
    from attnzoo.errors import RunError
    from attnzoo.train import open_run

    if committee:
        _committee(runs, which, vote, standardise, as_json)
        return
    if len(runs) > 1:
        raise RunError(
            "AZ813", f"{len(runs)} runs were named", help="say --committee, or evaluate one at a time"
        )
    run = runs[0]
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


def _committee(runs: list[Path], which: Any, vote: Any, standardise: bool, as_json: bool) -> None:
    from attnzoo.cli.render import say, say_json, say_next, table
    from attnzoo.lab.committee import evaluate_committee
    from attnzoo.train import open_run

    result = evaluate_committee([open_run(run) for run in runs], which, vote, standardise)
    if as_json:
        say_json(result.as_dict() | {"which": which})
        return
    table(["member", "accuracy", "its errors go with the others'"], result.rows(), right=["accuracy"])
    say("in brackets: the gain over the mean member; correlation 1 means the same errors", style="dim")
    say_next(f"attnzoo heatmap {runs[0]}")
