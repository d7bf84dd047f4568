"""Images in folders, a folder per class, read when they are needed."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from attnzoo.data.images import ImageData, Split, held_out, statistics
from attnzoo.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
SAMPLE = 500  # images that statistics are computed from


@dataclass(frozen=True)
class Files(Split):
    """A side whose images lie on disk; `batch` decodes them on a few threads.

    Args:
        labels: int64 (n,).
        paths: The image of each label.
        size: Rows and columns: the shorter side is resized to it, the middle is kept.
    """

    paths: tuple[Path, ...]
    size: int

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        decoded = _threads().map(lambda i: _decode(self.paths[i], self.size), indices.tolist())
        return torch.stack(list(decoded)), self.labels[indices]


def load_folder(path: Path, *, size: int | None = None, seed: int = 0) -> ImageData:
    """Read `path/train/CLASS/*` and `path/test/CLASS/*` (or `val`), or split `path/CLASS/*` by the seed.

    Args:
        path: The folder.
        size: Rows and columns; the shorter side of the first image when null.
        seed: Of the split, where the folder has none.

    Raises:
        DataError: AZ704 when the folder is missing, has no classes, a class without images, other classes to
            test on than to train on, or an image that cannot be read.
    """
    if not path.is_dir():
        raise DataError("AZ704", f"there is no folder `{path}`")
    notes: tuple[str, ...] = ()
    if (path / "train").is_dir():
        side = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
        if side is None:
            raise DataError(
                "AZ704",
                f"`{path}` has a folder train, but neither test nor val",
                help="make one, or remove train",
            )
        classes, paths, labels = _listed(path / "train")
        others, test_paths, test_labels = _listed(side)
        if classes != others:
            odd = ", ".join(sorted(set(classes) ^ set(others)))
            raise DataError("AZ704", f"`{path}` has other classes in {side.name} than in train: {odd}")
    else:
        classes, every, every_label = _listed(path, least=2)
        chosen = held_out(every_label, seed)
        paths, test_paths = (
            tuple(p for p, c in zip(every, chosen, strict=True) if bool(c) is test) for test in (False, True)
        )
        labels, test_labels = every_label[~chosen], every_label[chosen]
        notes = (f"a fifth of every class is tested on, chosen by seed {seed}",)
    size = size or min(_open(paths[0]).size)
    return ImageData(
        f"folder:{path}",
        classes,
        *_statistics(paths, size),
        (3, size, size),
        Files(labels, paths, size),
        Files(test_labels, test_paths, size),
        notes,
    )


def _listed(folder: Path, least: int = 1) -> tuple[tuple[str, ...], tuple[Path, ...], Tensor]:
    """Classes, images and labels below a folder, in the order of their names."""
    found = {}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            found[child.name] = [p for p in sorted(child.iterdir()) if p.suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(
            "AZ704", f"`{folder}` has no folders", help="make a folder per class, with its images"
        )
    for name, paths in found.items():
        if len(paths) < least:
            raise DataError("AZ704", f"the class `{folder / name}` has {len(paths)} images; it needs {least}")
    labels = [label for label, paths in enumerate(found.values()) for _ in paths]
    return tuple(found), tuple(p for paths in found.values() for p in paths), torch.tensor(labels)


@lru_cache(maxsize=8)
def _statistics(paths: tuple[Path, ...], size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    sample = paths[:: -(-len(paths) // SAMPLE)]
    return statistics(torch.stack(list(_threads().map(lambda path: _decode(path, size), sample))))


def _open(path: Path) -> Image.Image:
    """The image in RGB, upright."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # SyntaxError: a broken PNG
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            "AZ704", f"cannot read the image `{path}`: {error}", help="mend or remove it"
        ) from error


def _decode(path: Path, size: int) -> Tensor:
    """uint8 (3 y x)."""
    image = ImageOps.fit(_open(path), (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="attnzoo-images")


os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not survive a fork
