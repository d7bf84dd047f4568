"""`attnzoo list`: what there is."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from attnzoo.cli import completion

AsJson = Annotated[bool, typer.Option("--json", help="Print data instead of a table.")]


class Kind(StrEnum):
    """What can be listed."""

    mechanisms = "mechanisms"
    fusions = "fusions"
    probes = "probes"
    interventions = "interventions"
    recipes = "recipes"
    models = "models"


class MaskKind(StrEnum):
    """Kinds of mask."""

    keys = "keys"
    causal = "causal"
    pairs = "pairs"


def list_(
    kind: Annotated[Kind | None, typer.Argument(help="Only these.")] = None,
    family: Annotated[str | None, typer.Option(help="Only mechanisms of this family.")] = None,
    mask: Annotated[
        MaskKind | None, typer.Option(help="Only mechanisms that honour masks of this kind.")
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="Only mechanisms of this form: head, mechanism, pool.")
    ] = None,
    context: Annotated[
        bool | None, typer.Option(help="Only mechanisms that can read from a context, or cannot.")
    ] = None,
    law: Annotated[str | None, typer.Option(help="Only those that claim this law.")] = None,
    name: Annotated[str, typer.Option(help="Only these names, with * and ?: '*lin*'.")] = "*",
    search: Annotated[
        str, typer.Option(help="Only what these words stand in: name, summary, notes, paper.")
    ] = "",
    plugin: Annotated[
        str | None, typer.Option(help="Only what this plugin provides.", autocompletion=completion.plugins)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show mechanisms, fusions, probes, interventions, recipes and models, with who provides them."""
    from attnzoo.catalogue.lists import rows as rows_of
    from attnzoo.cli.render import Column, piped, say, say_json, say_next, table
    from attnzoo.zoo import load_zoo

    zoo = load_zoo()
    claims = {"family": family, "mask": mask and mask.value, "form": form, "context": context}
    everything = [Kind.mechanisms, Kind.fusions, Kind.probes, Kind.interventions, Kind.recipes]
    if any(claim is not None for claim in claims.values()):
        everything = [Kind.mechanisms]
    listing = {
        each.value: rows_of(zoo, each.value, name, plugin=plugin, search=search, law=law, **claims)
        for each in ([kind] if kind else everything)
    }
    problems = [vars(problem) | {"details": ""} for problem in zoo.problems]
    if as_json:
        say_json(listing | {"problems": problems})
        return
    columns = [
        Column("name"),
        Column("family", rank=1),
        Column("form", rank=5),
        Column("masks", rank=3),
        Column("grows", rank=2),
        Column("base", rank=1),
        Column("needs", rank=2),
        Column("edits", rank=2),
        Column("registers", rank=2),
        Column("summary", wrap=40),
        Column("provider", rank=4),
    ]
    for title, rows in listing.items():
        if not rows:
            say(f"no {title} match")
            continue
        shown = [column for column in columns if column.name in rows[0] and _told(column.name, title)]
        above: dict[int, str] = {}
        if "family" in rows[0] and not piped():  # of what is piped each line speaks for itself
            rows, above = _by_family(rows)
            shown = [column for column in shown if column.name != "family"]
        cells = [[_cell(row[column.name]) for column in shown] for row in rows]
        counted = title.removesuffix("s") if len(rows) == 1 else title
        table(shown, cells, title=f"{len(rows)} {counted}", above=above)
    broken = sorted({problem["plugin"] for problem in problems})
    if broken:
        say(f"something is wrong with {', '.join(broken)}: `attnzoo doctor` says what", style="yellow")
    say_next(*_NEXT.get(kind or Kind.mechanisms, _NEXT[Kind.mechanisms]))


_NEXT = {
    Kind.mechanisms: ("attnzoo show softmax", "attnzoo compose ham_a", "attnzoo new plugin mine"),
    Kind.probes: ("attnzoo show entropy", "attnzoo probe RUN entropy"),
    Kind.interventions: ("attnzoo show ablate_heads", "attnzoo eval RUN --with ablate_heads"),
}
"""What one does with what was listed."""


def _by_family(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The rows by family, and above the first of each its name and the question that it answers."""
    from attnzoo.core import Family

    order = list(Family)
    ordered = sorted(rows, key=lambda row: order.index(row["family"]))
    families = [row["family"] for row in ordered]
    above = {families.index(one): f"{one}: {Family(one).question}" for one in dict.fromkeys(families)}
    return ordered, above


def _told(column: str, kind: str) -> bool:
    """Whether a column says something of this kind: what an intervention needs is where it edits."""
    return column != "needs" or kind == "probes"


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, (list, tuple)) else "" if value is None else str(value)
