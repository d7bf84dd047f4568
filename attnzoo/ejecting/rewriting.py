"""One definition as text, without what only the zoo needs: cards, claims, error codes, decisions already taken.

Edits are made by positions in the source, so what stays keeps its comments and its layout. Each pass parses anew.
"""

import ast
import re
import textwrap
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import fields
from functools import lru_cache

from attnzoo.core import Site

WIDTH = 110
"""Columns of code."""
Edit = tuple[int, int, str]
"""From where to where, in characters, and what stands there then."""

CLAIMS = frozenset({"card", "claims", "auxiliary", "renamed", "takes_tensors", "of_all_heads", "words"})
"""What classes say of themselves for the zoo alone, and methods that it alone calls."""
CHECKS = frozenset({"_check_arity", "admit", "lies_on", "named"})
"""Calls, standing alone, that only refuse."""
FIELDS = frozenset(field.name for field in fields(Site))
"""Of a site."""
DIMENSIONED = frozenset({"Bool", "Complex", "Float", "Int", "Integer", "Num", "Real", "Shaped"})
"""Annotations of jaxtyping's: `Float[Tensor, "b n c"]`."""


class Source:
    """Text with the positions of its syntax tree."""

    def __init__(self, text: str):
        self.text, self.tree = text, ast.parse(text)
        self.lines = text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def at(self, line: int, column: int) -> int:
        """A place in characters; trees count columns in bytes."""
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def start(self, node: ast.AST) -> int:
        return self.at(node.lineno, node.col_offset)  # type: ignore[attr-defined]

    def stop(self, node: ast.AST) -> int:
        return self.at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def of(self, node: ast.AST) -> str:
        """The text of a node."""
        return self.text[self.start(node) : self.stop(node)]

    def whole_lines(self, first: int, last: int) -> tuple[int, int]:
        """Lines from and to, with their ends."""
        return self.starts[first - 1], self.starts[last]


@lru_cache(4096)
def parsed(text: str) -> Source:
    """Text with its syntax tree, which nobody changes; the same text comes again and again."""
    return Source(text)


def edited(text: str, edits: Iterable[Edit]) -> str:
    """The text with edits, of which those inside others wait for the next pass."""
    done, kept = -1, []
    for start, stop, new in sorted(edits, key=lambda edit: (edit[0], -edit[1])):
        if start >= done:
            kept.append((start, stop, new))
            done = stop
    for start, stop, new in reversed(kept):
        text = text[:start] + new + text[stop:]
    return text


def until_still(text: str, find: Callable[[Source], list[Edit]]) -> str:
    """Edits, as long as there are any to make."""
    while edits := find(parsed(text)):
        text = edited(text, edits)
    return text


def nodes(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """All nodes with their parents, but for what is inside f-strings, whose positions Python 3.11 does not know."""
    stack: list[ast.AST] = [tree]
    while stack:
        parent = stack.pop()
        for child in ast.iter_child_nodes(parent):
            yield child, parent
            if not isinstance(child, ast.JoinedStr):
                stack.append(child)


def blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """All lists of statements."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


def first_line(statement: ast.stmt) -> int:
    """Of a statement with its decorators."""
    return min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))])


def without(source: Source, block: list[ast.stmt], statement: ast.stmt) -> Edit:
    """The edit that takes a statement out of its block, with the comments right above it."""
    first = first_line(statement)
    while source.lines[first - 2].lstrip().startswith("#") and first > 1:
        first -= 1
    start, stop = source.whole_lines(first, statement.end_lineno or first)
    alone = len(block) == 1
    return start, stop, " " * statement.col_offset + "pass\n" if alone else ""


def name_of(function: ast.expr) -> str:
    """The last part of what is called."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


# -- what is left out -------------------------------------------------------------------------------------------------


def left_out(source: Source) -> list[Edit]:
    """What says something to the zoo alone goes, and what refuses only what the zoo can ask."""
    classes = [node.body for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)]
    return [without(source, block, one) for block in classes for one in block if _claims(one)] + [
        without(source, block, one) for block in blocks(source.tree) for one in block if _refuses(one)
    ]


