"""Writes what follows from the cards: `python docs/generate.py`, or `make docs`.

The tables of README.md between its markers, the last columns of docs/mission.md, and a page for each mechanism, pool,
fusion, probe and intervention in docs/reference/. `tests/test_docs.py` holds them to the cards. Pictures of probes are
made by docs/pictures.py.
"""

import re
from pathlib import Path

from attnzoo.bench.mechanisms import read_csv
from attnzoo.core import Family
from attnzoo.gallery.pages import Pages, users
from attnzoo.zoo import Zoo

ROOT = Path(__file__).parent.parent
README, MISSION, REFERENCE = ROOT / "README.md", ROOT / "docs" / "mission.md", ROOT / "docs" / "reference"
ZOO = Zoo.of()
TIMINGS = ROOT / "docs" / "benchmarks" / "mechanisms.csv"
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


def mission(text: str) -> str:
    """docs/mission.md, its last columns made anew: what the cards say of each name, and the recipes that use it."""
    used = users(ZOO)
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
                recipes += used.get(entry.full_name, [])
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
    made = Pages(ZOO, read_csv(TIMINGS), source=True, plain=True)
    entries = [entry for registry in ZOO.registries[:-1] for entry in registry.values()]
    return {REFERENCE / made.files[entry.full_name]: made.page(entry) for entry in entries}


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    MISSION.write_text(mission(MISSION.read_text(encoding="utf-8")), encoding="utf-8")
    for stale in set(REFERENCE.rglob("*.md")) - set(pages()):
        stale.unlink()
    for file, text in pages().items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
