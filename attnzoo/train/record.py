"""What a run notes when it begins, so that it can be held to it later: versions, plugins, defaults, data, weights."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat
from torch import nn

from attnzoo.core.options import options_of
from attnzoo.data.fingerprint import fingerprint
from attnzoo.recipe import Composition
from attnzoo.recipe.made_with import MadeWith, made_with, source_sha256
from attnzoo.recipe.plan import Plan
from attnzoo.train import checkpoint
from attnzoo.train.task import Task

FIRST = 20
"""Steps whose losses are noted one by one; of later ones the log tells by the epoch."""
Digest = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


class Record(BaseModel):
    """What a run noted when it began.

    Args:
        made_with: Versions, and the plugins of its components.
        environment: What bits depend on beside the settings.
        recipe: What the recipe says of the model, with what it left to defaults; of training the settings say all.
        options: Of each component, by full name, all options of each of its uses, with those left to defaults.
        sources: SHA-256 of the source of each component, by full name.
        data: SHA-256 of what is trained and tested on: `train` and `test`.
        weights: SHA-256 of the initial weights.
        losses: The first values of the training loss as it is shown: the mean since the epoch began, step by step.
        epochs: SHA-256 of the weights after each epoch.
    """

    made_with: MadeWith
    environment: dict[str, str | int]
    recipe: dict[str, Any]
    options: dict[str, list[dict[str, Any]]]
    sources: dict[str, Digest]
    data: dict[str, Digest]
    weights: Digest
    losses: Annotated[list[FiniteFloat], Field(max_length=FIRST)] = []
    epochs: list[Digest] = []


def record_of(
    task: Task, composition: Composition, model: nn.Module, environment: dict[str, str | int]
) -> Record:
    """The record of a run that begins here and now.

    Args:
        task: Its data.
        composition: Its recipe.
        model: With its initial weights.
        environment: What bits depend on beside the settings.
    """
    uses: dict[str, list[dict[str, Any]]] = {}
    for plan in (part for whole in composition.everything for part in (*whole.fusions(), *whole.leaves())):
        own, options = uses.setdefault(plan.entry.full_name, []), _options(plan)
        if options not in own:
            own.append(options)
    return Record(
        made_with=made_with(composition.entries),
        environment=environment,
        recipe=_plain(task.loaded.recipe, exclude={"train", "expect", "summary", "source"}),
        options=uses,
        sources={entry.full_name: source_sha256(entry) for entry in composition.entries},
        data={side: fingerprint(getattr(task.data, side)) for side in ("train", "test")},
        weights=checkpoint.fingerprint(model.state_dict()),
    )


def _options(plan: Plan) -> dict[str, Any]:
    return _plain(options_of(plan.entry.value).model_validate(dict(plan.options)))


def _plain(model: BaseModel, exclude: set[str] | None = None) -> dict[str, Any]:
    """What a pydantic model says, with defaults, as JSON."""
    return json.loads(model.model_dump_json(by_alias=True, exclude=exclude, fallback=str))
