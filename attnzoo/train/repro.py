"""A run is trained again from its record, elsewhere, to name the first thing that is not as it was.

What a step does follows from the settings, the data, the initial weights and the versions (`loop.py`), and a run notes
all of them when it begins (`record.py`). So what is compared comes in the order of causes: plugins and versions, data,
recipe and defaults, initial weights; then the losses of the first steps, the rows of the log, and the tensors of each
checkpoint that is still there.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from attnzoo.core.fact_sheet import fact_sheet
from attnzoo.errors import RunError
from attnzoo.train import checkpoint
from attnzoo.train.checkpoint import Checkpoint
from attnzoo.train.loop import NotFinite, Report, train
from attnzoo.train.record import Record
from attnzoo.train.run import Run, newest, open_run, usable
from attnzoo.train.state import fault

About = Literal[
    "checkpoint", "plugin", "environment", "source", "data", "recipe", "option", "weights", "training"
]
VARYING = ("images_per_second", "seconds")
"""What a row of the log says of the clock."""
COMPARED = ("model", "ema", "optimizer")
"""Tensors of a checkpoint that follow from the steps before it. `best` also follows from where time ended a run."""
MOST_THREADS = 1024


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was.

    Args:
        about: What kind of thing.
        what: Which, in words.
        recorded: How it was.
        here: How it is.
        step: Optimiser steps after which it showed; None for what comes before training.
    """

    about: About
    what: str
    recorded: Any
    here: Any
    step: int | None = None

    def __str__(self) -> str:
        return f"{self.what}: {_shown(self.recorded)} → {_shown(self.here)}"


@dataclass(frozen=True)
class Reproduction:
    """What came of training a run again.

    Args:
        folder: Of the run.
        steps: How many steps it has taken.
        step: The last step after which the weights are known to have the same bits, 0 for the initial weights; None
            when nothing of that was compared, or the initial weights differ already.
        losses: The last step up to which the training losses have the same bits.
        differences: What is not as it was, causes first.
        notes: What could not be compared, and why.
    """

    folder: Path
    steps: int
    step: int | None
    losses: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    @property
    def first(self) -> Difference | None:
        """The first difference."""
        return next(iter(self.differences), None)

    @property
    def reached(self) -> str:
        """How far the bits are the same, in words."""
        if self.step is None:
            bits = "no weights were found the same"
        elif self.step == 0:
            bits = "the same initial weights"
        else:
            bits = f"the same bits up to step {self.step} of {self.steps}"
        return f"{bits}, the same losses up to step {self.losses}" if self.losses > (self.step or 0) else bits

    def as_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        differences = [asdict(difference) for difference in self.differences]
        return asdict(self) | {
            "folder": str(self.folder),
            "same": self.same,
            "first": differences[0] if differences else None,
        }

    def __str__(self) -> str:
        first = [f"first difference: {self.first}"] if self.first else []
        others = [f"also: {difference}" for difference in self.differences[1:]]
        return "\n".join([*first, *others, self.reached, *self.notes])

    def _repr_html_(self) -> str:
        facts = {"first difference": str(self.first or ""), "bits": self.reached}
        facts |= {"also": "; ".join(map(str, self.differences[1:])), "to know": "; ".join(self.notes)}
        return fact_sheet(str(self.folder), "Trained again from its record.", facts)


class _Found(Exception):
    """Ends a training at the first step that went another way."""

    def __init__(self, difference: Difference):
        super().__init__()
        self.difference = difference


def repro(
    run: str | Path | Run,
    steps: int | None = None,
    *,
    out: str | Path | None = None,
    data_root: str | Path | None = None,
    report: Report | None = None,
) -> Reproduction:
    """Train a run again from its record, and name what is not as it was; the run itself is only read.

    PyTorch works with the run's number of threads meanwhile, and the random states are set as `attnzoo.train.train`
    sets them.

    Args:
        run: A run, or its folder.
        steps: Train no further than this; as far as the run went otherwise.
        out: Keep what is trained in this folder, which must be empty; otherwise nothing is kept.
        data_root: Where data sets lie here; where they lay for the run otherwise.
        report: Told what happens, as `attnzoo.train.train` tells it.

    Raises:
        RecipeError: AZ205, when a plugin of the recipe is missing here.
        DataError: AZ7xx, when the data cannot be had.
        RunError: AZ801, AZ802, AZ805, what is wrong with the run; AZ832 for a folder that is not empty, or a negative
            number of steps.
        Stopped: after Ctrl-C or SIGTERM.
    """
    run = run if isinstance(run, Run) else open_run(run)
    if steps is not None and steps < 0:
        raise RunError(
            "AZ832", f"there is no step {steps}", help="write a number from 0: 0 compares initial weights"
        )
    if out is None:
        with tempfile.TemporaryDirectory(prefix="attnzoo-repro-") as folder:
            return _Repro(run, Path(folder) / run.folder.name, data_root, report).compare(steps)
    out = Path(out)
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise RunError(
            "AZ832",
            f"`{out}` is no empty folder",
            why="a run that is trained again must not meet another",
            help="name another folder with --out, or leave it out",
        )
    return _Repro(run, out, data_root, report).compare(steps)


