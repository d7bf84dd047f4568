"""Checkpoints: whole or not there, every byte vouched for, and what happens when the disk refuses."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from attnzoo.errors import RunError
from attnzoo.train import checkpoint

TENSORS = {"model": {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}, "optimizer": {}}


def save(run: Path, step: int, **options) -> checkpoint.Checkpoint:
    """A checkpoint whose state names its step."""
    return checkpoint.save(run, step, TENSORS, {"step": step}, **options)


def newest(run: Path) -> int | None:
    """The step that a resume would go on from."""
    found, _ = checkpoint.sound(run)
    assert found is None or found.state() == {"step": found.step}
    return found and found.step


def test_what_is_written_is_read(tmp_path):
    made = save(tmp_path / "a" / "run", 7)
    found, notes = checkpoint.sound(tmp_path / "a" / "run")
    assert found == made and notes == [] and found.state() == {"step": 7}
    read = found.tensors("model")
    assert torch.equal(read["w"], TENSORS["model"]["w"]) and read["n"].item() == 3
    assert found.tensors("optimizer") == {} and found.has("model") and not found.has("ema")


def test_tied_tensors_are_written(tmp_path):
    shared = torch.ones(4)
    made = checkpoint.save(tmp_path, 0, {"model": {"a": shared, "b": shared[:2]}}, {})
    assert made.tensors("model")["b"].tolist() == [1, 1]


def test_the_oldest_are_dropped(tmp_path):
    for step in range(5):
        save(tmp_path, step, keep=2)
    assert sorted(step for step, _ in checkpoint.steps(tmp_path)) == [3, 4]
    save(tmp_path, 5, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


def test_every_byte_of_the_manifest_and_some_of_the_rest_are_vouched_for(tmp_path):
    save(tmp_path, 1)
    folder = save(tmp_path, 2).folder
    seen = 0
    for file in sorted(folder.iterdir()):
        good = file.read_bytes()
        stride = 1 if file.name == checkpoint.MANIFEST else max(1, len(good) // 12)
        for position in range(0, len(good), stride):
            file.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            assert checkpoint.damage(folder), (file.name, position)
            seen += 1
        file.write_bytes(good[:-1])
        assert checkpoint.damage(folder) and newest(tmp_path) == 1
        file.write_bytes(good)
    assert seen > 200 and newest(tmp_path) == 2


def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "step_00000003" / "model.safetensors").write_bytes(b"")
    (tmp_path / "step_00000002" / "state.json").unlink()
    found, notes = checkpoint.sound(tmp_path)
    assert found.step == 1
    assert notes == ["step_00000003 is damaged (model.safetensors changed); the one before it is used",
                     "step_00000002 is damaged (state.json changed); the one before it is used"]  # fmt: skip
    (tmp_path / "step_00000001" / "more").write_text("")
    assert newest(tmp_path) is None


def test_a_damaged_one_is_replaced_and_does_not_count(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step_00000002" / "manifest.json").write_text("{}")
    save(tmp_path, 2, keep=1)
    assert newest(tmp_path) == 2
    save(tmp_path, 9)
    (tmp_path / "step_00000009" / "state.json").write_text("")
    save(tmp_path, 3, keep=1)
    assert newest(tmp_path) == 3


def test_only_our_left_overs_are_swept(tmp_path):
    stale = tmp_path / f".tmp-{'0' * 32}"
    stale.mkdir()
    (stale / "x").write_text("")
    mine = tmp_path / ".tmp-notes"
    mine.mkdir()
    checkpoint.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [mine]


class Crash(BaseException):
    """The power goes."""


CALLS = ((os, "fsync"), (os, "rename"), (os, "open"), (Path, "mkdir"), (shutil, "rmtree"))


def strike(monkeypatch, error: BaseException, at: int) -> list[str]:
    """Let the `at`-th call to the disk fail, before it does anything; returns the calls so far."""
    calls: list[str] = []

    def guarded(name, real):
        def call(*arguments, **options):
            calls.append(name)
            if len(calls) == at:
                raise error
            return real(*arguments, **options)

        return call

    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, guarded(name, getattr(owner, name)))
    return calls


def calls_of_a_save(run: Path) -> list[str]:
    """What a save asks of the disk when it also drops one."""
    for step in (1, 2):
        save(run, step)
    with pytest.MonkeyPatch.context() as patch:
        calls = strike(patch, Crash(), 0)
        save(run, 3)
        return list(calls)


def test_a_crash_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    calls = calls_of_a_save(tmp_path / "count")
    assert calls.count("fsync") == 6 and calls.count("rename") == 2 and "rmtree" in calls
    found = []
    for at in range(1, len(calls) + 1):
        run = tmp_path / str(at)
        save(run, 1)
        save(run, 2)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
            strike(patch, Crash(), at)
            save(run, 3)
        found.append(newest(run))
        checkpoint.sweep(run)
        save(run, 3)
        assert newest(run) == 3 and not list(run.glob(".tmp-*"))
    moved = calls.index("rename") + 1
    assert found == [2] * moved + [3] * (len(calls) - moved)


@pytest.mark.parametrize(
    "number,words", [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "the place is read-only")]
)
def test_a_disk_that_refuses_loses_nothing(tmp_path, number, words):
    calls = calls_of_a_save(tmp_path / "count")
    for at in range(1, len(calls) + 1):
        run = tmp_path / str(at)
        save(run, 1)
        save(run, 2)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError) as caught:
            strike(patch, OSError(number, os.strerror(number)), at)
            save(run, 3)
        assert (
            caught.value.code == "AZ804"
            and words in str(caught.value)
            and f"attnzoo resume {run}" in str(caught.value)
        )
        assert newest(run) in (2, 3)


def test_a_file_that_may_not_grow_loses_nothing(tmp_path):
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(RunError, match="AZ804"):
            save(tmp_path, 2)
        with pytest.raises(RunError, match="AZ804"):
            checkpoint.replace(tmp_path / "log.csv", "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"] and newest(tmp_path) == 1


def test_the_state_is_json_and_finite(tmp_path):
    with pytest.raises(ValueError):
        checkpoint.save(tmp_path, 1, {}, {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
    made = save(tmp_path, 1)
    assert json.loads((made.folder / checkpoint.MANIFEST).read_text())["state.json"]["bytes"] == len(
        '{"step": 1}'
    )
