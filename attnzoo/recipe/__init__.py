"""Recipes: YAML that says which mechanism goes to which site of which host."""

import attnzoo.hosts  # noqa: F401, I001 - timm first: its arrival makes the modules below register models
from attnzoo.recipe.composing import build, compose, compose_file
from attnzoo.recipe.loading import load
from attnzoo.recipe.plan import Plan
from attnzoo.recipe.reading import Loaded
from attnzoo.recipe.resolving import Composition, resolve

__all__ = ["Composition", "Loaded", "Plan", "build", "compose", "compose_file", "load", "resolve"]
