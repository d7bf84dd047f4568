"""`attnzoo probe MODEL NAME...`: what is measured of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attnzoo.cli import completion
from attnzoo.cli.eval import With
from attnzoo.cli.list import AsJson
from attnzoo.cli.models import LOCAL, ImageModel, from_recipe, from_timm, image_model, only_for, opened

SHOWN = 12
"""Rows of each table that are printed; all are in the CSV."""


def probe(
    model: Annotated[
        str,
        typer.Argument(
            help="A run's folder, a recipe's name or file, a timm model's name, or local-dir:DIR.",
            metavar="MODEL",
            autocompletion=completion.runs_and_recipes,
        ),
    ],
    probes: Annotated[
        list[str],
        typer.Argument(
            help="Names of probes, or NAME(option=value, ...).",
            metavar="PROBE...",
            autocompletion=completion.probes,
        ),
    ],
    count: Annotated[
        int,
        typer.Option(
            min=1, help="Most examples of the test side, drawn at random, and of the training side."
        ),
    ] = 256,
    which: Annotated[
        Literal["best", "last"], typer.Option(help="Weights of the best or the last epoch.")
    ] = "best",
    data: Annotated[
        str | None,
        typer.Option(
            help="What is shown: digits, folder:PATH, markov, ...; the run's or the recipe's own otherwise.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        list[Path],
        typer.Option("--images", help="An image or a folder of images without classes; again for more."),
    ] = [],  # noqa: B006
    init_from: Annotated[
        Path | None, typer.Option(help="Load weights into a recipe's or timm's model (.safetensors, .pth).")
    ] = None,
    with_: With = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="Folder of tables and pictures; NAME-probes when left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw, and of an untrained model's weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure something of a model: tables, CSV, pictures and one HTML page."""
    from attnzoo.cli.render import say, say_json, say_next
    from attnzoo.lab.intervening import intervene, intervention
    from attnzoo.lab.probing import probe as measured
    from attnzoo.lab.probing import probe_of
    from attnzoo.lab.report import write

    asked, changes = [probe_of(text) for text in probes], [intervention(text) for text in with_]
    run, loaded = opened(model, init_from)
    if not as_json and run:
        for note in run.notes():
            say(note, style="dim")
    sources = _Sources(model, run, loaded, init_from, which, data, tuple(images))
    with sources.subject(count, seed) as (subject, state):
        examples = sum(len(batch) for batch in subject.batches)
        side = "" if images else " of the test side"
        changed = f", with {', '.join(map(str, changes))}" if changes else ""
        about = f"{state}, {examples} {subject.kind}{side}{changed}"
        if not as_json:
            say(about, style="bold")
        findings = []
        with intervene(subject.model, *changes):
            for one in asked:
                found = measured(subject, one)
                findings.append(found)
                if not as_json:
                    _print(found)
    written = write(findings, out or Path(f"{subject.name}-probes"), f"{subject.name}: probes", about)
    if as_json:
        said = {"model": model, "state": state, "examples": examples, "with": [str(c) for c in changes]}
        said |= {"run": model, "which": which} if run else {}
        say_json(said | {"findings": [f.as_dict() for f in findings], "written": [str(p) for p in written]})
        return
    say(f"written: {written[0]}, with {', '.join(path.name for path in written[1:])}")
    say_next(f"attnzoo heatmap {model}", "attnzoo list interventions")


