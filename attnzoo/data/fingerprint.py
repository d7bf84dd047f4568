"""What tells data from other data: a SHA-256 over all that a side of a data set hands out."""

import hashlib
from collections.abc import Iterable
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from attnzoo.data.folder import Files
from attnzoo.data.images import Images
from attnzoo.data.pairs import Pairs
from attnzoo.data.sequences.sequence_data import InMemory
from attnzoo.files import open_file

MOST = 2**30
"""Bytes of image files that are read; of a larger folder the contents of every second file count, or every third."""


@singledispatch
def fingerprint(side: Any) -> str:
    """The SHA-256 of one side of a data set, in hexadecimal; empty for a side of a kind that is not known.

    Two sides with the same one hand out the same examples in the same order. Of a folder these are the names, the sizes
    and the contents of its files, so it is the same wherever the folder lies.

    Args:
        side: What is trained or tested on.
    """
    return ""


@fingerprint.register
def _(side: Images) -> str:
    return _digest([_bits(side.labels), _bits(side.images), str(side.size).encode()])


@fingerprint.register
def _(side: InMemory) -> str:
    return _digest([_bits(side.inputs), _bits(side.targets)])


@fingerprint.register
def _(side: Pairs) -> str:
    ids = (str(pair).encode() for pair in zip(side.sources, side.targets, strict=True))
    texts = (str(pair).encode() for pair in zip(side.source_texts, side.target_texts, strict=True))
    return _digest([*ids, *texts])


@fingerprint.register
def _(side: Files) -> str:
    sizes = [path.stat().st_size for path in side.paths]
    nth = sum(sizes) // MOST + 1
    named = zip(side.paths, sizes, side.labels.tolist(), strict=True)
    parts = [str((*path.parts[-2:], size, label)).encode() for path, size, label in named]
    for path in side.paths[::nth]:
        with open_file(path, most=None) as file:
            parts.append(hashlib.file_digest(file, "sha256").digest())
    return _digest([*parts, str(side.size).encode()])


def _bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{tensor.dtype} {tuple(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
