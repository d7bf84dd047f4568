"""`attnzoo heatmap MODEL IMAGE...`: what a model looks at, as a sheet of images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attnzoo.cli import completion
from attnzoo.cli.eval import With
from attnzoo.cli.list import AsJson
from attnzoo.cli.models import ImageModel, from_recipe, image_model, only_for, opened


def heatmap(
    model: Annotated[
        str,
        typer.Argument(
            help="A run's folder, a recipe's name or file, a timm model's name, or local-dir:DIR.",
            metavar="MODEL",
            autocompletion=completion.runs_and_recipes,
        ),
    ],
    files: Annotated[
        list[Path],
        typer.Argument(help="Images, or folders of images, as with --images.", metavar="[IMAGE]..."),
    ] = [],  # noqa: B006
    images: Annotated[
        list[Path], typer.Option("--images", help="An image or a folder of images; again for more.")
    ] = [],  # noqa: B006
    texts: Annotated[
        list[str], typer.Option("--text", help="A text for a run on text; again for more.")
    ] = [],  # noqa: B006
    targets: Annotated[
        list[str], typer.Option("--target", help="What the decoder is given; the model's own when left out.")
    ] = [],  # noqa: B006
    count: Annotated[
        int | None,
        typer.Option(min=1, help="How many, drawn at random; 8 images, or 1 with --what heads and of text."),
    ] = None,
    what: Annotated[
        Literal["model", "rollout", "mechanism", "heads"] | None,
        typer.Option(
            help="Branches and rollout; rollout, branches or heads by layer. Of text `heads` first."
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="One layer only, from 0.")] = None,
    site: Annotated[
        Literal["encoder", "decoder", "cross"] | None,
        typer.Option(help="Of text: one kind of attention only."),
    ] = None,
    fusion: Annotated[
        Literal["mean", "max", "min"], typer.Option(help="How a rollout fuses heads.")
    ] = "mean",
    discard: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the smallest weights that a rollout discards.")
    ] = 0.0,
    which: Annotated[
        Literal["best", "last"], typer.Option(help="Weights of a run: best or last epoch.")
    ] = "best",
    init_from: Annotated[
        Path | None, typer.Option(help="Load weights into a recipe's or timm's model (.safetensors, .pth).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .png, .svg or .pdf file; NAME-WHAT.png when left out.")
    ] = None,
    npy: Annotated[
        bool,
        typer.Option(
            "--npy",
            help="Write the maps beside it, by grid: images, rows, columns, y, x; of text rows, columns, n, m.",
        ),
    ] = False,
    with_: With = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of the draw, and of an untrained model's weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Draw what a model looks at: mean maps, rollout, mechanisms by layer, heads."""
    from attnzoo.cli.render import say_next
    from attnzoo.lab.intervening import intervene, intervention
    from attnzoo.plot import check_file

    pictures, changes = [*files, *images], [intervention(text) for text in with_]
    changed = f"; with {', '.join(map(str, changes))}" if changes else ""
    if out is not None:
        check_file(out)
    run, loaded = opened(model, init_from)
    name = Path(model).resolve().name if run else loaded.name if loaded else model
    if loaded and loaded.recipe.host.kind in ("seq2seq", "sequence"):
        only_for(
            "images",
            f"`{name}` is a model of sequences",
            ("IMAGE", files, "`--text TEXT` says what is shown of a run"),
            ("--images", images, "`--text TEXT` says what is shown of a run"),
            (f"--what {what}", what in ("model", "rollout"), "choose --what heads or --what mechanism"),
            ("--fusion", fusion != "mean", "leave it out: it belongs to a rollout"),
            ("--discard", discard, "leave it out: it belongs to a rollout"),
            ("--init-from", init_from, f"`attnzoo train {model}` trains it"),
        )
        what = what or "heads"
        text = _text_of_run(run, name, which) if run else _text_of_recipe(loaded, seed)
        text = replace(text, state=text.state + changed)
        with intervene(text.model, *changes):
            examples = text.examples(texts, targets, count, seed)
            _draw_text(text, examples, what, layer, site, out, npy, as_json)
    else:
        only_for(
            "models of text",
            f"`{name}` looks at images",
            ("--text", texts, "`--images` names images"),
            ("--target", targets, "leave it out: it belongs to --text"),
            ("--site", site, "leave it out, or choose a layer with --layer"),
        )
        what = what or "model"
        seen = image_model(model, run, loaded, init_from, seed, which)
        chosen = seen.images(pictures, count or (1 if what == "heads" else 8), seed)
        seen = replace(seen, state=seen.state + changed)
        with intervene(seen.model, *changes):
            _draw_images(seen, chosen, what, layer, fusion, discard, out, npy, as_json)
    if not as_json:
        say_next(f"attnzoo heatmap {model} --what {'mechanism' if what == 'heads' else 'heads'}")


