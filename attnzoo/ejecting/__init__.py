"""A model as one readable Python file that needs torch and timm alone: `eject`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from attnzoo.ejecting.file import RESERVED, text_of
from attnzoo.ejecting.proof import prove
from attnzoo.errors import ZooError
from attnzoo.recipe import Composition, load, resolve
from attnzoo.train import Run, open_run

__all__ = ["Ejected", "eject"]


@dataclass(frozen=True, eq=False)
class Ejected:
    """A file that was not written yet.

    Args:
        name: Of the function in it that builds the model.
        text: The file.
        weights: Of a run, by name; None of a recipe.
    """

    name: str
    text: str
    weights: Mapping[str, torch.Tensor] | None = None

    def save(self, out: str | os.PathLike) -> list[Path]:
        """Write the file, and weights as `.safetensors` beside it.

        Args:
            out: The file, whose name ends in `.py`.

        Returns:
            What was written.

        Raises:
            ZooError: AZ970, when it cannot be written, or is there already.
        """
        out = Path(out)
        beside = out.parent / f"{out.stem}.safetensors"
        refuse_taken(out, [out, beside] if self.weights is not None else [out])
        text = self.text.replace(f'"{self.name}.safetensors"', f'"{beside.name}"')
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            if self.weights is not None:
                save_file(dict(self.weights), beside)
            with out.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
        except OSError as error:
            raise ZooError(
                "AZ970", f"`{out}` cannot be written: {(error.strerror or str(error)).lower()}"
            ) from None
        return [out] if self.weights is None else [out, beside]


def refuse_taken(out: Path, files: Sequence[Path]) -> None:
    """Refuse to write where something is.

    Args:
        out: The file.
        files: All that would be written.

    Raises:
        ZooError: AZ970.
    """
    if out.suffix != ".py":
        help = "" if out.is_dir() else f"write {out.with_suffix('.py').name}"
        raise ZooError(
            "AZ970", f"`{out}` is no name of a Python file", help=help or f"write {out / 'model.py'}"
        )
    taken = [str(file) for file in files if file.exists() or file.is_symlink()]
    if taken:
        raise ZooError(
            "AZ970",
            f"{' and '.join(f'`{file}`' for file in taken)} exists already",
            why="nothing is ever overwritten",
            help="choose another name, or move it away",
        )


def eject(
    source: str | os.PathLike | Mapping[str, Any] | Composition | Run,
    *,
    edits: Sequence[str] = (),
    which: str = "best",
) -> Ejected:
    """A recipe, or a run with its weights, as one Python file that needs torch and timm alone.

        attnzoo.eject("ham_b").save("ham_b.py")

    The model of the file has the same names of parameters and gives the same numbers, bit for bit on a CPU.

    Args:
        source: A recipe: its name, file, text or mapping; or a run: its folder.
        edits: Changes to a recipe, such as `attention.with.start=identity`.
        which: Of a run: the `best` weights, or the `last`.

    Raises:
        ZooError: AZ972 a definition that cannot be taken, AZ973 a component that needs more than torch and timm,
            AZ974 a file that does not build the model; what is wrong with the recipe or the run.
    """
    if isinstance(source, str | os.PathLike) and Path(source).is_dir():
        source = open_run(Path(source))
    if isinstance(source, Run):
        if source.settings.method is not None:
            raise ZooError(
                "AZ973",
                f"`{source.folder}` was trained by the method `{source.settings.method}`, which cannot be ejected",
                why="its second classifier is no part of the recipe",
                help="eject the recipe, without the weights",
            )
        composition = resolve(source.loaded)
        model = source.model(which)  # type: ignore[arg-type]
        weights = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    else:
        composition = source if isinstance(source, Composition) else resolve(load(source, edits))
        weights = None
    name = function_name(composition.loaded.name)
    text = text_of(composition, name, trained=weights is not None)
    prove(text, name, composition)
    return Ejected(name, text, weights)


def function_name(name: str) -> str:
    """The name of a recipe as that of a function."""
    word = (
        "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name).strip("_")
        or "model"
    )
    word = f"model_{word}" if word[0].isdigit() else word
    return f"{word}_model" if iskeyword(word) or word in RESERVED else word
