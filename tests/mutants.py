"""Mutation testing of the maths: small faults are put into it one by one, and the tests must notice each.

    python tests/mutants.py                            # all mutants of core, functional, mechanisms, fusions
    python tests/mutants.py --count 100 --seed 1       # a sample
    python tests/mutants.py attnzoo/core/mask.py       # one file

A mutant changes one operator, comparison, constant or order of arguments, drops a `not`, or removes a statement. For
each, a forked process runs the tests that matter on a copy of the package that holds the change; the mutant is killed
when one fails, or when they hang. Mutants that cannot be noticed,
because they compute the same, stand in `EQUIVALENT` with the reason.
"""

import argparse
import ast
import atexit
import copy
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("core", "functional", "mechanisms", "fusions")
LONGER = 3  # a mutant hangs when its tests take this many times as long as without it

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
"""Each operator and what takes its place."""
TEXTS = ("Card", "FusionCard", "Paper")
"""Calls that say things rather than compute them; their claims are what the conformance suite is about."""

EQUIVALENT: dict[str, str] = {}
"""`file: line as it stands -> line as it becomes`, with the reason why nobody could notice."""


@dataclass(frozen=True)
class Mutant:
    """One changed file.

    Args:
        file: Path from the top of the repository.
        line: Where the change is.
        what: The line before and after.
        source: The whole changed file.
    """

    file: str
    line: int
    what: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield _with(node, ops=[SWAPS[type(op)]()])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            yield _with(node, op=SWAPS[type(op)]())
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield _with(node, value=not value)
        case ast.Constant(value=int(value)):
            yield _with(node, value=value + 1)
        case ast.Constant(value=float(value)):
            yield _with(node, value=value * 1.5 if value else 1.0)
        case ast.Call(args=[first, second, *rest]) if not isinstance(first, ast.Starred):
            if ast.dump(first) != ast.dump(second):
                yield _with(node, args=[second, first, *rest])
        case ast.IfExp(body=body, orelse=other):
            yield _with(node, body=other, orelse=body)
        case ast.Raise() | ast.Expr(value=ast.Call()):
            yield ast.Pass()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _maths(tree: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every place whose content may change: owner, field, index; texts, annotations and error messages are left out."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "keywords") and isinstance(
            tree, ast.ClassDef | ast.arg
        ):
            continue
        if name in ("annotation", "returns", "decorator_list"):
            continue
        many = value if isinstance(value, list) else [value]
        for index, child in enumerate(many):
            if not isinstance(child, ast.AST):
                continue
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in TEXTS:
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):  # a docstring
                continue
            yield tree, name, index if isinstance(value, list) else None
            if not isinstance(child, ast.Raise | ast.JoinedStr):
                yield from _maths(child)


def mutants_of(file: Path) -> list[Mutant]:
    """All mutants of a file.

    Args:
        file: A Python file.
    """
    text = file.read_text(encoding="utf-8")
    tree, lines, found = ast.parse(text), text.splitlines(), []
    for owner, name, index in list(_maths(tree)):
        holder = getattr(owner, name)
        child = holder if index is None else holder[index]
        if getattr(child, "lineno", None) is None:
            continue
        for changed in _changes(child):
            ast.copy_location(changed, child)
            _put(owner, name, index, changed)
            whole = ast.unparse(ast.fix_missing_locations(tree))
            before = ast.get_source_segment(text, child) or lines[child.lineno - 1]
            _put(owner, name, index, changed)
            what = f"{' '.join(before.split())} -> {' '.join(ast.unparse(changed).split())}"
            _put(owner, name, index, child)
            found.append(
                Mutant(str(file.relative_to(ROOT)), child.lineno, f"line {child.lineno}: {what}", whole)
            )
    return found


def _put(owner: ast.AST, name: str, index: int | None, child: ast.AST) -> None:
    if index is None:
        setattr(owner, name, child)
    else:
        getattr(owner, name)[index] = child


