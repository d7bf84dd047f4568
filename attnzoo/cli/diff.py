"""`attnzoo diff A B`: what two recipes differ in."""

from typing import Annotated

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson
from attnzoo.cli.render import spaced


def diff(
    first: Annotated[str, typer.Argument(help="A recipe's name or file.", autocompletion=completion.recipes)],
    second: Annotated[
        str, typer.Argument(help="The one that is held against it.", autocompletion=completion.recipes)
    ],
    edits: Annotated[list[str], typer.Option("--set", help="Change a value in both recipes.")] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show what two recipes differ in: sites, options, parameters, FLOPs, masks and laws lost and won."""
    from attnzoo.bench.diff import diff as difference
    from attnzoo.cli.render import Column, count, facts, say, say_json, say_next, table
    from attnzoo.recipe import load, resolve

    found = difference(*(resolve(load(name, edits)) for name in (first, second)))
    if as_json:
        say_json(found.as_dict())
        return
    one, other = found.names
    if found.changes:
        columns = [Column("where"), Column(one, wrap=18), Column(other, wrap=18)]
        about = [change.about for change in found.changes]
        above = {i: name for i, name in enumerate(about) if name not in about[:i]}
        table(columns, [[c.where, c.first, c.second] for c in found.changes], above=above)
    else:
        say("the same model, trained in the same way", style="bold")
    figures = [("parameters", found.params, spaced), ("FLOPs", found.flops, count)]
    facts([(name, f"{show(a)} → {show(b)}{_more(a, b)}") for name, (a, b), show in figures])
    say_next(f"attnzoo compare {first} {second}", f"attnzoo cost {first} {second}")


def _more(first: int, second: int) -> str:
    """By how much the second is more or less: in percent, or as a factor where it is many times the first."""
    if first == second or not first:
        return ""
    ratio = second / first
    if 0.1 < ratio < 10:
        return f" ({100 * (ratio - 1):+.2f} %)"
    return f" (× {spaced(round(ratio)) if ratio > 100 else f'{ratio:.3g}'})"
