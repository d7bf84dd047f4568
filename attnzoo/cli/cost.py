"""`attnzoo cost RECIPE...`: what recipes cost, and how one is made to cost what another does."""

from typing import Annotated, Literal

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson

Matched = Annotated[
    Literal["params", "flops", "time"] | None,
    typer.Option(help="Make the others so wide that they cost what the first does."),
]
By = Annotated[
    Literal["mlp", "width"],
    typer.Option(
        help="What --match changes: MLPs alone, or the width of the tokens, heads kept, and then MLPs."
    ),
]


def cost(
    recipes: Annotated[
        list[str],
        typer.Argument(
            help="Recipes; the first is what the others are held against.", autocompletion=completion.recipes
        ),
    ],
    match: Matched = None,
    by: By = "mlp",
    edits: Annotated[list[str], typer.Option("--set", help="Change a value in every recipe.")] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Count parameters and FLOPs of recipes, and solve for equal ones."""
    from attnzoo.bench.budget import Match, matched
    from attnzoo.bench.budget import cost as cost_of
    from attnzoo.cli.render import Column, count, say, say_json, say_next, seconds, share, spaced, table
    from attnzoo.recipe import load

    found = (
        matched(recipes, match, lambda name, more: load(name, [*edits, *more]), by)
        if match
        else {name: Match((), one := cost_of(load(name, edits)), one) for name in recipes}
    )
    costs = {name: one.after or one.before for name, one in found.items()}
    if as_json:
        say_json({name: vars(costs[name]) | {"edits": each.edits} for name, each in found.items()})
        return
    first = costs[recipes[0]]
    columns = [
        Column("recipe"),
        Column("parameters", right=True),
        Column("of the first", rank=1, right=True),
        Column("FLOPs", right=True),
        Column("of the first", rank=1, right=True),
        *([Column("time", right=True)] if match == "time" else []),
    ]
    rows = [
        [
            name,
            spaced(one.params),
            share(one.params, first.params) if name != recipes[0] else "",
            count(one.flops),
            share(one.flops, first.flops) if name != recipes[0] else "",
            *([seconds(one.seconds or 0.0)] if match == "time" else []),
        ]
        for name, one in costs.items()
    ]
    table(columns, rows)
    for name, each in found.items():
        if each.edits:
            say(f"{name}: {' '.join(f'--set {edit}' for edit in each.edits)}")
    say("FLOPs of one forward on one sample, two for a multiplication and an addition", style="dim")
    say_next(
        f"attnzoo compare {' '.join(recipes)}"
        + (f" --match {match}" if match else "")
        + (" --by width" if by == "width" else "")
    )
