"""Recipes: YAML that says which mechanism goes to which site of which host."""

from attnzoo.recipe.compose import build, compose, compose_file
from attnzoo.recipe.load import Loaded, load
from attnzoo.recipe.resolve import Composition, Plan, resolve

__all__ = ["Composition", "Loaded", "Plan", "build", "compose", "compose_file", "load", "resolve"]
