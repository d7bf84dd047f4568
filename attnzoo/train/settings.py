"""What a run needs to know beside its model; and how recipe, data and command line agree on it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from attnzoo.data import ImageData
from attnzoo.recipe import Loaded, load, resolve
from attnzoo.recipe.schema import Train

FOR_DATA: dict[str, tuple[str, ...]] = {
    "digits": (
        "train.epochs=40",
        "train.batch_size=32",
        "train.optimizer.lr=0.004",
        "train.clip_grad=1.0",
        "train.schedule={use: cosine, warmup: 3}",
        "train.augment=[{use: random_crop, with: {padding: 2}}]",  # a mirrored digit is none
    ),
    "synthetic": ("train.epochs=10", "train.batch_size=64", "train.optimizer.lr=0.003", "train.augment=[]"),
}
"""What small data sets need instead of a recipe's settings, which were chosen for another data set."""


class Settings(Train):
    """How a model is trained, and what may change between a start and a resume without changing the result.

    What `Train` says decides the result; what this class adds does not, but for `deterministic` on a GPU.
    """

    data_root: str | None = Field(
        default=None, description="Folder of the data sets; the usual one otherwise."
    )
    minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Training ends after this time even if epochs are left, in minutes."
    )
    checkpoint_every: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Steps between checkpoints; one per epoch otherwise."
    )
    keep: Annotated[int, Field(ge=1)] = Field(default=2, description="How many checkpoints stay.")
    workers: Annotated[int, Field(ge=0, le=64)] = Field(
        default=0, description="Threads that prepare batches ahead; 0 prepares each when it is needed."
    )
    device: Literal["auto", "cpu"] = Field(default="auto", description="The GPU if there is one, or the CPU.")
    deterministic: bool | None = Field(
        default=None,
        description="Same bits in every run; on the CPU when not said, since it costs speed on a GPU.",
    )

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the result, as data."""
        return self.model_dump(mode="json", by_alias=True, include=set(Train.model_fields))


def prepare(recipe: str | os.PathLike, edits: Sequence[str] = (), **others: Any) -> tuple[Loaded, Settings]:
    """A recipe and its settings, with those that its data needs when it is not trained on the recipe's own.

    Args:
        recipe: Name, file or text.
        edits: Changes such as `train.optimizer.lr=0.003`; they come last.
        others: What `Settings` adds to the recipe's `train:`.

    Raises:
        RecipeError: what is wrong with the recipe or an edit.
    """
    loaded = load(recipe, edits)
    data = loaded.recipe.train.data
    if data != load(recipe).recipe.train.data:
        forget = ("host.mean=null", "host.std=null")  # the recipe's are those of its own data
        loaded = load(recipe, [*forget, *FOR_DATA.get(data, ()), *edits])
    return loaded, settings_of(loaded, **others)


def settings_of(loaded: Loaded, **others: Any) -> Settings:
    """The settings that a recipe says.

    Args:
        loaded: The recipe.
        others: What `Settings` adds.
    """
    return Settings(**loaded.recipe.train.model_dump(by_alias=True), **others)


def fit(loaded: Loaded, settings: Settings, images: ImageData) -> Loaded:
    """The recipe with picture size, classes and statistics of the data; what agrees already is left as it is.

    Args:
        loaded: The recipe.
        settings: Its statistics hold when these name the same data.
        images: What it is trained on.

    Returns:
        A recipe whose `train:` names the data alone, since the settings say the rest.
    """
    seen, host = resolve(loaded).seen, loaded.recipe.host
    channels, rows, columns = images.image
    same = settings.data == loaded.recipe.train.data
    edits = [f"name={loaded.name}"] if loaded.recipe.name is None else []
    if seen.image[1:] != (rows, columns):
        edits.append(f"host.model.img_size={rows if rows == columns else [rows, columns]}")
    if seen.image[0] != channels:
        edits.append(f"host.model.in_chans={channels}")
    if seen.classes != len(images.classes):
        edits.append(f"host.model.num_classes={len(images.classes)}")
    if host.mean is None or not same:
        edits.append(f"host.mean={list(images.mean)}")
    if host.std is None or not same:
        edits.append(f"host.std={list(images.std)}")
    tree = loaded.source.tree | {"train": {"data": settings.data}}
    if edits or loaded.edited:
        tree.pop("expect", None)
    return load(json.dumps(tree, ensure_ascii=False), edits)


def default_folder(loaded: Loaded, settings: Settings) -> Path:
    """`runs/<recipe>-<data>-seed<k>`."""
    data = Path(settings.data.partition(":")[2]).name or settings.data
    return Path("runs") / f"{loaded.name}-{data}-seed{settings.seed}"
