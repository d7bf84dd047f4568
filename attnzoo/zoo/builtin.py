"""The built-in plugin: every mechanism and fusion in this package, every recipe that is shipped with it."""

import importlib
import inspect
import pkgutil
from pathlib import Path

from attnzoo.zoo.hookspecs import hookimpl

PACKAGE = Path(__file__).parent.parent


def _concrete(package: str, bases: tuple[type, ...]) -> list[type]:
    """The final subclasses of `bases` defined in a package, in the order of their files."""
    root = importlib.import_module(package)
    found = []
    for info in pkgutil.walk_packages(root.__path__, f"{package}."):
        module = importlib.import_module(info.name)
        found += [
            value
            for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, bases) and value.__module__ == info.name
            and not inspect.isabstract(value)
        ]  # fmt: skip
    return found


def recipes_folder() -> Path:
    """Where the shipped recipes are: beside the code in a wheel, at the top of the repository otherwise."""
    shipped = PACKAGE / "_recipes"
    return shipped if shipped.is_dir() else PACKAGE.parent / "recipes"


@hookimpl
def attnzoo_mechanisms():
    """All mechanisms and heads of `attnzoo.mechanisms`."""
    from attnzoo.core import Head, Mechanism

    return _concrete("attnzoo.mechanisms", (Mechanism, Head))


@hookimpl
def attnzoo_fusions():
    """All fusions of `attnzoo.fusions`."""
    from attnzoo.core import Fusion

    return _concrete("attnzoo.fusions", (Fusion,))


@hookimpl
def attnzoo_recipes():
    """The shipped recipes."""
    return [recipes_folder()]
