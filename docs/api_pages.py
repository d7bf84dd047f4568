"""The reference of Python: an entry for every public name, as tests/api_surface.json records them.

    python docs/api_pages.py FOLDER     writes a page for each module

As an extension of Sphinx it reads docstrings as people wrote them: plain text with Google's sections, `code` between
single backticks, and code or tables where lines are indented. Nothing else in them is markup.
"""

import ast
import inspect
import json
import re
import sys
import textwrap
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

ROOT = Path(__file__).parent.parent
SECTIONS = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Example|Examples|Note|Notes):$")


def surface() -> dict[str, list[str]]:
    """Public names by module; `attnzoo` first, then alphabetically."""
    recorded = json.loads((ROOT / "tests" / "api_surface.json").read_text(encoding="utf-8"))
    return {module: sorted(recorded[module]) for module in sorted(recorded)}


def pages() -> dict[str, str]:
    """reStructuredText of each page, by its name without suffix; `index` lists them."""
    home: dict[int, str] = {}  # where a thing that several modules offer is described: where it is met first
    made = {}
    for module, names in surface().items():
        own, others = [], []
        for name in names:
            value, path = getattr(import_module(module), name), f"{module}.{name}"
            kind = kind_of(value)
            if kind == "module":
                own.append(f"The module :py:mod:`{value.__name__}` has a page of its own.\n")
            elif id(value) in home:
                others.append(entry(kind, name, f"The same as :py:obj:`{home[id(value)]}`."))
            elif kind == "data":
                own.append(entry(kind, name, rst(comments_of(ROOT / "attnzoo").get(name, "")), value=value))
            else:
                own.append(documented(kind, path, value))
            if kind != "module":
                home.setdefault(id(value), path)
        head = f"{module}\n{'=' * len(module)}\n\n.. automodule:: {module}\n"
        also = ["Also here\n---------\n"] if others else []
        made[module] = "\n".join([head, *own, *also, *others])
    listed = "\n".join(f"   {module}" for module in made)
    made["index"] = (
        "Python\n======\n\nEvery public name, by the module that people import it from. "
        f"What is not here may change without notice.\n\n.. toctree::\n   :maxdepth: 1\n\n{listed}\n"
    )
    return made


def kind_of(value: Any) -> str:
    """`module`, `class`, `exception`, `function` or `data`."""
    if inspect.ismodule(value):
        return "module"
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function" if inspect.isroutine(value) else "data"


def documented(kind: str, path: str, value: Any) -> str:
    """The directive that takes an entry from the docstring."""
    options = "" if kind == "function" else "\n   :members:"
    if inspect.isclass(value) and value.__bases__ != (object,):
        options += "\n   :show-inheritance:"
    return f".. auto{kind}:: {path}{options}\n"


def entry(kind: str, name: str, text: str, value: Any = None) -> str:
    """An entry that is written here, of the module of the page."""
    shown = f"\n   :value: {value!r}" if isinstance(value, int | str) else ""
    return f".. py:{kind}:: {name}{shown}\n\n{textwrap.indent(text, '   ')}\n"


@cache
def comments_of(package: Path) -> dict[str, str]:
    """Strings below the assignments in a folder's files, by the name that is assigned to."""
    found: dict[str, str] = {}
    for file in sorted(package.rglob("*.py")):
        for statement, after in pairwise(ast.parse(file.read_text(encoding="utf-8")).body):
            targets = (
                statement.targets
                if isinstance(statement, ast.Assign)
                else [getattr(statement, "target", None)]
            )
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = inspect.cleandoc(str(after.value.value))
                found |= {target.id: text for target in targets if isinstance(target, ast.Name)}
    return found


def rst(text: str) -> str:
    """A docstring as reStructuredText; its sections stay for napoleon.

    Args:
        text: Without common indentation.
    """
    out: list[str] = []
    said: list[str] = []  # lines of prose since the last block of code
    inside = False  # a section, whose lines are indented
    lines = text.expandtabs().splitlines()
    while lines:
        line = lines.pop(0)
        fenced = line.lstrip().startswith("```")
        if line and not line.startswith(" "):
            inside = bool(SECTIONS.match(line))
        if not fenced and (not line.startswith(" ") or inside or in_list(said)):
            said.append(line)
            continue
        block = [] if fenced else [line]
        while lines and (not lines[0].lstrip().startswith("```") if fenced else lines[0][:1] in ("", " ")):
            block.append(lines.pop(0))
        if fenced and lines:
            lines.pop(0)
        code = textwrap.dedent("\n".join(block)).strip("\n")
        pad = " " * (len(line) - len(line.lstrip())) if inside else ""
        made = ["", f".. code-block:: {language(code)}", "", *textwrap.indent(code, "   ").splitlines(), ""]
        out += [prose("\n".join(said)), *(pad + each for each in made)]
        said = []
    return "\n".join([*out, prose("\n".join(said))])


def in_list(written: list[str]) -> bool:
    """Whether an indented line would go on with an item of a list."""
    for line in reversed(written):
        if not line.strip():
            return False
        if not line.startswith(" "):
            return bool(re.match(r"(-|\d+\.) ", line))
    return False


def language(code: str) -> str:
    """`python` for what Python can read, else `text`."""
    try:
        ast.parse(code)
    except SyntaxError:
        return "text"
    return "python"


def prose(text: str) -> str:
    """Text with `code` as Sphinx has it, and everything that reStructuredText would take for markup escaped."""
    parts = re.split(r"(`+[^`]+`+)", text)
    out = ""
    for at, part in enumerate(parts):
        if at % 2 == 0:
            out += re.sub(r"([*|\\])|(?<=\w)(_)(?!\w)", r"\\\g<0>", part)
            continue
        code = part.strip("`")
        role = f":py:obj:`{code}`" if re.fullmatch(r"[A-Za-z_][\w.]*", code) else f"``{code}``"
        before, after = (parts[at - 1][-1:] or " "), (parts[at + 1][:1] or " ")
        out += ("" if before in " \n([{\"'-/" else "\\ ") + role + ("\\ " if re.match(r"\w", after) else "")
    return out


def read_docstring(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """For Sphinx's `autodoc-process-docstring`: the lines, in place."""
    lines[:] = rst("\n".join(lines)).splitlines() + [""]


def read_signature(
    app: Any, what: str, name: str, value: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """For Sphinx's `autodoc-process-signature`: defaults that are no Python, such as `<factory>`, become `...`."""
    return signature and re.sub(r"<[^<>]+>", "...", signature), returned


def list_parameters(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """For Sphinx's `html-page-context`: the lines of a long signature as a list; Sphinx has definitions of no terms."""
    context["body"] = re.sub(
        r'<dl>\n<dd>(<em class="sig-param">.*?)</dl>',
        lambda found: f'<ul class="sig-params">\n<li>{found[1]}</ul>'.replace("dd>", "li>"),
        context.get("body", ""),
        flags=re.S,
    )


def setup(app: Any) -> dict[str, Any]:
    """As an extension of Sphinx."""
    app.connect("autodoc-process-docstring", read_docstring, priority=100)  # before napoleon
    app.connect("html-page-context", list_parameters)
    app.connect("autodoc-process-signature", read_signature)
    return {"env_version": crc32(Path(__file__).read_bytes()), "parallel_read_safe": True}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pages().items():
        (folder / f"{name}.rst").write_text(page, encoding="utf-8")