@dataclass(frozen=True)
class _Sources:
    """Where model and examples come from.

    Args:
        model: As it was typed.
        run: None where none is meant.
        loaded: The recipe; None for a model of timm's.
        init_from: A file of weights.
        which: Weights of a run.
        data: Name of a data set.
        images: Files and folders.
    """

    model: str
    run: Any
    loaded: Any
    init_from: Path | None
    which: Literal["best", "last"]
    data: str | None
    images: tuple[Path, ...]

    @contextmanager
    def subject(self, count: int, seed: int) -> Iterator[tuple[Any, str]]:
        """The model with what it is shown, and how it was trained; timm's own has taps as long as the block lasts.

        Args:
            count: Most examples.
            seed: Of the draw, and of untrained weights.

        Raises:
            ZooError: AZ926, AZ928, AZ908: no examples, two sources of them, images for a model of sequences.
        """
        from attnzoo.lab.subject import Subject
        from attnzoo.lab.timm_models import tapped

        if self.images:
            seen, shown = self._with_images(count, seed)
            with tapped(seen.model):
                yield (
                    Subject.of(seen.model, shown, classes=seen.classes, name=seen.name),
                    f"{seen.name}, {seen.state}",
                )
        elif self.run:
            state = f"{self.run.loaded.name}, {self.which} epoch"
            yield Subject.of_run(self.run, self.which, count, seed, self.data), state
        elif self.loaded:
            yield self._of_recipe(count, seed)
        else:
            seen, there, labelled = self._of_timm(seed)
            with tapped(seen.model):
                found = Subject.of_data(
                    seen.model, there, "images", count=count, seed=seed, name=seen.name, labelled=labelled
                )
                yield found, f"{seen.name}, {seen.state}"

    def _with_images(self, count: int, seed: int) -> tuple[ImageModel, Any]:
        """The model, and the images as it takes them (b c y x)."""
        from attnzoo.data import evaluation
        from attnzoo.errors import ZooError

        if self.data:
            raise ZooError(
                "AZ928", "`--data` and `--images` do not go together", help="leave one of the two out"
            )
        if self.loaded:
            sequences = self.loaded.recipe.host.kind in ("seq2seq", "sequence")
            but = f"`{self.model}` is a model of sequences"
            only_for("models of images", but, ("--images", sequences, "`--data` names what is shown"))
        seen = image_model(self.model, self.run, self.loaded, self.init_from, seed, self.which)
        shown, _, _ = seen.images(self.images, count, seed)
        return seen, evaluation(seen.size, seen.mean, seen.std)(shown)

    def _of_recipe(self, count: int, seed: int) -> tuple[Any, str]:
        """The model as training would begin: with the classes, sizes and vocabularies of the data."""
        from attnzoo.lab.subject import Subject
        from attnzoo.train.kinds import task_of
        from attnzoo.train.settings import prepare

        edits = [f"train.data={self.data}"] if self.data else []
        task = task_of(*prepare(self.model, [*edits, f"train.seed={seed}"]))
        model, state = from_recipe(task.loaded, self.init_from, seed)
        data: Any = task.data
        host: Any = task.loaded.recipe.host
        if task.kind == "images":
            data = replace(data, mean=tuple(host.mean or data.mean), std=tuple(host.std or data.std))
        name = task.loaded.name
        found = Subject.of_data(model, data, task.kind, count=count, seed=seed, name=name)
        return found, f"{name}, {state}"

    def _of_timm(self, seed: int) -> tuple[ImageModel, Any, bool]:
        """The model, images in its size, and whether their classes are its own: an untrained model is given these."""
        from attnzoo.data import load_images
        from attnzoo.errors import RunError, ZooError

        if not self.data:
            raise ZooError(
                "AZ926",
                "there is nothing to show the model",
                help="name a data set or pictures: --data digits, --images FOLDER",
            )
        data, untrained = load_images(self.data), self.init_from is None and not self.model.startswith(LOCAL)
        options = {"num_classes": len(data.classes)} if untrained else {}
        seen = from_timm(self.model, self.init_from, seed, **options)
        if data.image[0] not in (1, seen.size[0]):
            raise RunError(
                "AZ807",
                f"`{data.name}` has images in {data.image[0]} channels",
                why=f"`{seen.name}` takes {seen.size[0]}",
                help="choose other data",
            )
        labelled = untrained or list(seen.classes or ()) == list(data.classes)
        return seen, replace(data, image=seen.size, mean=seen.mean, std=seen.std), labelled


def _print(found: Any) -> None:
    """The strongest rows of a finding, and what must be said about it."""
    from attnzoo.cli.render import Column, facts, say, table
    from attnzoo.lab.finding import shown

    rows = list(found.rows()) if len(found) <= SHOWN else found.sorted()[:SHOWN]
    names = [name for name in found.columns if any(row[name] != "" for row in rows)]
    if "layer" in names and "site" in names:
        names.remove("layer")
    columns = [
        Column(name, right=not isinstance(rows[0][name], str), rank=_rank(found, name)) for name in names
    ]
    title = (
        f"{found.probe}"
        if len(found) <= SHOWN
        else f"{found.probe}: {SHOWN} of {len(found)}, by {found.shows}"
    )
    say()
    table(columns, [[shown(row[name]) for name in names] for row in rows], title=title)
    facts([(name.replace("_", " "), shown(value)) for name, value in found.figures.items()])
    for note in found.notes:
        say(note, style="dim")


def _rank(found: Any, name: str) -> int:
    """How early a column is dropped where there is little room: what is shown and where it is, never."""
    return 0 if name in ("site", "branch", "head", found.shows) or name == next(iter(found.columns)) else 1
