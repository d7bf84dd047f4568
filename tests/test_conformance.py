"""Every built-in mechanism and fusion is held to its card, with 200 scenes for each check."""

from attnzoo import load_zoo
from attnzoo.testing import parametrize_with_checks

ZOO = load_zoo()
PARTS = [
    entry.value
    for registry in (ZOO.mechanisms, ZOO.fusions)
    for entry in registry.values()
    if entry.plugin == "attnzoo"
]


@parametrize_with_checks(PARTS, examples=200)
def test_conformance(check):
    check()
