"""One mechanism, fusion, probe, intervention or recipe on a page: what it is, claims and takes, where it comes from."""

import inspect
import types
import typing
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from attnzoo.catalogue.lists import form_of
from attnzoo.catalogue.text import Sheet, Table, Verbatim
from attnzoo.core import Head, Layout, Site, evaluate, options_of
from attnzoo.core.card import ROLLOUT
from attnzoo.core.instrument import NEEDS
from attnzoo.core.options import defaults_of
from attnzoo.errors import RecipeError, did_you_mean
from attnzoo.recipe.source import read_text
from attnzoo.zoo import Entry, load_zoo

_FORMS = {
    "fusion": "fusion",
    "head": "head (inside the heads)",
    "mechanism": "on tokens",
    "pool": "pool (n tokens to one)",
}


def show(name: str) -> Sheet:
    """A mechanism, fusion, probe, intervention or recipe on a page, as `attnzoo show` prints it.

        attnzoo.show("softmax")

    Args:
        name: Its name, or `plugin/name`.

    Raises:
        RecipeError: AZ201 when there is nothing of this name, AZ202 when several plugins have it.
    """
    kind, entry = look_up(name)
    if kind == "recipe":
        return Sheet(f"# {entry.file}", (Verbatim(read_text(entry.value, str(entry.file)).rstrip()),))
    page = page_of(entry, kind)
    where = "in a recipe:" if kind in ("mechanism", "fusion") else "so:"
    facts = Table([[key, value] for key, value in page["claims"].items() if value and key != "equation"])
    rows = [[one["name"], one["type"], one["default"], one["text"]] for one in page["options"]]
    options = (Table(rows, ["option", "type", "default", "meaning"]),) if rows else ()
    equation = (Verbatim(page["claims"]["equation"]),) if page["claims"]["equation"] else ()
    doc = (page["doc"],) if page["doc"] else ()
    parts = (page["summary"], *equation, *doc, facts, *options, where, Verbatim(page["example"]))
    return Sheet(page["name"], parts)


def look_up(name: str) -> tuple[str, Entry]:
    """Kind and entry of a mechanism, fusion, probe, intervention or recipe.

    Raises:
        RecipeError: AZ201, AZ202.
    """
    zoo = load_zoo()
    for registry in zoo.registries:
        if registry.knows(name):
            return registry.kind, registry.find(name)
    everything = [name for registry in zoo.registries for name in registry]
    hint = f"{did_you_mean(str(name), everything)} `attnzoo list` shows all".strip()
    raise RecipeError("AZ201", f"there is nothing called `{name}`", help=hint)


def page_of(entry: Entry, kind: str) -> dict[str, Any]:
    """A mechanism, fusion, probe or intervention as data.

    Args:
        entry: Of the zoo.
        kind: `mechanism`, `fusion`, `probe` or `intervention`.
    """
    instrument = kind in ("probe", "intervention")
    doc = inspect.cleandoc(entry.value.__doc__ or "")
    doc = doc.partition("\nArgs:")[0].partition("\nRaises:")[0].strip()
    return {
        "name": entry.name,
        "kind": kind,
        "summary": entry.value.card.summary,
        "doc": doc,
        "claims": _of_instrument(entry, kind) if instrument else _claims(entry, kind),
        "options": [
            {
                "name": name,
                "type": _type(info.annotation),
                "default": "required" if info.is_required() else _yaml(info.default),
                "text": info.description or "",
            }
            for name, info in options_of(entry.value).model_fields.items()
        ],
        "example": _call(entry, kind) if instrument else _example(entry, kind),
    }


def _of_instrument(entry: Entry, kind: str) -> dict[str, str]:
    """What a probe or an intervention says about itself."""
    card = entry.value.card
    edits = ", ".join(entry.value.points()) if kind == "intervention" else ""
    return {
        "form": kind,
        "equation": card.equation,
        "needs": "; ".join(NEEDS[need] for need in sorted(card.needs)),
        "edits": edits,
        "paper": str(card.paper) if card.paper else "",
        "fidelity": card.fidelity,
        "notes": card.notes,
        "from": f"{entry.plugin} {entry.version}".strip(),
        "file": entry.file,
    }


