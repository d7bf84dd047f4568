"""The checks as pytest cases: one for each check of each class."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import pytest

from attnzoo.testing.claim import Check
from attnzoo.testing.runner import EXAMPLES, checks_for, held_to, known, run_check
from attnzoo.testing.strategies import Checkable


def parametrize_with_checks(
    classes: Iterable[Checkable], examples: int = EXAMPLES, expected_failures: Mapping[str, str] | None = None
) -> Callable:
    """Gives a test function, as its argument `check`, one check of one class at a time; call it.

        @parametrize_with_checks([Haar])
        def test_conformance(check):
            check()

    Args:
        classes: Mechanisms, heads, pools and fusions.
        examples: Number of scenes for each check.
        expected_failures: Names of checks that must fail, with reasons.

    Raises:
        CheckError: AZ501, when an expected failure names no check.
    """
    expected = dict(expected_failures or {})
    known(expected)
    cases = [
        pytest.param(partial(_case, cls, check, examples, expected), id=f"{cls.card.name}-{check.__name__}")
        for cls in classes
        for check in checks_for(cls)
    ]
    return pytest.mark.parametrize("check", cases)


def _case(cls: Checkable, check: Check, examples: int, expected: Mapping[str, str]) -> None:
    """Pass, fail, skip or xfail as the result says."""
    result = held_to(run_check(cls, check, examples), expected)
    if result.status == "skipped":
        pytest.skip(result.reason)
    if result.status == "expected failure":
        pytest.xfail(result.reason)
    if not result.ok:
        pytest.fail(str(result), pytrace=False)
