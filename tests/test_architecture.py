"""Who may import whom, and how files are named: an AST walk over the package, and proof that it catches violations."""

import ast
import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import attnzoo
from attnzoo.core import Family
from attnzoo.zoo import load_zoo

ROOT = Path(attnzoo.__file__).parent

NOUNS = {"errors", "core"}
MAY_IMPORT = {
    "version": set(),
    "errors": set(),
    "files": set(),
    "workers": {"errors"},
    "__init__": {"timm_hook", "version", "zoo"},  # the rest by name, when asked for
    "__main__": {"cli"},
    "timm_hook": {"recipe", "zoo"},  # inside a function: only once timm is imported
    "core": NOUNS,
    "functional": {*NOUNS, "functional"},
    "methods": {*NOUNS, "functional", "hosts", "methods"},
    "mechanisms": {*NOUNS, "functional"},
    "fusions": {*NOUNS, "functional"},
    "zoo": {*NOUNS, "version", "zoo"},
    "hosts": {*NOUNS, "hosts"},
    "recipe": {*NOUNS, "files", "zoo", "hosts", "recipe"},
    "alone": {*NOUNS, "zoo", "recipe", "alone"},
    "hf": {*NOUNS, "zoo", "recipe", "alone", "hf"},
    "parallel": NOUNS,
    "inference": NOUNS,
    "catalogue": {*NOUNS, "zoo", "hosts", "recipe", "alone", "catalogue"},
    "bench": {
        *NOUNS,
        "functional",
        "plot",
        "workers",
        "inference",
        "zoo",
        "hosts",
        "recipe",
        "alone",
        "data",
        "train",
        "testing",
        "bench",
    },
    "testing": {*NOUNS, "zoo", "testing"},
    "data": {*NOUNS, "files", "data"},
    "plot": {*NOUNS, "plot"},
    "train": {*NOUNS, "files", "plot", "workers", "inference", "methods", "hosts", "recipe", "data", "train"},
    "eval": {*NOUNS, "hosts", "data", "train", "eval"},
    "lab": {*NOUNS, "functional", "zoo", "hosts", "data", "plot", "lab"},
    "probes": {*NOUNS, "functional", "hosts", "lab", "plot", "probes"},
    "interventions": {*NOUNS, "functional"},
    "grafting": {*NOUNS, "files", "zoo", "hosts", "recipe", "data", "train", "grafting"},
    "gallery": {
        *NOUNS,
        "version",
        "files",
        "plot",
        "workers",
        "zoo",
        "hosts",
        "recipe",
        "alone",
        "catalogue",
        "data",
        "train",
        "bench",
        "lab",
        "testing",
        "gallery",
    },
    "ejecting": {*NOUNS, "attnzoo", "version", "hosts", "recipe", "train", "ejecting"},
    "scaffold": {"errors", "attnzoo"},
    "cli": {
        *NOUNS,
        "inference",
        "zoo",
        "hosts",
        "recipe",
        "alone",
        "catalogue",
        "bench",
        "data",
        "train",
        "eval",
        "gallery",
        "grafting",
        "ejecting",
        "lab",
        "plot",
        "testing",
        "scaffold",
        "cli",
        "version",
    },
}
"""Package -> packages that it may import, at any level; `attnzoo` is the root itself. Nobody else may import `cli`."""

HEAVY = {
    "timm",
    "transformers",
    "torchvision",
    "yaml",
    "pydantic",
    "pydantic_core",
    "typer",
    "rich",
    "hypothesis",
    "pluggy",
    "matplotlib",
}
MAY_NEED = {
    "version": set(),
    "errors": set(),
    "files": set(),
    "workers": set(),
    "__init__": set(),
    "__main__": set(),
    "timm_hook": set(),
    "core": set(),
    "functional": set(),
    "methods": {"timm"},
    "mechanisms": set(),
    "fusions": set(),
    "zoo": {"pluggy"},
    "hosts": {"timm", "torchvision"},  # of torchvision: deformable convolutions
    "recipe": {"timm", "yaml", "pydantic", "pydantic_core"},
    "alone": {"pydantic"},
    "hf": set(),
    "parallel": {"timm"},
    "inference": {"timm"},
    "catalogue": set(),
    "bench": {"timm", "torchvision"},
    "testing": {"hypothesis"},
    "plot": {"matplotlib"},
    "data": {"timm", "torchvision", "pydantic", "pydantic_core"},
    "train": {"timm", "pydantic", "accelerate"},
    "eval": set(),
    "probes": set(),
    "interventions": set(),
    "lab": {"timm"},
    "grafting": {"timm", "pydantic"},
    "gallery": {
        "matplotlib",
        "sphinx",
        "docutils",
        "latex2mathml",
    },  # the extra `docs`, only when pages are made
    "ejecting": {"timm", "yaml"},
    "scaffold": set(),
    "cli": {"typer"},
}
"""Package -> libraries of `HEAVY` that it may import at module level."""
EXCEPTIONS = {"core/options.py": {"pydantic"}, "cli/render.py": {"rich"}}
MECHANISM_LIBRARIES = {"torch", "jaxtyping", "attnzoo"} | sys.stdlib_module_names
LIGHT = {
    "version.py",
    "errors.py",
    "__init__.py",
    "__main__.py",
    "timm_hook.py",
    "zoo/__init__.py",
    "zoo/hookspecs.py",
    "zoo/shipped.py",
}
"""Files that `import attnzoo` or `attnzoo --help` reads: they must not wait for torch."""
MEANINGLESS = {"utils", "util", "helpers", "common", "base", "misc"}
MAX_LINES, MAX_FILES = 140, 12  # formulas of parameters and FLOPs among them


