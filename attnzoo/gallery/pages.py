"""The page of a component as Markdown, made from its card, its docstring and what was drawn of it.

Without pictures it is a page of docs/reference, plain enough for GitHub; with them it is one of the gallery and of the
site, for Sphinx with MyST.
"""

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnzoo.bench.mechanisms import Growth, ratio
from attnzoo.catalogue.equations import latex
from attnzoo.catalogue.pages import page_of
from attnzoo.core import Law
from attnzoo.errors import ZooError
from attnzoo.gallery.bibtex import bibtex
from attnzoo.gallery.drawing import Drawn
from attnzoo.gallery.markdown import fenced, paragraphs, prose, table
from attnzoo.gallery.relatives import relatives
from attnzoo.recipe import load
from attnzoo.recipe.schema import Fuse, Use
from attnzoo.recipe.source import read_text
from attnzoo.zoo import Entry, Zoo

CLAIMS = (
    "form", "family", "level", "masks", "context", "grid", "time", "memory", "parameters", "FLOPs", "auxiliary",
    "needs", "edits", "fidelity")  # fmt: skip
"""What a page says in a line each, where there is something to say."""


HEADINGS = {
    "flow": "## Data flow",
    "influence": "## Who influences whom",
    "maps": "## What it looks at",
    "cost": "## What it costs",
}
"""Kinds of picture, in order, and what stands above each."""
PARTS = {"flow": "flow", "influence": "digits", "maps": "digits", "cost": "cost"}
"""The piece of work that each is a part of."""
TEXTS = {
    "flow": "What happens in one forward: `b` samples, `n` and `m` tokens, `c` channels, `h` heads, `d` channels each.",
    "influence": "How much each of 14 × 14 tokens changes what comes out at a few places, |∂ output_i / ∂ token_j|, in "
    "a network of one block, on a handwritten digit.",
    "maps": "The weights of each head in the same network, after training.",
    "cost": "One layer of 384 channels and 6 heads, as the number of tokens grows.",
}
"""What stands above each picture."""
ALT = {
    "flow": "Data flow of",
    "influence": "Who influences whom in",
    "maps": "Heat maps of",
    "cost": "Cost of",
}
"""What each picture is, for those who do not see it; what is seen stands below it."""
MASKS = {
    "keys": "keys that do not exist, such as padding, have no say",
    "pairs": "which query may attend to which key is honoured",
    "causal": "later tokens have no say",
}
"""What a component promises of each kind of mask."""


