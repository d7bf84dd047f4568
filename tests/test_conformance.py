"""Every built-in mechanism, pool and fusion is held to its card: 25 scenes for each check, 200 in the slow run."""

import pytest

from attnzoo import load_zoo
from attnzoo.testing import parametrize_with_checks

ZOO = load_zoo()
COMPONENTS = [
    entry.value
    for registry in (ZOO.mechanisms, ZOO.fusions)
    for entry in registry.values()
    if entry.plugin == "attnzoo"
]


@parametrize_with_checks(COMPONENTS)
def test_conformance(check):
    check()


@pytest.mark.slow
@parametrize_with_checks(COMPONENTS, examples=200)
def test_conformance_in_many_scenes(check):
    check()