def _claims(statement: ast.stmt) -> bool:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name in CLAIMS
    return isinstance(statement, ast.FunctionDef) and statement.name in CLAIMS


def _refuses(statement: ast.stmt) -> bool:
    match statement:
        case ast.Assign(targets=[ast.Attribute(attr="card")]):
            return True
        case ast.Expr(value=ast.Call(func=function)):
            return name_of(function) in CHECKS
    return False


def unexplained(source: Source) -> list[Edit]:
    """What was computed for the explanation of an error alone goes: nobody reads it any more."""
    edits = []
    for function in (node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef)):
        read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        for block in blocks(function):
            for one in block:
                match one:
                    case ast.Assign(targets=[ast.Name(id=name)]) if name not in read:
                        edits.append(without(source, block, one))
                    case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                        kept = [
                            (name, value)
                            for name, value in zip(names, values, strict=False)
                            if not isinstance(name, ast.Name) or name.id in read
                        ]
                        if kept and len(kept) < len(names) == len(values):
                            left, right = (
                                ", ".join(map(source.of, side)) for side in zip(*kept, strict=True)
                            )
                            edits.append((source.start(one), source.stop(one), f"{left} = {right}"))
    return edits


def unasked(attributes: Container[str]) -> Callable[[Source], list[Edit]]:
    """Fields of sites and layouts that nobody asks for go, with what is said of them and where they are set.

    Args:
        attributes: Names that are asked for.
    """

    def find(source: Source) -> list[Edit]:
        edits = []
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef) and node.name in ("Layout", "Site"):
                for one in node.body:
                    match one:
                        case ast.AnnAssign(target=ast.Name(id=name)) if name not in attributes:
                            edits.append(without(source, node.body, one))
                            told = re.search(
                                rf"^        {name}: .*\n(?:            .*\n)*", source.text, re.M
                            )
                            edits += [(*told.span(), "")] if told else []
            if isinstance(node, ast.Call) and name_of(node.func) in ("Site", "replace"):
                values = [*node.args, *(keyword.value for keyword in node.keywords)]
                for keyword in node.keywords:
                    if keyword.arg in FIELDS and keyword.arg not in attributes:
                        before = values[values.index(keyword.value) - 1]
                        edits.append((source.stop(before), source.stop(keyword.value), ""))
        return edits

    return find


def unread(keep: Callable[[str, str], bool]) -> Callable[[Source], list[Edit]]:
    """Methods that nobody calls go.

    Args:
        keep: Whether a method of a class, by both names, stays.
    """

    def find(source: Source) -> list[Edit]:
        return [
            without(source, node.body, one)
            for node in source.tree.body
            if isinstance(node, ast.ClassDef)
            for one in node.body
            if isinstance(one, ast.FunctionDef) and not keep(node.name, one.name)
        ]

    return find


# -- what is said otherwise -------------------------------------------------------------------------------------------


def respelled(source: Source) -> list[Edit]:
    """Errors are Python's own, annotations have no axes, claims are attributes."""
    edits: list[Edit] = []
    for node, _ in nodes(source.tree):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=args)) if name not in (
                "ValueError",
                "TypeError",
                "NotImplementedError",
                "RuntimeError",
                "AssertionError",
            ):
                edits.append((source.start(node), source.stop(node), _plain_error(source, node, args)))
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Tuple(elts=[first, *_])) if (
                name in DIMENSIONED or name == "Annotated"
            ):
                edits.append((source.start(node), source.stop(node), source.of(first)))
            case ast.Attribute(attr="card"):
                edits.append((source.stop(node.value), source.stop(node), ""))
            case ast.Call(
                func=ast.Attribute(attr="only", value=mask)
            ):  # `mask.only(...)`, which only refuses
                edits.append((source.start(node), source.stop(node), source.of(mask)))
            case ast.FunctionDef() | ast.ClassDef():
                for decorator in node.decorator_list:
                    if name_of(decorator) == "final":
                        edits.append((*source.whole_lines(decorator.lineno, decorator.lineno), ""))
    return edits


