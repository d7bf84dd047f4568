"""Values and calls as Python text, with references to what gets its name in the file only later."""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from attnzoo.core import Layout
from attnzoo.ejecting.modules import Symbol
from attnzoo.errors import ZooError
from attnzoo.hosts.skip import Skip

MARK = re.compile(r"⟦([\w.]*):(\w*)⟧")
"""A reference: module and name."""


def ref(thing: Any) -> str:
    """A reference to a class or a function, or to a symbol."""
    if isinstance(thing, Symbol):
        return f"⟦{thing.module}:{thing.name}⟧"
    if "." in thing.__qualname__:
        raise ZooError(
            "AZ972",
            f"`{thing.__qualname__}` is not defined at the top of `{thing.__module__}`",
            why="a file is put together from definitions, which must be statements of their own",
            help="define it there, outside any function or class",
        )
    return f"⟦{thing.__module__}:{thing.__qualname__}⟧"


def referred(text: str) -> list[Symbol]:
    """What a text refers to."""
    return [Symbol(*found) for found in dict.fromkeys(MARK.findall(text))]


def named(text: str, name: Callable[[Symbol], str]) -> str:
    """The text with names in the place of references."""
    return MARK.sub(lambda found: name(Symbol(*found.groups())), text)


def literal(value: Any) -> str:
    """A value as Python text.

    Raises:
        TypeError: When it cannot be written down.
    """
    match value:
        case bool() | int() | None:
            return repr(value)
        case float():
            return repr(value) if value == value and abs(value) != float("inf") else f'float("{value}")'
        case str():
            return json.dumps(value, ensure_ascii=False)
        case Layout():
            inside = [literal(value.grid), *([f"prefix={value.prefix}"] if value.prefix else [])]
            return f"{ref(Layout)}({', '.join(inside)})"
        case list():
            return f"[{', '.join(map(literal, value))}]"
        case tuple():
            return f"({', '.join(map(literal, value))}{',' * (len(value) == 1)})"
        case frozenset():
            return f"frozenset({literal(sorted(value))})" if value else "frozenset()"
        case Skip():
            return call(ref(Skip), [], {"use": value.use, "at": value.at, "encoders": value.encoders})
        case Mapping():
            return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
        case partial():
            return call(ref(partial), [ref(value.func), *map(literal, value.args)], value.keywords)
    if callable(value) and hasattr(value, "__qualname__"):
        return ref(value)
    raise TypeError(f"{value!r} cannot be written as text")


def call(function: str, arguments: Sequence[str], named: Mapping[str, Any]) -> str:
    """A call as Python text.

    Args:
        function: What is called.
        arguments: As text.
        named: Those with names, as values.
    """
    return f"{function}({', '.join([*arguments, *(f'{k}={literal(v)}' for k, v in named.items())])})"


def wrapped(text: str, indent: int = 0, before: int = 0, width: int = 110) -> str:
    """An expression over as many lines as it needs.

    Args:
        text: On one line.
        indent: Of the line where it begins.
        before: Columns that stand before it on its line, beyond the indent.
        width: Columns of a line.
    """
    if indent + before + len(text) <= width:
        return text
    tree: Any = ast.parse(text, mode="eval").body

    def of(node: ast.AST) -> str:
        return ast.get_source_segment(text, node) or ""

    match tree:
        case ast.Call():
            start, stop = of(tree.func) + "(", ")"
            parts = [of(a) for a in tree.args]
            parts += [f"{k.arg}={of(k.value)}" if k.arg else f"**{of(k.value)}" for k in tree.keywords]
        case ast.Dict():
            start, stop = "{", "}"
            parts = [
                f"{of(k)}: {of(v)}" if k else f"**{of(v)}"
                for k, v in zip(tree.keys, tree.values, strict=True)
            ]
        case ast.Lambda():
            head = text[: len(text) - len(of(tree.body))]
            return head + wrapped(of(tree.body), indent, before + len(head), width)
        case ast.BinOp(left=ast.Tuple() as left):
            return wrapped(of(left), indent, before, 0) + text[len(of(left)) :]
        case ast.Set():
            start, stop, parts = "{", "}", [of(part) for part in tree.elts]
        case ast.List() | ast.Tuple():
            start, stop = ("[", "]") if isinstance(tree, ast.List) else ("(", ")")
            parts = [of(part) for part in tree.elts]
        case _:
            return text
    if len(parts) == 1 and isinstance(tree, ast.Call) and indent + 4 + len(parts[0]) <= width:
        return f"{start}\n{' ' * (indent + 4)}{parts[0]}\n{' ' * indent}{stop}"
    lines = [_part(part, indent + 4, width) for part in parts]
    return start + "\n" + "".join(f"{' ' * (indent + 4)}{line},\n" for line in lines) + " " * indent + stop


def _part(part: str, indent: int, width: int) -> str:
    """An argument, over as many lines as it needs."""
    named = re.match(r'(\w+=|"[^"]*": |\*\*)(?=\S)', part)
    head = named[0] if named and not part.startswith(f"{named[0]}=") else ""
    return head + wrapped(part[len(head) :], indent, len(head) + 1, width)
