"""Writes what follows from the cards: `python docs/generate.py`, or `make docs`.

The tables of README.md between its markers, the last columns of docs/mission.md, and a page for each mechanism, pool,
fusion, probe and intervention in docs/reference/. `tests/test_docs.py` holds them to the cards. Pictures of probes are
made by docs/pictures.py.
"""

import re
from pathlib import Path

from attnzoo.bench.mechanisms import ratio, read_csv
from attnzoo.catalogue.pages import page_of
from attnzoo.core import Family
from attnzoo.recipe import load
from attnzoo.recipe.schema import Fuse, Use
from attnzoo.zoo import Entry, Zoo

ROOT = Path(__file__).parent.parent
README, MISSION, REFERENCE = ROOT / "README.md", ROOT / "docs" / "mission.md", ROOT / "docs" / "reference"
ZOO = Zoo.of()
FIGURES = read_csv(ROOT / "docs" / "benchmarks" / "mechanisms.csv")
"""Of `attnzoo bench mechanisms`, which measures; docs/benchmarks.md has the command."""


def of_family(family: Family) -> list[str]:
    """Names of the mechanisms and pools of a family, sorted."""
    return sorted(name for name, entry in ZOO.mechanisms.items() if entry.value.card.family is family)


def tables() -> str:
    """What the built-in plugin offers, as Markdown."""
    lines = []
    for family in filter(of_family, Family):
        lines += [f"**`{family}`**: {family.question}", "", "| mechanism | what it does |", "|---|---|"]
        for name in of_family(family):
            lines.append(
                f"| [`{name}`](docs/reference/{name}.md) | {ZOO.mechanisms[name].value.card.summary} |"
            )
        lines.append("")
    lines += ["| fusion | what it does |", "|---|---|"]
    for name, entry in ZOO.fusions.items():
        lines.append(f"| [`{name}`](docs/reference/{name}.md) | {entry.value.card.summary} |")
    for what, registry in (("probe", ZOO.probes), ("intervention", ZOO.interventions)):
        does = {"probe": "what it measures", "intervention": "what it changes while a model runs"}[what]
        lines += ["", f"| {what} | {does} |", "|---|---|"]
        for name, entry in registry.items():
            lines.append(f"| [`{name}`](docs/reference/{what}s/{name}.md) | {entry.value.card.summary} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The README with fresh tables between its two markers."""
    begin, end = "<!-- tables: python docs/generate.py -->", "<!-- end of tables -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{tables()}\n{end}", text, flags=re.S)


def named(spec: Use | Fuse | None) -> set[str]:
    """Names of the components in a spec."""
    if spec is None:
        return set()
    if isinstance(spec, Use):
        return {spec.use}
    return {spec.fuse}.union(*(named(branch) for branch in spec.of))


def users() -> dict[str, list[str]]:
    """Names of the recipes that put a component somewhere, by its name."""
    found: dict[str, list[str]] = {}
    for name in sorted(ZOO.recipes):
        recipe = load(name).recipe
        specs = [recipe.attention, recipe.pool, *(override.put for override in recipe.overrides)]
        for used in sorted(set().union(*map(named, specs))):
            found.setdefault(used, []).append(name)
    return found


def page(entry: Entry, kind: str, recipes: list[str]) -> str:
    """A mechanism, pool or fusion as Markdown.

    Args:
        entry: Of the zoo.
        kind: `mechanism` or `fusion`.
        recipes: Names of the recipes that use it.
    """
    card, facts = entry.value.card, page_of(entry, kind)
    claims = facts["claims"]
    text = f"{card.equation}\n\n{facts['doc']}"
    lines = [f"# {entry.name}", "", facts["summary"], "", "```text", text, "```", ""]
    for what in (
        "paper",
        "form",
        "family",
        "masks",
        "context",
        "grid",
        "time",
        "memory",
        "parameters",
        "FLOPs",
        "auxiliary",
        "fidelity",
    ):
        if claims[what]:
            lines.append(f"- **{what}**: {claims[what]}")
    lines += [f"- **tap** `{name}`: ({axes})" for name, axes in getattr(card, "taps", {}).items()]
    lines += [f"- **given** `{name}`: {what}" for name, what in getattr(card, "given", {}).items()]
    lines += [f"- **law** `{law}`: {law.meaning}" for law in sorted(card.laws)]
    if text := measured(entry.name):
        lines.append(f"- **measured**: {text}")
    if card.notes:
        lines += ["", "## What to know", "", card.notes]
    if facts["options"]:
        lines += ["", "## Options", "", "| option | type | default | meaning |", "|---|---|---|---|"]
        for option in facts["options"]:
            cells = (f"`{option['name']}`", option["type"], option["default"], option["text"])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "## In a recipe", "", "```yaml", facts["example"], "```"]
    if recipes:
        lines += ["", "Recipes that use it: " + ", ".join(f"`{name}`" for name in recipes) + "."]
    tests = f"tests/{kind}s/test_{Path(entry.file).stem}.py"
    lines += ["", "## How it is checked", "", f"`attnzoo check {entry.name}` holds it to every claim above."]
    lines += [f"Its oracle, hand-worked numbers and identities: [{tests}](../../{tests})."]
    near = of_family(card.family) if kind == "mechanism" else list(ZOO.fusions)
    if others := [f"[`{name}`]({name}.md)" for name in near if name != entry.name]:
        lines += ["", "## Related", "", ", ".join(others)]
    return "\n".join(lines) + "\n"


