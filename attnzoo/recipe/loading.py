"""A recipe, or all that is wrong with it: in its text, and in the names and options that are sound as text."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from attnzoo.errors import Diagnostic, RecipeError
from attnzoo.recipe.reading import Loaded, read
from attnzoo.recipe.resolving import other_faults, resolve
from attnzoo.recipe.source import MAX_FAULTS, Source


def load(recipe: str | os.PathLike | Mapping[str, Any], edits: Sequence[str] = ()) -> Loaded:
    """A recipe by name (`ham_a`), by file (`recipes/ham_a.yaml`), by its text, or as a dict.

    Args:
        recipe: Name, path, text (which has several lines or begins with a brace), or a dict of what the text would say.
        edits: Changes such as `attention.with.start=identity`, validated like the file.

    Raises:
        RecipeError: AZ1xx with all faults of the text, and what else can be said of what is sound;
            AZ204 when there is no recipe of that name.
    """
    source, loaded = read(recipe, edits)
    if source.faults or loaded is None:
        raise RecipeError.of(_with_others(source, loaded)[:MAX_FAULTS])
    return loaded


def _with_others(source: Source, loaded: Loaded | None) -> list[Diagnostic]:
    """The faults of the text, and those of its names and options, which they must not hide."""
    others: Sequence[Diagnostic] = ()
    if loaded is None:
        others = other_faults(source)
    else:
        try:
            resolve(loaded)
        except RecipeError as error:
            others = error.diagnostics
    places = {fault.place for fault in source.faults}
    return [*source.faults, *(fault for fault in others if fault.place not in places)]
