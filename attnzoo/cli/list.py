"""`attnzoo list`: what there is."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from attnzoo.cli import completion

AsJson = Annotated[bool, typer.Option("--json", help="Print data instead of a table.")]


class Kind(StrEnum):
    """What can be listed."""

    mechanisms = "mechanisms"
    fusions = "fusions"
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
    law: Annotated[str | None, typer.Option(help="Only those that claim this law.")] = None,
    plugin: Annotated[
        str | None, typer.Option(help="Only what this plugin provides.", autocompletion=completion.plugins)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show mechanisms, fusions, recipes and models, with who provides them."""
    from attnzoo.cli.render import Column, say, say_json, say_next, table
    from attnzoo.core import Family, Law
    from attnzoo.errors import ZooError, did_you_mean
    from attnzoo.zoo import load_zoo

    for value, known, name in ((family, [*Family], "family"), (law, [*Law], "law")):
        if value is not None and value not in known:
            hint = did_you_mean(value, known) or f"it is one of {', '.join(known)}"
            raise ZooError("AZ605", f"there is no {name} called `{value}`", help=hint)
    zoo = load_zoo()
    listing: dict[str, list[dict[str, Any]]] = {}
    wanted = (
        [kind]
        if kind
        else [Kind.mechanisms]
        if family or mask
        else [Kind.mechanisms, Kind.fusions, Kind.recipes]
    )
    for each in wanted:
        rows = _MAKERS[each](zoo)
        listing[each.value] = [
            row
            for row in rows
            if (plugin is None or plugin in (row["plugin"], row["dist"]))
            and (family is None or row.get("family") == family)
            and (mask is None or mask in row.get("masks", []))
            and (law is None or law in row.get("laws", []))
        ]
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
        Column("registers", rank=2),
        Column("summary", wrap=30),
        Column("provider", rank=4),
    ]
    for name, rows in listing.items():
        if not rows:
            say(f"no {name} match")
            continue
        shown = [column for column in columns if column.name in rows[0]]
        table(shown, [[_cell(row[c.name]) for c in shown] for row in rows], title=f"{len(rows)} {name}")
    broken = sorted({problem["plugin"] for problem in problems})
    if broken:
        say(f"something is wrong with {', '.join(broken)}: `attnzoo doctor` says what", style="yellow")
    say_next("attnzoo show softmax", "attnzoo compose ham_a", "attnzoo new plugin mine")


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, (list, tuple)) else "" if value is None else str(value)


def _provided(zoo, entry) -> dict[str, str]:
    dist = next((provider.dist for provider in zoo.providers if provider.name == entry.plugin), "")
    return {"plugin": entry.plugin, "dist": dist, "provider": f"{entry.plugin} {entry.version}".strip()}


def _mechanisms(zoo) -> list[dict[str, Any]]:
    from attnzoo.core import Head

    return [
        {
            "name": name,
            "family": str(entry.value.card.family),
            "form": "head" if issubclass(entry.value, Head) else "mechanism",
            "masks": [kind for kind in ("keys", "causal", "pairs") if kind in entry.value.card.masks],
            "grows": entry.value.card.grows,
            "summary": entry.value.card.summary,
            "laws": sorted(entry.value.card.laws),
            **_provided(zoo, entry),
        }
        for name, entry in zoo.mechanisms.items()
    ]


def _fusions(zoo) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "summary": entry.value.card.summary,
            "laws": sorted(entry.value.card.laws),
            **_provided(zoo, entry),
        }
        for name, entry in zoo.fusions.items()
    ]


def _recipes(zoo) -> list[dict[str, Any]]:
    from attnzoo.errors import ZooError
    from attnzoo.recipe import load

    rows = []
    for name, entry in zoo.recipes.items():
        try:
            recipe = load(str(entry.value)).recipe
            row = {
                "name": name,
                "base": getattr(recipe.host, "base", recipe.host.kind),
                "registers": getattr(recipe.host, "registers", None),
                "summary": recipe.summary,
            }
        except ZooError as error:
            row = {
                "name": name,
                "base": "",
                "registers": None,
                "summary": f"broken: {error.diagnostics[0].message}",
            }
        rows.append(row | {"file": entry.file} | _provided(zoo, entry))
    return rows


def _models(zoo) -> list[dict[str, Any]]:
    from attnzoo.recipe.timm_models import registered

    known = {row["name"]: row for row in _recipes(zoo)}
    return [
        {
            "name": model,
            "base": known[recipe]["base"],
            "summary": known[recipe]["summary"],
            **_provided(zoo, zoo.recipes[recipe]),
        }
        for model, recipe in sorted(registered.items())
        if recipe
    ]


_MAKERS = {Kind.mechanisms: _mechanisms, Kind.fusions: _fusions, Kind.recipes: _recipes, Kind.models: _models}
