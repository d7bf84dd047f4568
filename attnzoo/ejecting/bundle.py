"""What a model is made of, down to the last function: definitions, in an order in which Python can read them."""

import ast
import builtins
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from attnzoo.ejecting.modules import ALLOWED, Module, Symbol, is_module, read, top
from attnzoo.ejecting.rewriting import (
    edited,
    parsed,
    refitted,
    rewritten,
    tidied,
    unasked,
    unread,
    until_still,
)
from attnzoo.errors import ZooError

PRELUDE = "attnzoo.ejecting.prelude"
"""Stands in the place of `attnzoo.core` and of einops."""
NUMBERS = {
    "PositiveInt": "int",
    "NonNegativeInt": "int",
    "Fraction": "float",
    "PositiveFloat": "float",
    "NonNegativeFloat": "float",
}
"""What options are annotated with, and what that is."""
CALLED = frozenset(
    {
        "__init__",
        "__call__",
        "__getattr__",
        "forward",
        "init_weights",
        "attend",
        "mix",
        "reset_parameters",
        "merge",
        "no_weight_decay",
        "train",
        "_apply",
        "_load_from_state_dict",
        "_save_to_state_dict",
        "get_extra_state",
        "set_extra_state",
        "setup_context",
        "backward",
        "jvp",
        "vmap",
    }
)
"""Methods that are called from outside, or by way of PyTorch and timm: modules and autograd functions."""


@dataclass
class Piece:
    """A definition.

    Args:
        module: Where it is from.
        names: The names that it defines; several for `a, b = 1, 2`.
        text: Its source, rewritten.
    """

    module: Module
    names: tuple[str, ...]
    text: str
    line: int
    used: dict[str, Symbol] = field(default_factory=dict)


