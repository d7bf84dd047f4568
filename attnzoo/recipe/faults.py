"""pydantic's errors as faults of a recipe's text: what is wrong in plain words, where, and what was meant."""

import types
import typing
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from attnzoo.errors import Diagnostic, did_you_mean
from attnzoo.recipe.schema import Fuse, Recipe, Use, spec_tag
from attnzoo.recipe.source import Loc, Source

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping (`key: value`)",
    "model_type": "a mapping (`key: value`)",
    "model_attributes_type": "a mapping (`key: value`)",
    "none_required": "null",
}


def faults_of(error: ValidationError, source: Source, loc: Loc = (), owner: str = "") -> list[Diagnostic]:
    """One fault per spot of the text.

    Args:
        error: What pydantic found.
        source: Where the values came from.
        loc: Where the validated part is in the source.
        owner: For options: the mechanism or fusion they belong to.
    """
    by_spot: dict[Loc, Diagnostic] = {}
    for item in error.errors(include_url=False):
        path = tuple(p for p in item["loc"] if not (isinstance(p, str) and p.startswith("(")))
        spot = loc + _existing(path, item["type"], source, loc)
        fault = _fault(item, spot, source, error, owner)
        known = by_spot.get(spot)
        by_spot[spot] = _either(known, fault) if known else fault  # branches of a union fail one by one
    return list(by_spot.values())


def _existing(path: tuple, kind: str, source: Source, base: Loc) -> Loc:
    """The path without the labels that pydantic adds for branches of a union."""
    kept: Loc = ()
    for position, step in enumerate(path):
        last = position == len(path) - 1
        if base + kept + (step,) in source.values or (last and kind in ("missing", "extra_forbidden")):
            kept += (step,)
    return kept


def _either(one: Diagnostic, other: Diagnostic) -> Diagnostic:
    if one.code != other.code or one.message == other.message or "must be" not in one.message:
        return one
    name, _, wanted = one.message.partition(" must be ")
    wanted, _, found = wanted.partition("; ")
    also = other.message.partition(" must be ")[2].partition("; ")[0]
    if also in wanted:
        return one
    return Diagnostic(one.code, f"{name} must be {wanted} or {also}; {found}", one.place, one.why, one.help)


def _fault(item: dict, spot: Loc, source: Source, error: ValidationError, owner: str) -> Diagnostic:
    kind, value, ctx = item["type"], item.get("input"), item.get("ctx", {})
    name = _shown(spot)
    option = bool(owner)
    if kind == "extra_forbidden":
        return _unknown_key(spot, source, owner)
    if kind == "missing":
        inside = f" in `{_dotted(spot[:-1])}`" if len(spot) > 1 else ""
        code = "AZ213" if option else "AZ111"
        what = f"`{owner}` needs the option `{spot[-1]}`" if option else f"`{spot[-1]}` is missing{inside}"
        return Diagnostic(code, what, source.key_place(spot[:-1]), help=f"add `{spot[-1]}: ...`")
    place = source.value_place(spot)
    if kind == "spec":
        return Diagnostic("AZ114", f"{name} must say `use: NAME` or `fuse: NAME` with `of: [...]`; {_found(value)}", place,
                          help="`attnzoo list` shows the names")  # fmt: skip
    if kind == "literal_error":
        choices = [_yaml(choice) for choice in _choices(spot, item)]
        hint = did_you_mean(str(value), choices) if isinstance(value, str) else ""
        return Diagnostic("AZ212" if option else "AZ113", f"{name} must be {_or(choices)}; {_found(value)}", place, help=hint)
    if kind == "string_pattern_mismatch":
        hint = "use a-z, 0-9 and _, beginning with a letter"
        return Diagnostic("AZ113", f"{name} must be a name; {_found(value)}", place, help=hint)
    if kind in _KINDS:
        hint = _type_hint(value, kind)
        code = "AZ211" if option else "AZ112"
        return Diagnostic(code, f"{name} must be {_KINDS[kind]}; {_found(value)}", place, help=hint)
    bounds = {"greater_than": "above {gt}", "greater_than_equal": "{ge} or more", "less_than": "below {lt}",
              "less_than_equal": "{le} or less", "too_short": "{min_length} or more entries",
              "too_long": "{max_length} or fewer entries", "string_too_long": "at most {max_length} characters",
              "string_too_short": "at least {min_length} characters"}  # fmt: skip
    if kind in bounds:
        code = "AZ212" if option else "AZ113"
        return Diagnostic(code, f"{name} must be {bounds[kind].format(**ctx)}; {_found(value)}", place)
    return Diagnostic("AZ112" if not option else "AZ211", f"{name}: {item['msg'].lower()}; {_found(value)}", place)


