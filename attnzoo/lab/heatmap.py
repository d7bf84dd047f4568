"""Heat maps of what a model looks at: which maps are shown, over which images."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from attnzoo.data.chance import drawn
from attnzoo.data.image_file import read_image_file
from attnzoo.errors import ZooError
from attnzoo.lab.maps import Maps
from attnzoo.lab.passage import Passage
from attnzoo.lab.rollout import (
    HeadFusion,
    check_followed,
    check_layer,
    check_some,
    layer_maps,
    mean_at,
    mean_map,
    roll,
    rollout,
)
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
        panels: How much the answer looks at each grid token, row by row, (b y x), or (b m) of tokens that lie in a
            line and not on the image; NaN where there is no map.
        units: What each token of a panel had if all had the same, row by row.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    panels: Sequence[Sequence[Float[Tensor, "b *grid"]]]
    units: Sequence[Sequence[float]]

    @property
    def values(self) -> Float[Tensor, "b r k *grid"]:
        """All panels in one tensor, where all are of one grid."""
        return torch.stack([torch.stack(list(row), dim=1) for row in self.panels], dim=1)

    def by_image(self) -> Iterable[Any]:
        """The panels of each image, row by row."""
        if "" in self.arrays():
            return self.values
        images = range(len(self.panels[0][0]))
        return [[[panel[i] for panel in row] for row in self.panels] for i in images]

    def arrays(self) -> dict[str, Tensor]:
        """A tensor (b r k *grid) for each grid that there is, named as in `8x8`, with NaN where a panel has another; a
        single one, without a name, where all are of one grid."""
        grids = dict.fromkeys(tuple(panel.shape[1:]) for row in self.panels for panel in row)
        if len(grids) == 1:
            return {"": self.values}
        return {"x".join(map(str, grid)): self._of_grid(grid).values for grid in grids}

    def _of_grid(self, grid: tuple[int, ...]) -> "View":
        panels = [
            [p if p.shape[1:] == grid else p.new_full((len(p), *grid), torch.nan) for p in row]
            for row in self.panels
        ]
        return replace(self, panels=panels)


def view(
    maps: Maps,
    what: What = "model",
    *,
    layer: int | None = None,
    fusion: HeadFusion = "mean",
    ratio: float = 0.0,
) -> View:
    """The maps to be shown.

    `model`: the mean map of each branch, for each group of sites whose maps lie on one grid, and the rollout.
    `rollout`: the rollout up to each layer, to each set of tokens that came in. `mechanism`: each branch by site, mean
    over heads. `heads`: each site by head.

    Args:
        maps: From `collect`.
        what: Which of the four.
        layer: One layer only, from 0; of a rollout, the last layer that counts.
        fusion: How a rollout fuses the heads of a branch.
        ratio: Share of the smallest entries of each layer that a rollout discards.

    Raises:
        ZooError: AZ903, when there is no map; AZ904, when there is no such layer; AZ924, when a rollout is asked for
            and tokens merge in a way that is not known.
    """
    check_some(maps.maps, maps.absent)
    check_layer(maps.passage.depth, layer)
    if what == "model":
        return _of_model(maps, layer, fusion, ratio)
    if what == "rollout":
        return _rollouts(maps, layer, fusion, ratio)
    sites = maps.passage.sites(layer)
    if what == "heads":
        return _by_head(maps, sites)
    branches = maps.branches()
    panels = [[mean_at(maps, branch, [site]) for site in sites] for branch in branches]
    units = [_unit(maps, maps.passage.looks[site][1]) for site in sites]
    return View(tuple(sites), tuple(branches), panels, [units] * len(branches))


def _unit(maps: Maps, *names: str) -> float:
    """An even share of these sets of tokens."""
    return 1 / sum(maps.passage.layouts[name].length for name in names)


def _of_model(maps: Maps, layer: int | None, fusion: HeadFusion, ratio: float) -> View:
    """The branches of each group, then the rollout to each set of tokens that came in, where it is known."""
    passage, several = maps.passage, len(maps.branches()) > 1
    shown: list[tuple[str, Tensor, float]] = []
    for group, sites in passage.groups.items():
        here = set(sites) & set(passage.sites(layer))
        for branch in dict.fromkeys(found.branch for found in maps.maps if found.site in here):
            name = f"{group} {branch}" if group and several else group or branch
            unit = _unit(maps, passage.looks[sites[0]][1])
            shown.append((name, mean_map(maps, branch, layer, group), unit))
    if not passage.unknown:
        rolled, (first, last) = rollout(maps, fusion, ratio, layer), (passage.steps[0], _last(maps, layer))
        for name in first.tokens:
            label = f"rollout {name}" if len(first.tokens) > 1 else "rollout"
            shown.append((label, maps.asked(rolled, last, name), _unit(maps, *first.tokens)))
    names, panels, units = zip(*shown, strict=True)
    return View(names, ("",), [panels], [units])


def _last(maps: Maps, layer: int | None) -> int:
    """The number of the last step of a layer."""
    steps = maps.passage.steps
    return max(i for i, step in enumerate(steps) if layer is None or step.layer <= layer)


def _rollouts(maps: Maps, layer: int | None, fusion: HeadFusion, ratio: float) -> View:
    """Steps across, the sets of tokens that came in down."""
    check_followed("this model", maps)
    passage, all_layers = maps.passage, layer_maps(maps, fusion, ratio)
    steps = [i for i, step in enumerate(passage.steps) if step.sites and layer in (None, step.layer)]
    first = passage.steps[0].tokens
    rolled = {i: roll(all_layers[: i + 1]) for i in steps}
    panels = [[maps.asked(rolled[i], i, name) for i in steps] for name in first]
    columns = tuple(f"up to {passage.steps[i].name}" for i in steps)
    return View(columns, first, panels, [[_unit(maps, *first)] * len(steps)] * len(first))


def _by_head(maps: Maps, sites: Sequence[str]) -> View:
    """Sites down, the heads of each branch across."""
    here = {(found.site, found.branch): maps.on_grid(found) for found in maps.maps if found.site in sites}
    heads = {
        branch: max(grid.shape[1] for (_, name), grid in here.items() if name == branch)
        for branch in dict.fromkeys(branch for _, branch in here)
    }

    def row(site: str) -> list[Tensor]:
        grid = maps.passage.layouts[maps.passage.looks[site][1]].grid
        blank = torch.full((len(maps.logits), *grid), torch.nan)
        panels: list[Tensor] = []
        for branch, wanted in heads.items():
            found = list(here[site, branch].unbind(1)) if (site, branch) in here else []
            panels += found + [blank] * (wanted - len(found))
        return panels

    columns = tuple(f"{branch} {i}" for branch, count in heads.items() for i in range(count))
    units = [[_unit(maps, maps.passage.looks[site][1])] * len(columns) for site in sites]
    return View(columns, tuple(sites), [row(site) for site in sites], units)


def notes(maps: Maps, what: What = "model", layer: int | None = None) -> list[str]:
    """What must be said about the maps: what was averaged, what is implied, what is missing."""
    passage = maps.passage
    tokens = ", ".join(
        f"{name} 1/{layout.length}" if name else f"1/{layout.length}"
        for name, layout in passage.layouts.items()
    )
    first = passage.steps[0].tokens if passage.steps else ("",)
    if len(first) > 1 and what in ("model", "rollout"):
        tokens += f", of a rollout 1/{sum(passage.layouts[name].length for name in first)}"
    heads: dict[str, int] = {}
    for found in maps.maps:
        heads[found.branch] = max(found.heads, heads.get(found.branch, 0))
    count = ", ".join(f"{branch} {n}" for branch, n in heads.items())
    over = {
        "model": "mean over layers and heads",
        "mechanism": "mean over heads",
        "heads": "each head by itself",
        "rollout": "heads fused, branches averaged, residuals added",
    }[what]
    if layer is not None:
        over += f"; {'up to' if what == 'rollout' else 'only'} {', '.join(passage.sites(layer))}"
    lines = [
        f"What {maps.reads} looks at: {over}. {passage.depth} layers; heads: {count}.",
        f"Numbers: least and most of a map, in even shares ({tokens} of the attention).",
        "Below an image: what it is, then what the model says.",
    ]
    lines += [_of_sets(passage, what)] if len(passage.layouts) > 1 else []
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


def _of_sets(passage: Passage, what: What) -> str:
    """What must be said where there are several sets of tokens."""
    if what not in ("model", "rollout"):
        return "Each map lies on the grid of the tokens that are looked at."
    if passage.unknown:
        return f"Each map lies on the grid of the tokens that are looked at. There is no rollout: {passage.unknown}."
    first = passage.steps[0].tokens
    words = f"the tokens of {' and '.join(first)}, where tokens come in"
    return f"Each map lies on the grid of the tokens that are looked at, a rollout on {words}."


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
        for image, captions, values in zip(images, lines, shown.by_image(), strict=True)
    ]
    return drawn_sheet(blocks, shown.columns, shown.rows, title, remarks, unit=np.asarray(shown.units))


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
