"""A run that was started: its model, data, log and figures, read from its newest sound checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from attnzoo.data import evaluation
from attnzoo.data.pairs import PairData, encoded
from attnzoo.data.vocabulary import Vocabulary
from attnzoo.errors import RecipeError, RunError, ZooError
from attnzoo.hosts.given import taken
from attnzoo.hosts.info import BackboneInfo
from attnzoo.inference import accelerate
from attnzoo.recipe import Loaded, build, load, resolve
from attnzoo.recipe.made_with import warn_of_others
from attnzoo.recipe.schema import ImageHost, Seq2SeqHost, SequenceHost
from attnzoo.train import checkpoint
from attnzoo.train.checkpoint import Checkpoint
from attnzoo.train.kinds import load_data, task_of
from attnzoo.train.methods import with_method
from attnzoo.train.metrics import Evaluation, evaluate
from attnzoo.train.record import Record
from attnzoo.train.settings import Kind, Settings, kind_of
from attnzoo.train.state import fault

Which = Literal["best", "last"]
"""The weights of the epoch with the highest test accuracy, or of the last step."""


@dataclass(frozen=True)
class Run:
    """A run on the disk.

    Args:
        folder: Where it is.
        loaded: The recipe, with what its data decide.
        settings: How it is trained.
        accelerated: Whether its models are made faster for a CPU, `attnzoo.accelerate`, and stay there.
        changed: What is done to each of its models before it is used.
    """

    folder: Path
    loaded: Loaded
    settings: Settings
    accelerated: bool = False
    changed: Callable[[nn.Module], nn.Module] = nn.Module.eval

    @property
    def device(self) -> str:
        """Where its models are tried."""
        return "cuda" if torch.cuda.is_available() and not self.accelerated else "cpu"

    def model(self, which: Which = "best") -> nn.Module:
        """The model in eval mode; with `ema`, the averaged one.

        Args:
            which: `best` is the last as long as no epoch is complete.

        Raises:
            RunError: AZ802, when its weights do not fit; AZ805, when no checkpoint is sound.
            ZooError: AZ413, when it cannot be accelerated.
        """
        saved = self._newest()
        model = with_method(build(self.loaded, {}), self.loaded, self.settings)
        names = {"best": ("best", "ema", "model"), "last": ("ema", "model")}[which]
        with reading(saved):
            model.load_state_dict(saved.tensors(next((name for name in names if saved.has(name)), "model")))
        return accelerate(model) if self.accelerated else self.changed(model.eval())

    @property
    def kind(self) -> Kind:
        """What it is trained on."""
        return kind_of(self.loaded, self.settings)

    def data(self, name: str | None = None) -> Any:
        """What it is trained and tested on, as the model knows it: `ImageData`, `PairData` or `SequenceData`.

        Images come with the statistics that the model was trained with, pairs in the vocabularies of the run.

        Args:
            name: Of other data of the same kind.

        Raises:
            DataError: AZ7xx, when the data cannot be had.
            RunError: AZ807, when the model has no place for them; AZ814, when they are of another kind.
        """
        changed: dict[str, Any] = {"data": name} if name else {}
        if name and self.kind == "images":
            changed["size"] = cast(BackboneInfo, resolve(self.loaded).info).image[1]
        data = load_data(self.settings.model_copy(update=changed), self.loaded)
        if self.kind == "images":
            host = cast(ImageHost, self.loaded.recipe.host)
            return replace(data, mean=tuple(host.mean or data.mean), std=tuple(host.std or data.std))
        if self.kind == "pairs":
            return self._in_its_vocabularies(data)
        asked = cast(SequenceHost, self.loaded.recipe.host)
        there, known = (
            (data.vocab or 0, data.width or 0, data.outputs),
            (asked.vocab, asked.width, asked.outputs),
        )
        if there != known:
            said = "{} tokens, vectors of {} numbers and {} outputs"
            raise RunError(
                "AZ807",
                f"`{data.name}` has {said.format(*there)}",
                why=f"the run has {said.format(*known)}",
                help="choose data of the same kind",
            )
        return data

    def vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        """Of the sources and of the targets, out of the checkpoint: a run translates without its data.

        Raises:
            RunError: AZ805, when no checkpoint is sound; AZ814, when it is no run on pairs.
        """
        if self.kind != "pairs":
            raise RunError(
                "AZ814",
                f"`{self.folder}` does not translate: it was trained on {self.kind}",
                help="take a run whose recipe has a host of kind `seq2seq`",
            )
        saved = self._newest()
        with reading(saved):
            made = [Vocabulary.of(data) for data in saved.state()["vocabularies"]]
            if not all(one.size for one in made):
                raise ValueError("a vocabulary is empty")
        return made[0], made[-1]

    def _in_its_vocabularies(self, data: PairData) -> PairData:
        """The pairs, cut into tokens anew if their own vocabularies are others."""
        own = source, target = self.vocabularies()
        if [one.as_data() for one in own] == [data.source.as_data(), data.target.as_data()]:
            return data
        longest = cast(Seq2SeqHost, self.loaded.recipe.host).max_length
        train, test = (
            encoded(list(zip(side.source_texts, side.target_texts, strict=True)), source, target, longest)[0]
            for side in (data.train, data.test)
        )
        return replace(data, source=source, target=target, train=train, test=test)

    def figures(self, which: Which = "best", data: str | None = None) -> dict[str, float]:
        """`test_loss`, `test_accuracy` and what else the log says of an epoch, for data of any kind.

        Args:
            which: Which weights.
            data: Name of other data of the same kind; the run's own when left out.

        Raises:
            DataError: AZ7xx, when the data cannot be had.
            RunError: AZ807, when the model has no place for them; AZ814, when they are of another kind.
        """
        changed = {"data": data} if data else {}
        task = task_of(self.loaded, self.settings.model_copy(update=changed), self.data(data))
        return task.figures(task.tally(self.model(which).to(self.device), device=self.device))

    def evaluate(self, which: Which = "best", data: str | None = None) -> Evaluation:
        """The model on the test side of its images, or of others with the same classes.

        Args:
            which: Which weights.
            data: Name of a data set; the run's own when left out.

        Raises:
            DataError: AZ7xx, when the data cannot be had.
            RunError: AZ807, when they are not of the kind that the model was trained on; AZ814, when it or they are no
                images.
        """
        if self.kind != "images":
            raise RunError(
                "AZ814",
                f"`{self.folder}` has no classes: it was trained on {self.kind}",
                help="`figures` has its loss and accuracy",
            )
        known = self._newest().state().get("classes") or []
        model = self.model(which)
        channels, *_ = image = tuple(model.pretrained_cfg["input_size"])  # type: ignore[union-attr, arg-type, index]
        images = self.data(data)
        if list(images.classes) != known or images.image[0] != channels:
            names = ", ".join(images.classes)[:60]
            found = f"{len(images.classes)} classes ({names}) in {images.image[0]} channels"
            raise RunError(
                "AZ807",
                f"`{images.name}` has {found}",
                why=f"the run has {len(known)} classes ({', '.join(known)[:60]}) in {channels} channels",
                help="choose data of the same kind",
            )
        transform = evaluation(image, images.mean, images.std)
        return evaluate(
            model.to(self.device),
            images.test,
            transform,
            images.classes,
            inputs=taken(model),
            device=self.device,
        )

    def log(self) -> list[dict[str, Any]]:
        """A row per epoch: `epoch` from 1, `train_loss` and `test_loss` in nats, `test_accuracy`, what else the task
        says, `images_per_second` in training (images, pairs or sequences), `lr` of the last step, `seconds` with
        evaluation."""
        return self._newest().state()["log"]

    def summary(self) -> dict[str, Any]:
        """Its figures: `best_` and `last_` with `accuracy`, `epoch`, `loss` and what else the log says of it, null
        until the first epoch is complete; `params`, `images_per_second`, `seconds`, `finished`, `data_kind`."""
        state = self._newest().state()
        log = state["log"]
        figures: dict[str, Any] = {}
        best = max(log, key=lambda row: row["test_accuracy"], default=None)  # the first of equals
        for name, row in (("best", best), ("last", log[-1] if log else None)):
            columns = {"accuracy": "test_accuracy", "epoch": "epoch", "loss": "test_loss"}
            columns |= {column[5:]: column for column in row or () if column.startswith("test_")}
            for key, column in columns.items():
                figures[f"{name}_{key}"] = row and row[column]
        speed = sum(row["images_per_second"] for row in log) / len(log) if log else None
        return figures | {
            "params": state["params"],
            "images_per_second": speed,
            "seconds": state["progress"]["seconds"],
            "finished": state["finished"],
            "data_kind": self.kind,
        }

    def notes(self) -> list[str]:
        """A line for each checkpoint that cannot be used and is newer than the one that is."""
        return usable(self.folder)[1]

    def _newest(self) -> Checkpoint:
        return newest(self.folder)


def usable(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that a run can go on from, and a line for each newer one that it cannot.

    Raises:
        RunError: AZ802, when checkpoints of another run lie beside it.
    """
    found, notes = checkpoint.sound(folder, fault)
    if found is None:
        return None, notes
    for step, other in sorted(checkpoint.steps(folder)):
        beside = Checkpoint(other, step)
        if (
            beside == found
            or fault(beside)
            or _identity(beside) == _identity(found)
            or checkpoint.damage(other)
        ):
            continue
        raise RunError(
            "AZ802",
            f"`{folder}` holds checkpoints of two runs: {other.name} and {found.folder.name}",
            why="their recipes or settings differ",
            help="move the one that is not of this run elsewhere",
        )
    return found, notes