@dataclass(frozen=True)
class Import:
    """One import: a dotted name, its line, whether it runs when the module is imported."""

    name: str
    line: int
    at_import: bool

    @property
    def library(self) -> str:
        """The first word."""
        return self.name.partition(".")[0]

    @property
    def package(self) -> str | None:
        """The package of attnzoo, `attnzoo` for the root itself, None for another library."""
        words = self.name.split(".")
        if words[0] != "attnzoo":
            return None
        return words[1] if len(words) > 1 and words[1] in MAY_IMPORT else "attnzoo"


def imports(source: str) -> Iterator[Import]:
    """All imports of a source. `from attnzoo import core` counts as `attnzoo.core`; names for type checkers do not run."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import("." * node.level + f"{node.module or ''}.{alias.name}", node.lineno, at_import)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in ast.iter_child_nodes(node):
                yield from walk(child, False)
        else:
            inside = at_import and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                yield from walk(child, inside)

    return walk(ast.parse(source), True)


def violations(path: str, source: str) -> list[str]:
    """What is wrong with a file.

    Args:
        path: Relative to the package, with slashes.
        source: Its text.
    """
    package = path.partition("/")[0].removesuffix(".py")
    found = []
    if package not in MAY_IMPORT:
        return [f"{path}: `{package}` is in no row of the table"]
    for line in imports(source):
        where = f"{path}:{line.line}:"
        if line.name.startswith("."):
            found.append(f"{where} a relative import hides where it goes")
        elif line.package is not None and line.package not in MAY_IMPORT[package]:
            found.append(f"{where} `{package}` may not import `{line.name}`")
        allowed = MAY_NEED[package] | EXCEPTIONS.get(path, set())
        if line.at_import and line.library in HEAVY - allowed:
            found.append(f"{where} `{package}` may not import `{line.library}` at module level")
        if line.library == "rich" and path != "cli/render.py":
            found.append(f"{where} only cli/render.py draws with rich")
        if (
            package in ("mechanisms", "fusions")
            and line.at_import
            and line.library not in MECHANISM_LIBRARIES
        ):
            found.append(f"{where} a mechanism's file does not need `{line.library}`")
        if path in LIGHT and line.at_import and line.library in {"torch", "timm", "jaxtyping", "numpy"}:
            found.append(f"{where} `import attnzoo` would wait for `{line.library}`")
    return [*found, *_form(path, source)]


def _form(path: str, source: str) -> list[str]:
    """Docstrings, names and sizes."""
    tree, found = ast.parse(source), []
    if not ast.get_docstring(tree):
        found.append(f"{path}: no docstring")
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            public = not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                found.append(f"{path}:{node.lineno}: `{node.name}` has no docstring")
    name = Path(path).stem
    if name in MEANINGLESS:
        found.append(f"{path}: a file called `{name}` says nothing")
    if path.startswith("mechanisms/") and source.count("\n") > MAX_LINES:
        found.append(f"{path}: more than {MAX_LINES} lines")
    return found


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """File -> files that it names in an import, at any level: inside functions and for type checkers too.

    A package's `__init__.py` counts only where a name is taken from it, not for every file below it. What importlib
    loads by name is not seen.

    Args:
        sources: File, relative to the package, to its text.
    """
    modules = {
        f"attnzoo/{path}".removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for path in sources
    }
    found: dict[str, set[str]] = {}
    for path, source in sources.items():
        names = [line.name for line in imports(source)]
        files = {modules.get(name) or modules.get(name.rpartition(".")[0]) for name in names}
        found[path] = {file for file in files if file is not None}
    return found


def circles(arrows: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """Groups of files that reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = arrows[waiting.pop()] - seen
            seen |= new
            waiting.extend(new)
        return seen

    reach = {path: reached(path) for path in arrows}
    return {
        frozenset(other for other in reach[path] if path in reach[other])
        for path in arrows
        if path in reach[path]
    }


FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def test_no_files_import_each_other():
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in FILES}
    assert circles(graph(sources)) == set()


def test_the_drawing_of_imports_is_the_table():
    """In docs/architecture.md each room stands above those that it may import; `errors` and `core` go without saying."""
    text = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawing = text.partition("Imports go one way")[2].split("```")[1].removeprefix("text\n")
    rows = [line.partition("─►")[::2] for line in drawing.splitlines()]
    drawn = {room: set(below.split()) for rooms, below in rows for room in rooms.split()}
    root = {"__init__", "__main__", "timm_hook", "attnzoo", "version"}
    table = {
        room: may - NOUNS - {room} - root for room, may in MAY_IMPORT.items() if room not in NOUNS | root
    }
    assert {room: below for room, below in drawn.items() if room not in NOUNS} == table
    order = list(drawn)
    assert order[-2:] == ["core", "errors"]
    assert all(order.index(room) < order.index(other) for room, below in drawn.items() for other in below)


@pytest.mark.parametrize(
    "changed",
    [
        {"core/mask.py": "from attnzoo.core.layout import Layout"},
        {"core/mask.py": "from attnzoo.core import layout"},
        {"core/mask.py": "def _f():\n    import attnzoo.core.layout"},
        {"core/mask.py": "if TYPE_CHECKING:\n    from attnzoo.core.layout import Layout"},
        {
            "core/mask.py": "from attnzoo.core.site import Site",
            "core/site.py": "from attnzoo.core.layout import Layout",
        },
        {
            "core/mask.py": "from attnzoo.core import Card",
            "core/__init__.py": "from attnzoo.core.layout import Layout",
        },
        {"core/layout.py": "import attnzoo.core.layout"},
    ],
)
def test_a_circle_is_found(changed):
    straight = {
        "core/__init__.py": "from attnzoo.core.mask import Mask",
        "core/layout.py": "import math\nfrom attnzoo.core.mask import Mask",
        "core/mask.py": "import torch",
        "core/site.py": "from attnzoo.core import Mask",
    }
    assert circles(graph(straight)) == set()
    (found,) = circles(graph(straight | changed))
    assert found >= set(changed)