class Bundle:
    """The definitions that others reach.

    Args:
        packages: Packages whose sources are taken; of others a file imports.
        known: Conditions whose truth is known, by module; see `rewriting.decided`.
        facts: Class attributes that stand for cards, by class: lines of Python.
        respelled: Patterns with what stands in the place of what they match, by module.
        missing: Choices that the file has not; see `rewriting.absent`.
    """

    def __init__(
        self,
        packages: set[str],
        known: Mapping[str, Mapping[str, bool]],
        facts: Mapping[Symbol, list[str]],
        respelled: Mapping[str, Mapping[str, str]],
        missing: frozenset[str] = frozenset(),
    ):
        self.packages, self.known, self.facts = packages, known, facts
        self.respelled, self.missing = respelled, missing
        self.attributes: set[str] = set(CALLED)
        self.raw: dict[Symbol, str] = {}
        self.pieces: dict[Symbol, Piece] = {}
        self.order: list[str] = []  # of modules, those that are imported first
        self.external: dict[Symbol, str] = {}
        self.names: dict[Symbol, str] = {}

    def take(self, roots: list[Symbol], attributes: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        """Take what is reached from these, with the methods of these names and those that are mentioned anywhere."""
        self.attributes |= attributes | {"name", "dim", "heads", "layout"}  # of every site
        wanted = [self.resolve(root) for root in roots]
        size = -1
        while size != len(self.attributes):
            size = len(self.attributes)
            self.pieces, self.order, self.external = {}, [], {}
            for root in wanted:
                self._reach(root, ())

    # -- what names stand for -----------------------------------------------------------------------------------------

    def resolve(self, symbol: Symbol) -> Symbol:
        """Where what a name stands for is defined, or the name that is imported from elsewhere."""
        if top(symbol.module) not in self.packages or not symbol.name:
            return symbol
        if (
            symbol.module.startswith(("attnzoo.core", "attnzoo.functional"))
            and symbol.name in read(PRELUDE).defined
        ):
            return Symbol(PRELUDE, symbol.name)
        module = read(symbol.module)
        if symbol.name in module.defined:
            return symbol
        if symbol.name in module.imported:
            return self.resolve(module.imported[symbol.name])
        if is_module(symbol):
            return Symbol(str(symbol))
        raise _undefined(symbol.name, symbol.module)

    # -- what is reached ----------------------------------------------------------------------------------------------

    def _reach(self, symbol: Symbol, on_the_way: tuple[str, ...]) -> None:
        if symbol in self.pieces or symbol in self.external:
            return
        if top(symbol.module) not in self.packages:
            self._import(symbol)
            return
        if not symbol.name:
            raise ZooError(
                "AZ972",
                f"`{symbol.module}` is used as a whole",
                why="which of its definitions a file needs is read off the names that are used",
                help="import the names themselves: from package.module import name",
            )
        module = read(symbol.module)
        self._visit(module.name, on_the_way)
        statement = module.defined[symbol.name]
        names = tuple(name for name, one in module.defined.items() if one is statement)
        piece = Piece(module, names, self._text(symbol), statement.lineno)
        for name in names:
            self.pieces[Symbol(module.name, name)] = piece
        source = parsed(piece.text)
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._allow(node, symbol)
        self.attributes |= {node.attr for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)}
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef):  # `fuse = fold`
                self.attributes |= {name.id for name, _ in free_names(_assigned(node))}
        for spelled, attribute in free_names(source.tree):
            found = self._meant(module, spelled.id)
            if found is None:
                continue
            if not found.name and top(found.module) in self.packages and attribute:
                found = self.resolve(Symbol(found.module, attribute))
                piece.used[f"{spelled.id}.{attribute}"] = found
            else:
                piece.used[spelled.id] = found
            self._reach(found, (*on_the_way, module.name))

    def _meant(self, module: Module, name: str) -> Symbol | None:
        """What a free name of a module stands for; None for Python's own."""
        if name in module.defined:
            return self.resolve(Symbol(module.name, name))
        if name not in module.imported:
            if name in read(PRELUDE).defined:
                return Symbol(PRELUDE, name)
            if name not in PYTHONS:
                raise _undefined(name, module.name)
            return None
        symbol = module.imported[name]
        if symbol.module.startswith("attnzoo") and symbol.name in NUMBERS:
            return Symbol("builtins", NUMBERS[symbol.name])
        if symbol.module in ("attnzoo.errors",):
            return Symbol("builtins", "ValueError")
        return self.resolve(symbol)

    def _visit(self, name: str, on_the_way: tuple[str, ...]) -> None:
        """Give a module its place: behind those that it imports from."""
        if name in self.order or name in on_the_way:
            return
        for symbol in read(name).imported.values():
            if top(symbol.module) in self.packages and symbol.name:
                try:
                    found = self.resolve(symbol)
                except ZooError:  # not needed, perhaps
                    continue
                if found.name and top(found.module) in self.packages:
                    self._visit(found.module, (*on_the_way, name))
        self.order.append(name)

    def _text(self, symbol: Symbol) -> str:
        module = read(symbol.module)
        if symbol not in self.raw:
            text = module.source(symbol.name)
            for old, new in self.respelled.get(symbol.module, {}).items():
                text = re.sub(old, new, text)
            text = _rewritten(text, frozenset(self.known.get(symbol.module, {}).items()), self.missing)
            self.raw[symbol] = with_facts(text, self.facts.get(symbol, []))
        text = self.raw[symbol] + "\n"
        if "Site" in text or "replace(" in text or symbol.name == "Layout":
            text = until_still(text, unasked(self.attributes))
        if isinstance(module.defined[symbol.name], ast.ClassDef):
            text = until_still(text, unread(lambda _, name: name in self.attributes or name.startswith("__")))
        return tidied(text)

    def _allow(self, node: ast.Import | ast.ImportFrom, symbol: Symbol) -> None:
        """Imports inside a definition stay as they are, so they may be of other packages only."""
        modules = (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        )
        if getattr(node, "level", 0) or any(top(module) in self.packages for module in modules):
            raise ZooError(
                "AZ972",
                f"`{symbol.name}` of `{symbol.module}` imports from its own package inside a function",
                why="what a file takes along is read off the imports at the top of a module",
                help="import at the top",
            )
        for module in modules:
            self._check(top(module))

    def _import(self, symbol: Symbol) -> None:
        self._check(top(symbol.module))
        if symbol.module != "builtins":
            self.external[symbol] = symbol.name or symbol.module

    def _check(self, package: str) -> None:
        if package not in ALLOWED and package not in sys.stdlib_module_names:
            raise ZooError(
                "AZ973",
                f"`{package}` would be needed",
                why=f"an ejected file imports {', '.join(sorted(ALLOWED))} and Python's own modules alone",
                help="choose other components, or write this one without it",
            )

    # -- names in the file --------------------------------------------------------------------------------------------

    def name_all(self, reserved: set[str]) -> None:
        """Give everything a name of its own in the file.

        Args:
            reserved: Names that are taken.
        """
        taken = set(reserved)
        for symbol in sorted(
            self.external, key=lambda one: (top(one.module) == "timm", one.module, one.name)
        ):
            self.names[symbol] = name = self._alias(symbol, taken)
            taken.add(name)
        for symbol in sorted(self.pieces, key=self._place):
            name, stem = symbol.name.replace("Zoo", "Sited"), symbol.module.rpartition(".")[2]
            if name in taken:
                name = f"{stem}_{name.lstrip('_')}"
                if symbol.name.isupper():
                    name = name.upper()
                elif symbol.name[0].isupper():
                    name = "".join(part.title() for part in stem.split("_")) + symbol.name
            while name in taken:
                name += "_"
            self.names[symbol] = name
            taken.add(name)

    def _alias(self, symbol: Symbol, taken: set[str]) -> str:
        """What something imported is called: as most modules do."""
        if symbol == Symbol("torch.nn", "functional"):
            return "F"
        if not symbol.name:
            return symbol.module if "." not in symbol.module else symbol.module.rpartition(".")[2]
        name = symbol.name
        return name if name not in taken else f"{top(symbol.module)}_{name}"

    def _place(self, symbol: Symbol) -> tuple[int, int, str]:
        return self.order.index(symbol.module), self.pieces[symbol].line, symbol.name

    def written(self) -> Iterator[tuple[Module, list[str]]]:
        """The modules with their definitions, in order, under the names of the file."""
        for name in self.order:
            own = sorted((s for s in self.pieces if s.module == name), key=self._place)
            pieces = list({id(self.pieces[s]): self.pieces[s] for s in own}.values())
            if pieces:
                yield read(name), [self.renamed(piece) for piece in pieces]

    def renamed(self, piece: Piece) -> str:
        """A definition under the names of the file."""
        source = parsed(piece.text)
        edits = []
        for node, attribute in free_names(source.tree):
            key = f"{node.id}.{attribute}"
            if key in piece.used:
                edits.append(
                    (source.start(node), source.stop(node) + 1 + len(attribute), self._name(piece.used[key]))
                )
            elif node.id in piece.used and (new := self._name(piece.used[node.id])) != node.id:
                edits.append((source.start(node), source.stop(node), new))
        text = edited(piece.text, edits)
        for name in piece.names:
            new = self.names[Symbol(piece.module.name, name)]
            if new != name:
                text = re.sub(rf"^((?:async )?(?:def|class) ){name}\b", rf"\g<1>{new}", text, flags=re.M)
        return tidied(refitted(text))

    def _name(self, symbol: Symbol) -> str:
        return symbol.name if symbol.module == "builtins" else self.names[symbol]

    def imports(self) -> list[str]:
        """Lines that import what is not in the file, as ruff sorts them."""
        sections: tuple[set[str], set[str]] = (set(), set())
        members: dict[str, set[tuple[str, str]]] = {}
        for symbol in self.external:
            section = sections[top(symbol.module) not in sys.stdlib_module_names]
            name = self.names[symbol]
            if not symbol.name:
                section.add(f"import {symbol.module}" + (f" as {name}" if name != symbol.module else ""))
            else:
                members.setdefault(symbol.module, set()).add((symbol.name, name))
        lines: list[str] = []
        for place, section in enumerate(sections):
            own = sorted(section)
            for module in sorted(
                m for m in members if (top(m) not in sys.stdlib_module_names) == bool(place)
            ):
                plain = sorted((n for n, alias in members[module] if n == alias), key=_member)
                if plain:
                    own.append(_from(module, plain))
                own += [
                    f"from {module} import {n} as {alias}"
                    for n, alias in sorted(members[module])
                    if n != alias
                ]
            if own:
                lines += [*([""] if lines else []), *own]
        return lines


