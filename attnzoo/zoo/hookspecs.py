"""The hooks a plugin may implement. Each takes nothing and returns what the plugin offers.

A plugin is a module named by an entry point of the group `attnzoo`:

    [project.entry-points.attnzoo]
    wavelets = "attnzoo_wavelets"

and its hooks are plain functions:

    from attnzoo import hookimpl

    @hookimpl
    def attnzoo_mechanisms():
        return [Haar]

A module may say `ATTNZOO_API = 2`: the version of this page that it was written for.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from attnzoo.core import Fusion, Head, Intervention, Mechanism, Probe

__all__ = [
    "API", "PROJECT", "attnzoo_fusions", "attnzoo_interventions", "attnzoo_mechanisms", "attnzoo_probes",
    "attnzoo_recipes",
]  # fmt: skip

PROJECT = "attnzoo"
"""Name of the group of entry points, and of the hooks' project."""
API = 2
"""Version of the hooks. It grows when a hook changes its meaning; plugins for another version are refused."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as one of the hooks of attnzoo."""


@hookspec
def attnzoo_mechanisms() -> "Iterable[type[Mechanism] | type[Head]]":
    """Mechanisms and heads: classes with a `card`."""
    raise NotImplementedError


@hookspec
def attnzoo_fusions() -> "Iterable[type[Fusion]]":
    """Fusions: classes with a `card`."""
    raise NotImplementedError


@hookspec
def attnzoo_recipes() -> Iterable[Path]:
    """Recipes: absolute paths of YAML files, or of folders of them; a file's stem is its recipe's name."""
    raise NotImplementedError


@hookspec
def attnzoo_probes() -> "Iterable[type[Probe]]":
    """Probes: classes with a `card` that measure something of a model."""
    raise NotImplementedError


@hookspec
def attnzoo_interventions() -> "Iterable[type[Intervention]]":
    """Interventions: classes with a `card` that change something inside a model while it runs."""
    raise NotImplementedError
