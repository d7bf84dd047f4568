"""A data set by its name."""

import os
from pathlib import Path

from attnzoo.data.cifar import CIFAR10, CIFAR100
from attnzoo.data.digits import load_digits
from attnzoo.data.folder import load_folder
from attnzoo.data.images import ImageData
from attnzoo.data.synthetic import load_synthetic
from attnzoo.errors import DataError, did_you_mean

DATASETS = ("cifar10", "cifar100", "digits", "synthetic", "folder:PATH")
"""The names that `load_images` knows; PATH stands for a folder."""


def check_images(name: str) -> None:
    """Refuse a name that `load_images` does not know; nothing is read.

    Args:
        name: As for `load_images`.

    Raises:
        DataError: AZ701.
    """
    kind, colon, path = name.partition(":")
    if name not in DATASETS[:-1] and not (kind == "folder" and path):
        known = ", ".join(f"`{each}`" for each in DATASETS)
        hint = did_you_mean(kind if colon else name, [each.partition(":")[0] for each in DATASETS])
        raise DataError("AZ701", f"there is no data set `{name}`", help=hint or f"the data sets are {known}")


def load_images(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = True,
    size: int | None = None,
    seed: int = 0,
) -> ImageData:
    """A data set.

    Args:
        name: `cifar10`, `cifar100`, `digits`, `synthetic` or `folder:PATH`.
        root: Where downloaded data sets lie; the environment's ATTNZOO_DATA, or `~/.cache/attnzoo`, when null.
        download: Whether the network may be asked.
        size: Rows and columns of the images; the data set's own when null.
        seed: What `synthetic` is drawn from, and a folder without a test side is split by.

    Raises:
        DataError: AZ701 for an unknown name, AZ702 when it cannot be downloaded, AZ703 when a file is damaged, AZ704
            for what is wrong with a folder, AZ708 when a library is missing.
    """
    check_images(name)
    kind, _, path = name.partition(":")
    if kind == "folder":
        return load_folder(Path(os.path.expanduser(path)), size=size, seed=seed)
    if name == "digits":
        return load_digits(size)
    if name == "synthetic":
        return load_synthetic(seed, size)
    cifar = CIFAR10 if name == CIFAR10.name else CIFAR100
    return cifar.load(data_folder(root), download=download, size=size)


def data_folder(root: str | Path | None) -> Path:
    """Where downloaded data sets lie.

    Args:
        root: The environment's ATTNZOO_DATA, or `~/.cache/attnzoo`, when null.
    """
    return Path(root or os.environ.get("ATTNZOO_DATA") or "~/.cache/attnzoo").expanduser()
