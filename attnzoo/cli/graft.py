"""`attnzoo graft DONOR`: a recipe in a trained timm model, with its weights; `attnzoo ungraft DIR`: the model again."""

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson


def graft(
    donor: Annotated[
        str,
        typer.Argument(
            help="A timm model (vit_tiny_patch16_224), local-dir:FOLDER, or the folder of a run.",
            autocompletion=completion.runs,
        ),
    ],
    recipe: Annotated[
        str,
        typer.Option(help="The recipe's name (ham_b) or file.", autocompletion=completion.recipes),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write the graft, its ledger and what it dropped.", show_default=False)
    ] = None,
    edits: Annotated[list[str], typer.Option("--set", help="Change a value: attention.with.window=5")] = [],  # noqa: B006
    start: Annotated[
        Literal["identity", "recipe"],
        typer.Option(help="Fusions start as their first branch where they can, or as the recipe says."),
    ] = "identity",
    weights: Annotated[
        Path | None, typer.Option(help="The donor's weights (.safetensors, .pth).", show_default=False)
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Let timm download the donor's weights.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of what is new, and of distillation.")] = 0,
    distil: Annotated[
        str | None,
        typer.Option(
            help="Learn from the donor on these images: digits, folder:PATH, ...", show_default=False
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=0, help="Of the first stage, which learns the donor's blocks; 0 for none.", show_default="10"
        ),
    ] = None,
    finetune: Annotated[
        int, typer.Option(min=0, help="Epochs of the second stage, which learns the labels.")
    ] = 10,
    tune: Annotated[
        Literal["model", "blocks"],
        typer.Option(help="What the second stage changes: all, or the new blocks."),
    ] = "model",
    mse: Annotated[float, typer.Option(min=0.0, help="Weight of squared errors in the first stage.")] = 0.0,
    ce: Annotated[float, typer.Option(min=0.0, help="Weight of the labels in the first stage.")] = 0.0,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="New blocks that learn at a time in the first stage, from the first on, --epochs each.",
            show_default="all",
        ),
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="Where data sets lie.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Put a recipe into a trained timm ViT: its weights stay, and a ledger says where."""
    from attnzoo.cli.render import progress, say, say_json, say_next
    from attnzoo.errors import RecipeError
    from attnzoo.grafting import distil as learn
    from attnzoo.grafting import graft as put
    from attnzoo.grafting import save_graft
    from attnzoo.grafting.distillation import FAR
    from attnzoo.grafting.grafts import refuse_taken
    from attnzoo.recipe import load
    from attnzoo.train.check import checked
    from attnzoo.train.settings import settings_of

    if out:
        refuse_taken(out)
    if weights and pretrained:
        raise RecipeError("AZ611", "--weights and --pretrained are both given", help="leave one of them out")
    settings = None
    if distil:
        how = {**FAR, "data": distil, "seed": seed} | ({"epochs": epochs} if epochs else {})
        edits = [f"train={json.dumps(how)}", *edits]
        loaded = load(recipe, edits)
        checked(loaded)
        settings = settings_of(loaded, data_root=str(data_root) if data_root else None)
    made, ledger = put(
        donor, recipe, edits=edits, start=start, weights=weights, pretrained=pretrained, seed=seed
    )
    if not as_json:
        _ledger(ledger)
    report = None
    if settings:
        with progress(quiet=as_json) as tell:
            first = 0 if epochs == 0 else None
            how = {"tune": tune, "mse": mse, "ce": ce, "at_once": at_once}
            report = learn(made, settings, first=first, finetune=finetune, report=tell, **how)
    if out:
        save_graft(made, out)
    if as_json:
        say_json(
            ledger.model_dump(mode="json")
            | {"counts": ledger.counts(), "distilled": _data(report), "out": str(out) if out else None}
        )
        return
    if report:
        _learnt(report)
    if out:
        say(f"written: {out}/config.json, model.safetensors, ledger.json and dropped.safetensors")
        say_next(f"timm.create_model('local-dir:{out}', pretrained=True)", f"attnzoo ungraft {out} --out DIR")
    else:
        say_next(f"attnzoo graft {donor} --recipe {recipe} --out DIR")


def ungraft(
    folder: Annotated[Path, typer.Argument(help="Folder that `attnzoo graft --out` wrote.")],
    out: Annotated[Path, typer.Option(help="Write what timm.create_model('local-dir:DIR') loads.")],
    as_json: AsJson = False,
) -> None:
    """Take the recipe out of a graft again: its donor, bit for bit unless the graft was trained."""
    from attnzoo.cli.render import say, say_json, say_next
    from attnzoo.grafting import ungraft as take_out
    from attnzoo.grafting.grafts import ledger_of, refuse_taken
    from attnzoo.recipe.weights import save
    from attnzoo.train.checkpoint import fingerprint

    refuse_taken(out)
    donor, ledger = take_out(folder), ledger_of(folder)
    state = donor.state_dict()
    same = fingerprint(state) == ledger.donor.sha256
    save(donor, out)
    if as_json:
        say_json({"donor": ledger.donor.name, "tensors": len(state), "bit_for_bit": same, "out": str(out)})
        return
    kept = len(state) - len(ledger.held())
    say(f"{ledger.donor.name}: {len(state)} tensors", style="bold")
    if same:
        say("equal to the donor that was grafted, bit for bit", style="green")
    else:
        say(
            f"not the donor that was grafted: the graft was trained since. {len(state) - kept} tensors are "
            f"those of the graft, {kept} are as they were."
        )
    say(f"written: {out}/config.json and {out}/model.safetensors")
    say_next(f"timm.create_model('local-dir:{out}', pretrained=True)")


def _ledger(ledger: Any) -> None:
    """The ledger in short."""
    from attnzoo.cli.render import GLUE, Column, say, spaced, table

    donor = ledger.donor
    say(f"{ledger.recipe} in {donor.name}", style="bold")
    counts = ledger.counts()
    parts = [f"{spaced(counts[kind])} {kind}" for kind in ("copied", "reshaped", "new")]
    say(f"tensors: {', '.join(parts)}; {spaced(counts['dropped'])} of the donor dropped")
    say()
    lines = []
    for group in ledger.groups():
        number = f"{GLUE}({group.blocks})" if group.blocks > 1 else ""
        names = _modules(group.names)
        lines.append(
            [
                f"{group.where}{number}",
                group.kind,
                spaced(group.tensors),
                spaced(group.numbers),
                ", ".join(names),
            ]
        )
    table(
        [
            Column("where", wrap=20),
            Column("what"),
            Column("tensors", rank=1, right=True),
            Column("numbers", right=True),
            Column("which", rank=2, wrap=24),
        ],
        lines,
    )
    for note in ledger.notes:
        say(note[0].upper() + note[1:] + ".")


def _modules(names: tuple[str, ...]) -> list[str]:
    """Names of tensors, those of one layer as one, and numbered layers too: `attn.qkv`, `attn.onwards.0 … 2`."""
    layers = dict.fromkeys(re.sub(r"\.(weight|bias)(_\w+)?$", "", name) for name in names)
    out = []
    for row, found in groupby(layers, key=lambda layer: re.sub(r"(?<=\.)\d+$", "", layer)):
        first, *others = found
        out.append(f"{first} … {others[-1].removeprefix(row)}" if others else first)
    return out


def _learnt(report: Any) -> None:
    """How close the blocks came, and what it recognises."""
    from attnzoo.cli.render import Column, duration, percent, say, table

    names = [stage.name for stage in report.stages]
    say()
    rows = [
        [f"blocks.{number}", *(f"{stage.cosines[number]:.4f}" for stage in report.stages)]
        + (["yes" if number in report.replaced else "no"])
        for number in range(len(report.stages[0].cosines))
    ]
    table(
        [
            Column("cosine with the donor's"),
            *(Column(name, right=True) for name in names),
            Column("replaced", rank=1),
        ],
        rows,
    )
    told = ", ".join(f"{stage.name} {percent(stage.accuracy)}" for stage in report.stages)
    say(
        f"accuracy on {report.images} images of {report.data}: donor {percent(report.donor)}, {told}",
        style="bold",
    )
    say(f"{percent(report.recovered)} of the donor's accuracy recovered, in {duration(report.seconds)}")


def _data(report: Any) -> dict[str, Any] | None:
    from dataclasses import asdict

    return None if report is None else asdict(report) | {"recovered": report.recovered}
