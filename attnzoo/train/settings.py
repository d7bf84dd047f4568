"""What a run needs to know beside its model; and how recipe, data and command line agree on it."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from attnzoo.data import DATASETS
from attnzoo.data.parallel import PAIRS, is_pairs
from attnzoo.data.sequences import SEQUENCES, STRINGS, is_sequences
from attnzoo.errors import RunError
from attnzoo.recipe import Loaded, load
from attnzoo.recipe.schema import Seq2SeqHost, SideLayers, Train

_STRINGS = (
    "train.epochs=6",
    "train.batch_size=32",
    "train.optimizer.lr=0.001",
    "train.schedule={use: cosine, warmup: 0.3}",
    "train.clip_grad=1.0",
    "train.label_smoothing=0.0",  # there is one right answer
)
_SEQUENCES = (
    "train.epochs=6",
    "train.batch_size=64",
    "train.optimizer.lr=0.001",
    "train.schedule={use: cosine, warmup: 1}",
    "train.clip_grad=1.0",
    "train.label_smoothing=0.0",
)
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
    **dict.fromkeys(STRINGS, _STRINGS),
    **dict.fromkeys(SEQUENCES, _SEQUENCES),
}
"""What small data sets need instead of a recipe's settings, which were chosen for another data set; by the word before
the colon."""


Kind = Literal["images", "pairs", "sequences"]
"""What a run is trained on, and what a step sees."""
HOSTS: dict[str, Kind] = {
    "vit": "images",
    "cct": "images",
    "pyramid": "images",
    "dual": "images",
    "seq2seq": "pairs",
    "sequence": "sequences",
}
"""Kind of host to the kind of data that it is for."""
NAMES: dict[Kind, tuple[str, ...]] = {"images": DATASETS, "pairs": PAIRS, "sequences": tuple(SEQUENCES)}
"""Names of the data sets of each kind."""
FILES = ("folder", "moses", "tsv", "aligned", "gettext")
"""Data sets whose names go on with a path."""
SIDES = ("encoder", "decoder")


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
        RunError: AZ814, when the recipe is for data of another kind.
    """
    loaded = load(recipe, edits)
    data = loaded.recipe.train.data
    if data != load(recipe).recipe.train.data:
        loaded = load(recipe, [*_of_its_own_data(loaded), *for_data(load(recipe), data), *edits])
    settings = settings_of(loaded, **others)
    kind_of(loaded, settings)
    return loaded, settings


def _of_its_own_data(loaded: Loaded) -> tuple[str, ...]:
    """What a recipe says of images that it is not trained on now, to be forgotten."""
    return ("host.mean=null", "host.std=null") if HOSTS[loaded.recipe.host.kind] == "images" else ()


def for_data(loaded: Loaded, data: str) -> tuple[str, ...]:
    """What a small data set needs instead of what a recipe says, as edits; a model is made smaller, never larger.

    Args:
        loaded: The recipe.
        data: Name of the data set; not the recipe's own.
    """
    word, host = data.partition(":")[0], loaded.recipe.host
    edits = FOR_DATA.get(word, ())
    if word not in STRINGS or not isinstance(host, Seq2SeqHost):
        return edits
    layers = (
        host.layers.model_dump() if isinstance(host.layers, SideLayers) else dict.fromkeys(SIDES, host.layers)
    )
    small = {
        "dim": min(host.dim, 128),
        "mlp_dim": min(host.mlp_dim, 256),
        "layers": layers | {"decoder": min(layers["decoder"], 2)},
        "dropout": 0.0,
    }
    return (*(f"host.{key}={json.dumps(value)}" for key, value in small.items()), *edits)


def settings_of(loaded: Loaded, **others: Any) -> Settings:
    """The settings that a recipe says.

    Args:
        loaded: The recipe.
        others: What `Settings` adds.
    """
    return Settings(**loaded.recipe.train.model_dump(by_alias=True), **others)


def data_kind(name: str) -> Kind | None:
    """Of which kind a data set is, by the word before the first colon; None when nobody knows it.

    Args:
        name: As `--data` takes it.
    """
    if is_pairs(name):
        return "pairs"
    if is_sequences(name):
        return "sequences"
    known = (each.partition(":")[0] for each in DATASETS)
    return "images" if name.partition(":")[0] in known else None


def kind_of(loaded: Loaded, settings: Train) -> Kind:
    """What a recipe is trained on.

    Args:
        loaded: The recipe.
        settings: They name the data.

    Raises:
        RunError: AZ814, when the data are of another kind than the recipe is for.
    """
    host, found = loaded.recipe.host.kind, data_kind(settings.data)
    wanted = HOSTS[host]
    if found is not None and found != wanted:
        words = {"images": "images", "pairs": "pairs of sequences", "sequences": "single sequences"}
        others = " or ".join(f"`{kind}`" for kind, its in HOSTS.items() if its == found)
        raise RunError(
            "AZ814",
            f"`{loaded.name}` cannot learn from `{settings.data}`",
            why=f"its host, of kind `{host}`, is for {words[wanted]}; these are {words[found]}",
            help=f"take {words[wanted]} ({', '.join(NAMES[wanted])}), or a recipe whose host is of kind {others}",
        )
    return wanted


def completed(loaded: Loaded, settings: Settings, edits: Sequence[str]) -> Loaded:
    """The recipe of a run: with a name, and with what the data decide.

    Args:
        loaded: The recipe.
        settings: They name the data.
        edits: What the data decide, as changes such as `host.model.num_classes=10`; empty when it agrees already.

    Returns:
        A recipe whose `train:` names the data alone, since the settings say the rest.
    """
    changes = [*([f"name={loaded.name}"] if loaded.recipe.name is None else []), *edits]
    tree = loaded.source.tree | {"train": {"data": settings.data}}
    if changes or loaded.edited:
        tree.pop("expect", None)
    return replace(load(json.dumps(tree, ensure_ascii=False), changes), made_with=loaded.made_with)


def default_folder(loaded: Loaded, settings: Settings) -> Path:
    """`runs/<recipe>-<data>-seed<k>`; of a path its last part."""
    word, _, path = settings.data.partition(":")
    data = Path(path).name if word in FILES else re.sub("[:/,]", "-", settings.data)
    return Path("runs") / f"{loaded.name}-{data}-seed{settings.seed}"
