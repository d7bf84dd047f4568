"""`attnzoo train RECIPE`: train a model; what was stopped goes on."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson

Minutes = Annotated[
    float | None,
    typer.Option(min=0.001, help="End after this time, even if epochs are left.", show_default=False),
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(min=1, help="Steps between checkpoints; one per epoch otherwise.", show_default=False),
]
Keep = Annotated[int, typer.Option(min=1, help="How many checkpoints stay.")]
Workers = Annotated[int, typer.Option(min=0, max=64, help="Threads that prepare batches ahead.")]
Device = Annotated[Literal["auto", "cpu"], typer.Option(help="The GPU if there is one, or the CPU.")]


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe's name (ham_b) or file (recipes/ham_b.yaml).", autocompletion=completion.recipes
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, cifar10, synthetic, folder:PATH, reverse, opus_books:en-es, tsv:FILE, recall, ...; "
            "the recipe's own otherwise."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training side.")] = None,
    minutes: Minutes = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images, pairs or sequences per step, over all processes.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    edits: Annotated[list[str], typer.Option("--set", help="Change a value: train.schedule.use=cosine")] = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run.", show_default="runs/<recipe>-<data>-seed<k>")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="Where data sets lie.", show_default=False)] = None,
    checkpoint_every: CheckpointEvery = None,
    keep: Keep = 2,
    workers: Workers = 0,
    device: Device = "auto",
    deterministic: Annotated[
        bool | None,
        typer.Option(help="Same bits in every run; on the CPU when not said.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a model. The same command goes on where it was stopped."""
    from attnzoo.cli.render import say, say_notes
    from attnzoo.recipe import load
    from attnzoo.train import prepare
    from attnzoo.train.check import checked
    from attnzoo.train.settings import default_folder, for_data

    short = {"data": data, "epochs": epochs, "batch_size": batch_size, "optimizer.lr": lr, "seed": seed}
    given = [f"train.{key}={value}" for key, value in short.items() if value is not None]
    loaded, settings = prepare(
        recipe,
        [*edits, *given],
        minutes=minutes,
        data_root=str(data_root) if data_root else None,
        checkpoint_every=checkpoint_every,
        keep=keep,
        workers=workers,
        device=device,
        deterministic=deterministic,
    )
    say_notes(checked(loaded).notes)
    own = load(recipe)
    changes = for_data(own, settings.data) if settings.data != own.recipe.train.data else ()
    if changes and not as_json:
        say(f"for {settings.data}, unless you say otherwise: {', '.join(changes)}", style="dim")
    carry_out(loaded, settings, out or default_folder(loaded, settings), as_json)


def carry_out(loaded: Any, settings: Any, folder: Path, as_json: bool) -> None:
    """Train and show what came of it.

    Args:
        loaded: The recipe.
        settings: How to train.
        folder: Of the run.
        as_json: Show data only.

    Raises:
        typer.Exit: 130, when it was asked to stop.
    """
    from attnzoo.cli.render import progress, say, say_json, say_next
    from attnzoo.train import Stopped
    from attnzoo.train import train as train_model

    main = os.environ.get("RANK", "0") == "0"  # of several processes one talks
    try:
        with progress(quiet=as_json or not main) as report:
            run = train_model(loaded, settings, folder, report=report)
    except Stopped:
        if main:
            say(f"stopped; all that was done is in {folder}")
            say_next(f"attnzoo resume {folder}")
        raise typer.Exit(130) from None
    if not main:
        return
    figures, images = run.summary(), _images(run)
    if as_json:
        say_json({"run": str(folder), **figures, "curve": images})
        return
    _show(figures)
    say(f"run: {folder}" + (f"   curve: {', '.join(images)}" if images else ""))
    further = {"images": [f"attnzoo heatmap {folder}"], "pairs": [f"attnzoo translate {folder} TEXT"]}
    say_next(*further.get(figures["data_kind"], []), f"attnzoo eval {folder}")


def _show(figures: dict[str, Any]) -> None:
    from attnzoo.cli.render import duration, percent, say, spaced

    examples = figures["data_kind"]
    time = f"{spaced(figures['params'])} parameters, {duration(figures['seconds'])}"
    if figures["last_epoch"] is None:  # the minutes were over before
        say("no epoch is complete yet", style="bold")
        say(time)
        return
    for name in ("best", "last"):
        exact = figures.get(f"{name}_exact")
        strings = "" if exact is None else f", {percent(exact)} exact"
        say(
            f"{name}: {percent(figures[f'{name}_accuracy'])} test accuracy{strings}, "
            f"loss {figures[f'{name}_loss']:.4f}, epoch {figures[f'{name}_epoch']}",
            style="bold",
        )
    say(f"{time}, {figures['images_per_second']:,.0f} {examples}/s in training")


def _images(run: Any) -> list[str]:
    """Files with the learning curve; none before the first epoch."""
    from attnzoo.train.curve import draw_curve

    return [str(file) for file in draw_curve(run.log(), run.folder, ("svg", "png"))]
