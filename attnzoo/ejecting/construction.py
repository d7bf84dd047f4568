"""How the model of a recipe is built, as Python text: what is put where, and the host around it."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from attnzoo.core import Fused, FusedHeads, Mechanism, MultiHead, Site
from attnzoo.ejecting.expressions import call, literal, ref, wrapped
from attnzoo.ejecting.modules import Symbol
from attnzoo.ejecting.rewriting import WIDTH
from attnzoo.recipe import Composition, Plan


def component(plan: Plan, site: str) -> str:
    """What a plan builds at a site, as an expression.

    Args:
        plan: Of a mechanism, a head with projections around it, a pool or a fusion.
        site: An expression for the site.
    """
    if plan.heads is not None:
        site = call(ref(Symbol("dataclasses", "replace")), [site], {"heads": plan.heads})
    if plan.inside_heads:
        return call(ref(MultiHead), [site, head(plan, site)], {})
    if not plan.branches:
        return call(ref(plan.entry.value), [site], plan.options)
    return call(ref(Fused), [site, _partly(plan), _branches(plan, on_tokens)], {})


def head(plan: Plan, site: str) -> str:
    """What a plan builds inside the heads at a site, as an expression."""
    if not plan.branches:
        return call(ref(plan.entry.value), [site], plan.options)
    return call(ref(FusedHeads), [site, _partly(plan), _branches(plan, inside)], {})


def inside(plan: Plan) -> str:
    """What builds a branch inside the heads, as an expression."""
    return f"lambda site: {head(plan, 'site')}" if plan.branches else _partly(plan)


def on_tokens(plan: Plan) -> str:
    """What builds a branch on tokens, as an expression."""
    if plan.inside_heads or plan.branches or plan.heads is not None:
        return f"lambda site: {component(plan, 'site')}"
    return _partly(plan)


def _partly(plan: Plan) -> str:
    made = ref(plan.entry.value)
    return call(ref(partial), [made], plan.options) if plan.options else made


def _branches(plan: Plan, build: Any) -> str:
    """The branches of a fusion by the names under which they stand in a state dict."""
    seen: dict[str, int] = {}
    parts = []
    for branch in plan.branches:
        name = branch.card.name
        seen[name] = seen.get(name, 0) + 1
        parts.append(f'"{name if seen[name] == 1 else f"{name}_{seen[name]}"}": {build(branch)}')
    return "{" + ", ".join(parts) + "}"


def builder_name(plan: Plan, taken: set[str]) -> str:
    """A name for the function that builds a plan."""
    words = "_".join(re.findall(r"[a-z_]\w*", re.sub(r"\[.*?\]", "", str(plan))))[:40].strip("_")
    name, count = f"put_{words}", 1
    while name in taken:
        count += 1
        name = f"put_{words}_{count}"
    taken.add(name)
    return name


def puts(composition: Composition) -> tuple[list[str], str]:
    """Functions that build what is put at sites; and the name of the one that the host calls."""
    by_plan: dict[str, tuple[Plan, list[str]]] = {}
    for name, plan in composition.plans.items():
        by_plan.setdefault(component(plan, "site"), (plan, []))[1].append(name)
    taken: set[str] = set()
    parts: list[str] = []
    builders: dict[str, str] = {}
    for expression, (plan, sites) in by_plan.items():
        name = "put" if len(by_plan) == 1 and not _heads(composition) else builder_name(plan, taken)
        builders |= dict.fromkeys(sites, name)
        parts.append(_builder(name, plan, sites, expression))
    if set(builders.values()) == {"put"}:
        return parts, "put"
    parts += [_table(builders), _dispatch(composition)]
    return parts, "put"


def _builder(name: str, plan: Plan, sites: Sequence[str], expression: str) -> str:
    said = textwrap.wrap(f"{plan}.", WIDTH - 10, break_long_words=False, break_on_hyphens=False)
    end = "\n    " if len(said) > 1 else ""
    doc = '    """' + "\n    ".join(said) + end + '"""\n'
    return f"def {name}(site: {ref(Site)}) -> {ref(Mechanism)}:\n{doc}    return ⟪{expression}⟫"


def _heads(composition: Composition) -> tuple[int, ...]:
    """The heads of each layer, where a recipe says them beside its host."""
    if composition.image is None or composition.loaded.recipe.heads is None:
        return ()
    return tuple(composition.image[1].heads)


def _dispatch(composition: Composition) -> str:
    heads = _heads(composition)
    lines = [f"def put(site: {ref(Site)}) -> {ref(Mechanism)}:", '    """What is put at a site."""']
    if heads:
        lines.append(f"    site = {ref(Symbol('dataclasses', 'replace'))}(site, heads=HEADS[site.layer])")
    lines.append("    return SITES[site.name](site)")
    before = [f"HEADS = {literal(heads)}", '"""The heads of each layer."""', "", ""] if heads else []
    return "\n".join([*before, *lines])


def _table(builders: Mapping[str, str]) -> str:
    """What is put where; long runs of numbered sites that hold the same in one line."""
    entries: list[str] = []
    names = list(builders)
    i = 0
    while i < len(names):
        run = _run(names[i:], builders)
        if run is not None:
            pattern, first, count = run
            entries.append(f'**{{f"{pattern}": {builders[names[i]]} for i in range({_span(first, count)})}}')
            i += count
        else:
            entries.append(f'"{names[i]}": {builders[names[i]]}')
            i += 1
    lines = "".join(f"    {entry},\n" for entry in entries)
    kind = f"dict[str, {ref(Symbol('collections.abc', 'Callable'))}[[{ref(Site)}], {ref(Mechanism)}]]"
    table = f"{{\n{lines}}}" if lines else "{}"
    return f'SITES: {kind} = {table}\n"""What is put where."""'


def _span(first: int, count: int) -> str:
    return f"{first}, {first + count}" if first else str(count)


def _run(names: Sequence[str], builders: Mapping[str, str]) -> tuple[str, int, int] | None:
    """A run of sites that differ in one number, which counts up, and hold the same: pattern, first, how many."""
    numbers = [[int(x) for x in re.findall(r"\d+", name)] for name in names[:2]]
    if len(names) < 3 or len(numbers[0]) != 1:
        return None
    shape, first = re.sub(r"\d+", "{i}", names[0]), numbers[0][0]
    count = 0
    while (
        count < len(names)
        and names[count] == shape.replace("{i}", str(first + count))
        and builders[names[count]] == builders[names[0]]
    ):
        count += 1
    return (shape, first, count) if count > 2 else None


def laid_out(text: str) -> str:
    """Text whose expressions between ⟪ and ⟫ are broken over lines, once all names are known."""

    def broken(found: re.Match) -> str:
        line = text[text.rfind("\n", 0, found.start()) + 1 : found.start()]
        indent = len(line) - len(line.lstrip())
        return wrapped(found[1], indent, len(line) - indent)

    return re.sub(r"⟪(.*?)⟫", broken, text, flags=re.S)


def function(name: str, doc: Sequence[str], body: Sequence[str]) -> str:
    """A function that builds the model.

    Args:
        name: Of the function.
        doc: Lines of its docstring.
        body: Its lines.
    """
    lines = [f"def {name}(**changed: {ref(Symbol('typing', 'Any'))}) -> {ref(Symbol('torch', 'nn'))}.Module:"]
    lines += [f'    """{doc[0]}', *(f"    {line}".rstrip() for line in doc[1:]), '    """']
    return "\n".join([*lines, *(f"    {line}" for line in body)])
