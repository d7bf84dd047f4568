"""`attnzoo heatmap RUN_OR_RECIPE`: what a model looks at, as a sheet of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attnzoo.cli.list import AsJson


def heatmap(
    model: Annotated[
        str, typer.Argument(help="A run's folder, or a recipe's name or file.", metavar="RUN_OR_RECIPE")
    ],
    images: Annotated[
        list[Path], typer.Option("--images", help="A picture or a folder of pictures; again for more.")
    ] = [],  # noqa: B006
    count: Annotated[
        int | None, typer.Option(min=1, help="How many pictures, drawn at random; 8, or 1 with --what heads.")
    ] = None,
    what: Annotated[
        Literal["model", "rollout", "mechanism", "heads"],
        typer.Option(help="Branches and rollout; rollout, branches or heads by layer."),
    ] = "model",
    layer: Annotated[int | None, typer.Option(help="One layer only, from 0.")] = None,
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
        Path | None, typer.Option(help="Load weights into a recipe's model (.safetensors, .pth).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The PNG; NAME-WHAT.png when left out.")] = None,
    npy: Annotated[
        bool, typer.Option("--npy", help="Write the maps beside it: pictures, rows, columns, y, x.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the draw, and of an untrained model's weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Draw what a model looks at: mean maps, rollout, mechanisms by layer, heads."""
    from attnzoo.cli.render import say, say_json, say_next
    from attnzoo.data import evaluation
    from attnzoo.lab.heatmap import TITLES, captions, heat_sheet, notes, save_sheet, view
    from attnzoo.lab.maps import collect

    seen = _from_run(model, which, init_from) if _is_run(model) else _from_recipe(model, init_from, seed)
    count = count or (1 if what == "heads" else 8)
    pictures, names, truths = seen.pictures(images, count, seed)
    maps = collect(seen.model, evaluation(seen.size, seen.mean, seen.std)(pictures))
    shown = view(maps, what, layer=layer, fusion=fusion, ratio=discard)
    lines = captions(maps, names, truths, seen.classes)
    sheet = heat_sheet(
        maps, shown, pictures, lines, f"{seen.name}: {TITLES[what]}", [seen.state, *notes(maps, what, layer)]
    )
    written = save_sheet(sheet, out or Path(f"{seen.name}-{what}.png"), shown.values if npy else None)
    if as_json:
        say_json(
            {
                "written": [str(path) for path in written],
                "size": list(sheet.size),
                "pictures": names,
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
    say(f"pictures: {len(pictures)} · layers: {len(maps.sites)} · branches: {branches} · {seen.state}")
    for absent in {one.branch: one for one in maps.absent}.values():
        say(f"{absent.branch} has no map: {absent.reason}", style="yellow")
    other = "heads" if what != "heads" else "mechanism"
    say_next(f"attnzoo heatmap {model} --what {other}")


@dataclass(frozen=True)
class _Subject:
    """What is looked into, and the pictures that it has itself.

    Args:
        name: For the title and the file.
        state: How it was trained.
        model: In eval mode.
        size: Channels, rows and columns of its pictures.
        mean: By channel, of pictures from 0 to 1.
        std: By channel, of pictures from 0 to 1.
        classes: Names of its classes; None where they have none.
        test: The test pictures of a run.
    """

    name: str
    state: str
    model: Any
    size: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str] | None = None
    test: Any = None

    def pictures(
        self, paths: Sequence[Path], count: int, seed: int
    ) -> tuple[Any, list[str], list[int] | None]:
        """Pictures from 0 to 255 (b c y x), their names, and their classes where these are known."""
        import torch

        from attnzoo.bench.composition import default_picture
        from attnzoo.lab.heatmap import drawn, picture_files, read_picture

        if self.test is not None and not paths:
            indices = drawn(len(self.test), count, seed)
            pictures, truths = self.test.batch(torch.tensor(indices))
            return pictures, [f"test picture {i}" for i in indices], truths.tolist()
        files = picture_files(paths or [default_picture()], count, seed)
        return torch.stack([read_picture(file, self.size) for file in files]), [f.name for f in files], None


def _is_run(name: str) -> bool:
    """Whether a folder is meant; a recipe of the zoo comes first, `./name` is always a folder."""
    from attnzoo.zoo import load_zoo

    return Path(name).is_dir() and name not in load_zoo().recipes


def _from_run(folder: str, which: Literal["best", "last"], init_from: Path | None) -> _Subject:
    from attnzoo.errors import ZooError
    from attnzoo.train import open_run

    if init_from is not None:
        raise ZooError("AZ907", f"`{folder}` is a run, which has weights of its own",
                       help="leave --init-from out, or name the recipe")  # fmt: skip
    run = open_run(folder)
    data, model = run.data(), run.model(which)
    name = Path(folder).resolve().name
    state = f"{run.loaded.name}, {which} epoch"
    return _Subject(name, state, model, data.image, data.mean, data.std, data.classes, data.test)


def _from_recipe(recipe: str, init_from: Path | None, seed: int) -> _Subject:
    import torch

    from attnzoo.recipe.compose import build
    from attnzoo.recipe.load import load
    from attnzoo.recipe.weights import init_model

    loaded = load(recipe)
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
