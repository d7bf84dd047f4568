"""pydantic's errors as faults of a recipe's text: what is wrong in plain words, where, and what was meant.

pydantic says which spots are wrong; the sentences are made from the schema, so that both bounds, all choices
and all branches of a union are named.
"""

import json
import types
from collections.abc import Mapping
from itertools import islice
from types import MappingProxyType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from attnzoo.errors import Diagnostic, did_you_mean
from attnzoo.recipe.schema import (
    TAGGED,
    VERSION,
    CctHost,
    CctModel,
    DualHost,
    DualModel,
    Expect,
    Fuse,
    Override,
    PyramidHost,
    PyramidModel,
    Recipe,
    SecondStream,
    Seq2SeqHost,
    SequenceHost,
    Train,
    Use,
    VitHost,
    VitModel,
)
from attnzoo.recipe.source import MAX_FAULTS, Loc, Source

_HOMES: dict[type[BaseModel], str] = {
    VitModel: "under `host: model:`",
    CctModel: "under `host: model:`",
    DualModel: "under `host: model:`",
    PyramidModel: "under `host: model:`",
    VitHost: "under `host:`",
    Override: "in an entry of `overrides:`",
    Expect: "under `expect:`",
    Train: "under `train:`",
    Recipe: "at the top of the recipe",
}
"""Where the keys of a section belong."""
_MODELS: dict[type[BaseModel], type[BaseModel]] = {
    VitHost: VitModel,
    CctHost: CctModel,
    PyramidHost: PyramidModel,
    DualHost: DualModel,
}
"""The arguments of each kind of backbone."""


def _strange(model: type[BaseModel]) -> set[type[BaseModel]]:
    """Where a key that is unknown here does not belong either: here, and among arguments of other kinds of host."""
    models = set(_MODELS.values())
    if model in models or issubclass(model, SecondStream):
        return models
    if model in _MODELS:
        return {model} | models - {_MODELS[model]}
    return {*_MODELS, *models} if model in (Seq2SeqHost, SequenceHost) else {model}


def faults_of(
    error: ValidationError,
    source: Source,
    schema: type[BaseModel] = Recipe,
    loc: Loc = (),
    owner: str = "",
    written: Mapping[str, str] = MappingProxyType({}),
) -> list[Diagnostic]:
    """One fault per spot of the text, at most `MAX_FAULTS`.

    Args:
        error: What pydantic found.
        source: Where the values came from.
        schema: What they were held to.
        loc: Where the validated part is in the source.
        owner: For options: the mechanism or fusion they belong to.
        written: What the source calls options of another name.
    """
    spots: dict[Loc, tuple[Any, list[ErrorDetails]]] = {}
    for item in error.errors(include_url=False):
        steps, rule = _descend(schema, item["loc"])
        spot = loc + tuple(written.get(str(step), step) for step in steps[:1]) + steps[1:]
        spots.setdefault(spot, (rule, []))[1].append(item)

    def position(spot: Loc) -> tuple[int, int]:
        place = source.key_place(spot)
        return place.line, place.column

    meant: set[Loc] = set()
    faults: dict[Loc, Diagnostic] = {}
    ordered = sorted(spots, key=position)
    for spot in islice(ordered, MAX_FAULTS):
        rule, items = spots[spot]
        kind = items[0]["type"]
        if kind == "extra_forbidden":
            faults[spot] = _unknown_key(spot, rule, source, owner, meant)
        elif kind == "missing":
            faults[spot] = _missing(spot, source, owner)
        elif kind == "spec":
            faults[spot] = _neither(spot, items[0]["input"], source)
        else:
            faults[spot] = _misfit(spot, rule, items, source, owner)
    return [
        fault
        for spot, fault in faults.items()
        if not (spot in meant and spots[spot][1][0]["type"] == "missing")
    ]


def _descend(schema: Any, path: tuple[int | str, ...]) -> tuple[Loc, Any]:
    """A path of pydantic without its labels for the branches of unions, and the rule that holds there.

    Below a mapping with an unknown key the rule is that mapping's; a union is not entered.
    """
    steps: Loc = ()
    rule = schema
    for step in path:
        inner = _alternatives(rule)
        if step in TAGGED:
            rule = TAGGED[str(step)]
        elif len(inner) == 1 and _is_model(inner[0]):
            steps += (step,)
            fields = _fields(inner[0])
            if step not in fields:
                return steps, _apart(inner[0])[0]
            rule = fields[str(step)]
        elif len(inner) == 1 and get_origin(_apart(inner[0])[0]) is list and isinstance(step, int):
            steps += (step,)
            rule = get_args(_apart(inner[0])[0])[0]
        else:
            break
    return steps, rule


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    """The rule of each key of a mapping."""
    return {info.alias or name: Annotated[info.annotation, info] for name, info in model.model_fields.items()}


