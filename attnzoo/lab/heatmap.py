"""Heat maps of what a model looks at: which maps are shown, over which images."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from attnzoo.data.chance import drawn
from attnzoo.data.image_file import read_image_file
from attnzoo.errors import ZooError
from attnzoo.lab.maps import Maps
from attnzoo.lab.rollout import HeadFusion, check_layer, check_some, layer_maps, mean_map, roll, rollout
from attnzoo.plot import Picture, Shown, save
from attnzoo.plot import heat_sheet as drawn_sheet
from attnzoo.plot.palette import GREEN, RED, Line

What = Literal["model", "rollout", "mechanism", "heads"]
TITLES = {
    "model": "what the model looks at",
    "rollout": "attention rollout, layer by layer",
    "mechanism": "what each mechanism looks at, layer by layer",
    "heads": "what each head looks at",
}
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})


@dataclass(frozen=True)
class View:
    """What is shown of each image: a table of maps.

    Args:
        columns: Names of its columns.
        rows: Names of its rows.
        values: How much the answer looks at each grid token, (b rows columns y x); NaN where there is no map.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: Float[Tensor, "b r k y x"]


def view(
    maps: Maps,
    what: What = "model",
    *,
    layer: int | None = None,
    fusion: HeadFusion = "mean",
    ratio: float = 0.0,
) -> View:
    """The maps to be shown.

    `model`: the mean map of each branch, and the rollout. `rollout`: the rollout up to each layer. `mechanism`: each
    branch by layer, mean over heads. `heads`: each layer by head.

    Args:
        maps: From `collect`.
        what: Which of the four.
        layer: One layer only, from 0; of a rollout, the last layer that counts.
        fusion: How a rollout fuses the heads of a branch.
        ratio: Share of the smallest entries of each layer that a rollout discards.

    Raises:
        ZooError: AZ903, when there is no map; AZ904, when there is no such layer.
    """
    check_some(maps.maps, maps.absent)
    check_layer(len(maps.sites), layer)
    layers = list(range(len(maps.sites))) if layer is None else [layer]
    branches = maps.branches()
    if what == "model":
        panels = [mean_map(maps, branch, layer) for branch in branches]
        panels.append(maps.asked(rollout(maps, fusion, ratio, layer)))
        return View((*branches, "rollout"), ("",), torch.stack(panels, dim=1)[:, None])
    if what == "rollout":
        all_layers = layer_maps(maps, fusion, ratio)
        panels = [maps.asked(roll(all_layers[: i + 1])) for i in layers]
        columns = tuple(f"up to {maps.sites[i]}" for i in layers)
        return View(columns, ("",), torch.stack(panels, dim=1)[:, None])
    if what == "mechanism":
        table = [torch.stack([mean_map(maps, branch, i) for i in layers], dim=1) for branch in branches]
        return View(tuple(maps.sites[i] for i in layers), tuple(branches), torch.stack(table, dim=1))
    return _by_head(maps, layers)


def _by_head(maps: Maps, layers: Sequence[int]) -> View:
    """Layers down, the heads of each branch across."""
    here = {(found.layer, found.branch): maps.on_grid(found) for found in maps.maps if found.layer in layers}
    heads = {
        branch: max(grid.shape[1] for (_, name), grid in here.items() if name == branch)
        for branch in dict.fromkeys(branch for _, branch in here)
    }
    blank = torch.full((len(maps.logits), 1, *maps.layout.grid), torch.nan)

    def row(layer: int) -> Tensor:
        parts = []
        for branch, wanted in heads.items():
            grid = here.get((layer, branch), blank[:, :0])
            parts += [grid, blank.expand(-1, wanted - grid.shape[1], -1, -1)]
        return torch.cat(parts, dim=1)

    columns = tuple(f"{branch} {i}" for branch, count in heads.items() for i in range(count))
    return View(columns, tuple(maps.sites[i] for i in layers), torch.stack([row(i) for i in layers], dim=1))


def notes(maps: Maps, what: What = "model", layer: int | None = None) -> list[str]:
    """What must be said about the maps: what was averaged, what is implied, what is missing."""
    tokens = maps.layout.length
    heads = {found.branch: found.heads for found in maps.maps}
    count = ", ".join(f"{branch} {n}" for branch, n in heads.items())
    over = {
        "model": "mean over layers and heads",
        "mechanism": "mean over heads",
        "heads": "each head by itself",
        "rollout": "heads fused, branches averaged, residuals added",
    }[what]
    if layer is not None:
        over += f"; {'up to' if what == 'rollout' else 'only'} {maps.sites[layer]}"
    lines = [
        f"What {maps.reads} looks at: {over}. {len(maps.sites)} layers; heads: {count}.",
        f"Numbers: least and most of a map, in even shares (1/{tokens} of the attention).",
        "Below an image: what it is, then what the model says.",
    ]
    kinds = {
        "implied": "forms no weights; its map is what it does to values, exactly, for these queries and keys.",
        "gate": "gates: each token keeps its own value, times this.",
    }
    for kind, text in kinds.items():
        names = list(dict.fromkeys(found.branch for found in maps.maps if found.kind == kind))
        lines += [f"{', '.join(names)} {text}"] if names else []
    absent: dict[str, str] = {one.branch: one.reason for one in maps.absent}
    lines += [f"{branch} has no map: {reason}." for branch, reason in absent.items()]
    return lines


