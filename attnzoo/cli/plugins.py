"""`attnzoo plugins`: who provides what."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnzoo.cli.list import AsJson

if TYPE_CHECKING:
    from attnzoo.zoo import Problem


def plugins(as_json: AsJson = False) -> None:
    """Show the installed plugins, what they offer and whether they work."""
    from attnzoo.cli.render import Column, say_json, say_next, table
    from attnzoo.zoo import load_zoo

    zoo = load_zoo()
    rows = []
    for provider in zoo.providers:
        offers = {
            registry.kind + "s": [entry.name for entry in registry.values() if entry.plugin == provider.name]
            for registry in zoo.registries
        }
        problems = [f"{p.code}: {p.reason}" for p in zoo.problems if p.plugin == provider.name]
        rows.append(vars(provider) | offers | {"problems": problems})
    if as_json:
        say_json(rows)
        return
    table(
        [
            Column("plugin"),
            Column("distribution", rank=3),
            Column("version", rank=2),
            Column("status"),
            *(Column(kind, rank=1, wrap=12) for kind in ("mechanisms", "fusions", "recipes")),
        ],
        [
            [r["name"], r["dist"], r["version"], r["status"]]
            + [_few(r[kind]) for kind in ("mechanisms", "fusions", "recipes")]
            for r in rows
        ],
    )
    say_problems(zoo.problems)
    say_next(
        "attnzoo doctor --verbose" if zoo.problems else "attnzoo new plugin mine",
        "attnzoo list --plugin NAME",
    )


def say_problems(problems: Sequence["Problem"], verbose: bool = False) -> None:
    """What is wrong, a line for each.

    Args:
        problems: What to say.
        verbose: Show tracebacks, too.
    """
    from attnzoo.cli.render import say

    for problem in problems:
        color = "red" if problem.fatal else "yellow"
        say(f"{problem.plugin} [{problem.code}]: {problem.reason}", style=color)
        if verbose and problem.details:
            say(problem.details, style="dim")


def _few(names: list[str]) -> str:
    """The names, or their number where there are many: `attnzoo list --plugin NAME` has them."""
    return ", ".join(names) if len(names) <= 3 else str(len(names))
