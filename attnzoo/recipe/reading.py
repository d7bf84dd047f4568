"""From a name, a file or a text to a validated recipe: `extends`, edits, schema."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from attnzoo.core.fact_sheet import fact_sheet
from attnzoo.errors import Place, RecipeError, did_you_mean
from attnzoo.recipe.faults import faults_of
from attnzoo.recipe.made_with import MadeWith
from attnzoo.recipe.schema import Recipe
from attnzoo.recipe.source import PROSE, Loc, Source, from_data, parse, read_text

MAX_CHAIN = 8
OWN = ("name", "summary", "expect", "extends")
"""What a recipe says of itself alone; it is not inherited."""
MERGED = ("host", "model", "train", "optimizer", "schedule")
"""Mappings whose keys are inherited one by one; all else is inherited whole."""


@dataclass(frozen=True)
class Loaded:
    """A recipe and where it comes from.

    Args:
        name: Its name, for people.
        recipe: What it says.
        source: Its text, for faults.
        edited: Whether it differs from its file.
        made_with: Of a saved model or a run: the versions and plugins that it was made with.
    """

    name: str
    recipe: Recipe
    source: Source
    edited: bool = False
    made_with: MadeWith | None = None

    @property
    def text(self) -> str:
        """The whole recipe on its own, `extends` and edits worked in, as one line."""
        return json.dumps(self.source.tree, ensure_ascii=False)

    def _repr_html_(self) -> str:
        whole = yaml.safe_dump(json.loads(self.text), sort_keys=False, allow_unicode=True)
        facts = {
            "model": self.recipe.host.kind,
            "source": self.recipe.source,
            "file": self.source.file + (", edited" if self.edited else ""),
        }
        return fact_sheet(self.name, self.recipe.summary, facts, whole)


def read(
    recipe: str | os.PathLike | Mapping[str, Any], edits: Sequence[str] = ()
) -> tuple[Source, Loaded | None]:
    """The text of a recipe with its faults, and the recipe where it fits the schema.

    Args:
        recipe: Name, path, text (which has several lines or begins with a brace), or a dict of what the text would say.
        edits: Changes such as `attention.with.start=identity`, validated like the file.

    Raises:
        RecipeError: AZ1xx for what ends the reading; AZ204 when there is no recipe of that name.
    """
    source, path = _read(recipe)
    whole = _inherit(source, path, ())
    for edit in edits:
        _edit(source, edit)
    checked = _validate(source, whole)
    declared = source.tree.get("name") if isinstance(source.tree, dict) else None
    if path and isinstance(declared, str) and declared != path.stem:
        place = source.value_place(("name",))
        help = f"write `name: {path.stem}` or rename the file"
        source.fault(
            "AZ115", f"the recipe is called `{declared[:64]}`, its file `{path.stem}`", place, help=help
        )
    loaded = (
        Loaded(declared or (path.stem if path else "recipe"), checked, source, bool(edits))
        if checked
        else None
    )
    return source, loaded


def _read(recipe: str | os.PathLike | Mapping[str, Any]) -> tuple[Source, Path | None]:
    """The tree of a recipe and, where it has one, its file."""
    if isinstance(recipe, Mapping):
        return from_data(recipe, "<recipe>"), None
    text = os.fsdecode(recipe)
    if is_text(text):
        return parse(text, "<recipe>"), None
    path = find(text)
    shown = text if is_path(text) else str(path)
    return parse(read_text(path, shown), shown), path


def is_text(recipe: str) -> bool:
    """Whether this is a recipe itself and not the name of one."""
    return "\n" in recipe or recipe.lstrip().startswith("{")


def is_path(recipe: str) -> bool:
    """Whether this names a file and not a recipe of the zoo."""
    return recipe.endswith((".yaml", ".yml")) or (os.sep in recipe and os.path.exists(recipe))


def find(recipe: str) -> Path:
    """The file of a recipe by path or name.

    Raises:
        RecipeError: AZ204, when the zoo has no recipe of that name.
    """
    return Path(recipe) if is_path(recipe) else _named(recipe[:200])


def _validate(source: Source, whole: bool) -> Recipe | None:
    """Hold a tree to the schema; what is wrong goes to the source's faults.

    Args:
        source: The tree.
        whole: Whether all that it extends is there; otherwise nothing is said to be missing.
    """
    if not isinstance(source.tree, dict):
        place = source.value_place(())
        source.fault(
            "AZ112", "a recipe must be a mapping (`key: value`)", place, help="begin with `recipe: 1`"
        )
        return None
    try:
        return Recipe.model_validate(source.tree)
    except ValidationError as error:
        known = {fault.place for fault in source.faults}  # what cannot be read is not measured as well
        faults = [
            fault for fault in faults_of(error, source) if fault.place not in known or fault.code == "AZ111"
        ]
        source.faults += [fault for fault in faults if whole or fault.code != "AZ111"]
        return None


def _inherit(source: Source, path: Path | None, chain: tuple[Path, ...]) -> bool:
    """Work `extends` in: what this recipe does not say is taken from the other, with the places of the other.

    Args:
        source: The recipe.
        path: Its file.
        chain: The files that led here.

    Returns:
        Whether all that it extends could be had.
    """
    tree = source.tree
    if not isinstance(tree, dict) or not isinstance(tree.get("extends"), str):
        return True
    place = source.value_place(("extends",))
    try:
        chain = (*chain, path.resolve()) if path else chain
        file = _other(tree["extends"], path, chain, place)
        other = parse(read_text(file, str(file)), str(file))
    except RecipeError as error:
        source.faults += error.diagnostics
        return False
    whole = _inherit(other, file, chain)
    source.faults += other.faults
    if not isinstance(other.tree, dict):
        source.fault("AZ116", f"`{file.name}` holds no recipe", place)
        return False
    for key in OWN:
        other.tree.pop(key, None)
    if isinstance(other.tree.get("host"), dict):
        other.tree["host"].pop("registers", None)
    taken = _merge(tree, other.tree, ())
    for table, extra in ((source.values, other.values), (source.keys, other.keys)):
        table.update({loc: at for loc, at in extra.items() if any(loc[:n] in taken for n in (1, 2, 3))})
    del tree["extends"], source.keys["extends",], source.values["extends",]
    return whole


def _other(word: str, path: Path | None, chain: tuple[Path, ...], place: Place) -> Path:
    """The file that `extends` means.

    Raises:
        RecipeError: AZ116, AZ204.
    """
    if any(c in word for c in "/\\\0") or word.startswith(".") or not word:
        message = f"`extends` takes a file of the same folder or a name, not `{word[:60]}`"
        raise RecipeError(
            "AZ116", message, place=place, why="opening a recipe never reads outside its folder"
        )
    if not word.endswith((".yaml", ".yml")):
        file = _named(word, place)
    elif path is None:
        message = f"a recipe without a file has no folder to find `{word[:60]}` in"
        help = "write the name of a recipe of the zoo, without `.yaml`"
        raise RecipeError("AZ116", message, place=place, help=help)
    else:
        file = path.parent / word
        if not os.path.isfile(file):
            others = [p.name for p in path.parent.glob("*.y*ml") if p != path]
            help = (
                did_you_mean(word, others)
                or "it must stand in the same folder, or be the name of a recipe of the zoo"
            )
            raise RecipeError(
                "AZ116", f"`extends` names `{word[:60]}`, which is no file here", place=place, help=help
            )
        if file.resolve().parent != path.resolve().parent:
            raise RecipeError(
                "AZ116",
                f"`{word[:60]}` is a link out of its folder",
                place=place,
                why="opening a recipe never reads outside its folder",
            )
    if file.resolve() in chain:
        names = " -> ".join(f"`{one.name}`" for one in (*chain, file))
        raise RecipeError("AZ116", f"the recipes extend each other in a circle: {names}", place=place)
    if len(chain) >= MAX_CHAIN:
        raise RecipeError("AZ116", f"more than {MAX_CHAIN} recipes extend each other", place=place)
    return file


def _named(word: str, place: Place | None = None) -> Path:
    from attnzoo.zoo import load_zoo

    return load_zoo().recipes.find(word, place).value


def _merge(mine: dict, theirs: dict, loc: Loc) -> set[Loc]:
    """Take what is not said; returns which spots were taken."""
    taken: set[Loc] = set()
    for key, value in theirs.items():
        if key not in mine:
            mine[key] = value
            taken.add((*loc, key))
        elif key in MERGED and isinstance(value, dict) and isinstance(mine[key], dict):
            taken |= _merge(mine[key], value, (*loc, key))
    return taken


def _edit(source: Source, edit: str) -> None:
    """One `--set path=value`: the value is YAML, the path is keys and indices with dots."""
    path, equals, text = edit.partition("=")
    place = Place("--set", text=edit, width=len(path))
    steps = source.seen(path, place).split(".")
    if not equals or not all(steps):
        source.fault(
            "AZ117", f"`{edit[:60]}` is no edit", place, help="write it as `attention.with.start=identity`"
        )
        return
    if steps[0] == "extends":
        source.fault("AZ117", "`extends` cannot be set", place, help="give the other recipe instead")
        return
    try:
        value = parse(text or "null", "--set", f"{path}=", prose=tuple(steps) in PROSE)
    except RecipeError as error:
        source.faults += error.diagnostics
        return
    source.faults += value.faults
    here: Any = source.tree
    loc: Loc = ()
    column = 1
    for step, last in zip(steps, [*[False] * (len(steps) - 1), True], strict=True):
        at = Place("--set", 1, column, len(step), edit)
        if isinstance(here, list) and not (step.isdecimal() and int(step) < len(here)):
            there = f"has entries 0 to {len(here) - 1}" if here else "is an empty list"
            source.fault("AZ117", f"`{'.'.join(map(str, loc))}` {there}; there is no `{step[:40]}`", at)
            return
        if not isinstance(here, (dict, list)):
            what = f"`{'.'.join(map(str, loc))}`" if loc else "the recipe"
            source.fault("AZ117", f"`{step[:40]}` cannot be set: {what} is no mapping and no list", at)
            return
        key: Any = int(step) if isinstance(here, list) else step
        loc = (*loc, key)
        if isinstance(here, dict):
            source.keys.setdefault(loc, at)
        if last:
            here[key] = value.tree
            source.put(loc, value)
            return
        if isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
            source.values[loc] = at
        elif isinstance(here[key], str) and _holds_spec(loc):
            here[key] = {"use": here[key]}
            source.values[(*loc, "use")] = source.values[loc]
        here = here[key]
        column += len(step) + 1


def _holds_spec(loc: Loc) -> bool:
    """Whether a spec may stand there, which may be written as a plain name."""
    return loc in (("attention",), ("pool",)) or loc[-1] == "put" or (len(loc) > 1 and loc[-2] == "of")
