"""What checks found: data, and plain text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["passed", "failed", "expected failure", "unexpected pass", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """What one check found of one component.

    Args:
        mechanism: Name on the card of the mechanism, head or fusion.
        check: Name of the check.
        status: `passed`, `failed`, `expected failure`, `unexpected pass` or `skipped`.
        reason: One sentence or more; empty for what passed.
        reproduction: Code that repeats a failure in the smallest scene that was found; empty otherwise.
    """

    mechanism: str
    check: str
    status: Status
    reason: str = ""
    reproduction: str = ""

    @property
    def ok(self) -> bool:
        """Whether this result lets a run pass: an expected failure does, an unexpected pass does not."""
        return self.status in ("passed", "expected failure", "skipped")

    def as_dict(self) -> dict[str, str]:
        """The result as data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.mechanism}: {self.check}: {self.status}"]
        if self.reason:
            lines.append(f"  {self.reason}")
        lines += [f"    {line}" for line in self.reproduction.splitlines()]
        return "\n".join(lines)


def as_dict(results: Sequence[CheckResult]) -> dict:
    """All results as data: whether the run passes, counts by status, and the results themselves.

    Args:
        results: What `check` returned.
    """
    counts = Counter(result.status for result in results)
    return {
        "ok": all(result.ok for result in results),
        "counts": dict(sorted(counts.items())),
        "results": [result.as_dict() for result in results],
    }


def summary(results: Sequence[CheckResult]) -> str:
    """Plain text: what did not simply pass, then one line of counts.

    Args:
        results: What `check` returned.
    """
    told = [str(result) for result in results if result.status != "passed"]
    counts = Counter(result.status for result in results)
    components = len({result.mechanism for result in results})
    line = (
        ", ".join(f"{number} {status}" for status, number in sorted(counts.items())) or "nothing was checked"
    )
    return "\n\n".join([*told, f"{line} ({components} component{'' if components == 1 else 's'})"])
