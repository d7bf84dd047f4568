"""Every built-in mechanism, pool and fusion is held to its card: 25 scenes for each check, 200 in the slow run.

Every day each check is asked of every second of them, and of all that have changed (conftest.py). Where `ATTNZOO_SINCE`
names a revision of git, those whose files have changed since get the 200 at once, as in CI.
"""

import inspect
import os
import subprocess
from pathlib import Path

import pytest

import attnzoo
from attnzoo import load_zoo
from attnzoo.testing import parametrize_with_checks

ROOT, PACKAGE = Path(__file__).parent.parent, Path(attnzoo.__file__).parent
ZOO = load_zoo()
COMPONENTS = [
    entry.value
    for registry in (ZOO.mechanisms, ZOO.fusions)
    for entry in registry.values()
    if entry.plugin == "attnzoo"
]


def touched(since: str | None) -> list[type]:
    """The components whose files have changed since a revision, committed or not; none without one that git knows."""
    if since is None:
        return []
    command = ["git", "diff", "--name-only", since, "--", "attnzoo/mechanisms", "attnzoo/fusions"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    changed = {PACKAGE.parent / line for line in done.stdout.splitlines()}
    return [component for component in COMPONENTS if Path(inspect.getfile(component)) in changed]


def test_git_says_what_is_touched():
    assert touched(None) == touched("no-such-revision") == []
    if (ROOT / ".git").exists():
        empty = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # git's empty tree: since then, everything
        assert touched(empty) == COMPONENTS


@parametrize_with_checks(COMPONENTS, examples=25)
def test_conformance(check):
    check()


@parametrize_with_checks(touched(os.environ.get("ATTNZOO_SINCE")), examples=200)
def test_conformance_of_what_is_touched(check):
    check()


@pytest.mark.slow
@parametrize_with_checks(COMPONENTS, examples=200)
def test_conformance_in_many_scenes(check):
    check()