def captions(
    maps: Maps, names: Sequence[str], truths: Sequence[int] | None, classes: Sequence[str] | None
) -> list[list[Line]]:
    """Lines below each image: what it is and what the model says, green where that is right and red where not.

    Args:
        maps: From `collect`; the model's answers are in them.
        names: What to call the images where the truth is not known.
        truths: True classes; None when not known.
        classes: Names of the classes; numbers when None.
    """
    shares = maps.logits.float().softmax(dim=-1)
    out = []
    for i, share in enumerate(shares):
        guess = int(share.argmax()) if share.numel() else -1

        def called(k: int) -> str:
            return classes[k] if classes else f"class {k}"

        colour = None if truths is None else GREEN if guess == truths[i] else RED
        first = names[i] if truths is None else called(truths[i])
        said: list[Line] = (
            [(f"{called(guess)}, {100 * float(share[guess]):.0f} %", colour)] if share.numel() else []
        )
        out.append([(first, None), *said])
    return out


def heat_sheet(
    maps: Maps,
    shown: View,
    images: UInt8[Tensor, "b c y x"],
    lines: Sequence[Sequence[Line]],
    title: str,
    remarks: Sequence[str],
) -> Picture:
    """The sheet of a view.

    Args:
        maps: From `collect`.
        shown: From `view`.
        images: 0 to 255, (b c y x).
        lines: From `captions`.
        title: First line.
        remarks: From `notes`.
    """
    blocks = [
        Shown(image, captions, values)
        for image, captions, values in zip(images, lines, shown.values, strict=True)
    ]
    return drawn_sheet(blocks, shown.columns, shown.rows, title, remarks, unit=1 / maps.layout.length)


def save_sheet(
    sheet: Picture, out: str | os.PathLike, values: Tensor | Mapping[str, Tensor] | None = None
) -> list[Path]:
    """Write the sheet, and the maps beside it as `.npy`; folders are made, an older sheet is replaced.

    Args:
        sheet: From `heat_sheet` or `text_sheet`.
        out: A file that ends in `.png`, `.svg` or `.pdf`.
        values: The maps, if they are wanted; several, each with a name that the file's is followed by.

    Returns:
        What was written.

    Raises:
        ZooError: AZ905, when it cannot be written there.
    """
    path = save(sheet, out)
    written = [path]
    try:
        for name, tensor in (values if isinstance(values, Mapping) else {"": values}).items():
            if tensor is not None:
                written.append(path.with_name(f"{path.stem}{f'-{name}' if name else ''}.npy"))
                np.save(written[-1], tensor.cpu().numpy())
    except OSError as error:
        raise ZooError(
            "AZ905",
            f"cannot write `{written[-1]}`: {(error.strerror or str(error)).lower()}",
            help="name another file with --out",
        ) from None
    return written


def image_files(paths: Sequence[str | os.PathLike], count: int, seed: int) -> list[Path]:
    """The images among files and folders, at most `count`, drawn at random and in the order of their names.

    Args:
        paths: Files are taken as they are; of folders, the files that end as images do.
        count: How many at most.
        seed: Of the draw.

    Raises:
        ZooError: AZ901, when there is none.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        inside = (
            sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        )
        files += inside
    if not files:
        raise ZooError(
            "AZ901",
            f"there is no image in {', '.join(f'`{os.fspath(path)}`' for path in paths)}",
            why=f"images end in {', '.join(sorted(SUFFIXES))}",
            help="name a folder of images, or images",
        )
    return [files[i] for i in drawn(len(files), count, seed)]


def read_image(path: str | os.PathLike, size: tuple[int, int, int]) -> UInt8[Tensor, "c y x"]:
    """An image at a model's size, squashed rather than cropped, 0 to 255.

    Args:
        path: Any image that Pillow reads.
        size: Channels (1 or 3), rows and columns.

    Raises:
        ZooError: AZ902, when the file is no image, or the model does not take images of 1 or 3 channels.
    """
    channels, rows, columns = size
    if channels not in (1, 3):
        raise ZooError("AZ902", f"the model takes images of {channels} channels; a file has 1 or 3")
    try:
        plain = read_image_file(path, "RGB" if channels == 3 else "L")
    except OSError as error:
        raise ZooError(
            "AZ902",
            f"cannot open `{os.fspath(path)}`: {(error.strerror or str(error)).lower()}",
            help="name a PNG or JPEG file",
        ) from None
    small = plain.resize((columns, rows), Image.Resampling.BICUBIC)
    values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return values.view(rows, columns, channels).permute(2, 0, 1)