def _unknown_key(spot: Loc, source: Source, owner: str) -> Diagnostic:
    key, place = str(spot[-1]), source.key_place(spot)
    if owner:
        return Diagnostic("AZ210", f"`{owner}` has no option `{key}`", place, help=f"`attnzoo show {owner}` lists its options")
    model = _model_at(spot[:-1], source)
    fields = [info.alias or field for field, info in model.model_fields.items()]
    if key == "use" and model is Fuse:
        return Diagnostic("AZ114", "a spec has `use` or `fuse`, not both", place, help="nest one in the other's `of:`")
    inside = f" in `{_dotted(spot[:-1])}`" if len(spot) > 1 else ""
    hint = did_you_mean(key, fields) or f"the keys here are {', '.join(fields[:12])}{' ...' if len(fields) > 12 else ''}"
    return Diagnostic("AZ110", f"unknown key `{key}`{inside}", place, help=hint)


def _model_at(loc: Loc, source: Source) -> type[BaseModel]:
    """The model whose fields may stand at a spot."""
    model: Any = Recipe
    tree = source.tree
    for step in loc:
        tree = tree[step]
        if isinstance(step, int):
            model = get_args(model)[0]
        else:
            by_key = {info.alias or name: info.annotation for name, info in model.model_fields.items()}
            model = _strip(by_key.get(step, model))
        if get_origin(model) is not list and not (isinstance(model, type) and issubclass(model, BaseModel)):
            model = Fuse if spec_tag(tree) == "(fuse)" else Use
    return model


def _strip(annotation: Any) -> Any:
    """An annotation without `Annotated` and `| None`."""
    if get_origin(annotation) is typing.Annotated:
        return _strip(get_args(annotation)[0])
    if get_origin(annotation) in (types.UnionType, typing.Union):
        inner = [arg for arg in get_args(annotation) if arg is not type(None)]
        return _strip(inner[0]) if len(inner) == 1 else annotation
    return annotation


def _choices(spot: Loc, item: dict) -> list[Any]:
    expected = item.get("ctx", {}).get("expected", "")
    return [word.strip().strip("'") for part in expected.split(" or ") for word in part.split(",")]


def _type_hint(value: Any, kind: str) -> str:
    if kind in ("int_type", "float_type") and isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ""
        return f"write it without quotes: {value}"
    if kind == "bool_type" and isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "y", "n"):
        return f"in YAML 1.2 `{value}` is text: write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
    if kind == "string_type" and value is not None:
        return f'write it in quotes: "{_yaml(value)}"'
    if kind in ("list_type",) and isinstance(value, (str, dict)):
        return "begin each entry with `- `"
    return ""


def _found(value: Any) -> str:
    """What stands there, in words."""
    if value is None:
        return "nothing stands here"
    if isinstance(value, bool):
        return f"this is {_yaml(value)}"
    if isinstance(value, (int, float)):
        return f"this is {value}"
    if isinstance(value, str):
        return f"this is the text `{value[:40]}{'…' if len(value) > 40 else ''}`"
    if isinstance(value, list):
        return f"this is a list of {len(value)}"
    return "this is a mapping" + (f" with `{', '.join(map(str, list(value)[:4]))}`" if value else " without keys")


def _yaml(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}.get(value, str(value)) if not isinstance(value, int) or isinstance(
        value, bool
    ) else str(value)


def _or(words: list[str]) -> str:
    shown = [f"`{word}`" for word in words]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _dotted(loc: Loc) -> str:
    return ".".join(map(str, loc))


def _shown(loc: Loc) -> str:
    return f"`{_dotted(loc)}`" if loc else "a recipe"