class _Repro:
    """What is recorded of a run, read at once, since a run that still goes on drops its older checkpoints."""

    def __init__(self, run: Run, out: Path, data_root: str | Path | None, report: Report | None):
        self.run, self.out, self.report = run, out, report
        saved = newest(run.folder)
        self.steps, self.state = saved.step, saved.state()
        self.record = Record.model_validate(self.state["record"]) if self.state.get("record") else None
        self.losses = self.record.losses if self.record else []
        complete = self.state["progress"]["epoch"]
        per_epoch = (saved.step - self.state["progress"]["step"]) // complete if complete else 0
        self.rows = {row["epoch"] * per_epoch: row for row in self.state["log"] if row["epoch"] <= complete}
        self.points = {
            step: _contents(Checkpoint(folder, step))
            for step, folder in sorted(checkpoint.steps(run.folder))
            if not checkpoint.damage(folder) and not fault(Checkpoint(folder, step))
        }
        recorded = self.state["environment"]
        changes: dict[str, Any] = {"minutes": None, "keep": 1, "checkpoint_every": 2**40, "workers": 0}
        changes |= {"device": "cpu"} if recorded.get("device") == "cpu" else {}
        changes |= {"data_root": str(data_root)} if data_root else {}
        self.settings = run.settings.model_copy(update=changes)
        self.differences: list[Difference] = []
        self.notes: list[str] = []
        self.step: int | None = None
        self.told = self.now = 0  # steps up to which losses are the same; and the step that was taken last

    def compare(self, steps: int | None) -> Reproduction:
        """All comparisons, as far as one follows from the others."""
        for note in usable(self.run.folder)[1]:
            self._differs("checkpoint", note.partition(" ")[0], "as it was written", note.partition(";")[0])
        with _threads(self.state["environment"].get("threads")):
            self._train(0)
            here = Checkpoint(self.out / "step_00000000", 0).state()
            self._before(here)
            if self._worthwhile(here):
                self._steps(self.steps if steps is None else min(steps, self.steps))
        found = tuple(self.differences), tuple(self.notes)
        return Reproduction(self.run.folder, self.steps, self.step, self.told, *found)

    def _before(self, here: Mapping[str, Any]) -> None:
        """What a training begins with."""
        there, now = self.record, Record.model_validate(here["record"])
        if there is None:
            self._environment({}, self.state["environment"], now)
            self._facts(here)
            self.notes.append(
                "the run has no record of plugins, data and initial weights, since its attnzoo wrote none"
            )
            return
        self._plugins(there, now)
        self._environment(there.environment, self.state["environment"], now)
        same = there.environment.get("attnzoo") == now.environment.get("attnzoo")
        for name, digest in there.sources.items() if same else ():
            if name.startswith("attnzoo/") and digest != now.sources.get(name):
                self._differs("source", f"source of `{name}`", digest, now.sources.get(name, ""))
        for side, digest in there.data.items():
            if digest and digest != now.data.get(side):
                self._differs(
                    "data", f"{side} side of `{self.settings.data}`", digest, now.data.get(side, "")
                )
        self._facts(here)
        for path, was, is_ in _differing(there.recipe, now.recipe):
            self._differs("recipe", f"`{path}` of the recipe", was, is_)
        for path, was, is_ in _differing(there.options, now.options):
            name, _, option = path.partition(".")  # component, number of its use, option
            option = f"option `{option.partition('.')[2]}`" if option else "options"
            self._differs("option", f"{option} of `{name}`", was, is_)
        if there.weights != now.weights:
            self._differs("weights", "initial weights", there.weights, now.weights)
        else:
            self.step = 0

    def _plugins(self, there: Record, now: Record) -> None:
        for name, was in there.made_with.plugins.items():
            here = now.made_with.plugins.get(name)
            if here is None:
                self._differs("plugin", f"plugin `{name}`", str(was), "not used")
            elif (was.distribution, was.version) != (here.distribution, here.version):
                same = was.distribution == here.distribution
                shown = (was.version, here.version) if same else (str(was), str(here))
                self._differs("plugin", f"plugin {was.distribution or name}" if same else "plugin", *shown)
            elif was.sha256 != here.sha256:
                self._differs("source", f"source of the plugin {was}", was.sha256, here.sha256)

    def _environment(self, first: Mapping[str, Any], last: Mapping[str, Any], now: Record) -> None:
        """Where the run began, and where it was last."""
        known = {name.distribution or key for key, name in now.made_with.plugins.items()}
        for key in dict.fromkeys([*first, *last]):
            here = now.environment.get(key)
            odd = {each[key] for each in (first, last) if key in each and each[key] != here}
            for was in sorted(odd, key=str) if key not in known else ():
                self._differs("environment", key, was, here)
        if first and (moved := [key for key in last if first.get(key) != last[key]]):
            self.notes.append(f"while it was trained the run went on elsewhere: other {', '.join(moved)}")

    def _facts(self, here: Mapping[str, Any]) -> None:
        for key in ("classes", "vocabularies", "words"):
            if key in self.state and self.state[key] != here.get(key):
                self._differs("data", f"{key} of `{self.settings.data}`", self.state[key], here.get(key))

    def _worthwhile(self, here: Mapping[str, Any]) -> bool:
        """Whether steps can come out the same: not from other data, other weights or on another device."""
        if self.state["environment"].get("device") != here["environment"]["device"]:
            self.notes.append("nothing was trained: no bits are the same on another device")
            return False
        if self.settings.deterministic is False or (
            self.settings.deterministic is None and here["environment"]["device"] != "cpu"
        ):
            self.notes.append("the run was trained without --deterministic, so its bits may differ by chance")
        return not {"data", "weights"} & {difference.about for difference in self.differences}

    def _steps(self, limit: int) -> None:
        """Train, and compare at every point of which something is recorded."""
        recorded = {*self.points, *self.rows, len(self.losses)}
        target = max((step for step in recorded if step <= limit), default=0)
        target = max(target, min(len(self.losses), limit))
        try:
            for point in sorted({step for step in self.points if step <= target} | {target}):
                self._train(point)
                if point in self.points:
                    self._checkpoint(point)
                    self.step = point
        except _Found as found:
            self.differences.append(found.difference)
        except NotFinite as error:
            why = error.diagnostics[0]
            self._differs("training", "training", "went on", f"{why.message}, {why.why}")
        if self.state["progress"]["step"] and len(self.state["log"]) > self.state["progress"]["epoch"]:
            self.notes.append("the last row of the log, of a part of an epoch, is not compared")
        if target < limit:
            self.notes.append(f"between step {target} and step {limit} nothing is recorded")

    def _train(self, until: int) -> None:
        train(self.run.loaded, self.settings, self.out, report=self._watch, until=until)

    def _watch(self, event: dict[str, Any]) -> None:
        """Hold each step and each row to the record as they come.

        Raises:
            _Found: for the first that differs.
        """
        if event["event"] == "note":
            return
        if self.report:
            self.report(event)
        if event["event"] == "step":
            self.now = event["step"]
            if self.now <= len(self.losses):
                loss = self.losses[self.now - 1]
                self._hold(f"training loss of step {self.now}", loss, event["train_loss"], self.now)
                self.told = self.now
        elif row := self.rows.get(self.now):
            for key in (key for key in row if key not in VARYING):
                words = key.replace("_", " ")
                self._hold(f"{words} of epoch {row['epoch']}", row[key], event.get(key), self.now)
            self.told = self.now
            if self.record and len(self.record.epochs) >= row["epoch"]:
                recorded = self.record.epochs[row["epoch"] - 1]
                self._hold(f"weights after epoch {row['epoch']}", recorded, event["weights"], self.now)
                self.step = self.now

    def _checkpoint(self, step: int) -> None:
        """Hold tensors to the digests of the recorded ones, file by file."""
        there, here = self.points[step], _contents(Checkpoint(self.out / f"step_{step:08d}", step))
        self._hold(f"training loss summed up to step {step}", there["loss"], here["loss"], step)
        for name in COMPARED:
            odd = [key for key, digest in there[name].items() if digest != here[name].get(key)]
            if odd:
                more = f" and {len(odd) - 1} more of {len(there[name])} tensors" if len(odd) > 1 else ""
                what = f"`{odd[0]}`{more} of `{name}` after step {step}"
                raise _Found(
                    Difference("weights", what, there[name][odd[0]], here[name].get(odd[0], ""), step)
                )

    def _hold(self, what: str, recorded: Any, here: Any, step: int) -> None:
        if recorded != here:
            raise _Found(Difference("training", what, recorded, here, step))

    def _differs(self, about: About, what: str, recorded: Any, here: Any) -> None:
        self.differences.append(Difference(about, what, recorded, here))


def _contents(saved: Checkpoint) -> dict[str, Any]:
    """The sum of the losses of the epoch that is under way, and of each file the digest of each tensor."""
    digests: dict[str, Any] = {
        name: {
            key: checkpoint.fingerprint({key: tensor})
            for key, tensor in (saved.tensors(name) if saved.has(name) else {}).items()
        }
        for name in COMPARED
    }
    return digests | {"loss": saved.state()["progress"]["loss"]}


def _differing(there: Any, here: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two pieces of data differ: keys with dots, and both values."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            yield from _differing(there.get(key), here.get(key), f"{path}.{key}" if path else key)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, (one, other) in enumerate(zip(there, here, strict=True)):
            yield from _differing(one, other, f"{path}.{number}")
    elif there != here:
        yield path, there, here


def _shown(value: Any) -> str:
    """A value in a line: digests by their first letters, other long ones cut."""
    text = "none" if value is None else str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return f"{text[:12]}…"
    return text if len(text) <= 100 else f"{text[:99]}…"


@contextmanager
def _threads(count: Any) -> Iterator[None]:
    """As many threads as the run had: sums are taken in another order with another number."""
    before = torch.get_num_threads()
    try:
        if isinstance(count, int) and 1 <= count <= MOST_THREADS:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