def _member(name: str) -> tuple[int, str]:
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, name


def _from(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= 110:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


@lru_cache(4096)
def _rewritten(text: str, known: frozenset[tuple[str, bool]], missing: frozenset[str]) -> str:
    return rewritten(text, dict(known), missing)


def with_facts(text: str, facts: list[str]) -> str:
    """A class with attributes behind its docstring.

    Args:
        text: Of the class.
        facts: Lines.
    """
    if not facts:
        return text
    lines = text.splitlines()
    body = ast.parse(text).body[0].body  # type: ignore[attr-defined]
    documented = isinstance(body[0], ast.Expr)
    at = body[0].end_lineno if documented else body[0].lineno - 1
    rest = lines[at:]
    more = [""] if any(line.strip() for line in rest) else []
    return "\n".join(
        [
            *lines[:at],
            *([""] if documented else []),
            *(f"    {line}" for fact in facts for line in fact.split("\n")),
            *more,
            *rest,
        ]
    )


def free_names(tree: ast.AST) -> Iterator[tuple[ast.Name, str]]:
    """Names that are bound by no function around them, each with the attribute that is asked of it, if any."""
    yield from _free(tree, frozenset())


def _assigned(node: ast.ClassDef) -> ast.AST:
    """What a class assigns beside its methods."""
    return ast.Tuple([one.value for one in node.body if isinstance(one, ast.Assign)], ast.Load())


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _free(node: ast.AST, bound: frozenset[str], attribute: str = "") -> Iterator[tuple[ast.Name, str]]:
    if isinstance(node, ast.Name):
        if node.id not in bound:
            yield node, attribute
        return
    if isinstance(node, ast.Attribute):
        yield from _free(node.value, bound, node.attr)
        return
    if isinstance(node, FUNCTIONS):
        outside: list[ast.AST] = [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]
        outside += [a.annotation for a in _arguments(node.args) if a.annotation]
        outside += [*getattr(node, "decorator_list", ())]
        returns = getattr(node, "returns", None)
        outside += [returns] if returns else []
        for one in outside:
            yield from _free(one, bound)
        inner = bound | {a.arg for a in _arguments(node.args)} | _stored(node)
        body = [node.body] if isinstance(node, ast.Lambda) else node.body
        for one in body:
            yield from _free(one, inner)
        return
    if isinstance(node, ast.ClassDef):
        for one in (*node.bases, *(k.value for k in node.keywords), *node.decorator_list):
            yield from _free(one, bound)
        own = bound | _stored(node)
        for one in node.body:  # what a class defines is seen by what stands beside it, not by its methods
            yield from _free(one, bound if isinstance(one, ast.FunctionDef) else own)
        return
    if isinstance(node, COMPREHENSIONS):
        bound = bound | {
            name.id for g in node.generators for name in ast.walk(g.target) if isinstance(name, ast.Name)
        }
    for child in ast.iter_child_nodes(node):
        yield from _free(child, bound)


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    return [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        *([arguments.vararg] if arguments.vararg else []),
        *([arguments.kwarg] if arguments.kwarg else []),
    ]


def _stored(function: ast.AST) -> set[str]:
    """Names that a function binds, without those of functions in it."""
    found: set[str] = set()
    stack = list(ast.iter_child_nodes(function))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            stack += [n for n in ast.walk(node) if isinstance(n, ast.NamedExpr)]
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
        stack += ast.iter_child_nodes(node)
    return found


PYTHONS = frozenset(dir(builtins)) | {"__file__", "__name__"}


def _undefined(name: str, module: str) -> ZooError:
    return ZooError(
        "AZ972",
        f"`{name}` is not defined at the top of `{module}`",
        why="a file is put together from definitions, which must be statements of their own",
        help="define it there by `def`, `class` or `=`, outside any `if` or `try`",
    )