@pytest.mark.parametrize("path", FILES)
def test_a_file_keeps_the_rules(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_the_walk_covers_the_package():
    assert len(FILES) > 60 and {path.partition("/")[0].removesuffix(".py") for path in FILES} == set(
        MAY_IMPORT
    )
    assert not set(EXCEPTIONS) - set(FILES) and not LIGHT - set(FILES)
    lines = [line for path in FILES for line in imports((ROOT / path).read_text(encoding="utf-8"))]
    assert len(lines) > 300 and any(line.package == "core" for line in lines)


def test_every_family_has_few_files():
    for folder in (ROOT / "mechanisms").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert folder.name in set(Family) and len(files) <= MAX_FILES, folder


def test_folder_is_family_and_file_is_name():
    zoo, seen = load_zoo(), set()
    for entry in (*zoo.mechanisms.values(), *zoo.fusions.values()):
        if entry.plugin == "attnzoo":
            card, file = entry.value.card, Path(entry.file)
            folder = "fusions" if entry in zoo.fusions.values() else card.family
            assert (file.parent.name, file.stem) == (folder, card.name)
            seen.add(file.relative_to(ROOT).as_posix())
    there = {
        path
        for path in FILES
        if path.startswith(("mechanisms/", "fusions/")) and not path.endswith("__init__.py")
    }
    assert seen == there


DOC = '"""Doc."""\n'
MUTANTS = [
    ("core/layout.py", "from attnzoo.functional import softmax", "`core` may not import"),
    ("core/layout.py", "import attnzoo.zoo", "`core` may not import"),
    ("core/layout.py", "from attnzoo import recipe", "`core` may not import"),
    ("core/layout.py", "def _f():\n    from attnzoo.hosts import requirements", "`core` may not import"),
    ("errors.py", "from attnzoo.core import Card", "`errors` may not import"),
    ("files.py", "from attnzoo.errors import ZooError", "`files` may not import"),
    ("workers.py", "from attnzoo.train import train", "`workers` may not import"),
    ("core/layout.py", "from attnzoo.files import read_file", "`core` may not import"),
    ("functional/heads.py", "from attnzoo.mechanisms.linear import elu_linear", "`functional` may not import"),
    ("mechanisms/linear/x.py", "from attnzoo.mechanisms.linear.elu_linear import EluLinear", "`mechanisms` may not import"),
    ("mechanisms/linear/x.py", "from attnzoo.fusions.add import Add", "`mechanisms` may not import"),
    ("fusions/x.py", "from attnzoo.fusions.add import Add", "`fusions` may not import"),
    ("fusions/x.py", "from attnzoo import Fusion", "`fusions` may not import"),
    ("hosts/required.py", "from attnzoo.recipe import load", "`hosts` may not import"),
    ("zoo/manager.py", "from attnzoo.recipe import load", "`zoo` may not import"),
    ("recipe/load.py", "from attnzoo.bench import speed", "`recipe` may not import"),
    ("recipe/load.py", "from attnzoo.alone import masks", "`recipe` may not import"),
    ("alone/build.py", "from attnzoo.catalogue import lists", "`alone` may not import"),
    ("hf/masks.py", "from attnzoo.hosts import layers", "`hf` may not import"),
    ("hf/masks.py", "import transformers", "`hf` may not import `transformers` at module level"),
    ("parallel.py", "from attnzoo.hosts import layers", "`parallel` may not import"),
    ("catalogue/lists.py", "from attnzoo.cli import render", "`catalogue` may not import"),
    ("bench/speed.py", "from attnzoo.lab import rollout", "`bench` may not import"),
    ("recipe/load.py", "def _f():\n    import attnzoo.cli.render", "`recipe` may not import"),
    ("testing/runner.py", "from attnzoo.cli import render", "`testing` may not import"),
    ("core/card.py", "import pydantic", "`core` may not import `pydantic` at module level"),
    ("core/options.py", "import yaml", "`core` may not import `yaml` at module level"),
    ("core/options.py", "import pydantic", ""),
    ("zoo/registry.py", "import timm", "`zoo` may not import `timm` at module level"),
    ("testing/runner.py", "from timm.layers import SEModule", "`testing` may not import `timm` at module level"),
    ("testing/runner.py", "def _f():\n    from timm.layers import SEModule", ""),
    ("testing/runner.py", "try:\n    import timm\nexcept ImportError:\n    pass", "may not import `timm` at module level"),
    ("testing/runner.py", "class _A:\n    import timm", "may not import `timm` at module level"),
    ("recipe/load.py", "import typer", "`recipe` may not import `typer`"),
    ("cli/show.py", "import rich", "`cli` may not import `rich`"),
    ("cli/show.py", "def _f():\n    from rich.table import Table", "only cli/render.py draws"),
    ("cli/render.py", "from rich.table import Table", ""),
    ("mechanisms/channel/x.py", "import numpy as np", "does not need `numpy`"),
    ("mechanisms/channel/x.py", "import timm", "may not import `timm`"),
    ("mechanisms/channel/x.py", "def _f():\n    from timm.layers import SEModule", ""),
    ("mechanisms/channel/x.py", "import math\nfrom torch import nn\nfrom jaxtyping import Float", ""),
    ("zoo/hookspecs.py", "import torch", "would wait for `torch`"),
    ("zoo/hookspecs.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor", ""),
    ("hosts/required.py", "from . import vision_transformer", "a relative import"),
    ("hosts/required.py", "from ..core import Card", "a relative import"),
    ("recipe/utils.py", "", "says nothing"),
    ("core/base.py", "", "says nothing"),
    ("recipe/load.py", "def load():\n    return 1", "`load` has no docstring"),
    ("recipe/load.py", "class Loaded:\n    pass", "`Loaded` has no docstring"),
    ("recipe/load.py", "def _own():\n    return 1", ""),
    ("mechanisms/linear/x.py", "# line\n" * MAX_LINES, "more than 140 lines"),
    ("mechanisms/linear/x.py", "# line\n" * (MAX_LINES - 2), ""),
    ("laboratory/probe.py", "", "`laboratory` is in no row"),
]  # fmt: skip
"""A file with one violation each, and what must be said of it; the empty string where all is well."""


@pytest.mark.parametrize("path,source,said", MUTANTS)
def test_the_walk_catches(path, source, said):
    found = violations(path, DOC + source + "\n")
    if said:
        assert any(said in text for text in found), found
    else:
        assert found == []


def test_a_file_without_a_docstring_is_caught():
    assert violations("core/layout.py", "import math\n") == ["core/layout.py: no docstring"]


def dangling(source: str) -> list[str]:
    """What a source imports from the package that is not there, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != "attnzoo":
            continue
        for alias in node.names:
            try:
                module = importlib.import_module(node.module)
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
            except ModuleNotFoundError:
                found.append(f"{node.module}.{alias.name}")
    return found


@pytest.mark.parametrize("path", FILES)
def test_imports_name_what_is_there(path):
    """A module that moved is noticed by the first user of a function otherwise."""
    assert dangling((ROOT / path).read_text(encoding="utf-8")) == []


def test_imports_of_nothing_are_caught():
    moved = "def score():\n    from attnzoo.moved.away import bleu"
    assert dangling(moved) == ["attnzoo.moved.away.bleu"]
    assert dangling("from attnzoo.core import Card, Cart") == ["attnzoo.core.Cart"]
    assert dangling("from attnzoo import core\nfrom attnzoo.core import card") == []