def _draw_images(
    seen: ImageModel,
    chosen: tuple[Any, list[str], list[int] | None],
    what: Literal["model", "rollout", "mechanism", "heads"],
    layer: int | None,
    fusion: Literal["mean", "max", "min"],
    discard: float,
    out: Path | None,
    npy: bool,
    as_json: bool,
) -> None:
    """One sheet for all images."""
    from attnzoo.cli.render import say, say_json
    from attnzoo.data import evaluation
    from attnzoo.hosts.given import taken
    from attnzoo.lab.heatmap import TITLES, captions, heat_sheet, notes, save_sheet, view
    from attnzoo.lab.maps import collect

    images, names, truths = chosen
    maps = collect(seen.model, evaluation(seen.size, seen.mean, seen.std)(images))
    shown = view(maps, what, layer=layer, fusion=fusion, ratio=discard)
    lines = captions(maps, names, truths, seen.classes)
    given = [
        f"`{name}` is {'the brightness of the images' if isinstance(wanted, str) else 'the images, averaged'}"
        for name, wanted in taken(seen.model).items()
    ]
    sheet = heat_sheet(
        maps,
        shown,
        images,
        lines,
        f"{seen.name}: {TITLES[what]}",
        [seen.state, *given, *notes(maps, what, layer)],
    )
    written = save_sheet(sheet, out or Path(f"{seen.name}-{what}.png"), shown.arrays() if npy else None)
    if as_json:
        say_json(
            {
                "written": [str(path) for path in written],
                "size": list(sheet.pixels),
                "images": names,
                "columns": shown.columns,
                "rows": shown.rows,
                "maps": [found.as_dict() for found in maps.maps],
                "absent": [vars(absent) for absent in maps.absent],
            }
        )
        return
    for path in written:
        say(f"written: {path}")
    branches = ", ".join(maps.branches())
    say(f"images: {len(images)} · layers: {maps.passage.depth} · branches: {branches} · {seen.state}")
    for line in given:
        say(f"{line}: no data hand it over")
    for absent in {one.branch: one for one in maps.absent}.values():
        say(f"{absent.branch} has no map: {absent.reason}", style="yellow")


