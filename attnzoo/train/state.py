"""What a checkpoint says of a run beside its tensors, and what is wrong with one that says something else."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from attnzoo.files import read_file
from attnzoo.recipe.reading import is_text
from attnzoo.train.checkpoint import MOST_STATE, STATE, Checkpoint
from attnzoo.train.record import Record
from attnzoo.train.settings import Settings

Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[FiniteFloat, Field(ge=0)]


@dataclass
class Progress:
    """Where a run is.

    Args:
        epoch: Complete epochs.
        step: Steps taken in the one that is under way.
        loss: Sum of the losses of its units so far: of images, tokens, or whatever the task counts.
        units: How many units they are.
        images: How many examples it has seen: images, pairs, sequences.
        busy: Time spent on its steps, in seconds.
        seconds: Time spent on the run, in seconds.
        since: What `seconds` was when the epoch began.
        best: Highest test accuracy so far; null before there is one.
    """

    epoch: Count = 0
    step: Count = 0
    loss: FiniteFloat = 0.0
    units: Count = 0
    images: Count = 0
    busy: Seconds = 0.0
    seconds: Seconds = 0.0
    since: Seconds = 0.0
    best: FiniteFloat | None = None

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")


class Row(BaseModel):
    """An epoch in the log; what tasks add are numbers too."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, FiniteFloat]

    epoch: Annotated[int, Field(ge=1)]
    train_loss: FiniteFloat
    test_loss: FiniteFloat
    test_accuracy: FiniteFloat
    images_per_second: FiniteFloat
    lr: FiniteFloat
    seconds: FiniteFloat


class State(BaseModel):
    """The form of `state.json`; of what tasks add only what they read themselves is named."""

    model_config = ConfigDict(strict=True, extra="allow")

    step: Count | None = None  # not said by the first versions
    recipe: str
    settings: dict[str, Any]
    progress: Progress
    finished: bool
    params: Count
    log: list[Row]
    optimizer: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], dict[str, Any]]
    scaler: dict[str, Any] | None
    environment: dict[str, str | int]
    record: Record | None = None  # not said by the first versions
    classes: list[str] | None = None
    vocabularies: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=2)] | None = None


def fault(saved: Checkpoint) -> str:
    """What is wrong with the state of a checkpoint whose bytes are as they were written; empty when nothing is.

    Args:
        saved: The checkpoint.
    """
    try:
        state = State.model_validate_json(read_file(saved.folder / STATE, most=MOST_STATE))
        Settings.model_validate(state.settings)
    except OSError as error:
        return f"{STATE}: {(error.strerror or str(error)).lower()}"
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        return f"{STATE}: {f'`{where}`: ' if where else ''}{first['msg'].lower()}"[:200]
    if state.step not in (None, saved.step):
        return f"it was saved as step {state.step}"
    return "" if is_text(state.recipe) else f"{STATE}: `recipe` is no text of a recipe"
