"""From a name, a file or a text to a validated recipe: `extends`, edits, schema."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from attnzoo.errors import Diagnostic, RecipeError
from attnzoo.recipe.faults import faults_of
from attnzoo.recipe.schema import Recipe
from attnzoo.recipe.source import Loc, Source, parse, read_text

MAX_CHAIN = 8
OWN = ("name", "summary", "expect", "extends")
"""What a recipe says of itself alone; it is not inherited."""
MERGED = ("host", "model")
"""Mappings whose keys are inherited one by one; all else is inherited whole."""


@dataclass(frozen=True)
class Loaded:
    """A recipe and where it comes from.

    Args:
        name: Its name, for people.
        recipe: What it says.
        source: Its text, for faults.
        edited: Whether it differs from its file.
    """

    name: str
    recipe: Recipe
    source: Source
    edited: bool = False

    @property
    def text(self) -> str:
        """The whole recipe on its own, `extends` and edits worked in, as one line."""
        return json.dumps(self.source.tree, ensure_ascii=False)


def load(recipe: str | os.PathLike, edits: Sequence[str] = ()) -> Loaded:
    """A recipe by name (`ham_a`), by file (`recipes/ham_a.yaml`) or by its text.

    Args:
        recipe: Name, path, or text (which has several lines or begins with a brace).
        edits: Changes such as `attention.with.start=identity`, validated like the file.

    Raises:
        RecipeError: AZ1xx with all faults of the text, AZ2xx when there is no recipe of that name.
    """
    text = os.fspath(recipe)
    if is_text(text):
        source, stem = parse(text, "<recipe>"), ""
        folder = None
    else:
        path = find(text)
        shown = text if is_path(text) else str(path)
        source, stem, folder = parse(read_text(path, shown), shown), path.stem, path.parent
    _inherit(source, folder, [stem])
    for edit in edits:
        _edit(source, edit)
    recipe_, faults = _validate(source)
    declared = source.tree.get("name") if isinstance(source.tree, dict) else None
    if stem and isinstance(declared, str) and declared != stem:
        faults.append(Diagnostic("AZ115", f"the recipe is called `{declared}`, its file `{stem}`",
                                 source.value_place(("name",)), help=f"write `name: {stem}` or rename the file"))  # fmt: skip
    if faults or recipe_ is None:
        raise RecipeError.of(faults)
    return Loaded(declared or stem or "recipe", recipe_, source, edited=bool(edits))


def is_text(recipe: str) -> bool:
    """Whether this is a recipe itself and not the name of one."""
    return "\n" in recipe or recipe.lstrip().startswith("{")


def is_path(recipe: str) -> bool:
    """Whether this names a file and not a recipe of the zoo."""
    return recipe.endswith((".yaml", ".yml")) or os.sep in recipe and "\0" not in recipe and Path(recipe).exists()


def find(recipe: str) -> Path:
    """The file of a recipe by path or name.

    Raises:
        RecipeError: AZ204, when the zoo has no recipe of that name.
    """
    from attnzoo.zoo import load_zoo

    return Path(recipe) if is_path(recipe) else load_zoo().recipes.find(recipe).value


def _validate(source: Source) -> tuple[Recipe | None, list[Diagnostic]]:
    if not isinstance(source.tree, dict):
        place = source.value_place(())
        return None, [Diagnostic("AZ112", "a recipe must be a mapping (`key: value`)", place, help="begin with `recipe: 1`")]
    try:
        return Recipe.model_validate(source.tree), []
    except ValidationError as error:
        return None, faults_of(error, source)


def _inherit(source: Source, folder: Path | None, chain: list[str]) -> None:
    """Work `extends` in: what this recipe does not say is taken from the other, with the places of the other."""
    tree = source.tree
    if not isinstance(tree, dict) or not isinstance(tree.get("extends"), str):
        return
    word, place = tree["extends"], source.value_place(("extends",))
    if len(chain) > MAX_CHAIN:
        raise RecipeError("AZ116", f"more than {MAX_CHAIN} recipes extend each other", place=place)
    path = _other(word, folder, place)
    if path.stem in chain:
        raise RecipeError("AZ116", f"`{word}` extends itself: {' -> '.join([*chain, path.stem])}", place=place)
    try:
        other = parse(read_text(path, str(path)), str(path))
    except RecipeError as error:
        if error.code == "AZ101":
            raise RecipeError("AZ116", f"`extends: {word}` names no file that can be read", place=place,
                              help="it must stand in the same folder, or be the name of a recipe of the zoo") from None  # fmt: skip
        raise
    _inherit(other, path.parent, [*chain, path.stem])
    if isinstance(other.tree, dict):
        for key in OWN:
            other.tree.pop(key, None)
        if isinstance(other.tree.get("host"), dict):
            other.tree["host"].pop("registers", None)
        _merge(source, other, ())
    del tree["extends"]
    source.forget(("extends",))


def _other(word: str, folder: Path | None, place) -> Path:
    if any(c in word for c in "/\\\0") or word.startswith("."):
        raise RecipeError("AZ116", f"`extends` takes a file of the same folder or a name, not `{word[:60]}`", place=place,
                          why="opening a recipe never reads outside its folder")  # fmt: skip
    if not word.endswith((".yaml", ".yml")):
        from attnzoo.zoo import load_zoo

        return load_zoo().recipes.find(word, place).value
    if folder is None:
        raise RecipeError("AZ116", "a recipe without a file can only extend a recipe of the zoo by name", place=place)
    path = folder / word
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise RecipeError("AZ116", f"`{word}` is a link out of its folder", place=place)
    return path


def _merge(source: Source, other: Source, loc: Loc) -> None:
    mine, theirs = _at(source.tree, loc), _at(other.tree, loc)
    for key, value in theirs.items():
        spot = (*loc, key)
        if key not in mine:
            mine[key] = value
            for table, extra in ((source.values, other.values), (source.keys, other.keys)):
                table.update({k: p for k, p in extra.items() if k[: len(spot)] == spot})
        elif key in MERGED and isinstance(value, dict) and isinstance(mine[key], dict):
            _merge(source, other, spot)


def _at(tree: Any, loc: Loc) -> Any:
    for step in loc:
        tree = tree[step]
    return tree


def _edit(source: Source, edit: str) -> None:
    """One `--set path=value`: the value is YAML, the path is keys and indices with dots."""
    path, equals, text = edit.partition("=")
    steps = path.strip().split(".")
    if not equals or not all(steps):
        raise RecipeError("AZ117", f"`{edit}` is no edit", help="write it as `attention.with.start=identity`")
    value = parse(text if text.strip() else "null", f"--set {edit}")
    loc: Loc = ()
    here = source.tree
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if isinstance(here, list):
            if not step.isdigit() or int(step) >= len(here):
                raise RecipeError("AZ117", f"`{'.'.join(steps[: position + 1])}`: there are entries 0 to {len(here) - 1}")
            key: str | int = int(step)
        elif isinstance(here, dict):
            key = step
            if not last and not isinstance(here.get(step), (dict, list)):
                here[step] = {"use": here[step]} if isinstance(here.get(step), str) else {}  # a spec in short form
        else:
            raise RecipeError("AZ117", f"`{'.'.join(steps[:position])}` has nothing inside it to set")
        loc = (*loc, key)
        if last:
            here[key] = value.tree
            source.forget(loc)
            for table, extra in ((source.values, value.values), (source.keys, value.keys)):
                table.update({(*loc, *k): p for k, p in extra.items()})
        else:
            here = here[key]
            source.values.setdefault(loc, value.values[()])