def _plain_error(source: Source, node: ast.Raise, args: list[ast.expr]) -> str:
    """`raise ValueError(...)` with the sentence of one of the zoo's errors."""
    texts = [
        arg for arg in args if not (isinstance(arg, ast.Constant) and re.fullmatch(r"AZ\d+", str(arg.value)))
    ]
    text, indent = source.of(texts[0]) if texts else '""', " " * node.col_offset
    if "\n" not in text and len(f"{indent}raise ValueError({text})") <= WIDTH:
        return f"raise ValueError({text})"
    inner = f"{indent}    {text}"  # further lines stand where they stood
    for found in re.finditer(r"^(.*\()\n\s*(.*)\n\s*(\).*)$", inner, re.M):
        line = "".join(found.groups())  # without the comma that followed, it may fit
        inner = inner.replace(found[0], line) if len(line) <= WIDTH else inner
    return f"raise ValueError(\n{inner}\n{indent})"


ERRORS = re.compile(r"\b(?:\w*Error|Layout\w+|Missing\w+|Unsupported\w+): AZ\d{3}(?:,| (?=for|when|no))? ?")
"""Errors with codes, in docstrings."""


def plainly_documented(text: str) -> str:
    """Docstrings without codes of errors."""
    return ERRORS.sub("ValueError: ", text)


# -- what is decided --------------------------------------------------------------------------------------------------


def decided(known: Mapping[str, bool]) -> Callable[[Source], list[Edit]]:
    """Branches that are never taken go.

    Args:
        known: Conditions whose truth is known, as `ast.unparse` writes them.
    """

    def truth(node: ast.expr) -> bool | None:
        match node:
            case ast.Call(func=ast.Name(id="isinstance"), args=[_, ast.Attribute(attr="Proxy")]):
                return False
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                found = truth(inner)
                return None if found is None else not found
            case ast.BoolOp(op=op, values=values):
                settles = isinstance(op, ast.Or)
                found_all = [truth(value) for value in values]
                if settles in found_all:
                    return settles
                return None if None in found_all else not settles
        return known.get(ast.unparse(node))

    def find(source: Source) -> list[Edit]:
        edits: list[Edit] = []
        for block in blocks(source.tree):
            for i, statement in enumerate(block):
                if isinstance(statement, ast.If) and (taken := truth(statement.test)) is not None:
                    edits += _settled(source, block, i, statement, taken)
        if edits:
            return edits
        for node, parent in nodes(source.tree):
            if isinstance(node, ast.IfExp) and (taken := truth(node.test)) is not None:
                chosen = node.body if taken else node.orelse
                edits.append(
                    (source.start(node), source.stop(node), _fitted(source.of(chosen), chosen, parent))
                )
            elif isinstance(node, ast.BoolOp):
                left = [value for value in node.values if truth(value) is None]
                if (whole := truth(node)) is not None and left:
                    edits.append((source.start(node), source.stop(node), str(whole)))
                elif 0 < len(left) < len(node.values):
                    word = " and " if isinstance(node.op, ast.And) else " or "
                    text = word.join(source.of(value) for value in left)
                    fits = node if len(left) > 1 else left[0]
                    edits.append((source.start(node), source.stop(node), _fitted(text, fits, parent)))
        return edits

    return find


def _fitted(text: str, node: ast.expr, parent: ast.AST) -> str:
    """An expression in the place of another, in parentheses where it needs them."""
    atom = isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant)
    free = isinstance(parent, ast.stmt | ast.Call | ast.keyword | ast.List | ast.Tuple)
    return text if atom or free else f"({text})"