def instrument_page(entry: Entry, kind: str) -> str:
    """A probe or an intervention as Markdown.

    Args:
        entry: Of the zoo.
        kind: `probe` or `intervention`.
    """
    card, facts = entry.value.card, page_of(entry, kind)
    claims = facts["claims"]
    lines = [
        f"# {entry.name}",
        "",
        facts["summary"],
        "",
        "```text",
        card.equation,
        "",
        facts["doc"],
        "```",
        "",
    ]
    lines += [
        f"- **{what}**: {claims[what]}"
        for what in ("paper", "needs", "edits", "fidelity")
        if claims.get(what)
    ]
    if card.notes:
        lines += ["", "## What to know", "", card.notes]
    if facts["options"]:
        lines += ["", "## Options", "", "| option | type | default | meaning |", "|---|---|---|---|"]
        for option in facts["options"]:
            cells = (f"`{option['name']}`", option["type"], option["default"], option["text"])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    shell, python = facts["example"].split("\n", 1)
    lines += ["", "## How it is used", "", "```bash", shell, "```", "", "```python", python, "```"]
    picture = ROOT / "docs" / "pictures" / f"{entry.name}.png"
    if picture.exists():
        text = f"{entry.name.replace('_', ' ')} of a small model"
        lines += ["", f"![{text}](../../pictures/{picture.name})", ""]
        lines += ["Of a small model that was trained for this page: [how](../../pictures.py)."]
    tests = f"tests/{kind}s/test_{entry.name}.py"
    lines += ["", "## How it is checked", "", f"[{tests}](../../../{tests})"]
    registry = ZOO.probes if kind == "probe" else ZOO.interventions
    if others := [f"[`{name}`]({name}.md)" for name in registry if name != entry.name]:
        lines += ["", "## Related", "", ", ".join(others)]
    return "\n".join(lines) + "\n"


def measured(name: str) -> str:
    """How long one layer takes beside softmax; empty for what is not in docs/benchmarks/mechanisms.csv."""
    against, *_ = FIGURES
    if name not in FIGURES or name == against:
        return ""
    baseline, growth = FIGURES[against], FIGURES[name]
    n = max(growth.points.keys() & baseline.points.keys())
    parts = []
    for what, of in (("forward", lambda p: p.forward[0]), ("forward and backward", lambda p: p.step[0])):
        share = ratio(growth.points[n], baseline, of)
        start = growth.faster_from(baseline, of)
        since = (
            f"faster from {round(start, -1 if start < 1000 else -2):,.0f} tokens on"
            if start
            else "never faster"
        )
        parts.append(f"{what} {share:.2f} of `{against}` at {n:,} tokens, {since}")
    return "; ".join(parts) + " ([how](../benchmarks.md#mechanisms-as-tokens-grow))"


def mission(text: str) -> str:
    """docs/mission.md, its last columns made anew: what the cards say of each name, and the recipes that use it."""
    used = users()
    lines = []
    for line in text.splitlines():
        row = re.fullmatch(r"\| ([^|]+) \| ((?:\[?`[^|]*)) \|[^|]*\|[^|]*\|", line)
        if row is None:
            lines.append(line)
            continue
        names = re.findall(r"`([^`]+)`", row[2])
        shown, fidelity, recipes = [], [], []
        for name in names:
            entry = ZOO.mechanisms.get(name) or ZOO.fusions.get(name)
            kind = next((r.kind for r in (ZOO.probes, ZOO.interventions) if name in r), "")
            if kind:
                registry = ZOO.probes if kind == "probe" else ZOO.interventions
                shown.append(f"[`{name}`](reference/{kind}s/{name}.md)")
                fidelity.append(registry[name].value.card.fidelity)
            elif entry:
                shown.append(f"[`{name}`](reference/{name}.md)")
                fidelity.append(entry.value.card.fidelity)
                recipes += used.get(name, [])
            elif name in ZOO.recipes:
                file = Path(ZOO.recipes[name].file).relative_to(ROOT)
                shown.append(f"[`{name}`](../{file})")
            else:
                shown.append(f"`{name}`")
        few = ", ".join(f"`{name}`" for name in sorted(set(recipes))[:4])
        lines.append(f"| {row[1]} | {' '.join(shown)} | {', '.join(dict.fromkeys(fidelity))} | {few} |")
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """The text of every page of the reference, by its file."""
    used = users()
    entries = [
        (entry, registry.kind) for registry in (ZOO.mechanisms, ZOO.fusions) for entry in registry.values()
    ]
    made = {
        REFERENCE / f"{entry.name}.md": page(entry, kind, used.get(entry.name, [])) for entry, kind in entries
    }
    for registry in (ZOO.probes, ZOO.interventions):
        folder = REFERENCE / f"{registry.kind}s"
        made |= {folder / f"{e.name}.md": instrument_page(e, registry.kind) for e in registry.values()}
    return made


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    MISSION.write_text(mission(MISSION.read_text(encoding="utf-8")), encoding="utf-8")
    for stale in set(REFERENCE.rglob("*.md")) - set(pages()):
        stale.unlink()
    for file, text in pages().items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
