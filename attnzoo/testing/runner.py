"""Runs checks: selects them by card, draws scenes, and keeps the smallest scene in which one fails."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from random import Random
from zlib import crc32

from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis.errors import HypothesisException

from attnzoo.core import Component, Fusion, Head, Pool
from attnzoo.errors import CheckError, RecipeError, did_you_mean
from attnzoo.testing.checks import CHECKS
from attnzoo.testing.claim import Check, Inapplicable, Requirement, claim
from attnzoo.testing.report import CheckResult
from attnzoo.testing.strategies import Checkable, Scene, claims_of, edges, random_scenes, scenes

EXAMPLES = 50
MANY = 20
PATIENCE = 9
"""So many times as many scenes may be refused, for options and sites that do not go together."""


def requirement(check: Check) -> Requirement:
    """To what a check applies."""
    return check.requirement  # type: ignore[attr-defined]


def kinds_of(cls: Checkable) -> tuple[str, ...]:
    """What a class is to the checks: a head is a mechanism too, once it has projections around it."""
    if issubclass(cls, Fusion | Pool):
        return ("fusion",) if issubclass(cls, Fusion) else ("pool",)
    return ("mechanism", "head" if issubclass(cls, Head) else "tokens")


def checks_for(cls: Checkable) -> list[Check]:
    """The checks that apply to a class under at least one setting of its options.

    Args:
        cls: A mechanism, head, pool or fusion.
    """
    return [
        check
        for check in CHECKS.values()
        if set(requirement(check).kinds) & set(kinds_of(cls))
        and any(requirement(check).fits(card, options) for card, options in claims_of(cls))
    ]


def run_check(cls: Checkable, check: Check, examples: int = EXAMPLES, *, shrink: bool = True) -> CheckResult:
    """One check of one class.

    Args:
        cls: A mechanism, head, pool or fusion.
        check: The check.
        examples: Number of scenes.
        shrink: Whether a failing scene is made small, which takes a second or two.

    After the drawn scenes come a few at the edges: everything once, and more tokens than a chunk may hold; not for
    checks that ask for a share of the scenes, unless that is many.
    """
    name, wanted = check.__name__, requirement(check)
    drawn = max(1, round(examples * wanted.share))
    last: list[Scene] = []

    def holds(scene: Scene) -> bool:
        """Whether it was tried: options and sites that do not go together are refused, as they should be."""
        last[:] = [scene]
        try:
            check(cls, scene)
        except RecipeError:
            plain = not scene.options and scene.site.context_dim is None
            if plain and name != "check_builds" and not issubclass(cls, Fusion):
                raise
            return False
        return True

    @seed(crc32(name.encode()))
    @settings(
        max_examples=4 * drawn,
        phases=[Phase.generate, Phase.shrink],
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(scenes(cls, wanted.fits))
    def smallest(scene: Scene) -> None:
        if not holds(scene):
            reject()

    def run() -> None:
        """All scenes; one that fails is made small, which may find a smaller one that fails for another reason."""
        chance = random_scenes(cls, wanted.fits, Random(crc32(name.encode())))
        tried = sum(holds(scene) for scene in islice(chance, drawn))
        for scene in islice(chance, PATIENCE * drawn):
            if tried >= drawn:
                break
            tried += holds(scene)
        claim(tried > 0, "it can be built somewhere", "no scene could be tried")
        if wanted.share == 1 or drawn >= MANY:
            fitting = [options for card, options in claims_of(cls) if wanted.fits(card, options)]
            for scene in edges(cls, fitting[0], wanted.large):
                holds(scene)

    try:
        try:
            run()
        except (Inapplicable, KeyboardInterrupt):
            raise
        except BaseException:
            failing = last[0]
            if shrink:
                with suppress(HypothesisException):  # as when it fails in some runs only
                    smallest()
            last[:] = [failing]
            raise
    except Inapplicable as reason:
        return CheckResult(cls.card.name, name, "skipped", str(reason))
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
                "AZ501",
                f"there is no check called `{name}`",
                help=hint or "`attnzoo.testing.CHECKS` holds all by name",
            )


def check(
    cls: Checkable, examples: int = EXAMPLES, expected_failures: Mapping[str, str] | None = None
) -> list[CheckResult]:
    """Hold a class to its card.

    Args:
        cls: A mechanism, head, pool or fusion.
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


def load_file(path: str | Path) -> list[Checkable]:
    """The concrete mechanisms, heads, pools and fusions that a Python file defines.

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
        and issubclass(value, Component | Fusion)
        and value.__module__ == name
        and not inspect.isabstract(value)
    ]
    if not found:
        raise CheckError(
            "AZ503", f"`{path}` defines no mechanism, head or fusion", help="define a class with a `card`"
        )
    return found
