"""`attnzoo sweep RECIPE`: what else could stand in its place? Random recipes, trained briefly, ranked."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson


def sweep(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe: its host, training and budget are everybody's.", autocompletion=completion.recipes
        ),
    ] = "digits_softmax",
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Random recipes besides.")] = 10,
    mechanisms: Annotated[
        list[str] | None,
        typer.Option(
            "--mechanism",
            help="Draw among these alone; may be repeated.",
            autocompletion=completion.components,
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="digits, cifar10, folder:PATH, ...")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data, of each.")] = 2,
    match: Annotated[
        Literal["params", "flops", "time", "none"],
        typer.Option(help="What all spend as much of as RECIPE, by the width of their MLPs."),
    ] = "params",
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    edits: Annotated[list[str], typer.Option("--set", help="Change a value in every recipe.")] = [],  # noqa: B006
    workers: Annotated[int | None, typer.Option(min=1, help="Runs side by side; as many as cores.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the recipes, runs and the table.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw random recipes under the budget of one, train each briefly, and rank them."""
    from attnzoo.bench.sweep import draw, rank, write_table
    from attnzoo.catalogue.pages import look_up
    from attnzoo.cli.render import Column, say, say_json, say_next, spaced, table
    from attnzoo.cli.render import count as big
    from attnzoo.errors import RecipeError
    from attnzoo.train.settings import prepare

    for name in mechanisms or ():
        kind, _ = look_up(name)
        if kind != "mechanism":
            raise RecipeError(
                "AZ201", f"`{name}` is a {kind}, not a mechanism", help="`attnzoo list mechanisms` shows all"
            )
    changes = [*([f"train.data={data}"] if data else []), *edits, f"train.epochs={epochs}"]
    base, settings = prepare(recipe, changes)
    folder = out or Path("runs") / f"sweep-{base.name}-{seed}"
    drawn = draw(
        base, count, folder, seed=seed, budget=None if match == "none" else match, mechanisms=mechanisms
    )
    if not as_json:
        refused = ", ".join(f"{code} {times}" for code, times in drawn.refused.most_common())
        say(f"{count} random recipes beside {base.name}; refused: {refused or 'none'}", style="dim")

    def told(name: str, done: int, total: int) -> None:
        if not as_json:
            say(f"{done} of {total}: {name}")

    ranked = rank(drawn.candidates, workers=workers or os.cpu_count() or 1, report=told)
    target = folder / "sweep.csv"
    write_table(ranked, target)
    if as_json:
        say_json(
            {
                "data": settings.data,
                "refused": drawn.refused,
                "table": str(target),
                "ranking": [
                    {
                        "recipe": one.candidate.name,
                        "last_accuracy": one.last,
                        "best_accuracy": one.best,
                        "failure": one.failure,
                        "text": one.candidate.text,
                        **vars(one.candidate.cost),
                    }
                    for one in ranked
                ],
            }
        )
        return
    table(
        [
            Column("recipe"),
            Column("accuracy", right=True),
            Column("parameters", rank=1, right=True),
            Column("FLOPs", rank=2, right=True),
            Column("what", wrap=24),
        ],
        [
            [
                one.candidate.name,
                one.failure and "failed" or f"{one.last:.2%}",
                spaced(one.candidate.cost.params),
                big(one.candidate.cost.flops),
                one.candidate.text,
            ]
            for one in ranked
        ],
    )
    epochs_said = f"{settings.epochs} {'epoch' if settings.epochs == 1 else 'epochs'}"
    say(f"{epochs_said} of one seed: a start, no verdict; table: {target}", style="dim")
    best = [str(one.candidate.file) for one in ranked if one.candidate.loaded is not base][:2]
    say_next(f"attnzoo compare {recipe} {' '.join(best)}")
