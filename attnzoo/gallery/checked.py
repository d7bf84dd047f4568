"""A component held to its card once more, with few examples: what its page says of laws and masks."""

from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

from attnzoo.core import Law
from attnzoo.testing import CHECKS, CheckResult, check
from attnzoo.testing.runner import kinds_of, requirement
from attnzoo.version import VERSION
from attnzoo.zoo import Entry

EXAMPLES = 5
"""Scenes of each check."""
Verdict = Literal["holds", "fails", "not checked"]


@dataclass(frozen=True)
class Checked:
    """What checks found of a component.

    Args:
        date: When, as `2026-01-31`, in UTC.
        versions: Of attnzoo, torch and the plugin, by name.
        examples: Scenes of each check.
        laws: Verdict on each law that the card claims, by name.
        masks: Verdict on each kind of mask that it claims.
        passed: Number of checks that passed.
        skipped: Reasons of checks that had nothing to say, by check.
        failed: What was found by checks that failed, by check.
    """

    date: str
    versions: dict[str, str]
    examples: int
    laws: dict[str, Verdict]
    masks: dict[str, Verdict]
    passed: int
    skipped: dict[str, str]
    failed: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def checked(entry: Entry, examples: int = EXAMPLES) -> Checked:
    """Run all checks that apply to a component.

    Args:
        entry: A mechanism, pool or fusion of the zoo.
        examples: Scenes of each check.
    """
    results = check(entry.value, examples)
    card = entry.value.card
    by_name = {result.check: result for result in results}
    laws = {str(law): _verdict(by_name, _brought(entry, law=law)) for law in Law if law in card.laws}
    masks = {kind: _verdict(by_name, _brought(entry, mask=kind)) for kind in sorted(card.masks)}
    return Checked(
        date=datetime.now(UTC).date().isoformat(),
        versions={"attnzoo": VERSION, "torch": version("torch"), entry.plugin: entry.version or VERSION},
        examples=examples,
        laws=laws,
        masks=masks,
        passed=sum(result.status == "passed" for result in results),
        skipped={result.check: result.reason for result in results if result.status == "skipped"},
        failed={result.check: result.reason for result in results if not result.ok},
    )


def _verdict(results: dict[str, CheckResult], names: list[str]) -> Verdict:
    """What the checks of a claim say together."""
    found = [results[name].status for name in names if name in results]
    if "failed" in found:
        return "fails"
    return "holds" if "passed" in found else "not checked"


def _brought(entry: Entry, law: Law | None = None, mask: str | None = None) -> list[str]:
    """Names of the checks that a claim brings: those that would not apply without it, or ask nothing of it."""
    card: Any = entry.value.card
    if law is not None:
        lesser = replace(card, laws=card.laws - {law})
    else:
        more = {"incremental": False} if mask == "causal" and getattr(card, "incremental", False) else {}
        lesser = replace(card, masks=card.masks - {mask}, **more)
    kinds = set(kinds_of(entry.value))
    asked = (
        ["check_fused_masks"] if mask and "fusion" in kinds else []
    )  # of all kinds that are claimed at once
    return asked + [
        name
        for name, one in CHECKS.items()
        if kinds & set(requirement(one).kinds)
        and requirement(one).card(card)
        and not requirement(one).card(lesser)
    ]