def _identity(saved: Checkpoint) -> tuple[str, dict[str, Any]]:
    """What is the same in all checkpoints of a run."""
    state = saved.state()
    return state["recipe"], Settings.model_validate(state["settings"]).decisive()


@contextmanager
def reading(saved: Checkpoint) -> Iterator[None]:
    """What does not fit in a checkpoint, whose bytes are as they were written, is one error.

    Raises:
        RunError: AZ802.
    """
    try:
        yield
    except ZooError:
        raise
    except Exception as error:  # of torch, safetensors and tokenizers: whatever they stumble over
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RunError(
            "AZ802",
            f"`{saved.folder}` is none of this run",
            why=reason,
            help="move that folder elsewhere: the one before it is used then",
        ) from None


def newest(folder: Path) -> Checkpoint:
    """The newest checkpoint that can be used.

    Raises:
        RunError: AZ801 when the folder holds none, AZ802 when what is there is of no run, AZ805 when all are damaged.
    """
    found, notes = usable(folder)
    if found:
        return found
    if notes and all(checkpoint.damage(path) for _, path in checkpoint.steps(folder)):
        raise RunError(
            "AZ805",
            f"no checkpoint of `{folder}` is sound",
            why=notes[0].partition(";")[0],
            help="train again into another folder with --out",
        )
    if notes:
        raise RunError(
            "AZ802",
            f"no checkpoint in `{folder}` is of a run",
            why=notes[0].rpartition(";")[0],
            help="bring the folder back as it was, or train again into another one with --out",
        )
    there = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    hint = f"`{folder.parent}` holds {', '.join(sorted(there)[:5])}" if there and not folder.exists() else ""
    raise RunError(
        "AZ801", f"`{folder}` is no run", help=hint or "`attnzoo train RECIPE --out DIR` starts one"
    )


def open_run(folder: str | Path) -> Run:
    """A run by its folder. Its log can be read where plugins of its recipe are missing; its model needs them.

    Warns:
        VersionWarning: when a plugin is here in another version than the run was started with.

    Raises:
        RunError: AZ801 when it is no run, AZ802 when what is there is none of a run, AZ805 when no checkpoint is sound.
    """
    folder = Path(folder)
    saved = newest(folder)
    state = saved.state()
    try:
        loaded = load(state["recipe"])
    except RecipeError as error:
        if not error.code.startswith("AZ1"):  # a mechanism or plugin that is not here is no fault of the run
            raise
        why = "; ".join(each.message for each in error.diagnostics)[:300]
        raise RunError(
            "AZ802",
            f"`{saved.folder}` holds no sound recipe",
            why=why,
            help="move that folder elsewhere: the one before it is used then",
        ) from None
    record = Record.model_validate(state["record"]) if state.get("record") else None
    warn_of_others(record.made_with if record else None)
    loaded = replace(loaded, made_with=record.made_with if record else None)
    return Run(folder, loaded, Settings.model_validate(state["settings"]))
