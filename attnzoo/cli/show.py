"""`attnzoo show NAME`: one mechanism, fusion or recipe."""

from typing import Annotated

import typer

from attnzoo.cli.list import AsJson


def show(
    name: Annotated[str, typer.Argument(help="A mechanism, fusion or recipe; or plugin/name.")],
    as_json: AsJson = False,
) -> None:
    """Show what a component is, what it claims, its options and where it comes from."""
    from attnzoo.catalogue.pages import look_up, page_of
    from attnzoo.cli.render import say, say_json, say_next, table

    kind, entry = look_up(name)
    if kind == "recipe":
        text = entry.value.read_text(encoding="utf-8")
        if as_json:
            say_json({"name": entry.name, "kind": "recipe", "file": entry.file, "text": text})
            return
        say(f"# {entry.file}", style="dim")
        say(text.rstrip())
        say_next(f"attnzoo compose {name}")
        return
    data = page_of(entry, kind)
    if as_json:
        say_json(data)
        return
    say(f"{data['name']}", style="bold")
    say(data["summary"])
    if data["doc"]:
        say(f"\n{data['doc']}")
    say()
    table(["", " "], [[key, value] for key, value in data["claims"].items() if value])
    if data["options"]:
        rows = [[o["name"], o["type"], o["default"], o["text"]] for o in data["options"]]
        table(["option", "type", "default", "meaning"], rows)
    say("in a recipe:", style="dim")
    say(data["example"])
    say_next(f"attnzoo check {name}", "attnzoo compose RECIPE")