def _is_model(rule: Any) -> bool:
    core, _ = _apart(rule)
    return isinstance(core, type) and issubclass(core, BaseModel)


def _apart(rule: Any) -> tuple[Any, list[Any]]:
    """A rule as a bare type and all that was said beside it."""
    beside: list[Any] = []
    while get_origin(rule) is Annotated:
        rule, *extra = get_args(rule)
        for one in extra:
            beside += one.metadata if isinstance(one, FieldInfo) else [one]
    return rule, beside


def _alternatives(rule: Any) -> list[Any]:
    """The branches of a union, without null; anything else is its own only branch."""
    core, _ = _apart(rule)
    if get_origin(core) in (Union, types.UnionType):
        return [branch for branch in get_args(core) if branch is not type(None)]
    return [rule]


def wanted(rule: Any) -> str:
    """What a rule asks for, in words; the empty string for what cannot be said."""
    branches = _alternatives(rule)
    if len(branches) > 1:
        return " or ".join(filter(None, map(wanted, branches)))
    core, beside = _apart(branches[0])
    beside += _apart(rule)[1] if branches[0] is not rule else []
    limits = {
        name: getattr(one, name) for one in beside for name in _LIMITS if getattr(one, name, None) is not None
    }
    words = next((one for one in beside if isinstance(one, str)), "")
    if words:
        return words
    if get_origin(core) is Literal:
        return _or([f"`{_yaml(choice)}`" for choice in get_args(core)])
    if get_origin(core) is list:
        item = get_args(core)[0]
        each = f", each {wanted(item)}" if _apart(item)[0] in (int, float, str) else ""
        return f"a list{_count(limits, 'entries')}{each}"
    if core is bool:
        return "`true` or `false`"
    if core in (int, float):
        return f"a {'whole ' if core is int else ''}number{_range(limits)}"
    if core is str:
        return f"text{_count(limits, 'characters')}"
    return "a mapping (`key: value`)" if core is dict or get_origin(core) is dict or _is_model(core) else ""


_LIMITS = ("ge", "gt", "le", "lt", "min_length", "max_length")


def _range(limits: dict[str, Any]) -> str:
    low = f"from {limits['ge']}" if "ge" in limits else f"above {limits['gt']}" if "gt" in limits else ""
    high = f"to {limits['le']}" if "le" in limits else f"to below {limits['lt']}" if "lt" in limits else ""
    if low and high:
        return f" {low} {high}"
    if low:
        return f" {low} on" if "ge" in limits else f" {low}"
    return f" up {high}" if high else ""


def _count(limits: dict[str, Any], what: str) -> str:
    fewest, most = limits.get("min_length", 0), limits.get("max_length")
    if most is None:
        return f" of {fewest} or more {what}" if fewest else ""
    return f" of {most} {what}" if fewest == most else f" of {fewest} to {most} {what}"


def _unknown_key(
    spot: Loc, model: type[BaseModel], source: Source, owner: str, meant: set[Loc]
) -> Diagnostic:
    key, place, names = str(spot[-1]), source.key_place(spot), list(_fields(model))
    hint = did_you_mean(key, names)
    if hint:
        meant.add((*spot[:-1], hint.split("`")[1]))
    listing = f"the keys here are {_and(names)}"
    if owner:
        hint = hint or (f"its options are {_and(names)}" if names else "it has none")
        return Diagnostic("AZ210", f"`{owner}` has no option `{key[:40]}`", place, help=hint)
    if key == "use" and model is Fuse:
        meant.add((*spot[:-1], "fuse"))
        other = "fuse" if (*spot[:-1], "fuse") in source.values else "of"
        help = "merge branches with `fuse: NAME` and `of: [...]`, or write `use: NAME` alone"
        return Diagnostic("AZ114", f"`use` and `{other}` cannot stand in one spec", place, help=help)
    strange = _strange(model)
    homes = {other: home for other, home in _HOMES.items() if other not in strange}
    home = next((home for other, home in homes.items() if key in _fields(other)), "")
    if ":" in key:
        hint = "write a space after the colon"
    elif home:
        hint = f"`{key}` stands {home}"
    elif model in (Use, Fuse):
        hint = hint or f"options stand under `with:`; {listing}"
    inside = f" in `{_dotted(spot[:-1])}`" if len(spot) > 1 else ""
    return Diagnostic("AZ110", f"unknown key `{key[:40]}`{inside}", place, help=hint or listing)