def matter_for(file: str) -> list[list[str]]:
    """Which tests matter for a file, as arguments of pytest, the quickest first."""
    path = Path(file)
    own = path.stem
    kind = path.parts[1]
    conformance = ["tests/test_conformance.py", "-k"]
    if kind in ("mechanisms", "fusions"):
        return [[f"tests/{kind}/test_{own}.py"], [*conformance, f"{own}-"]]
    quick = [f"tests/test_{own}.py"] if (ROOT / f"tests/test_{own}.py").exists() else []
    runs = [[*quick, "tests/test_fused.py", "tests/test_functional.py"]]
    some = "softmax- or soft- or linformer- or map_pool- or region- or window_cross- or add- or head_split-"
    return [
        *runs,
        [*conformance, some],
        ["tests/test_checks_catch.py"],
        ["tests/mechanisms", "tests/fusions"],
    ]


def survives(mutant: Mutant, overlay: Path, limit: float) -> bool:
    """Whether all tests that matter pass with it.

    Args:
        mutant: What to try.
        overlay: A copy of the repository in which it may be written.
        limit: Seconds after which the tests count as hanging.
    """
    there, kept = overlay / mutant.file, (ROOT / mutant.file).read_text(encoding="utf-8")
    there.write_text(mutant.source, encoding="utf-8")
    try:
        return _passes(mutant.file, limit)
    finally:
        there.write_text(kept, encoding="utf-8")


def _passes(file: str, limit: float = math.inf) -> bool:
    """Whether the tests that matter for a file pass, in a process of their own, within so many seconds."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os._exit(_run(file))
    began = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        if time.monotonic() - began > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.02)


def _run(file: str) -> int:
    """0 when every test passes."""
    import pytest

    sys.dont_write_bytecode = True
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    try:
        for arguments in matter_for(file):
            if pytest.main([*options, *arguments]) not in (0, 5):  # 5: there are none
                return 1
    except BaseException:  # a fault while tests are collected is noticed too
        return 1
    return 0


def _copy(overlay: Path) -> None:
    """The package, to be changed, and what it finds beside itself."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "attnzoo", overlay / "attnzoo", ignore=ignore)
    for name in ("recipes", "docs", "plugins"):
        (overlay / name).symlink_to(ROOT / name)


def main() -> int:
    """Make mutants, run tests, print who survived; 1 when fewer than 95 % of those that can be noticed die."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--count", type=int, help="how many, drawn at random; all when left out")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for file in given.files:
        if not file.is_file():
            parser.error(f"there is no file {file}")
    os.chdir(ROOT)
    files = [file.resolve() for file in given.files] or [
        file for folder in FOLDERS for file in sorted((ROOT / "attnzoo" / folder).rglob("*.py"))
    ]
    mutants = [mutant for file in files for mutant in mutants_of(file)]
    if given.count is not None and given.count < len(mutants):
        mutants = sorted(random.Random(given.seed).sample(mutants, given.count), key=str)
    import hypothesis  # noqa: F401 - here, so that forks need not import what no mutant changes
    import pytest  # noqa: F401
    import timm  # noqa: F401
    import torch

    torch.set_num_threads(1)
    overlay = Path(tempfile.mkdtemp(prefix="attnzoo-mutants-"))
    atexit.register(shutil.rmtree, overlay, ignore_errors=True)
    _copy(overlay)
    sys.path.insert(0, str(overlay))
    limits = {}
    for file in dict.fromkeys(mutant.file for mutant in mutants):
        began = time.monotonic()
        if not _passes(file):
            print(f"the tests that matter for {file} fail without a mutant")
            return 2
        limits[file] = LONGER * (time.monotonic() - began)
    killed, survived, equal = 0, [], 0
    for number, mutant in enumerate(mutants, 1):
        reason = EQUIVALENT.get(f"{mutant.file}: {mutant.what.partition(': ')[2]}")
        if reason is not None:
            equal += 1
        elif survives(mutant, overlay, limits[mutant.file]):
            survived.append(mutant)
            print(f"survived {mutant}", flush=True)
        else:
            killed += 1
        if number % 25 == 0:
            print(f"{number} of {len(mutants)}: {killed} killed, {len(survived)} survived", flush=True)
    judged = killed + len(survived)
    share = 100 * killed / judged if judged else 100.0
    print(f"{killed} of {judged} killed ({share:.1f} %), {equal} equivalent, {len(survived)} survived")
    return int(share < 95)


if __name__ == "__main__":
    sys.exit(main())