def _settled(source: Source, block: list[ast.stmt], i: int, node: ast.If, taken: bool) -> list[Edit]:
    """An `if` whose condition is known, without it."""
    header = node.test.end_lineno or node.lineno
    body_end = node.body[-1].end_lineno or header
    start, stop = source.whole_lines(node.lineno, node.end_lineno or header)
    if source.text[source.start(node) :].startswith("elif"):
        if not taken:
            return [(start, source.starts[body_end], "")]
        indent = " " * node.col_offset
        kept = source.text[source.starts[header] : source.starts[body_end]]
        return [(start, stop, f"{indent}else:\n{kept}")]
    if taken:
        chosen, text = node.body, source.text[source.starts[header] : source.starts[body_end]]
    elif not node.orelse:
        chosen, text = [], ""
    elif source.text[source.start(node.orelse[0]) :].startswith("elif"):
        text = source.text[source.starts[body_end] : stop].replace("elif", "if", 1)
        return [(start, stop, text)]
    else:
        line = body_end
        while not source.lines[line].lstrip().startswith("else:"):
            line += 1
        chosen, text = node.orelse, source.text[source.starts[line + 1] : stop]
    text = "".join(
        line.removeprefix("    ") if line.strip() else line for line in text.splitlines(keepends=True)
    )
    if not chosen and len(block) == 1:
        text = " " * node.col_offset + "pass\n"
    if chosen and isinstance(chosen[-1], ast.Return | ast.Raise):  # nothing behind it is reached
        stop = source.starts[block[-1].end_lineno or 0]
    return [(start, stop, text)]


# -- all of it --------------------------------------------------------------------------------------------------------


def absent(conditions: Container[str]) -> Callable[[Source], list[Edit]]:
    """Choices that a file has not raise an error.

    Args:
        conditions: Of the `if` whose body is not there, as `ast.unparse` writes them: `kind == 'patch'`.
    """

    def find(source: Source) -> list[Edit]:
        edits = []
        for node in ast.walk(source.tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) in conditions:
                word = ast.unparse(node.test).partition("'")[2].partition("'")[0]
                start, stop = source.whole_lines(node.body[0].lineno, node.body[-1].end_lineno or 0)
                indent = " " * node.body[0].col_offset
                new = f'{indent}raise ValueError("`{word}` is not in this file")\n'
                if source.text[start:stop] != new:
                    edits.append((start, stop, new))
        return edits

    return find


def tidied(text: str) -> str:
    """No blank lines where something was taken out."""
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = re.sub(r"(:\n)\n+(?=\s)", r"\1", text)
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def refitted(text: str) -> str:
    """What has become short enough for one line on one line, as ruff has it."""

    def find(source: Source) -> list[Edit]:
        edits = []
        for node, _ in nodes(source.tree):
            if not isinstance(node, ast.stmt) or isinstance(node, ast.ClassDef):
                continue
            last = node.end_lineno or node.lineno
            if body := getattr(node, "body", None):
                last = first_line(body[0]) - 1
                while not source.lines[last - 1].rstrip().endswith(":"):
                    last -= 1
            start, stop = source.whole_lines(node.lineno, last)
            old = source.text[start:stop]
            if last > node.lineno and not re.search(r"#|\"\"\"|,\s*\n\s*[)\]}]", old):
                new = re.sub(r"([(\[{]) ", r"\1", re.sub(r"\s*\n\s*", " ", old.strip()))
                new = " " * node.col_offset + re.sub(r" ([)\]}])", r"\1", new)
                if len(new) <= WIDTH:
                    edits.append((start, stop, new + "\n"))
        return edits

    return until_still(text + "\n", find)


def rewritten(text: str, known: Mapping[str, bool], missing: Container[str] = ()) -> str:
    """The source of a definition as an ejected file has it, still with all methods and under its own name.

    Args:
        text: Its source.
        known: As for `decided`.
        missing: As for `absent`.
    """
    text = textwrap.dedent(text) + "\n"
    for change in (left_out, absent(missing), decided(known), respelled, unexplained):
        text = until_still(text, change)
    return plainly_documented(tidied(refitted(text)))
