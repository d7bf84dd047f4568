"""`attnzoo compare RECIPE RECIPE ...`: who is better, by how much, and is it noise?"""

import os
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from attnzoo.cli import completion
from attnzoo.cli.cost import By, Matched
from attnzoo.cli.list import AsJson


def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(
            help="Recipes; the first is what the others are held against.", autocompletion=completion.recipes
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="digits, cifar10, folder:PATH, reverse, tsv:FILE, recall, ...")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each recipe.")] = 5,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the data of the first recipe.")
    ] = None,
    budget: Annotated[str, typer.Option(help="The same `epochs`, `flops` or `seconds` for all.")] = "epochs",
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Of each run, with --budget seconds.")
    ] = None,
    reach: Annotated[
        float | None,
        typer.Option(
            min=0, max=100, help="A test accuracy in percent: tell the epochs that each takes to it."
        ),
    ] = None,
    match: Matched = None,
    by: By = "mlp",
    edits: Annotated[list[str], typer.Option("--set", help="Change a value in every recipe.")] = [],  # noqa: B006
    workers: Annotated[int | None, typer.Option(min=1, help="Runs side by side; as many as cores.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster that runs them; `local` is this machine.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs and of the page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train several recipes under one budget with several seeds, and weigh the outcome."""
    from attnzoo.bench.budget import matched
    from attnzoo.bench.cost import flops
    from attnzoo.cli.render import Column, say, say_json, say_next, table
    from attnzoo.errors import RunError, did_you_mean
    from attnzoo.recipe import build, resolve
    from attnzoo.train.checkpoint import replace
    from attnzoo.train.compare import compare as run_all
    from attnzoo.train.compare import equal_flops, trials
    from attnzoo.train.page import page
    from attnzoo.train.settings import kind_of, prepare

    known = ("epochs", "flops", "seconds")
    if budget not in known:
        raise RunError(
            "AZ812", f"there is no budget `{budget}`", help=did_you_mean(budget, known) or ", ".join(known)
        )
    if (budget == "seconds") != (minutes is not None):
        raise RunError("AZ812", "`--budget seconds` and `--minutes` go together", help="say both or neither")
    if len(set(recipes)) != len(recipes):
        raise RunError("AZ812", "a recipe stands here twice", help="compare it with another one")
    changes = [
        *([f"train.data={data}"] if data else []),
        *edits,
        *([f"train.epochs={epochs}"] if epochs else []),
    ]
    found = (
        matched(recipes, match, lambda name, more: prepare(name, [*changes, *more], minutes=minutes)[0], by)
        if match
        else {}
    )
    for recipe, one in found.items():
        if one.edits and not as_json:
            say(
                f"{recipe}: {' '.join(f'--set {edit}' for edit in one.edits)}, for as many {match}",
                style="dim",
            )
    prepared = []
    for recipe in recipes:
        more = found[recipe].edits if match else ()
        loaded, settings = prepare(recipe, [*changes, *more], minutes=minutes)
        prepared.append((loaded.name, loaded, settings))
    names = [name for name, _, _ in prepared]
    if len(set(names)) != len(names):
        raise RunError("AZ812", f"two recipes are called {names[0]}", help="give each a `name:` of its own")
    kinds = [kind_of(loaded, settings) for _, loaded, settings in prepared]
    if len(set(kinds)) > 1:
        raise RunError(
            "AZ812",
            f"these recipes learn from different things: {', '.join(dict.fromkeys(kinds))}",
            help="name data that suit them all with --data",
        )
    shares = None
    if budget == "flops" and kinds[0] != "images":
        raise RunError(
            "AZ812",
            f"there are no equal FLOPs for {kinds[0]}",
            why="their length differs, and so does the work from step to step",
            help="use --budget epochs, or --budget seconds --minutes M",
        )
    if budget == "flops":
        samples = [resolve(loaded).info.sample() for _, loaded, _ in prepared]
        counts = [
            flops(build(loaded, {}), image)[""]
            for (_, loaded, _), image in zip(prepared, samples, strict=True)
        ]
        shares = equal_flops(counts, prepared[0][2].epochs)
    folder = out or Path("runs") / f"compare-{'-'.join(names)}-{prepared[0][2].data.partition(':')[0]}"
    todo = trials(prepared, seeds, folder, shares)

    def told(recipe: str, seed: int, done: int, total: int) -> None:
        if not as_json:
            say(f"{done} of {total}: {recipe}, seed {seed}")

    side_by_side = workers or os.cpu_count() or 1
    share = None if reach is None else reach / 100
    result = run_all(todo, budget=cast(Any, budget), workers=side_by_side, ray=ray, reach=share, report=told)
    target = folder / "index.html"
    replace(target, page(result, f"{', '.join(names)} on {result.data}"))
    if as_json:
        say_json(
            result.as_dict()
            | {"page": str(target), "matched": {recipe: one.edits for recipe, one in found.items()}}
        )
        return
    speed = f"{kinds[0]}/s"
    table(
        [
            Column("recipe"),
            Column("best accuracy", right=True),
            Column("at epoch", rank=4, right=True),
            Column("last accuracy", rank=1, right=True),
            Column("epochs", rank=5, right=True),
            Column("parameters", rank=2, right=True),
            Column(speed, rank=3, right=True),
        ],
        [
            [
                r.recipe,
                f"{r.best:.2%} ± {r.best_spread:.2%}",
                f"{r.best_epoch:.1f}",
                f"{r.last:.2%} ± {r.last_spread:.2%}",
                f"{r.epochs:.0f}",
                f"{r.params:,}",
                f"{r.images_per_second:,.0f}",
            ]
            for r in result.rows
        ],
    )
    for difference, text in zip(result.differences, result.sentences(), strict=True):
        say(text, style={"better": "green", "worse": "red", "noise": ""}[difference.verdict])
    if (epochs_to := result.speed()) is not None:
        say(epochs_to)
    say(f"page: {target}")
    say_next(f"open {target}", f"attnzoo heatmap {todo[0].folder}")
