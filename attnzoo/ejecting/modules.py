"""Installed modules as text: what each of their names stands for, and where its source is."""

import ast
import importlib.util
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from attnzoo.errors import ZooError

ALLOWED = {"torch", "timm", "torchvision", "safetensors", "numpy"}
"""What an ejected file may import, beside Python's own modules."""


@dataclass(frozen=True)
class Symbol:
    """A name at the top of a module.

    Args:
        module: The module's full name.
        name: The name; empty for the module itself.
    """

    module: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


@dataclass
class Module:
    """A module whose source is at hand.

    Args:
        name: Its full name.
        text: Its source.
        defined: The statement that defines each name at its top.
        imported: What each name that it imports at its top stands for.
    """

    name: str
    text: str
    tree: ast.Module
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    imported: dict[str, Symbol] = field(default_factory=dict)

    @property
    def doc(self) -> str:
        """Its docstring."""
        return ast.get_docstring(self.tree) or ""

    def source(self, name: str) -> str:
        """The source of what defines a name, with decorators, comments after it on its lines, and its docstring."""
        statement = self.defined[name]
        lines = self.text.splitlines()
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))])
        last, after = statement.end_lineno or first, self.tree.body.index(statement) + 1
        following = self.tree.body[after] if after < len(self.tree.body) else None
        if isinstance(statement, ast.Assign | ast.AnnAssign) and _is_text(following):
            last = following.end_lineno or last  # type: ignore[union-attr]
        return "\n".join(lines[first - 1 : last])


def _is_text(statement: ast.stmt | None) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


@cache
def read(name: str) -> Module:
    """A module by its name.

    Raises:
        ZooError: AZ972, when there is no source of it.
    """
    try:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec else None
    except (ImportError, ValueError):  # made by hand, not found by the import system
        origin = getattr(sys.modules.get(name), "__file__", None)
    if not origin or not origin.endswith(".py") or not Path(origin).is_file():
        raise ZooError(
            "AZ972",
            f"the source of the module `{name}` is not there",
            why="a file is put together from the sources of what a model uses",
            help="install the distribution that it comes from with its `.py` files",
        )
    text = Path(origin).read_text(encoding="utf-8")
    module = Module(name, text, ast.parse(text))
    is_package = Path(origin).name == "__init__.py"
    stub = Path(origin).with_suffix(".pyi")  # where a package imports on demand, it says what
    demanded = ast.parse(stub.read_text(encoding="utf-8")).body if stub.is_file() else []
    for statement in [*(one for one in demanded if isinstance(one, ast.ImportFrom)), *module.tree.body]:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            module.defined[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        module.defined[part.id] = statement
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            module.defined[statement.target.id] = statement
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                bound = alias.asname or alias.name.partition(".")[0]
                module.imported[bound] = Symbol(alias.name if alias.asname else bound)
        elif isinstance(statement, ast.ImportFrom):
            parent = _absolute(statement, name, is_package)
            for alias in statement.names:
                module.imported[alias.asname or alias.name] = Symbol(parent, alias.name)
    return module


def _absolute(statement: ast.ImportFrom, name: str, is_package: bool) -> str:
    """The full name of the module from which something is imported."""
    if not statement.level:
        return statement.module or ""
    parts = name.split(".")
    up = statement.level - is_package
    parent = parts[: len(parts) - up] if up else parts
    return ".".join([*parent, *([statement.module] if statement.module else [])])


def top(module: str) -> str:
    """The package to which a module belongs."""
    return module.partition(".")[0]


def is_module(symbol: Symbol) -> bool:
    """Whether `from package import name` imports a module."""
    try:
        return importlib.util.find_spec(str(symbol)) is not None
    except (ImportError, ValueError):
        return False
