"""Runs checks: selects them by card, draws scenes, and keeps the smallest scene in which one fails."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis.errors import HypothesisException

from attnzoo.core import Fusion, Head, Mechanism
from attnzoo.errors import CheckError, RecipeError, did_you_mean
from attnzoo.testing import checks, laws
from attnzoo.testing.checks import Check, Inapplicable, Requirement
from attnzoo.testing.report import CheckResult
from attnzoo.testing.strategies import Component, Scene, card_of, scenes, settings_of

EXAMPLES = 25
CHECKS: dict[str, Check] = {
    name: value
    for module in (checks, laws)
    for name, value in vars(module).items()
    if name.startswith("check_") and hasattr(value, "requirement")
}
"""All checks by name."""


def requirement(check: Check) -> Requirement:
    """To what a check applies."""
    return check.requirement  # type: ignore[attr-defined]


def kinds_of(cls: Component) -> tuple[str, ...]:
    """What a class is to the checks: a head is a mechanism too, once it has projections around it."""
    if issubclass(cls, Fusion):
        return ("fusion",)
    return ("mechanism", "head") if issubclass(cls, Head) else ("mechanism",)


def checks_for(cls: Component) -> list[Check]:
    """The checks that apply to a class under at least one setting of its options.

    Args:
        cls: A mechanism, head or fusion.
    """
    claimed = [(card_of(cls, options), options) for options in settings_of(cls)]
    return [
        check
        for check in CHECKS.values()
        if set(requirement(check).kinds) & set(kinds_of(cls))
        and any(requirement(check).fits(card, options) for card, options in claimed)
    ]


def run_check(cls: Component, check: Check, examples: int = EXAMPLES, *, shrink: bool = True) -> CheckResult:
    """One check of one class.

    Args:
        cls: A mechanism, head or fusion.
        check: The check.
        examples: Number of scenes.
        shrink: Whether a failing scene is made small, which takes a second or two.
    """
    name, wanted = check.__name__, requirement(check)
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    last: list[Scene] = []

    @settings(
        max_examples=1 if wanted.once else examples,
        phases=phases,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(scenes(cls, wanted.fits))
    def run(scene: Scene) -> None:
        last[:] = [scene]
        try:
            check(cls, scene)
        except RecipeError:
            if not scene.options and name != "check_builds" and not issubclass(cls, Fusion):
                raise
            reject()  # options and sites that do not go together, and are refused as they should be

    try:
        run()
    except Inapplicable as reason:
        return CheckResult(cls.card.name, name, "skipped", str(reason))
    except HypothesisException as error:
        return CheckResult(
            cls.card.name, name, "failed", f"no scene could be tried: {type(error).__name__}: {error}"
        )
    except AssertionError as error:
        return CheckResult(cls.card.name, name, "failed", str(error), last[0].code(name))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: what is checked may not end the program
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"it raised {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return CheckResult(cls.card.name, name, "failed", text, last[0].code(name))
    return CheckResult(cls.card.name, name, "passed")


def held_to(result: CheckResult, expected_failures: Mapping[str, str]) -> CheckResult:
    """The result in the light of what was expected: what should fail must fail.

    Args:
        result: What `run_check` returned.
        expected_failures: Names of checks that must fail, with reasons.
    """
    if result.check not in expected_failures:
        return result
    reason = expected_failures[result.check]
    if result.status == "failed":
        return CheckResult(result.mechanism, result.check, "expected failure", reason)
    return CheckResult(
        result.mechanism,
        result.check,
        "unexpected pass",
        f"it was expected to fail ({reason}), but it {result.status}",
    )


def known(names: Mapping[str, str]) -> None:
    """Refuse names of checks that do not exist.

    Args:
        names: Names of checks, with reasons.

    Raises:
        CheckError: AZ501, when there is no such check.
    """
    for name in names:
        if name not in CHECKS:
            hint = did_you_mean(name, list(CHECKS))
            raise CheckError(
                "AZ501", f"there is no check called `{name}`", help=hint or f"checks: {', '.join(CHECKS)}"
            )


def check(
    cls: Component, examples: int = EXAMPLES, expected_failures: Mapping[str, str] | None = None
) -> list[CheckResult]:
    """Hold a class to its card.

    Args:
        cls: A mechanism, head or fusion.
        examples: Number of scenes for each check.
        expected_failures: Names of checks that must fail, with reasons; one that passes fails the run.

    Raises:
        CheckError: AZ501, when an expected failure names no check.
    """
    expected = expected_failures or {}
    known(expected)
    try:
        applicable = checks_for(cls)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = f"it raised {type(error).__name__}: {error}"
        return [CheckResult(cls.card.name, "claims", "failed", text)]
    return [held_to(run_check(cls, one, examples), expected) for one in applicable]


def load_file(path: str | Path) -> list[Component]:
    """The concrete mechanisms, heads and fusions that a Python file defines.

    Args:
        path: The file; it is run.

    Raises:
        CheckError: AZ502, when it cannot be read or run; AZ503, when it defines none.
    """
    path = Path(path)
    name = f"attnzoo_checked_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise CheckError(
            "AZ502", f"`{path}` is no Python file", help="give the path of a file that ends in .py"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that what it defines pickles
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        del sys.modules[name]
        raise CheckError("AZ502", f"`{path}` failed with {type(error).__name__}: {error}") from error
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, (Mechanism, Head, Fusion))
        and value.__module__ == name
        and not inspect.isabstract(value)
    ]
    if not found:
        raise CheckError(
            "AZ503", f"`{path}` defines no mechanism, head or fusion", help="define a class with a `card`"
        )
    return found
