"""First versions: complete, small, and right as they are. Standard library only."""

import keyword
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

import attnzoo
from attnzoo.errors import ZooError, did_you_mean

FAMILIES = (
    "dot_product",
    "projection",
    "routing",
    "local",
    "sparse",
    "linear",
    "recurrent",
    "latent",
    "channel",
    "additive",
    "mixing",
    "cross",
)
"""The values of `Family`, here without torch."""
IMPORTED = {*attnzoo.__all__, "Path"}
"""What the written files import; a class may not be called so."""
PLUGIN = {
    "pyproject.toml": "plugin/pyproject.toml",
    "README.md": "plugin/README.md",
    "src/$module/__init__.py": "plugin/module.py",
    "src/$module/recipes/${name}_vit.yaml": "plugin/recipe.yaml",
    "tests/test_conformance.py": "plugin/test_conformance.py",
}
"""The files of a plugin and their templates."""


def new_plugin(name: str, folder: str | Path) -> Path:
    """Write a distribution `attnzoo-NAME` with one mechanism, a recipe that uses it, and its checks.

    Args:
        name: snake_case or kebab-case, without `attnzoo-`.
        folder: Where its own folder is put; made when missing.

    Returns:
        The folder of the distribution.

    Raises:
        ZooError: AZ601 bad name, AZ602 it exists already or cannot be written.
    """
    words = _words(name) | {"family": "DOT_PRODUCT"}
    root = Path(folder) / words["dist"]
    words["mechanism"] = _text("class.py", words).rstrip()
    texts = {root / _fill(path, words): _text(template, words) for path, template in PLUGIN.items()}
    if root.exists() or root.is_symlink():
        raise _exists(root)
    _write(texts)
    return root


def new_mechanism(name: str, folder: str | Path, family: str) -> Path:
    """Write a file with one mechanism.

    Args:
        name: snake_case or kebab-case; the paper's own word.
        folder: Where the file is put; made when missing.
        family: A value of `attnzoo.Family`: what it changes relative to softmax attention.

    Returns:
        The file.

    Raises:
        ZooError: AZ601 bad name, AZ602 it exists already or cannot be written, AZ603 no such family.
    """
    if family not in FAMILIES:
        hint = did_you_mean(family, FAMILIES)
        raise ZooError(
            "AZ603", f"there is no family called `{family}`", help=hint or f"families: {', '.join(FAMILIES)}"
        )
    words = _words(name) | {"family": family.upper()}
    words["mechanism"] = _text("class.py", words).rstrip()
    return _write_one(Path(folder) / f"{words['name']}.py", _text("mechanism.py", words))


def new_fusion(name: str, folder: str | Path) -> Path:
    """Write a file with one fusion.

    Args:
        name: snake_case or kebab-case.
        folder: Where the file is put; made when missing.

    Returns:
        The file.

    Raises:
        ZooError: AZ601 bad name, AZ602 it exists already or cannot be written.
    """
    words = _words(name)
    return _write_one(Path(folder) / f"{words['name']}.py", _text("fusion.py", words))


def new_recipe(name: str, folder: str | Path) -> Path:
    """Write a recipe.

    Args:
        name: snake_case or kebab-case.
        folder: Where the file is put; made when missing.

    Returns:
        The file.

    Raises:
        ZooError: AZ601 bad name, AZ602 it exists already or cannot be written.
    """
    words = _words(name)
    return _write_one(Path(folder) / f"{words['name']}.yaml", _text("recipe.yaml", words))


def module_name(name: str) -> str:
    """The module of the plugin that `new_plugin` writes for this name."""
    return _words(name)["module"]


def _words(name: str) -> dict[str, str]:
    """What templates may say: the name in every spelling."""
    if not re.fullmatch(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*", name) or len(name) > 40:
        raise ZooError(
            "AZ601",
            f"`{name[:60]}` cannot be a name",
            why="a name is a-z, 0-9 and single _ or -, a letter first, at most 40 characters",
            help=_nearest(name),
        )
    if name.startswith(("attnzoo-", "attnzoo_")) or name == "attnzoo":
        why = "`attnzoo` belongs to the zoo; it is put before the name of a plugin anyway"
        raise ZooError("AZ601", f"`{name}` cannot be a name", why=why, help="leave `attnzoo` out")
    snake = name.replace("-", "_")
    title = "".join(word.capitalize() for word in snake.split("_"))
    if title in IMPORTED or keyword.iskeyword(title):
        why = f"its class would be called `{title}`, which is taken"
        raise ZooError("AZ601", f"`{name}` cannot be a name", why=why, help="choose another word")
    kebab = name.replace("_", "-")
    return {"name": snake, "title": title, "dist": f"attnzoo-{kebab}", "module": f"attnzoo_{snake}"}


def _nearest(name: str) -> str:
    """The nearest good name, as a hint."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    near = re.sub(r"^[0-9_]+", "", "_".join(words))[:40].strip("_")
    return f"write `{near}`" if near else "write a word such as `wavelets`"


def _fill(text: str, words: Mapping[str, str]) -> str:
    return Template(text).substitute(words)


def _text(template: str, words: Mapping[str, str]) -> str:
    return _fill(
        files("attnzoo.scaffold").joinpath("templates", f"{template}.template").read_text("utf-8"), words
    )


def _exists(path: Path) -> ZooError:
    kind = "folder" if path.is_dir() else "file"
    return ZooError(
        "AZ602",
        f"the {kind} `{path}` exists already",
        why="nothing is ever overwritten",
        help="choose another name, or another place with `--into`",
    )


def _write_one(path: Path, text: str) -> Path:
    _write({path: text})
    return path


def _write(texts: Mapping[Path, str]) -> None:
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
        except FileExistsError as error:
            raise _exists(Path(error.filename or path)) from None
        except OSError as error:
            raise ZooError(
                "AZ602", f"`{path}` cannot be written: {(error.strerror or str(error)).lower()}"
            ) from None
