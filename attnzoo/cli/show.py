"""`attnzoo show NAME`: one mechanism, fusion, probe, intervention or recipe."""

from typing import Annotated

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson


def show(
    name: Annotated[
        str,
        typer.Argument(
            help="A mechanism, fusion, probe, intervention or recipe; or plugin/name.",
            autocompletion=completion.everything,
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what a component is, what it claims, its options and where it comes from."""
    from attnzoo.catalogue.pages import look_up, page_of
    from attnzoo.cli.render import Column, facts, say, say_json, say_next, say_text, table
    from attnzoo.recipe.source import read_text

    kind, entry = look_up(name)
    if kind == "recipe":
        text = read_text(entry.value, str(entry.file))
        if as_json:
            say_json({"name": entry.name, "kind": "recipe", "file": entry.file, "text": text})
            return
        say(f"# {entry.file}", style="dim")
        say_text(text.rstrip())
        say_next(f"attnzoo compose {name}")
        return
    data = page_of(entry, kind)
    if as_json:
        say_json(data)
        return
    say(f"{data['name']}", style="bold")
    say(data["summary"])
    if data["claims"]["equation"]:
        say()
        say_text(data["claims"]["equation"])
    if data["doc"]:
        say(f"\n{data['doc']}")
    say()
    facts([(key, value) for key, value in data["claims"].items() if value and key != "equation"])
    say()
    if data["options"]:
        rows = [[o["name"], o["type"], o["default"], o["text"]] for o in data["options"]]
        table(
            [Column("option"), Column("type", wrap=12), Column("default"), Column("meaning", wrap=24)], rows
        )
    say("in a recipe:" if kind in ("mechanism", "fusion") else "so:", style="dim")
    say_text(data["example"])
    if kind in ("mechanism", "fusion"):
        say_next(f"attnzoo check {name}", "attnzoo compose RECIPE")
    else:
        say_next(f"attnzoo list {kind}s")
