"""`attnzoo run SCRIPT ...`: somebody else's script, with the zoo's models known to timm."""

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from attnzoo.cli import completion

CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
"""All that follows the script is the script's."""


def run(
    context: typer.Context,
    script: Annotated[
        str,
        typer.Argument(
            help="A Python file, or a module with -m style dots.", autocompletion=completion.scripts
        ),
    ],
) -> None:
    """Run a script that uses timm, such as timm's train.py: `attnzoo run train.py --model ham_vit_b ...`."""
    from attnzoo.errors import ZooError

    path = Path(script)
    sys.argv = [script, *context.args]
    if path.is_file():
        sys.path.insert(0, str(path.parent.resolve()))
        runpy.run_path(script, run_name="__main__")
    elif script.endswith(".py") or not all(part.isidentifier() for part in script.split(".")):
        raise ZooError("AZ608", f"there is no script `{script}`", help="name a Python file")
    else:
        try:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        except ImportError as error:
            if f"No module named {script}" not in str(error).replace("'", ""):
                raise
            raise ZooError(
                "AZ608", f"there is no script or module `{script}`", help="name a Python file"
            ) from None
