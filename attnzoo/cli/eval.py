"""`attnzoo eval RUN`: how good a trained model is."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson

Accelerate = Annotated[
    bool, typer.Option("--accelerate", help="Pack the weights for a faster CPU; the same to rounding.")
]


With = Annotated[
    list[str],
    typer.Option(
        "--with",
        help="Change something inside: NAME(option=value, ...); again for more. `attnzoo list interventions`.",
        autocompletion=completion.interventions,
    ),
]


def eval_(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folder of the run; of several with --committee.", autocompletion=completion.runs
        ),
    ],
    which: Annotated[
        Literal["best", "last"], typer.Option(help="Weights of the best or the last epoch.")
    ] = "best",
    data: Annotated[str | None, typer.Option(help="Other data of the same kind.", show_default=False)] = None,
    committee: Annotated[bool, typer.Option("--committee", help="Let all runs decide together.")] = False,
    vote: Annotated[
        Literal["probability", "logit", "majority"], typer.Option(help="How a committee decides.")
    ] = "probability",
    standardise: Annotated[
        bool, typer.Option("--standardise", help="Bring the members' logits to one scale first.")
    ] = False,
    beams: Annotated[
        int, typer.Option(min=1, max=256, help="Of pairs: hypotheses at once; 1 is greedy search.")
    ] = 4,
    accelerate: Accelerate = False,
    with_: With = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Test a trained model: accuracy and loss; images by class, translations by BLEU, chrF and error rates."""
    from attnzoo.errors import RunError

    check_alone(with_, accelerate, committee)
    if committee:
        _committee(runs, which, vote, standardise, accelerate, as_json)
        return
    if len(runs) > 1:
        raise RunError(
            "AZ813", f"{len(runs)} runs were named", help="say --committee, or evaluate one at a time"
        )
    with ExitStack() as stack:
        _one(runs[0], which, data, beams, accelerate, with_, stack, as_json)


def check_alone(with_: list[str], accelerate: bool, committee: bool = False) -> None:
    """Refuse interventions where no model can be changed inside.

    Raises:
        ZooError: AZ928.
    """
    from attnzoo.errors import ZooError

    other = "--accelerate" if accelerate else "--committee" if committee else ""
    if with_ and other:
        raise ZooError(
            "AZ928",
            f"`--with` and `{other}` do not go together",
            why="packed weights show nothing of what happens inside"
            if accelerate
            else "an intervention names the sites of one model",
            help="leave one of the two out",
        )


def _one(
    run: Path,
    which: Any,
    data: str | None,
    beams: int,
    accelerate: bool,
    with_: list[str],
    stack: ExitStack,
    as_json: bool,
) -> None:
    """One run, whose models are changed inside for as long as the stack is open."""
    from attnzoo.cli.render import Column, percent, say, say_json, say_next, table
    from attnzoo.train import open_run

    found = replace(open_run(run), accelerated=True) if accelerate else open_run(run)
    notes = found.notes()
    what: dict[str, Any] = {"run": str(run), "which": which, "data": data or found.settings.data}
    if with_:
        from attnzoo.lab.intervening import intervene, intervention

        changes = list(map(intervention, with_))
        found = replace(found, changed=lambda model: stack.enter_context(intervene(model, *changes)))
        what["with"] = list(map(str, changes))
    if not as_json:
        for note in [*notes, *(f"with {change}" for change in what.get("with", []))]:
            say(note, style="dim")
    if found.kind != "images":
        _figures(found, which, data, beams, what, as_json)
        return
    result = found.evaluate(which, data)
    if as_json:
        say_json(what | result.as_dict())
        return
    low, high = result.interval
    say(
        f"{run}: {percent(result.accuracy)} ({100 * low:.2f} to {percent(high)}) "
        f"of {result.images} images, loss {result.loss:.4f}",
        style="bold",
    )
    table(
        [
            Column("class", wrap=20),
            *(Column(name, right=True) for name in ("images", "correct", "accuracy", "loss")),
        ],
        [
            [c.name, str(c.images), str(c.correct), percent(c.correct / max(1, c.images)), f"{c.loss:.4f}"]
            for c in result.classes
        ],
    )
    say("95 % interval by Wilson's score; it knows of the test images only, not of other seeds", style="dim")
    say_next(f"attnzoo heatmap {run}")


def _figures(run: Any, which: Any, data: str | None, beams: int, what: dict[str, str], as_json: bool) -> None:
    """What the log says of the test side, for pairs and sequences; of pairs also how good the translations are."""
    from attnzoo.cli.render import Column, percent, say, say_json, say_next, table
    from attnzoo.eval.translation import evaluate_translations

    figures = {name.removeprefix("test_"): value for name, value in run.figures(which, data).items()}
    scores = evaluate_translations(run, which, data, beams) if run.kind == "pairs" else None
    if as_json:
        say_json(what | figures | ({"beams": beams, "translations": scores.as_dict()} if scores else {}))
        return
    loss = figures.pop("loss")
    shares = ", ".join(f"{name} {percent(share)}" for name, share in figures.items())
    say(f"{run.folder}: {shares}, loss {loss:.4f}", style="bold")
    asked = {
        "pairs": "accuracy: share of target tokens that are right given the right ones before; exact: of whole targets",
        "sequences": "accuracy: share of what is asked that is right; of numbers, the share of variance explained (R²)",
    }
    say(asked[run.kind], style="dim")
    if scores:
        say(f"{scores.sentences} translations, {beams} beams")
        columns = [
            Column("score"),
            Column("value", right=True),
            Column("95 % interval", rank=1),
            Column("signature", rank=2),
        ]
        table(columns, scores.rows())
        say("intervals by resampling the test sentences; they do not know of other seeds", style="dim")
        say_next(f'attnzoo translate {run.folder} "..."', f"attnzoo heatmap {run.folder}")
    else:
        say_next(f"attnzoo heatmap {run.folder}")


def _committee(
    runs: list[Path], which: Any, vote: Any, standardise: bool, accelerate: bool, as_json: bool
) -> None:
    from attnzoo.cli.render import Column, say, say_json, say_next, table
    from attnzoo.errors import RunError
    from attnzoo.eval.committee import evaluate_committee
    from attnzoo.train import open_run

    members = [open_run(run) for run in runs]
    members = [replace(member, accelerated=True) for member in members] if accelerate else members
    if other := next((run for run in members if run.kind != "images"), None):
        raise RunError(
            "AZ814",
            f"`{other.folder}` cannot vote: it was trained on {other.kind}",
            why="a committee decides about classes of images",
            help="take runs on images",
        )
    result = evaluate_committee(members, which, vote, standardise)
    if as_json:
        say_json(result.as_dict() | {"which": which})
        return
    columns = [
        Column("member"),
        Column("accuracy", right=True),
        Column("its errors go with the others'", rank=1),
    ]
    table(columns, result.rows())
    say("in brackets: the gain over the mean member; correlation 1 means the same errors", style="dim")
    say_next(f"attnzoo heatmap {runs[0]}")
