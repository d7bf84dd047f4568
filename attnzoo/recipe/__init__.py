"""Recipes: YAML that says which mechanism goes to which site of which host."""

import attnzoo.hosts  # noqa: F401, I001 - timm first: its arrival makes the modules below register models
from attnzoo.recipe.compose import build, compose, compose_file
from attnzoo.recipe.load import Loaded, load
from attnzoo.recipe.resolve import Composition, Plan, resolve

__all__ = ["Composition", "Loaded", "Plan", "build", "compose", "compose_file", "load", "resolve"]
