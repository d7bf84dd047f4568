"""`attnzoo show NAME`: one mechanism, fusion or recipe."""

from typing import Annotated, Any

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson


def show(
    name: Annotated[
        str,
        typer.Argument(
            help="A mechanism, fusion or recipe; or plugin/name.", autocompletion=completion.everything
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what a component is, what it claims, its options and where it comes from."""
    from attnzoo.cli.render import Column, facts, say, say_json, say_next, say_text, table
    from attnzoo.errors import RecipeError, did_you_mean
    from attnzoo.recipe.source import read_text
    from attnzoo.zoo import load_zoo

    zoo = load_zoo()
    for registry in (zoo.mechanisms, zoo.fusions, zoo.recipes):
        if registry.knows(name):
            entry = registry.find(name)
            break
    else:
        everything = [*zoo.mechanisms, *zoo.fusions, *zoo.recipes]
        raise RecipeError(
            "AZ201",
            f"there is nothing called `{name}`",
            help=f"{did_you_mean(name, everything)} `attnzoo list` shows all".strip(),
        )
    if registry is zoo.recipes:
        text = read_text(entry.value, str(entry.file))
        if as_json:
            say_json({"name": entry.name, "kind": "recipe", "file": entry.file, "text": text})
            return
        say(f"# {entry.file}", style="dim")
        say_text(text.rstrip())
        say_next(f"attnzoo compose {name}")
        return
    data = _part(entry, registry.kind)
    if as_json:
        say_json(data)
        return
    say(f"{data['name']}", style="bold")
    say(data["summary"])
    if data["doc"]:
        say(f"\n{data['doc']}")
    say()
    facts([(key, value) for key, value in data["claims"].items() if value])
    say()
    if data["options"]:
        rows = [[o["name"], o["type"], o["default"], o["text"]] for o in data["options"]]
        table(
            [Column("option"), Column("type", wrap=12), Column("default"), Column("meaning", wrap=24)], rows
        )
    say("in a recipe:", style="dim")
    say_text(data["example"])
    say_next(f"attnzoo check {name}", "attnzoo compose RECIPE")


def _part(entry, kind: str) -> dict[str, Any]:
    import inspect

    from attnzoo.core import Head, Pool, options_of

    card = entry.value.card
    claims = {
        "form": kind
        if kind == "fusion"
        else "head (inside the heads)"
        if issubclass(entry.value, Head)
        else "pool (one token of all)"
        if issubclass(entry.value, Pool)
        else "on tokens",
        "family": f"{card.family}: {card.family.question}" if kind == "mechanism" else "",
        "paper": str(card.paper) if card.paper else "",
        "fidelity": card.fidelity,
        "time": getattr(card, "time", ""),
        "memory": getattr(card, "memory", ""),
        "masks": ", ".join(sorted(card.masks)) or "none" if kind == "mechanism" else "",
        "context": "yes" if getattr(card, "context", False) else "",
        "grid": str(getattr(card, "grid", None) or ""),
        "taps": ", ".join(f"{name} ({axes})" for name, axes in getattr(card, "taps", {}).items()),
        "laws": ", ".join(sorted(card.laws)),
        "notes": card.notes,
        "from": f"{entry.plugin} {entry.version}".strip(),
        "file": entry.file,
    }
    options = [
        {
            "name": name,
            "type": _type(info.annotation),
            "default": "required" if info.is_required() else _yaml(info.default),
            "text": info.description or "",
        }
        for name, info in options_of(entry.value).model_fields.items()
    ]
    doc = (
        inspect.cleandoc(entry.value.__doc__ or "").partition("\nArgs:")[0].partition("\nRaises:")[0].strip()
    )
    example = (
        f"pool: {entry.name}"
        if issubclass(entry.value, Pool)
        else f"attention: {entry.name}"
        if kind == "mechanism"
        else f"attention: {{fuse: {entry.name}, of: [softmax, soft]}}"
    )
    return {
        "name": entry.name,
        "kind": kind,
        "summary": card.summary,
        "doc": doc,
        "claims": claims,
        "options": options,
        "example": example,
    }


def _yaml(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )


def _type(annotation: Any) -> str:
    """An annotation in a researcher's words."""
    import types
    import typing

    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is typing.Literal:
        return " | ".join(_yaml(value) for value in inner)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(_type(arg) for arg in inner)
    return {int: "whole number", float: "number", bool: "true | false", str: "text", type(None): "null"}.get(
        annotation, str(annotation)
    )
