"""Checkpoints: folders that are there as a whole or not at all, and whose every byte is vouched for.

`step_00000300/` holds tensors (`*.safetensors`), the rest (`state.json`) and `manifest.json` with the size and
SHA-256 of each file. A folder is written beside its place, forced to the disk, and moved there by one rename.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from attnzoo.errors import RunError
from attnzoo.files import open_file, read_file

MANIFEST = "manifest.json"
STATE = "state.json"
MOST_STATE = 2**28
"""Bytes of a state; vocabularies and the log of a long run are far below."""
_STEP = re.compile(r"step_(\d{8,})")
_STALE = re.compile(r"\.tmp-[0-9a-f]{32}")
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file is too large",
    errno.EROFS: "the place is read-only",
    errno.EACCES: "the place may not be written to",
    errno.EPERM: "the place may not be written to",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found sound.

    Args:
        folder: Where it is.
        step: Optimiser steps taken.
    """

    folder: Path
    step: int

    def state(self) -> dict[str, Any]:
        """All that is no tensor."""
        return json.loads(read_file(self.folder / STATE, most=MOST_STATE))

    def has(self, name: str) -> bool:
        """Whether there are tensors of that name."""
        return (self.folder / f"{name}.safetensors").exists()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, on the CPU."""
        return safetensors.torch.load_file(self.folder / f"{name}.safetensors")


def save(
    run: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Checkpoint:
    """Write a checkpoint and drop the oldest.

    Args:
        run: Folder of the run; is made.
        step: Optimiser steps taken.
        tensors: By file and name.
        state: All else; must be JSON.
        keep: How many checkpoints stay.

    Raises:
        RunError: AZ804, when it cannot be written. The checkpoints before it are as they were.
    """
    content = {f"{name}.safetensors": _packed(group) for name, group in tensors.items()}
    content[STATE] = json.dumps(state, ensure_ascii=False, allow_nan=False).encode()
    content[MANIFEST] = _manifest({name: (len(data), _sha256(data)) for name, data in content.items()})
    folder = run / f"step_{step:08d}"
    try:
        _commit(folder, content)
        _prune(run, step, keep)
        sweep(run)
    except OSError as error:
        raise unwritable(folder, error) from None
    return Checkpoint(folder, step)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, types, shapes and bits of tensors, in hexadecimal.

    Args:
        state: Tensors by name, in any order.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def unwritable(path: Path, error: OSError) -> RunError:
    """A fault of the disk in words.

    Args:
        path: What was to be written.
        error: What the system said.
    """
    reason = _REASONS.get(error.errno or 0, (error.strerror or str(error)).lower())
    return RunError(
        "AZ804",
        f"cannot write `{path}`: {reason}",
        why="what was written before it is as it was",
        help=f"mend that, then `attnzoo resume {path.parent}`",
    )


def sound(
    run: Path, fault: Callable[[Checkpoint], str] = lambda saved: ""
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is sound, and a line for each newer one that is not.

    Args:
        run: Folder of the run.
        fault: What is wrong with what a checkpoint says, whose bytes are as they were written; empty when nothing is.
    """
    notes: list[str] = []
    for step, folder in sorted(steps(run), reverse=True):
        saved = Checkpoint(folder, step)
        if damaged := damage(folder):
            notes.append(f"{folder.name} is damaged ({damaged}); the one before it is used")
        elif wrong := fault(saved):
            notes.append(f"{folder.name} cannot be used ({wrong}); the one before it is used")
        else:
            return saved, notes
    return None, notes


def steps(run: Path) -> Iterator[tuple[int, Path]]:
    """Step and folder of each checkpoint, sound or not."""
    for folder in run.iterdir() if run.is_dir() else ():
        if match := _STEP.fullmatch(folder.name):
            yield int(match[1]), folder


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint; the empty string when every byte is as it was written.

    The manifest is made again from what is there and compared byte by byte, so nothing in it can change unseen.
    """
    try:
        manifest = read_file(folder / MANIFEST, most=2**20)
        written = {name: (entry["bytes"], entry["sha256"]) for name, entry in json.loads(manifest).items()}
        found = {
            path.name: _size_and_sha256(path, written.get(path.name))
            for path in folder.iterdir()
            if path.name != MANIFEST
        }
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {(error.strerror or str(error)).lower()}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    if _manifest(found) == manifest:
        return ""
    differing = sorted(name for name in {*written, *found} if written.get(name) != found.get(name))
    return f"{', '.join(differing)[:80] or MANIFEST} changed"


def sweep(run: Path) -> None:
    """Remove what writes that were cut short left behind."""
    for path in run.iterdir() if run.is_dir() else ():
        if _STALE.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace(path: Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all.

    Raises:
        RunError: AZ804.
    """
    beside = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise unwritable(path, error) from None


def _commit(folder: Path, content: Mapping[str, bytes]) -> None:
    run = folder.parent
    run.mkdir(parents=True, exist_ok=True)
    beside = run / f".tmp-{uuid.uuid4().hex}"
    try:
        beside.mkdir()
        for name, data in content.items():
            with open(beside / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _fsync(beside)
        if folder.exists():  # damaged
            os.rename(folder, run / f".tmp-{uuid.uuid4().hex}")
        os.rename(beside, folder)
        _fsync(run)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _prune(run: Path, step: int, keep: int) -> None:
    """Drop the oldest. What is newer than this step is damaged and does not count."""
    older = sorted(entry for entry in steps(run) if entry[0] < step)
    for _, folder in older[: max(0, len(older) - (keep - 1))]:
        os.rename(folder, run / f".tmp-{uuid.uuid4().hex}")  # so that no half of a checkpoint is ever seen


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors; tied ones are written twice."""
    return safetensors.torch.save(
        {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _size_and_sha256(path: Path, written: tuple[int, str] | None) -> tuple[int, str]:
    """Of a file; a file of another size is not read."""
    with open_file(path, most=None) as file:
        size = os.fstat(file.fileno()).st_size
        same = written is not None and written[0] == size
        return size, hashlib.file_digest(file, "sha256").hexdigest() if same else ""


def _manifest(files: Mapping[str, tuple[int, str]]) -> bytes:
    entries = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    return (json.dumps(entries, indent=1) + "\n").encode()
