"""CIFAR-10 and CIFAR-100, from their binary version: bytes of labels and pixels, nothing that runs.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. A record is its label (CIFAR-100: the coarse
one, then the fine one) and 3072 bytes: red, green and blue planes of 32 rows.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnzoo.data.download import Archive, unpacked
from attnzoo.data.images import ImageData, Images
from attnzoo.errors import DataError
from attnzoo.files import read_file

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Cifar:
    """One of the two.

    Args:
        name: Of the data set.
        archive: Where it comes from.
        train: Files to train on.
        test: The file to test on.
        names: The file with a class name per line.
        label_bytes: Bytes before the pixels; the last is the label.
        records: Images per file of `train` and of `test`.
        mean: By channel, of 1.
        std: By channel, of 1.
    """

    name: str
    archive: Archive
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int
    records: tuple[int, int]
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def load(self, root: Path, *, download: bool, size: int | None) -> ImageData:
        """Read it, from the network if need be.

        Args:
            root: Where data sets lie.
            download: Whether the network may be asked.
            size: Rows and columns that batches are resized to; 32 when null.

        Raises:
            DataError: AZ702 when it cannot be downloaded, AZ703 when a file is not as published.
        """
        folder = unpacked(self.archive, root, download=download)
        classes = tuple(_content(folder / self.names).decode(errors="replace").split())
        if len(classes) != self.classes:
            raise _wrong(folder / self.names, f"names {len(classes)} classes, not {self.classes}")
        parts = [self._read(folder / file, self.records[0]) for file in self.train]
        labels, images = (torch.cat(part) for part in zip(*parts, strict=True))
        test_labels, test_images = self._read(folder / self.test, self.records[1])
        size = None if size == 32 else size
        side = size or 32
        return ImageData(
            self.name,
            classes,
            self.mean,
            self.std,
            (3, side, side),
            Images(labels, images, size),
            Images(test_labels, test_images, size),
        )

    def _read(self, file: Path, records: int) -> tuple[Tensor, Tensor]:
        """Labels int64 (n,) and images uint8 (n 3 32 32) of a file."""
        raw = np.frombuffer(_content(file), dtype=np.uint8)
        length = self.label_bytes + PIXELS
        if len(raw) != records * length:
            raise _wrong(file, f"has {len(raw)} bytes, not {records * length}")
        rows = torch.from_numpy(raw.reshape(records, length).copy())
        labels = rows[:, self.label_bytes - 1].long()
        if int(labels.max()) >= self.classes:
            raise _wrong(file, f"has a label {int(labels.max())}, but there are {self.classes} classes")
        return labels, rows[:, self.label_bytes :].reshape(records, 3, 32, 32).contiguous()


def _content(file: Path) -> bytes:
    try:
        return read_file(file)
    except OSError as error:
        raise _wrong(file, f"cannot be read: {error.strerror}") from error


def _wrong(file: Path, text: str) -> DataError:
    return DataError("AZ703", f"`{file}` {text}", help="delete the file: it is unpacked again")


CIFAR10 = Cifar(
    name="cifar10",
    archive=Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "cifar-10-batches-bin",
        (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt"),
    ),
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test="test_batch.bin",
    names="batches.meta.txt",
    label_bytes=1,
    records=(10_000, 10_000),
    classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),  # of single images, averaged; what the literature uses
)
CIFAR100 = Cifar(
    name="cifar100",
    archive=Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        "cifar-100-binary",
        ("train.bin", "test.bin", "fine_label_names.txt"),
    ),
    train=("train.bin",),
    test="test.bin",
    names="fine_label_names.txt",
    label_bytes=2,
    records=(50_000, 10_000),
    classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)
