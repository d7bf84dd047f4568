"""The file itself: what it is of, what it imports, what it is made of, how the model is built."""

import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import fields

import timm
import torch
import yaml
from torch import nn

from attnzoo.core import Component, Fused, FusedHeads, Fusion, Mechanism, MultiHead, Site
from attnzoo.ejecting import construction, hosts
from attnzoo.ejecting.bundle import PRELUDE, Bundle
from attnzoo.ejecting.expressions import literal, named, referred, wrapped
from attnzoo.ejecting.modules import Module, Symbol, top
from attnzoo.hosts.info import unallocated
from attnzoo.recipe import Composition
from attnzoo.version import VERSION

WIDTH = 110


RESERVED = frozenset(
    {"put", "put_pool", "SITES", "HEADS", "LAYOUT", "ATTENTION", "FREE", "model", "inputs", "outputs"}
)
"""Names that the file has for itself."""


class Recorded(Composition):
    """A composition that remembers the sites at which it put something."""

    def put(self, site: Site) -> Mechanism:
        vars(self).setdefault("sites", []).append(site)
        return super().put(site)


def text_of(composition: Composition, name: str, trained: bool = False) -> str:
    """The file of a recipe.

    Args:
        composition: The recipe, resolved.
        name: Of the function that builds the model.
        trained: Whether weights lie beside the file.
    """
    recorded = Recorded(**vars(composition))
    with unallocated():
        model = recorded.build()
    sites: list[Site] = vars(recorded).get("sites", [])  # none where `put: null` empties all
    parts, _ = construction.puts(composition)
    made = hosts.construction(composition, model)
    doc = ["The model, with weights as before training.", "", "Args:"]
    doc += ["    changed: Arguments that shall be others than in the recipe, of `FREE`."]
    body = [
        "if strange := changed.keys() - FREE:",
        '    raise TypeError(f"{sorted(strange)}: more than an argument hangs on it; change the file")',
        *made.body,
    ]
    function = construction.function(name, doc, body)
    free = f'FREE = ⟪{{{", ".join(map(literal, made.free))}}}⟫\n"""Arguments that may be others than in the recipe."""'
    parts += [*hosts.put_pool(composition), *made.before, free, function, main(name, made.sample)]
    packages = {"attnzoo", *(top(entry.value.__module__) for entry in composition.entries)}
    known = made.known | {PRELUDE: hosts.known_of(sites)}
    if not any(plan.branches for plan in recorded.everything):
        made.respelled["attnzoo.hosts.info"] = {r"Component \| Fusion": "Component"}
    made.respelled[PRELUDE] = hosts.projections_of(sites)
    bundle = Bundle(packages, known, facts_of(model), made.respelled, frozenset(made.missing))
    said = "\n".join(parts)
    asked = {one.name for one in fields(Site) if re.search(rf'\.{one.name}\b|"{one.name}":', said)}
    bundle.take(referred(said), made.attributes | asked)
    bundle.name_all({*RESERVED, name})
    written = [section for module, texts in bundle.written() for section in section_of(module, texts)]
    built = [
        construction.laid_out(named(part, lambda symbol: bundle.names[bundle.resolve(symbol)]))
        for part in parts
    ]
    body = ["# -- The model ".ljust(WIDTH, "-"), *built]
    parts = [header(composition, name, trained), "\n".join(bundle.imports())]
    text = "\n\n".join(parts) + "\n\n" + "\n\n\n".join([*written, *body]) + "\n"
    return re.sub(r"\bZoo(?=[A-Z])", "Sited", text)


HEADINGS = {
    "attnzoo.core.mask": "Who may attend to whom. True means may attend",
    "attnzoo.ejecting.prelude": "What mechanisms, heads, pools and fusions derive from, and where they are put",
    "attnzoo.hosts.backbone": "What backbones have in common",
    "attnzoo.hosts.info": "What models have in common: the initialisation of their parts, what is not decayed",
    "attnzoo.hosts.vision_transformer": "timm's vision transformer with mechanisms in its blocks",
}
"""Of sections whose modules say more than is left of them."""


def section_of(module: Module, texts: list[str]) -> Iterable[str]:
    """The definitions of a module under a heading that says what it is, and of which paper."""
    first, _, rest = HEADINGS.get(module.name, module.doc).partition("\n")
    heading = textwrap.wrap(first.removesuffix(".") or f"`{module.name}`", WIDTH - 10)
    lines = [f"# -- {heading[0]} ".ljust(WIDTH, "-"), *(f"# {line}" for line in heading[1:])]
    for paragraph in rest.strip().split("\n\n") if rest.strip() else ():
        verse = paragraph.startswith("    ")
        told = paragraph.splitlines() if verse else textwrap.wrap(paragraph, WIDTH - 2)
        lines += ["#", *(f"# {line}".rstrip() for line in told)]
    yield "\n".join(lines)
    yield from texts


