"""What there is: names of mechanisms, fusions, probes, interventions and recipes, by pattern and by claim."""

import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any

from attnzoo.core import Family, Fusion, Head, Intervention, Law, Pool, Probe
from attnzoo.core.card import FUSION_LAWS, MECHANISM_LAWS
from attnzoo.core.mask import KINDS
from attnzoo.errors import ZooError, did_you_mean
from attnzoo.recipe.loading import load
from attnzoo.zoo import Entry, Zoo, load_zoo

FORMS = ("head", "mechanism", "pool")
"""Inside the heads, on tokens, n tokens to one."""


def list_mechanisms(
    pattern: str = "*",
    *,
    family: str | None = None,
    mask: str | None = None,
    law: str | None = None,
    context: bool | None = None,
    form: str | None = None,
    plugin: str | None = None,
    search: str = "",
) -> list[str]:
    """Names of mechanisms, sorted, as `attnzoo list mechanisms` shows them.

        attnzoo.list_mechanisms("*lin*", mask="causal")

    Args:
        pattern: With `*` and `?`.
        family: What they change: `linear`.
        mask: A kind of mask that they honour: `keys`, `causal`, `pairs`.
        law: A law that they claim: `stochastic`.
        context: Whether they can read from a context.
        form: `head`, `mechanism` or `pool`.
        plugin: Who provides them.
        search: Words that must all stand in its name, summary, notes, family or paper.

    Raises:
        ZooError: AZ605, for a value that there is not.
    """
    _known("law of mechanisms", law, sorted(MECHANISM_LAWS))
    claims = {"family": family, "mask": mask, "law": law, "context": context, "form": form}
    found = rows(load_zoo(), "mechanisms", pattern, plugin=plugin, search=search, **claims)
    return [row["name"] for row in found]


def list_fusions(pattern: str = "*", *, law: str | None = None, plugin: str | None = None) -> list[str]:
    """Names of fusions, sorted, as `attnzoo list fusions` shows them.

    Args:
        pattern: With `*` and `?`.
        law: A law that they claim: `convex`.
        plugin: Who provides them.

    Raises:
        ZooError: AZ605, for a value that there is not.
    """
    _known("law of fusions", law, sorted(FUSION_LAWS))
    return [row["name"] for row in rows(load_zoo(), "fusions", pattern, plugin=plugin, law=law)]


def list_probes(pattern: str = "*", *, plugin: str | None = None, search: str = "") -> list[str]:
    """Names of probes, sorted, as `attnzoo list probes` shows them.

    Args:
        pattern: With `*` and `?`.
        plugin: Who provides them.
        search: Words that must all stand in its name, summary, notes or paper.

    Raises:
        ZooError: AZ605, for a value that there is not.
    """
    return [row["name"] for row in rows(load_zoo(), "probes", pattern, plugin=plugin, search=search)]


def list_interventions(pattern: str = "*", *, plugin: str | None = None, search: str = "") -> list[str]:
    """Names of interventions, sorted, as `attnzoo list interventions` shows them.

    Args:
        pattern: With `*` and `?`.
        plugin: Who provides them.
        search: Words that must all stand in its name, summary, notes or paper.

    Raises:
        ZooError: AZ605, for a value that there is not.
    """
    return [row["name"] for row in rows(load_zoo(), "interventions", pattern, plugin=plugin, search=search)]


def list_recipes(pattern: str = "*", *, plugin: str | None = None) -> list[str]:
    """Names of recipes, sorted, as `attnzoo list recipes` shows them.

    Args:
        pattern: With `*` and `?`.
        plugin: Who provides them.

    Raises:
        ZooError: AZ605, for a value that there is not.
    """
    return [row["name"] for row in rows(load_zoo(), "recipes", pattern, plugin=plugin)]


def rows(
    zoo: Zoo, kind: str, pattern: str = "*", *, plugin: str | None = None, search: str = "", **claims: Any
) -> list[dict[str, Any]]:
    """What there is of a kind, sorted by name.

    Args:
        zoo: Where to look.
        kind: `mechanisms`, `fusions`, `probes`, `interventions`, `recipes` or `models`.
        pattern: Of names, with `*` and `?`.
        plugin: Who provides them; None for all.
        search: Words that must all stand in its texts, in whatever case.
        claims: `family`, `mask`, `law`, `context`, `form`; None for all. What a kind does not claim it does not meet.

    Raises:
        ZooError: AZ605, for a value that there is not.
    """
    for name, (_, what, known) in _CLAIMS.items():
        _known(what, claims.get(name), known)
    wanted = {_CLAIMS[name][0]: value for name, value in claims.items() if value is not None}
    names = {word for provider in zoo.providers for word in (provider.name, provider.dist)} - {""}
    _known("plugin", plugin, sorted(names))
    found = _MAKERS[kind](zoo, pattern, plugin)
    words = search.casefold().split()
    met = (row for row in found if _meets(row, wanted) and all(word in _texts(row) for word in words))
    return sorted(met, key=lambda row: row["name"])


_CLAIMS: dict[str, tuple[str, str, Iterable[Any]]] = {
    "family": ("family", "family", list(Family)),
    "mask": ("masks", "kind of mask", KINDS),
    "law": ("laws", "law", list(Law)),
    "context": ("context", "context", (True, False)),
    "form": ("form", "form", FORMS),
}
"""Filters: the column that each is about, its name in words, its values."""