@dataclass
class Pages:
    """The pages of a zoo.

    Args:
        zoo: It.
        timings: What `attnzoo bench mechanisms` measured, the baseline first.
        shown: Full names of the components that have a page; all when None.
        source: Whether pages are in docs/reference of the project's source, so that they may refer to its files.
        plain: Whether equations stay text, as GitHub shows them best.
    """

    zoo: Zoo
    timings: Mapping[str, Growth] = field(default_factory=dict)
    shown: frozenset[str] | None = None
    source: bool = False
    plain: bool = False

    def __post_init__(self):
        self.files = files(self.zoo)
        self.users = users(self.zoo)

    def page(self, entry: Entry, drawn: Drawn | None = None) -> str:
        """One component.

        Args:
            entry: A mechanism, pool, fusion, probe or intervention of the zoo.
            drawn: Its pictures and what was checked; None for a page without.
        """
        kind = kind_of(entry, self.zoo)
        facts, card = page_of(entry, kind), entry.value.card
        parts = [f"# {entry.name}", prose(facts["summary"])]
        if card.equation:
            parts.append(fenced(card.equation, "text") if self.plain else _formula(card.equation))
        parts += paragraphs(facts["doc"])
        if drawn is not None:
            parts += _pictures(entry.name, drawn)
            parts.append("## Claims")
        parts.append("\n".join(self._claims(entry, facts["claims"])))
        parts += _notes(card)
        parts += _options(facts["options"])
        parts += self._usage(entry, kind, facts["example"])
        parts += self._checks(entry, kind, drawn)
        parts += _paper(card)
        parts += self._relatives(entry)
        return "\n\n".join(parts) + "\n"

    def _claims(self, entry: Entry, claims: Mapping[str, str]) -> list[str]:
        card = entry.value.card
        lines = [f"- **{what}**: {_claim(what, claims[what])}" for what in CLAIMS if claims.get(what)]
        lines += [f"- **tap** `{name}`: ({axes})" for name, axes in getattr(card, "taps", {}).items()]
        lines += [f"- **given** `{name}`: {what}" for name, what in getattr(card, "given", {}).items()]
        lines += [f"- **law** `{law}`: {law.meaning}" for law in Law if law in getattr(card, "laws", ())]
        if text := measured(entry.name, self.timings):
            how = " ([how](../benchmarks.md#mechanisms-as-tokens-grow))" if self.source else ""
            lines.append(f"- **measured**: {text}{how}")
        return lines

    def _usage(self, entry: Entry, kind: str, example: str) -> list[str]:
        if kind not in ("mechanism", "fusion"):
            shell, python = example.split("\n", 1)
            parts = ["## How it is used", fenced(shell, "bash"), fenced(python, "python")]
            if self.source and entry.plugin == "attnzoo":
                parts.append(
                    f"![{entry.name.replace('_', ' ')} of a small model](../../pictures/{entry.name}.png)"
                )
                parts.append("Of a small model that was trained for this page: [how](../../pictures.py).")
            return parts
        parts = ["## In a recipe", fenced(example, "yaml")]
        if recipes := self.users.get(entry.full_name):
            own = [name for name in recipes if self.zoo.recipes[name].plugin == entry.plugin]
            whole = min(own or recipes, key=lambda name: len(self._recipe(name)))
            parts += [f"As a whole, `{whole}`:", fenced(self._recipe(whole), "yaml")]
            if others := [f"`{name}`" for name in recipes if name != whole]:
                parts.append(f"Other recipes that use it: {', '.join(others)}.")
        return parts

    def _recipe(self, name: str) -> str:
        entry = self.zoo.recipes[name]
        return read_text(entry.value, str(entry.file)).rstrip()

    def _checks(self, entry: Entry, kind: str, drawn: Drawn | None) -> list[str]:
        """How it is checked, and where its tests are."""
        test = f"tests/{kind}s/test_{Path(entry.file).stem}.py"
        text = []
        if kind in ("mechanism", "fusion"):
            text.append(f"`attnzoo check {entry.name}` holds it to every claim above.")
            test = f"Its oracle, hand-worked numbers and identities: [{test}](../../{test})."
        else:
            test = f"[{test}](../../../{test})."
        if self.source and entry.plugin == "attnzoo":
            text.append(test)
        verdicts = _verdicts(drawn.checked) if drawn and drawn.checked else []
        if drawn and (why := drawn.missing.get("checked")):
            verdicts.append(f"Not checked for this page: {prose(why)}")
        return ["## How it is checked", *verdicts, "\n".join(text)] if text else []

    def _relatives(self, entry: Entry) -> list[str]:
        here = posixpath.dirname(self.files[entry.full_name]) or "."
        lines = []
        for near in relatives(entry, self.zoo):
            name, other = f"`{near.entry.name}`", near.entry.full_name
            if self.shown is None or other in self.shown:
                name = f"[{name}]({posixpath.relpath(self.files[other], here)})"
            lines.append(f"- {name}: {prose(near.entry.value.card.summary)} {near.sentence}")
        if not lines:
            return []
        return ["## Relatives", f"The nearest, and how they differ from `{entry.name}`:", "\n".join(lines)]


def kind_of(entry: Entry, zoo: Zoo) -> str:
    """`mechanism`, `fusion`, `probe` or `intervention`.

    Args:
        entry: Of the zoo.
        zoo: It.
    """
    return next(registry.kind for registry in zoo.registries if registry.get(entry.full_name) is entry)


def files(zoo: Zoo) -> dict[str, str]:
    """The file of each component's page, by its full name; probes and interventions have folders of their own.

    A name that several plugins claim has its plugin in front, a fusion that is called as a mechanism `-fusion` behind.

    Args:
        zoo: Whose components.
    """
    found: dict[str, str] = {}
    for registry in (zoo.mechanisms, zoo.fusions, zoo.probes, zoo.interventions):
        folder = f"{registry.kind}s/" if registry.kind in ("probe", "intervention") else ""
        for called, entry in registry.items():
            file = f"{folder}{called.replace('/', '-')}"
            if f"{file}.md" in found.values():
                file += f"-{registry.kind}"
            found[entry.full_name] = f"{file}.md"
    return found


def users(zoo: Zoo) -> dict[str, list[str]]:
    """Names of the recipes that put a component somewhere, sorted, by its full name.

    Args:
        zoo: Whose recipes.
    """
    found: dict[str, list[str]] = {}
    for name, file in sorted(zoo.recipes.items()):
        try:
            recipe = load(str(file.value)).recipe
        except ZooError:  # of a plugin, and broken; `attnzoo list` says so
            continue
        specs = [recipe.attention, recipe.pool, *(override.put for override in recipe.overrides)]
        for used in sorted(set().union(*map(_named, specs))):
            if entry := zoo.mechanisms.get(used) or zoo.fusions.get(used):
                found.setdefault(entry.full_name, []).append(name)
    return found