def facts_of(model: nn.Module) -> dict[Symbol, list[str]]:
    """What the file's classes must know of the cards of a model's components, as attributes."""
    facts: dict[Symbol, list[str]] = {}
    taps: dict[type, dict[str, str]] = {}
    for part in model.modules():
        cls = type(part)
        if isinstance(part, MultiHead | Fused | FusedHeads) or not isinstance(part, Component | Fusion):
            continue
        lines = facts.setdefault(Symbol(cls.__module__, cls.__qualname__), [])
        if isinstance(part, Component):
            own = taps.setdefault(cls, {})
            own |= dict(part.card.taps)
            lines[:] = [f"taps = {wrapped(_mapping(own), 0, 7, WIDTH - 4)}"] if own else []
            if part.card.given:
                lines.append(
                    f"given = ({', '.join(repr(name).replace(chr(39), chr(34)) for name in part.card.given)},)"
                )
            if part.card.context_grid is not None:
                lines.append("context_grid = True")
            if part.card.incremental:
                lines.append("incremental = True")
        else:
            lines[:] = [f"{fact} = True" for fact, holds in _of_fusion(part).items() if holds]
    return facts


def _of_fusion(fusion: Fusion) -> dict[str, bool]:
    mixes = fusion.card.mixes_tokens
    return {"mixes_tokens": mixes, "takes_mask": bool(mixes and fusion.card.masks)}


def _mapping(taps: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'"{name}": "{axes}"' for name, axes in taps.items()) + "}"


def header(composition: Composition, name: str, trained: bool) -> str:
    """The docstring of the file.

    Args:
        composition: The recipe.
        name: Of the function that builds the model.
        trained: Whether weights lie beside the file.
    """
    loaded = composition.loaded
    torchs, timms = torch.__version__.partition("+")[0], timm.__version__
    lines = [
        f"{loaded.name}: {loaded.recipe.summary}" if loaded.recipe.summary else f"{loaded.name}.",
        "",
        f"The model of this recipe as attnzoo {VERSION} builds it, on its own: it needs torch and timm, and was "
        f"written with torch {torchs} and timm {timms}. Parameters have the same names, so weights of the one fit the "
        "other.",
        "",
    ]
    if trained:
        lines += ["    from safetensors.torch import load_file", ""]
        lines += [f"    model = {name}()", f'    model.load_state_dict(load_file("{name}.safetensors"))']
    else:
        lines += [f"    model = {name}()"]
    lines += _images(composition)
    if lost := auxiliary(composition):
        lines += ["", f"Not here, because only training needs it: {lost}."]
    papers = dict.fromkeys(str(entry.card.paper) for entry in composition.entries if entry.card.paper)
    plugins = dict.fromkeys(
        f"{one.plugin} {one.version}" for one in composition.entries if one.plugin != "attnzoo"
    )
    for title, entries in (("Papers:", papers), ("With components of plugins:", plugins)):
        lines += ["", title, *(f"    {entry}" for entry in entries)] if entries else []
    lines += [
        "",
        "attnzoo's code is under the Apache License 2.0, that of plugins under their own."
        if plugins
        else "Apache License 2.0.",
        "",
        "The recipe:",
        "",
    ]
    recipe = yaml.safe_dump(
        loaded.source.tree, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
    lines += [f"    {line}" for line in recipe.splitlines()]
    text = "\n".join(line for one in lines for line in _folded(one))
    return f'"""{text}\n"""'.replace("\\", "\\\\")


def _images(composition: Composition) -> list[str]:
    """How images must be prepared."""
    if composition.image is None:
        return []
    channels, rows, columns = composition.image[1].image
    cfg = composition.model_cfg()
    mean, std = (", ".join(f"{x:.4g}" for x in cfg[word]) for word in ("mean", "std"))
    return [
        "",
        f"It takes images (b, {channels}, {rows}, {columns}), normalised by the mean ({mean}) and the standard "
        f"deviation ({std}).",
    ]


def auxiliary(composition: Composition) -> str:
    """The losses that components add in training, in words."""
    cards = {entry.name: entry.card for entry in composition.entries}
    return "; ".join(
        f"the loss that `{name}` adds, {card.auxiliary}" for name, card in cards.items() if card.auxiliary
    )


def _folded(line: str) -> list[str]:
    indent = re.match(r" *", line)[0]  # type: ignore[index]
    return textwrap.wrap(line, 110, subsequent_indent=indent and f"{indent}    ", break_long_words=False) or [
        ""
    ]


def main(name: str, sample: list[str]) -> str:
    """What the file does when it is run.

    Args:
        name: Of the function that builds the model.
        sample: Lines that make what the model takes.
    """
    lines = [
        f"model = {name}().eval()",
        *sample,
        "outputs = model(**inputs)",
        "shapes = {key: tuple(value.shape) for key, value in inputs.items()}",
        "parameters = sum(parameter.numel() for parameter in model.parameters())",
        'print(f"{shapes} -> {tuple(outputs.shape)}, {parameters:,} parameters")  # noqa: T201',
    ]
    return 'if __name__ == "__main__":\n' + "\n".join(f"    {line}" for line in lines)


__all__ = ["PRELUDE", "text_of"]