def _texts(row: dict[str, Any]) -> str:
    """All that a search looks at."""
    names = ("name", "family", "summary", "notes", "paper", "base", "registers", "source")
    return " ".join(str(row.get(name) or "") for name in names).casefold()


def _meets(row: dict[str, Any], wanted: dict[str, Any]) -> bool:
    for column, value in wanted.items():
        there = row.get(column)
        if not (value in there if isinstance(there, list) else there == value):
            return False
    return True


def _mechanisms(zoo: Zoo, pattern: str, plugin: str | None) -> Iterator[dict[str, Any]]:
    for name, entry in _chosen(zoo, zoo.mechanisms.items(), pattern, plugin):
        card = entry.value.card
        yield {
            "name": name,
            "family": str(card.family),
            "form": form_of(entry.value),
            "masks": [kind for kind in ("keys", "causal", "pairs") if kind in card.masks],
            "context": bool(card.context),
            "grows": card.grows,
            "summary": card.summary,
            "notes": card.notes,
            "paper": str(card.paper or ""),
            "equation": card.equation,
            "laws": sorted(card.laws),
            **_provided(zoo, entry),
        }


def _fusions(zoo: Zoo, pattern: str, plugin: str | None) -> Iterator[dict[str, Any]]:
    for name, entry in _chosen(zoo, zoo.fusions.items(), pattern, plugin):
        card = entry.value.card
        yield {
            "name": name,
            "summary": card.summary,
            "notes": card.notes,
            "paper": str(card.paper or ""),
            "equation": card.equation,
            "laws": sorted(card.laws),
            **_provided(zoo, entry),
        }


def _probes(zoo: Zoo, pattern: str, plugin: str | None) -> Iterator[dict[str, Any]]:
    yield from _instruments(zoo, zoo.probes.items(), pattern, plugin)


def _interventions(zoo: Zoo, pattern: str, plugin: str | None) -> Iterator[dict[str, Any]]:
    for row in _instruments(zoo, zoo.interventions.items(), pattern, plugin):
        yield row | {"edits": list(zoo.interventions[row["name"]].value.points())}


def _instruments(
    zoo: Zoo, entries: Iterable[tuple[str, Entry]], pattern: str, plugin: str | None
) -> Iterator[dict[str, Any]]:
    for name, entry in _chosen(zoo, entries, pattern, plugin):
        card = entry.value.card
        yield {
            "name": name,
            "needs": sorted(card.needs),
            "summary": card.summary,
            "notes": card.notes,
            "paper": str(card.paper or ""),
            "equation": card.equation,
            **_provided(zoo, entry),
        }


def _recipes(zoo: Zoo, pattern: str, plugin: str | None) -> Iterator[dict[str, Any]]:
    for name, entry in _chosen(zoo, zoo.recipes.items(), pattern, plugin):
        row: dict[str, Any] = {"name": name, "base": "", "registers": None}
        try:
            recipe = load(str(entry.value)).recipe
            row |= {
                "base": getattr(recipe.host, "base", recipe.host.kind),
                "registers": getattr(recipe.host, "registers", None),
                "summary": recipe.summary,
            }
        except ZooError as error:
            row["summary"] = f"broken: {error.diagnostics[0].message}"
        yield row | {"file": entry.file} | _provided(zoo, entry)


def _models(zoo: Zoo, pattern: str, plugin: str | None) -> Iterator[dict[str, Any]]:
    from attnzoo.recipe.timm_models import registered

    known = {row["name"]: row for row in _recipes(zoo, "*", plugin)}
    for model, recipe in registered.items():
        if recipe in known and fnmatch.fnmatchcase(model, pattern):
            row = known[recipe]
            yield {
                "name": model,
                "base": row["base"],
                "summary": row["summary"],
                **_provided(zoo, zoo.recipes[recipe]),
            }


_MAKERS = {
    "mechanisms": _mechanisms,
    "fusions": _fusions,
    "probes": _probes,
    "interventions": _interventions,
    "recipes": _recipes,
    "models": _models,
}


def form_of(cls: type) -> str:
    """`head`, `mechanism`, `pool`, `fusion`, `probe` or `intervention`."""
    for base, form in ((Fusion, "fusion"), (Probe, "probe"), (Intervention, "intervention")):
        if issubclass(cls, base):
            return form
    return "head" if issubclass(cls, Head) else "pool" if issubclass(cls, Pool) else "mechanism"


def _provided(zoo: Zoo, entry: Entry) -> dict[str, str]:
    dist = next((provider.dist for provider in zoo.providers if provider.name == entry.plugin), "")
    return {"plugin": entry.plugin, "dist": dist, "provider": f"{entry.plugin} {entry.version}".strip()}


def _chosen(
    zoo: Zoo, entries: Iterable[tuple[str, Entry]], pattern: str, plugin: str | None
) -> Iterator[tuple[str, Entry]]:
    """The entries whose name fits and which the plugin provides."""
    for name, entry in entries:
        fits = any(fnmatch.fnmatchcase(one, pattern) for one in (name, entry.full_name))
        if fits and (plugin is None or plugin in (entry.plugin, _provided(zoo, entry)["dist"])):
            yield name, entry


def _known(what: str, value: Any, known: Iterable[Any]) -> None:
    words = list(map(str, known))
    if value is not None and value not in list(known):
        hint = did_you_mean(str(value), words) or f"it is one of {', '.join(words)}"
        raise ZooError("AZ605", f"there is no {what} called `{value}`", help=hint)
