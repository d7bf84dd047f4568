"""`attnzoo compose RECIPE`: a recipe as a model, as a person wants to see it."""

from pathlib import Path
from typing import Annotated

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson


def compose(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe's name (ham_a) or file (recipes/ham_a.yaml).", autocompletion=completion.recipes
        ),
    ],
    edits: Annotated[
        list[str], typer.Option("--set", help="Change a value: attention.with.start=identity")
    ] = [],  # noqa: B006
    image: Annotated[
        Path | None, typer.Option(help="Image for the forward and backward; a small one otherwise.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write what timm.create_model('local-dir:DIR') loads.")
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Load weights from this file first (.safetensors, .pth).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compose a model, show what it is and costs, and run one forward and backward."""
    from attnzoo.bench.composition import default_image, describe, exercise, exercise_tokens
    from attnzoo.cli.render import say, say_json, say_next, say_notes
    from attnzoo.errors import RecipeError
    from attnzoo.recipe import load
    from attnzoo.recipe.composing import build
    from attnzoo.recipe.weights import init_model, save
    from attnzoo.train.check import checked

    composition = checked(load(recipe, edits))
    say_notes(composition.notes)
    if composition.image is None and (image or out or init_from):
        name = "image" if image else "out" if out else "init-from"
        raise RecipeError(
            "AZ611",
            f"--{name} belongs to backbones of timm; `{recipe}` is a model of sequences",
            help=f"leave it out; `attnzoo train {recipe}` trains it",
        )
    report = describe(composition)
    if not as_json:
        _describe(report)
    model = build(composition)
    ledger = init_model(model, init_from) if init_from else None
    with composition.watching(model):
        run = (
            exercise_tokens(model, composition.info)
            if composition.image is None
            else exercise(model, image or default_image())
        )
    if out:
        save(model, out)
    if as_json:
        say_json(
            report.as_dict() | {"run": run.as_dict(), "weights": ledger, "out": str(out) if out else None}
        )
    else:
        if ledger:
            say(f"weights: {ledger['copied']} tensors copied from {init_from}, {len(ledger['new'])} new")
        _ran(run)
        name = (
            f"timm.create_model({report.registers!r})" if report.registers else f"attnzoo.compose({recipe!r})"
        )
        steps = [f"in Python: import attnzoo, timm; {name}" if report.registers else f"in Python: {name}"]
        if out:
            say(f"written: {out}/config.json and {out}/model.safetensors")
            steps.insert(0, f"timm.create_model('local-dir:{out}', pretrained=True)")
        elif report.image:
            steps.append(f"attnzoo compose {recipe} --out DIR")
        else:
            steps.append(f"attnzoo train {recipe}")
        say_next(*steps)
    if run.without_gradient:
        raise typer.Exit(1)


def _describe(report) -> None:
    from attnzoo.cli.render import GLUE, Column, count, say, share, spaced, table

    say(f"{report.name}   {report.file}   sha256 {report.sha256[:12]}", style="bold")
    if report.summary:
        say(report.summary)
    say()
    first = _streams(report) if report.second else _stages(report) if report.stages else [_stack(report)]
    for line in first:
        say(line.replace(" × ", f"{GLUE}×{GLUE}"))
    if "=" in report.arguments or report.second:
        say(f"forward takes {report.arguments}")
    if any(len(set(counts)) > 1 for counts in report.heads.values()):
        for group, counts in report.heads.items():
            say(f"heads of {group}: {', '.join(map(str, counts))}")
    if report.skip:
        say(f"skip {report.skip}")
    say()
    lines = []
    for row in report.rows:
        sites = row.sites
        where = "" if not sites else sites[0] if len(sites) == 1 else f"{sites[0]} … {sites[-1]}"
        number = f"{GLUE}({len(sites)})" if len(sites) > 1 else ""
        what = (
            "  " * (row.depth - 1)
            + (f"└{GLUE}" if row.depth else "")
            + row.what
            + (f"  [{row.level}]" if row.level else "")
        )
        masks = ", ".join(row.masks) or "none"
        lines.append(
            [
                where + number,
                what,
                str(row.heads),
                spaced(row.params),
                count(row.flops),
                row.growth,
                masks,
                row.provider,
            ]
        )
    table(
        [
            Column("site", wrap=24),
            Column("what is put there", wrap=24),
            Column("heads", rank=2, right=True),
            Column("parameters", rank=1, right=True),
            Column("FLOPs", rank=1, right=True),
            Column("grows", rank=3),
            Column("masks", rank=4),
            Column("provider", rank=5),
        ],
        lines,
    )
    plain = f"plain {report.family} {spaced(report.base_params)}"
    say(
        f"{report.sites} sites · {spaced(report.params)} parameters ({plain}, "
        f"{share(report.params, report.base_params)}) · {count(report.flops)}FLOP "
        f"({share(report.flops, report.base_flops)})"
    )
    start = "yes, bit for bit, given its weights" if report.starts_equal else "no"
    loads = "yes" if not report.lost_tensors else f"all but {len(report.lost_tensors)} tensors"
    if report.image:
        say(
            f"starts equal to {report.base}: {start}   loads its weights: {loads}, "
            f"{report.new_tensors} new tensors"
        )
    say(f"supports: {', '.join(report.supports)}   not: {', '.join(report.lacks)}")


def _stack(report) -> str:
    """What goes in, the layers, what comes out."""
    front = report.depth - len(next(iter(report.heads.values())))
    conv = f"{front} × [ conv ] → " if report.image and front else ""
    layers = " → ".join(
        f"{len(counts)} × [ {' → '.join(_sublayers(report, group))} → mlp ]"
        for group, counts in report.heads.items()
        if "." not in group
    )
    pool = "".join(f" → {formula}" for site, formula in _formulas(report) if site == "pool")
    return f"{report.takes} → {conv}{layers}{pool} → {report.gives}"


def _streams(report) -> list[str]:
    """A line for each of two streams, and what comes out of which."""
    layers = {
        stream: len(
            {site.split(".")[1] for row in report.rows for site in row.sites if site.startswith(stream)}
        )
        for stream in "ab"
    }
    lines = [
        f"{stream}: {what}"
        + (f" → {count} × [ {' → '.join([*_sublayers(report, stream), 'mlp'])} ]" if count else "")
        for stream, what, count in (("a", report.takes, report.depth), ("b", report.second, layers["b"]))
    ]
    return [*lines, f"{'a and b' if layers['b'] else 'a'} → {report.gives}"]


def _stages(report) -> list[str]:
    """A line for each stage, from the image to the classes."""
    lines = []
    for s, stage in enumerate(report.stages):
        said = [(site, what) for site, what in _formulas(report) if site.startswith(f"stages.{s}.")]
        attention = " | ".join(dict.fromkeys(what for _, what in said))
        sited = len(report.heads.get(f"stages.{s}", ()))
        if stage.conv == "instead" and sited < stage.depth:
            attention = " | ".join(filter(None, (attention, "conv")))
        parts = [
            "conv" if stage.conv == "before" else "",
            attention,
            "conv" if stage.conv == "after" else "",
            "mlp" if stage.mlp else "",
        ]
        grid = " × ".join(map(str, stage.grid))
        inside = " → ".join(filter(None, parts))
        lines.append(f"stages.{s}: {grid} tokens of {stage.channels} channels → {stage.depth} × [ {inside} ]")
    channels, rows, columns = report.image
    pool = "".join(f"{formula} → " for site, formula in _formulas(report) if site == "pool")
    return [f"{channels} × {rows} × {columns} image", *lines, f"→ {pool}{report.gives}"]


def _sublayers(report, group: str) -> list[str]:
    """What the attention of a group of layers is, as formulas: `hadamard(softmax, soft)`, `cross softmax`."""
    own: dict[str, list[str]] = {}
    for site, formula in _formulas(report):
        words = site.split(".")
        first, last = words[0], words[-1]
        if first == group:
            own.setdefault("cross " if last == "cross" else "", []).append(formula)
    return [name + " | ".join(dict.fromkeys(formulas)) for name, formulas in own.items()]


def _formulas(report) -> list[tuple[str, str]]:
    """What is put at each run of sites, with the first of them."""
    out: list[tuple[str, str]] = []
    rows = list(report.rows)

    def formula(index: int) -> tuple[str, int]:
        row = rows[index]
        name, index = row.what.split()[0], index + 1
        inner = []
        while index < len(rows) and rows[index].depth > row.depth:
            text, index = formula(index)
            inner.append(text)
        return (f"{name}({', '.join(inner)})" if inner else name), index

    index = 0
    while index < len(rows):
        site = rows[index].sites[0]
        text, index = formula(index)
        out.append((site, text))
    return out


def _ran(run) -> None:
    from attnzoo.cli.render import GLUE, say, seconds

    shape = f"{GLUE}×{GLUE}".join(map(str, run.shape))
    say(f"forward: {Path(run.image).name} → {shape} in {seconds(run.forward)}")
    say(f"forward and backward, two samples, training mode: {seconds(run.backward)}")
    if run.without_gradient:
        say(f"no finite gradient for {', '.join(run.without_gradient)}", style="red")
    else:
        say(f"gradients: all {run.tensors} parameter tensors received a finite one", style="green")
