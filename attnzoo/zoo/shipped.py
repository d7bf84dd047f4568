"""Where the shipped recipes are. Standard library only: a shell that completes names does not wait for torch."""

from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def recipes_folder() -> Path:
    """The recipes' folder: beside the code in a wheel, at the top of the repository otherwise."""
    shipped = PACKAGE / "_recipes"
    return shipped if shipped.is_dir() else PACKAGE.parent / "recipes"
