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
            help="Write the maps beside it: images, rows, columns, y, x; of text rows, columns, n, m.",
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
    run, loaded = _opened(model, init_from)
    name = Path(model).resolve().name if run else loaded.name if loaded else model
    if loaded and loaded.recipe.host.kind in ("seq2seq", "sequence"):
        _only_for(
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
        _only_for(
            "models of text",
            f"`{name}` looks at images",
            ("--text", texts, "`--images` names images"),
            ("--target", targets, "leave it out: it belongs to --text"),
            ("--site", site, "leave it out, or choose a layer with --layer"),
        )
        what = what or "model"
        if run:
            seen = _from_run(run, name, which)
        else:
            seen = _from_recipe(loaded, init_from, seed) if loaded else _from_timm(model, init_from, seed)
        chosen = seen.images(pictures, count or (1 if what == "heads" else 8), seed)
        seen = replace(seen, state=seen.state + changed)
        with intervene(seen.model, *changes):
            _draw_images(seen, chosen, what, layer, fusion, discard, out, npy, as_json)
    if not as_json:
        say_next(f"attnzoo heatmap {model} --what {'mechanism' if what == 'heads' else 'heads'}")


LOCAL = "local-dir:"
"""What timm writes before a folder with weights and `config.json`."""


def _opened(name: str, init_from: Path | None) -> tuple[Any, Any]:
    """The run that is meant, or None, and its recipe, or None for a model of timm's: a recipe comes first."""
    from attnzoo.errors import RecipeError, ZooError, did_you_mean
    from attnzoo.recipe.loading import load
    from attnzoo.train import open_run

    is_run = _is_run(name)
    if init_from is not None and (is_run or name.startswith(LOCAL)):
        kind = "a folder of timm's" if name.startswith(LOCAL) else "a run"
        raise ZooError(
            "AZ907",
            f"`{name}` is {kind}, which has weights of its own",
            help="leave --init-from out, or name the recipe",
        )
    if is_run:
        run = open_run(name)
        return run, run.loaded
    if name.startswith(LOCAL):
        return None, None
    try:
        return None, load(name)
    except RecipeError as error:
        unknown = error.diagnostics[0]
        if unknown.code != "AZ204" or unknown.place is not None:  # a place in a recipe that there is
            raise
    import timm

    if timm.is_model(name):
        return None, None
    raise ZooError(
        "AZ204",
        f"there is no recipe and no timm model called `{name[:200]}`",
        help=f"{unknown.help}; of timm's models, {did_you_mean(name[:200], timm.list_models()) or 'none is near'}",
    )


def _only_for(kind: str, but: str, *options: tuple[str, Any, str]) -> None:
    """Refuse options that belong to models of another kind: the first that was given, with what to do instead."""
    from attnzoo.errors import ZooError

    for option, given, help in options:
        if given:
            raise ZooError("AZ908", f"`{option}` is for {kind}, and {but}", help=help)


def _draw_images(
    seen: "_Subject",
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
    from attnzoo.lab.heatmap import TITLES, captions, heat_sheet, notes, save_sheet, view
    from attnzoo.lab.maps import collect

    images, names, truths = chosen
    maps = collect(seen.model, evaluation(seen.size, seen.mean, seen.std)(images))
    shown = view(maps, what, layer=layer, fusion=fusion, ratio=discard)
    lines = captions(maps, names, truths, seen.classes)
    given = [f"`{name}` is the brightness of the images" for name in getattr(seen.model, "given", {})]
    sheet = heat_sheet(
        maps,
        shown,
        images,
        lines,
        f"{seen.name}: {TITLES[what]}",
        [seen.state, *given, *notes(maps, what, layer)],
    )
    written = save_sheet(sheet, out or Path(f"{seen.name}-{what}.png"), shown.values if npy else None)
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
    say(f"images: {len(images)} · layers: {len(maps.sites)} · branches: {branches} · {seen.state}")
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
class _Subject:
    """What is looked into, and the images that it has itself.

    Args:
        name: For the title and the file.
        state: How it was trained.
        model: In eval mode.
        size: Channels, rows and columns of its images.
        mean: By channel, of images from 0 to 1.
        std: By channel, of images from 0 to 1.
        classes: Names of its classes; None where they have none.
        test: The test images of a run.
    """

    name: str
    state: str
    model: Any
    size: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str] | None = None
    test: Any = None

    def images(self, paths: Sequence[Path], count: int, seed: int) -> tuple[Any, list[str], list[int] | None]:
        """Images from 0 to 255 (b c y x), their names, and their classes where these are known."""
        import torch

        from attnzoo.bench.composition import default_image
        from attnzoo.data.chance import drawn
        from attnzoo.lab.heatmap import image_files, read_image

        if self.test is not None and not paths:
            indices = drawn(len(self.test), count, seed)
            images, truths = self.test.batch(torch.tensor(indices))
            return images, [f"test image {i}" for i in indices], truths.tolist()
        files = image_files(paths or [default_image()], count, seed)
        return torch.stack([read_image(file, self.size) for file in files]), [f.name for f in files], None


def _is_run(name: str) -> bool:
    """Whether a folder is meant; a recipe of the zoo comes first, `./name` is always a folder."""
    from attnzoo.zoo import load_zoo

    return Path(name).is_dir() and name not in load_zoo().recipes


def _from_run(run: Any, name: str, which: Literal["best", "last"]) -> _Subject:
    data, model = run.data(), run.model(which)
    state = f"{run.loaded.name}, {which} epoch"
    return _Subject(name, state, model, data.image, data.mean, data.std, data.classes, data.test)


def _from_recipe(loaded: Any, init_from: Path | None, seed: int) -> _Subject:
    import torch

    from attnzoo.recipe.composing import build
    from attnzoo.recipe.weights import init_model

    torch.manual_seed(seed)
    model = build(loaded, {}).eval()
    state = f"untrained, seed {seed}"
    if init_from is not None:
        ledger = init_model(model, init_from)
        new = f", {len(ledger['new'])} tensors untrained" if ledger["new"] else ""
        state = f"weights of {init_from.name}{new}"
    cfg: Any = model.pretrained_cfg
    size = tuple(cfg["input_size"])
    return _Subject(loaded.name, state, model, size, cfg["mean"][: size[0]], cfg["std"][: size[0]])


def _from_timm(name: str, init_from: Path | None, seed: int) -> _Subject:
    import timm
    import torch

    from attnzoo.recipe.weights import init_model

    folder = name.removeprefix(LOCAL) if name.startswith(LOCAL) else None
    torch.manual_seed(seed)
    model = _built(name, folder).eval()
    state = f"untrained, seed {seed}" if folder is None else f"weights of {folder}"
    if init_from is not None:
        ledger = init_model(model, init_from)
        new = f", {len(ledger['new'])} tensors untrained" if ledger["new"] else ""
        state = f"weights of {init_from.name}{new}"
    cfg: Any = timm.data.resolve_model_data_config(model)
    labels = model.pretrained_cfg.get("label_names")
    classes = labels if folder is not None and labels and len(labels) == model.num_classes else None
    size = tuple(cfg["input_size"])
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return _Subject(
        Path(folder).resolve().name if folder is not None else name,
        state,
        model,
        (size[0], *(built or size[1:])),
        cfg["mean"][: size[0]],
        cfg["std"][: size[0]],
        classes,
    )


def _built(name: str, folder: str | None) -> Any:
    """A model of timm's: first looked at without allocating it, so that nobody waits for what is refused.

    Args:
        name: As `timm.create_model` takes it.
        folder: The folder that it names, whose weights are loaded; None where it names none.

    Raises:
        ZooError: AZ903, when it has no maps; AZ935, when timm cannot build it.
        RecipeError: AZ311, when it is too large for this machine.
    """
    import timm

    from attnzoo.errors import ZooError
    from attnzoo.hosts.info import unallocated
    from attnzoo.lab.timm_models import tapped

    try:
        with unallocated():
            shell = timm.create_model(name, pretrained=False)
        with tapped(shell):
            pass
        return timm.create_model(name, pretrained=folder is not None)
    except ZooError:
        raise
    except Exception as error:  # whatever timm makes of a folder: its files may hold anything
        raise ZooError(
            "AZ935",
            f"timm cannot build `{name}`",
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            help="a folder needs `config.json` and `model.safetensors`, as `timm.models.save_for_hf` writes them"
            if folder is not None
            else "`timm.create_model` says the same",
        ) from None


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
        _only_for("pairs", single, ("--target", targets and not self.pairs, "leave it out"))
        _only_for(
            "examples that are drawn", "--text names them", ("--count", texts and count, "leave it out")
        )
        untrained = f"`{self.name}` is a recipe without a vocabulary"
        _only_for(
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
    import torch

    from attnzoo.recipe.composing import build

    torch.manual_seed(seed)
    model = build(loaded, {}).eval()
    return _TextSubject(loaded.name, f"untrained, seed {seed}", model, loaded.recipe.host.kind == "seq2seq")
