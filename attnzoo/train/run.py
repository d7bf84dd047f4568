"""A run that was started: its model, data, log and figures, read from its newest sound checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from attnzoo.data import ImageData, evaluation, load_images
from attnzoo.errors import RunError
from attnzoo.recipe import Loaded, build, load
from attnzoo.train import checkpoint
from attnzoo.train.checkpoint import Checkpoint
from attnzoo.train.metrics import Evaluation, evaluate
from attnzoo.train.settings import Settings

Which = Literal["best", "last"]
"""The weights of the epoch with the highest test accuracy, or of the last step."""


@dataclass(frozen=True)
class Run:
    """A run on the disk.

    Args:
        folder: Where it is.
        loaded: The recipe, with picture size, classes and statistics of the data.
        settings: How it is trained.
    """

    folder: Path
    loaded: Loaded
    settings: Settings

    def model(self, which: Which = "best") -> nn.Module:
        """The model in eval mode; with `ema`, the averaged one.

        Args:
            which: `best` is the last as long as no epoch is complete.

        Raises:
            RunError: AZ805, when no checkpoint is sound.
        """
        saved = self._newest()
        model = build(self.loaded, {})
        names = {"best": ("best", "ema", "model"), "last": ("ema", "model")}[which]
        model.load_state_dict(saved.tensors(next(name for name in names if saved.has(name))))
        return model.eval()

    def data(self) -> ImageData:
        """The pictures it is trained and tested on, with the statistics that the model was trained with.

        Raises:
            DataError: AZ7xx, when they are not there any more.
        """
        images = load_images(self.settings.data, root=self.settings.data_root, size=self.settings.size)
        host = self.loaded.recipe.host
        return replace(images, mean=tuple(host.mean or images.mean), std=tuple(host.std or images.std))

    def evaluate(self, which: Which = "best", data: str | None = None) -> Evaluation:
        """The model on the test side of its data, or of other data with the same classes.

        Args:
            which: Which weights.
            data: Name of a data set; the run's own when left out.

        Raises:
            DataError: AZ7xx, when the data cannot be had.
            RunError: AZ807, when they are not of the kind that the model was trained on.
        """
        known = self._newest().state()["classes"]
        model = self.model(which)
        channels, rows, columns = image = tuple(model.pretrained_cfg["input_size"])  # type: ignore[union-attr, arg-type, index]
        if data is None:
            pictures = self.data()
        else:
            pictures = load_images(data, root=self.settings.data_root, size=rows)
        if list(pictures.classes) != known or pictures.image[0] != channels:
            names = ", ".join(pictures.classes)[:60]
            found = f"{len(pictures.classes)} classes ({names}) in {pictures.image[0]} channels"
            raise RunError("AZ807", f"`{pictures.name}` has {found}",
                           why=f"the run has {len(known)} classes ({', '.join(known)[:60]}) in {channels} channels",
                           help="choose data of the same kind")  # fmt: skip
        host = self.loaded.recipe.host
        transform = evaluation(image, host.mean or pictures.mean, host.std or pictures.std)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return evaluate(model.to(device), pictures.test, transform, pictures.classes, device=device)

    def log(self) -> list[dict[str, Any]]:
        """A row per epoch: `epoch` from 1, `train_loss` and `test_loss` in nats, `test_accuracy`, `images_per_second`
        in training, `lr` of the last step, `seconds` with evaluation."""
        return self._newest().state()["log"]

    def summary(self) -> dict[str, Any]:
        """Its figures: `best_` and `last_` with `accuracy`, `epoch` and `loss`, null until the first epoch is complete;
        `params`, `images_per_second`, `seconds`, `finished`."""
        state = self._newest().state()
        log = state["log"]
        figures: dict[str, Any] = {}
        best = max(log, key=lambda row: row["test_accuracy"], default=None)  # the first of equals
        for name, row in (("best", best), ("last", log[-1] if log else None)):
            for key, column in (("accuracy", "test_accuracy"), ("epoch", "epoch"), ("loss", "test_loss")):
                figures[f"{name}_{key}"] = row and row[column]
        speed = sum(row["images_per_second"] for row in log) / len(log) if log else None
        return figures | {
            "params": state["params"],
            "images_per_second": speed,
            "seconds": state["progress"]["seconds"],
            "finished": state["finished"],
        }

    def notes(self) -> list[str]:
        """A line for each checkpoint that is damaged and newer than the one that is used."""
        return checkpoint.sound(self.folder)[1]

    def _newest(self) -> Checkpoint:
        return newest(self.folder)


def newest(folder: Path) -> Checkpoint:
    """The newest sound checkpoint.

    Raises:
        RunError: AZ801 when the folder holds none, AZ805 when none is sound.
    """
    found, notes = checkpoint.sound(folder)
    if found:
        return found
    if notes:
        raise RunError("AZ805", f"no checkpoint of `{folder}` is sound", why=notes[0].partition(";")[0],
                       help="train again into another folder with --out")  # fmt: skip
    there = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    hint = f"`{folder.parent}` holds {', '.join(sorted(there)[:5])}" if there and not folder.exists() else ""
    raise RunError(
        "AZ801", f"`{folder}` is no run", help=hint or "`attnzoo train RECIPE --out DIR` starts one"
    )


def open_run(folder: str | Path) -> Run:
    """A run by its folder.

    Raises:
        RunError: AZ801 when it is no run, AZ805 when no checkpoint is sound.
    """
    folder = Path(folder)
    state = newest(folder).state()
    return Run(folder, load(state["recipe"]), Settings.model_validate(state["settings"]))
