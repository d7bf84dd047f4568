"""`attnzoo explain RECIPE`: the equations of a recipe."""

from typing import Annotated

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson


def explain(
    name: Annotated[str, typer.Argument(help="A recipe's name or file.", autocompletion=completion.recipes)],
    edits: Annotated[list[str], typer.Option("--set", help="Change a value in the recipe.")] = [],  # noqa: B006
    as_latex: Annotated[bool, typer.Option("--latex", help="The equations as LaTeX, for a paper.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the equations of a recipe: what happens to the tokens, layer by layer, and what is put there."""
    from attnzoo.catalogue.explain import explain as explanation
    from attnzoo.cli.render import say_json, say_next, say_text

    found = explanation(name, edits)
    if as_json:
        say_json(found.as_dict())
    elif as_latex:
        say_text(found.latex())
    else:
        say_text(str(found))
        say_next(f"attnzoo explain {name} --latex", f"attnzoo compose {name}")
