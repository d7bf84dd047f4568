# The public names and where they come from: type checkers read this file, and what it names is imported on demand.

from .manager import Problem, Provider, Zoo, load_zoo, when_loaded
from .registry import Entry, Registry

__all__ = ["Entry", "Problem", "Provider", "Registry", "Zoo", "load_zoo", "when_loaded"]