def _draw_text(
    seen: "_TextSubject",
    examples: Sequence[Any],
    what: Any,
    layer: int | None,
    site: str | None,
    out: Path | None,
    npy: bool,
    as_json: bool,
) -> None:
    """One sheet for each example."""
    from attnzoo.cli.render import say, say_json
    from attnzoo.lab.heatmap import save_sheet
    from attnzoo.lab.text_maps import collect_text
    from attnzoo.lab.text_sheet import TEXT_TITLES, text_notes, text_sheet, text_view

    out, told = out or Path(f"{seen.name}-{what}.png"), []
    for i, example in enumerate(examples, start=1):
        maps = collect_text(seen.model, *example.inputs).only(site, layer)
        blocks = text_view(maps, example, what)
        remarks = [f"{example.name}; {seen.state}", *text_notes(maps, blocks, what)]
        sheet = text_sheet(blocks, what, f"{seen.name}: {TEXT_TITLES[what]}", example.lines, remarks)
        path = out.with_name(f"{out.stem}-{i}{out.suffix}") if len(examples) > 1 else out
        written = save_sheet(sheet, path, {block.side: block.values() for block in blocks} if npy else None)
        told.append(
            {
                "written": [str(path) for path in written],
                "size": list(sheet.pixels),
                "example": example.name,
                "lines": [text for text, _ in example.lines],
                "tokens": example.words,
                "heads": {stack.side: stack.heads() for stack in maps.stacks},
                "maps": [found.as_dict() for found in maps.maps],
                "absent": [vars(absent) for absent in maps.absent],
            }
        )
        if not as_json:
            for path in written:
                say(f"written: {path}")
            for text, _ in example.lines:
                say(f"  {text}")
    if as_json:
        say_json({"sheets": told})
        return
    heads = " · ".join(f"{stack.side} {' '.join(map(str, stack.heads()))}" for stack in maps.stacks)
    say(f"heads by layer: {heads} · {seen.state}")
    for absent in {one.branch: one for one in maps.absent}.values():
        say(f"{absent.branch} has no map: {absent.reason}", style="yellow")


@dataclass(frozen=True)
class _TextSubject:
    """A model of sequences that is looked into.

    Args:
        name: For the title and the file.
        state: How it was trained.
        model: In eval mode.
        pairs: Whether it translates; otherwise it is one stack.
        run: What it was trained in; None for a recipe's model.
    """

    name: str
    state: str
    model: Any
    pairs: bool
    run: Any = None

    def examples(
        self, texts: Sequence[str], targets: Sequence[str], count: int | None, seed: int
    ) -> list[Any]:
        """What is shown: texts, or examples of the test side, or random ids for a recipe's model."""
        from attnzoo.data.chance import drawn
        from attnzoo.errors import ZooError
        from attnzoo.lab.text_maps import pair_example, random_example, sequence_example, translated_example

        single = f"`{self.name}` is one stack"
        only_for("pairs", single, ("--target", targets and not self.pairs, "leave it out"))
        only_for("examples that are drawn", "--text names them", ("--count", texts and count, "leave it out"))
        untrained = f"`{self.name}` is a recipe without a vocabulary"
        only_for(
            "runs", untrained, ("--text", texts and self.run is None, "leave it out: random ids are shown")
        )
        if targets and len(targets) != len(texts):
            raise ZooError(
                "AZ908",
                f"{len(targets)} targets were given for {len(texts)} texts",
                help="write one --target for each --text, or none",
            )
        if self.run is None:
            return [random_example(self.model, seed + i) for i in range(count or 1)]
        if texts and self.pairs:
            words, given = self.run.vocabularies(), list(targets) or repeat(None)
            return [
                translated_example(self.model, words, text, target, name=f"text {i}")
                for i, (text, target) in enumerate(zip(texts, given, strict=False), 1)
            ]
        data = self.run.data()
        if texts:
            return [sequence_example(self.model, data, text, f"text {i}") for i, text in enumerate(texts, 1)]
        example: Any = pair_example if self.pairs else sequence_example
        return [example(self.model, data, i) for i in drawn(len(data.test), count or 1, seed)]


def _text_of_run(run: Any, name: str, which: Literal["best", "last"]) -> _TextSubject:
    pairs = run.loaded.recipe.host.kind == "seq2seq"
    return _TextSubject(name, f"{run.loaded.name}, {which} epoch", run.model(which), pairs, run)


def _text_of_recipe(loaded: Any, seed: int) -> _TextSubject:
    model, state = from_recipe(loaded, None, seed)
    return _TextSubject(loaded.name, state, model, loaded.recipe.host.kind == "seq2seq")