def _missing(spot: Loc, source: Source, owner: str) -> Diagnostic:
    key, place = spot[-1], source.key_place(spot[:-1])
    if owner:
        return Diagnostic(
            "AZ213", f"`{owner}` needs the option `{key}`", place, help=f"add `{key}: ...` under `with:`"
        )
    inside = f" in `{_dotted(spot[:-1])}`" if len(spot) > 1 else ""
    example = {"recipe": f"{VERSION}", "kind": "vit", "attention": "softmax", "of": "[softmax, soft]"}.get(
        str(key), "..."
    )
    return Diagnostic("AZ111", f"`{key}` is missing{inside}", place, help=f"add `{key}: {example}`")


def _neither(spot: Loc, value: Any, source: Source) -> Diagnostic:
    """A spec that says neither `use` nor `fuse`."""
    many = isinstance(value, list) and value
    help = "several are merged by `{fuse: add, of: [...]}`" if many else "`attnzoo list` shows the names"
    for key in value if isinstance(value, dict) else ():
        hint = "write a space after the colon" if ":" in key else did_you_mean(key, ["use", "fuse"])
        if hint:
            inside = f" in `{_dotted(spot)}`" if spot else ""
            message = f"unknown key `{key[:40]}`{inside}"
            return Diagnostic("AZ110", message, source.key_place((*spot, key)), help=hint)
    name = f"`{_dotted(spot)}`" if spot else "a spec"
    message = f"{name} must say `use: NAME`, or `fuse: NAME` with `of: [...]`; {_found(value)}"
    return Diagnostic("AZ114", message, source.value_place(spot), help=help)


def _misfit(spot: Loc, rule: Any, items: list[ErrorDetails], source: Source, owner: str) -> Diagnostic:
    """A value of the wrong type, or out of range."""
    while spot not in source.values and spot:
        spot = spot[:-1]  # a spec in short form has no `use` of its own
    value = _at(source.tree, spot)
    of_type = all(item["type"].endswith("_type") or item["type"] == "int_from_float" for item in items)
    code = ("AZ211" if of_type else "AZ212") if owner else ("AZ112" if of_type else "AZ113")
    name = f"`{_dotted(spot)}`" if spot else "a recipe"
    words = wanted(rule)
    said = items[0].get("ctx", {}).get("error")  # of a validator in a plugin
    if words and said is None:
        message = f"{name} must be {words}; {_found(value)}"
    else:
        message = f"{name} does not fit{f' `{owner}`' if owner else ''}; {_found(value)}"
    return Diagnostic(code, message, source.value_place(spot), str(said or ""), _hint(spot, rule, value))


def _hint(spot: Loc, rule: Any, value: Any) -> str:
    """The likely mistake, where there is one."""
    if spot == ("recipe",) and isinstance(value, int) and value > VERSION:
        return f"this attnzoo reads version {VERSION} of the format; a later attnzoo may read this one"
    branches = [_apart(branch)[0] for branch in _alternatives(rule)]
    choices = [choice for branch in branches if get_origin(branch) is Literal for choice in get_args(branch)]
    if list(map(get_origin, branches)) == [list] and value is not None and not isinstance(value, list):
        return "begin each entry with `- `, or write `[..., ...]`"
    if not isinstance(value, str):
        return (
            f'write it in quotes: "{_yaml(value)}"'
            if str in branches and isinstance(value, (int, float))
            else ""
        )
    if {int, float} & {*branches, *map(type, choices)} and _is_number(value):
        return f"write it without quotes: {value}"
    if bool in branches and value.lower() in _TRUE | _FALSE:
        word = "true" if value.lower() in _TRUE else "false"
        return (
            f"`{value}` is text here: write {word}" if value != word else f"write it without quotes: {word}"
        )
    return did_you_mean(value, [str(choice) for choice in choices if choice != ""])


_TRUE, _FALSE = {"yes", "on", "y", "true"}, {"no", "off", "n", "false"}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _found(value: Any) -> str:
    """What stands there, in words."""
    if value is None:
        return "nothing stands here"
    if isinstance(value, str):
        return (
            f"this is the text `{value[:40]}{'…' if len(value) > 40 else ''}`"
            if value
            else "this is an empty text"
        )
    if isinstance(value, list):
        text = json.dumps(value, ensure_ascii=False, default=str) if len(value) < 8 else ""
        return f"this is {text}" if text and len(text) <= 40 else f"this is a list of {len(value)}"
    if isinstance(value, dict):
        keys = [key[:20] for key in value]
        return f"this is a mapping with {_and(keys, 4)}" if keys else "this is a mapping without keys"
    return f"this is {_yaml(value)}"


def _yaml(value: Any) -> str:
    """A scalar as it is written in YAML."""
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def _or(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _and(names: list[str], most: int = 12) -> str:
    return ", ".join(f"`{name}`" for name in names[:most]) + (" ..." if len(names) > most else "")


def _dotted(loc: Loc) -> str:
    return ".".join(map(str, loc))


def _at(tree: Any, loc: Loc) -> Any:
    for step in loc:
        tree = tree[step]
    return tree