def measured(name: str, timings: Mapping[str, Growth]) -> str:
    """How long one layer takes beside the baseline, in words; empty for what was not measured.

    Args:
        name: Of a mechanism.
        timings: What `attnzoo bench mechanisms` measured, the baseline first.
    """
    against = next(iter(timings), "")
    if name not in timings or name == against:
        return ""
    baseline, growth = timings[against], timings[name]
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
    return "; ".join(parts)


def _named(spec: Use | Fuse | None) -> set[str]:
    """Names of the components in a spec."""
    if spec is None:
        return set()
    if isinstance(spec, Use):
        return {spec.use}
    return {spec.fuse}.union(*(_named(branch) for branch in spec.of))


def _claim(what: str, text: str) -> str:
    """What a page says of a claim; of a formula the formula as code, and what it gives."""
    if what not in ("parameters", "FLOPs"):
        return prose(text)
    formula, rest = re.findall(r"^(.*?)((?:, beside the projections)?(?: \([\d,]+ at c = .*)?)$", text)[0]
    return f"`{formula}`{rest}"


def _notes(card: Any) -> list[str]:
    title = "## What to know" if card.fidelity == "exact" else "## What differs, and what to know"
    return [title, prose(card.notes)] if card.notes else []


def _paper(card: Any) -> list[str]:
    if card.paper is None:
        return []
    return ["## Paper", prose(f"{card.paper}."), fenced(bibtex(card.paper), "bibtex")]


def _options(options: Sequence[Mapping[str, str]]) -> list[str]:
    rows = [
        [f"`{one['name']}`", prose(one["type"]), f"`{one['default']}`", prose(one["text"])] for one in options
    ]
    return ["## Options", table(("option", "type", "default", "meaning"), rows)] if rows else []


def _pictures(name: str, drawn: Drawn) -> list[str]:
    """What was drawn, and why something was not."""
    parts = []
    for kind, heading in HEADINGS.items():
        if shown := drawn.pictures.get(kind):
            how = [f":alt: {ALT[kind]} {name}", f":width: {shown.width}px", "", prose(shown.text)]
            figure = fenced("\n".join(how), f"{{figure}} pictures/{shown.path.name}")
            parts += [heading, *_explained(kind, drawn.numbers), figure]
        elif why := drawn.missing.get(kind) or drawn.missing.get(PARTS[kind]):
            parts += [heading, f"Not drawn: {prose(why)}"]
    return parts


def _explained(kind: str, numbers: Mapping[str, Any]) -> list[str]:
    """What a picture shows of any component, with the numbers of this one."""
    if kind != "influence":
        return [TEXTS[kind]]
    trained = ""
    if numbers.get("accuracy") is not None:
        trained = (
            f" Then it was trained for {numbers['steps']} steps, after which it named {numbers['accuracy']:.1%} of "
            f"{numbers['tested']} other digits rightly."
        )
    return [f"{TEXTS[kind]}{trained} {prose(numbers.get('network') or '')}".rstrip()]


def _verdicts(checked: Mapping[str, Any]) -> list[str]:
    """Laws and masks as they were checked, when, and with which versions."""
    claims = [("law", law, Law(law).meaning, verdict) for law, verdict in checked["laws"].items()]
    claims += [("mask", mask, MASKS[mask], verdict) for mask, verdict in checked["masks"].items()]
    rows = [(f"{what} `{name}`", prose(meaning), f"**{verdict}**") for what, name, meaning, verdict in claims]
    versions = ", ".join(f"{name} {number}" for name, number in checked["versions"].items())
    passed, few = checked["passed"], checked["examples"]
    parts = [table(("claim", "what it says", "verdict"), rows)] if rows else []
    parts.append(
        f"{checked['date']}, with {prose(versions)}: {passed} checks passed, with {few} drawn cases each."
    )
    for word in ("failed", "skipped"):
        if checked[word]:
            found = [f"- `{name}` {word}: {prose(why)}" for name, why in checked[word].items()]
            parts.append("\n".join(found))
    return parts


def _formula(equation: str) -> str:
    """The equation of a card as a formula; as text where it is in no notation that is known."""
    try:
        return fenced(latex(equation), "{math}")
    except ZooError:
        return fenced(equation, "text")