def _call(entry: Entry, kind: str) -> str:
    """How it is used, in the shell and in Python."""
    if kind == "probe":
        return f'attnzoo probe RUN {entry.name}\nattnzoo.probe(model, "{entry.name}", inputs=images)'
    return (
        f"attnzoo eval RUN --with '{entry.name}(at=\"blocks.0\")'\n"
        f"with attnzoo.intervene(model, '{entry.name}(at=\"blocks.0\")'):\n    model(images)"
    )


def _claims(entry: Entry, kind: str) -> dict[str, str]:
    """What a mechanism or fusion claims."""
    card = entry.value.card
    return {
        "form": _FORMS[form_of(entry.value)],
        "equation": card.equation,
        "family": f"{card.family}: {card.family.question}" if kind == "mechanism" else "",
        "paper": str(card.paper) if card.paper else "",
        "fidelity": card.fidelity,
        "time": getattr(card, "time", ""),
        "memory": getattr(card, "memory", ""),
        "parameters": _counted(entry.value, "params"),
        "FLOPs": _counted(entry.value, "flops"),
        "masks": ", ".join(sorted(card.masks)) or "none",
        "level": "on tokens only" if kind == "fusion" and not card.inside_heads else "",
        "context": "yes" if getattr(card, "context", False) else "",
        "grid": str(getattr(card, "grid", None) or ""),
        "taps": ", ".join(f"{name} ({axes})" for name, axes in getattr(card, "taps", {}).items()),
        "auxiliary": getattr(card, "auxiliary", ""),
        "laws": ", ".join(sorted(card.laws)),
        "notes": card.notes,
        "from": f"{entry.plugin} {entry.version}".strip(),
        "file": entry.file,
    }


def _example(entry: Entry, kind: str) -> str:
    """A line of a recipe with it."""
    card = entry.value.card
    example = f"{'pool' if form_of(entry.value) == 'pool' else 'attention'}: {entry.name}"
    if kind == "fusion":
        example = f"attention: {{fuse: {entry.name}, of: [softmax, soft]}}"
    elif ROLLOUT in card.given and "attention" in example:
        example = f"attention: softmax\noverrides: [{{at: blocks.11, put: {entry.name}}}]"
    return example


def _counted(component: Any, what: str) -> str:
    """A formula and what it gives at a site of ViT-S."""
    formula = getattr(component.card, what, "")
    if not formula:
        return ""
    grid = {1: (196,), 3: (4, 7, 7)}.get(component.card.grid, (14, 14))
    layout = Layout(grid, prefix=1)
    site = Site("blocks.0", 384, 6, layout)
    if component.card.context_grid is not None:
        site = replace(site, context_dim=384, context_layout=layout)
    text = formula.replace("**2", "²").replace("**3", "³").replace(" * ", " · ")
    text = text.replace(" ** ", "^").replace("**", "^")
    if issubclass(component, Head) and what == "params":
        text += ", beside the projections"
    try:
        return f"{text} ({evaluate(formula, site, defaults_of(component)):,} at c = 384, h = 6, n = 197)"
    except ValueError:  # an option without a default
        return text


def _yaml(value: Any) -> str:
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _type(annotation: Any) -> str:
    """An annotation in a researcher's words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is typing.Literal:
        return " | ".join(_yaml(value) for value in inner)
    if origin in (Sequence, list, tuple):
        return "list" if inner[0] is Any else f"list of {_plural(_type(inner[0]))}"
    if origin in (types.UnionType, typing.Union):
        return " | ".join(_type(arg) for arg in inner)
    words = {int: "whole number", float: "number", bool: "true | false", str: "text", type(None): "null"}
    return words.get(annotation, "tensor" if annotation is Tensor else str(annotation))


def _plural(words: str) -> str:
    return words if words == "text" or " | " in words else f"{words}s"
