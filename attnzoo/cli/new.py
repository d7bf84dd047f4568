"""`attnzoo new`: the first version of something of your own."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, help="Write the first version of a plugin, mechanism, fusion or recipe."
)

Name = Annotated[str, typer.Argument(help="Its name: a-z, 0-9 and _, a letter first.")]
Into = Annotated[
    Path | None, typer.Option(help="Where it is written.", show_default="here, or its place in a checkout")
]


@app.command("plugin")
def plugin(name: Name, into: Into = None) -> None:
    """A distribution of your own: a mechanism, a recipe that uses it, and its checks."""
    from attnzoo.scaffold import module_name, new_plugin

    root = new_plugin(name, into or Path())
    module = root / "src" / module_name(name) / "__init__.py"
    _tell(root, f"edit {module}", f"pip install -e {root}", f"attnzoo check --plugin {root.name}")


@app.command("mechanism")
def mechanism(
    name: Name,
    family: Annotated[
        str, typer.Option(help="What it changes relative to softmax attention, such as `linear`.")
    ],
    into: Into = None,
) -> None:
    """One file with a mechanism that passes all checks; change what happens inside."""
    from attnzoo.scaffold import new_mechanism

    file = new_mechanism(name, into or _place(f"attnzoo/mechanisms/{family}"), family)
    _tell(file, "edit it", f"attnzoo check {file}")


@app.command("fusion")
def fusion(name: Name, into: Into = None) -> None:
    """One file with a fusion that passes all checks; change how it merges."""
    from attnzoo.scaffold import new_fusion

    file = new_fusion(name, into or _place("attnzoo/fusions"))
    _tell(file, "edit it", f"attnzoo check {file}")


@app.command("recipe")
def recipe(name: Name, into: Into = None) -> None:
    """One YAML file that composes; change what is put where."""
    from attnzoo.scaffold import new_recipe

    file = new_recipe(name, into or _place("recipes"))
    _tell(file, "edit it", f"attnzoo compose {file}")


def _place(folder: str) -> Path:
    """The folder in which a checkout of attnzoo keeps such files; here, when this is no checkout."""
    return Path(folder) if Path("attnzoo/mechanisms").is_dir() and Path(folder).is_dir() else Path()


def _tell(written: Path, *following: str) -> None:
    from attnzoo.cli.render import say, say_next

    files = sorted(path for path in written.rglob("*") if path.is_file()) if written.is_dir() else [written]
    for file in files:
        say(f"wrote {file}")
    say_next(*following)
