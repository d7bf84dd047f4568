"""The conformance suite: holds mechanisms, heads, pools and fusions to their cards. Importable by anyone.

from attnzoo.testing import check, parametrize_with_checks
"""

from typing import TYPE_CHECKING, Any

from attnzoo.testing.checks import CHECKS
from attnzoo.testing.oracle import against, compare
from attnzoo.testing.recipes import random_recipe, recipes
from attnzoo.testing.report import CheckResult
from attnzoo.testing.runner import check, checks_for, load_file
from attnzoo.testing.strategies import Scene, scenes

if TYPE_CHECKING:
    from attnzoo.testing.pytest import parametrize_with_checks

__all__ = [
    "CHECKS", "CheckResult", "Scene", "against", "check", "checks_for", "compare", "load_file",
    "parametrize_with_checks", "random_recipe", "recipes", "scenes",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "parametrize_with_checks":  # pytest is no requirement of attnzoo
        from attnzoo.testing.pytest import parametrize_with_checks

        return parametrize_with_checks
    raise AttributeError(f"module 'attnzoo.testing' has no attribute {name!r}")
