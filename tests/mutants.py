"""Mutation testing of the maths: small faults are put into it one by one, and the tests must notice each.

    python tests/mutants.py                            # all mutants of core, functional, mechanisms, fusions
    python tests/mutants.py --count 100 --seed 1       # a sample
    python tests/mutants.py attnzoo/core/mask.py       # one file

A mutant changes one operator, comparison, constant or order of arguments, drops a `not`, or removes a statement. The
tests that matter run once without a mutant, to see which of them reach which line. For each mutant a forked process then
runs those that reach its line, the quickest first, on a copy of the package that holds the change; the mutant is killed
when one fails, or when they hang. Mutants that cannot be noticed, because they compute the same, stand in `EQUIVALENT`
with the reason.
"""

import argparse
import ast
import compileall
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("core", "functional", "mechanisms", "fusions")
# a mutant hangs when its tests take so many times as long as without it, and so many seconds
LONGER, GRACE = 5, 30
EMPTY = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
"""git's empty tree: since then everything has changed."""
THOROUGH = "tests/test_conformance.py::test_conformance_of_what_is_touched"
"""The same checks in more scenes."""
FIRST = 25  # as many of the quickest tests run before the others are looked for
SOME = "softmax soft agent linformer map_pool region window_cross add gated head_split"
"""Whose conformance matters for what all components share."""

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
"""Each operator and what takes its place."""
COMMUTES = ("min", "max", "minimum", "maximum", "promote_types", "transpose")
"""Functions that do not mind the order of their arguments."""
TEXTS = ("Card", "FusionCard", "Paper")
"""Calls that say things rather than compute them; their claims are what the conformance suite is about."""

EQUIVALENT: dict[str, str] = {
    "attnzoo/functional/additive.py: 170.0 -> 255.0": "each exponential is finite up to 354, and where only the product "
    "is not, 1 / (1 + ∞) is the limit that is due",
    "attnzoo/core/component.py: super().__init_subclass__(**options) -> pass": "`object` has nothing to do there",
    "attnzoo/core/kv_cache.py: stop > self._growing[0].shape[-2] -> stop >= self._growing[0].shape[-2]": "the buffers grow "
    "one token sooner",
    "attnzoo/functional/neighbours.py: mask.dense(q.shape[2], k.shape[2], q.device) -> mask.dense(k.shape[2], q.shape[2], "
    "q.device)": "there are as many keys as queries",
    "attnzoo/mechanisms/linear/spatial_reduction.py: 1.0 -> 1.5": "where nothing exists, zero is divided",
}
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
            yield copy.copy(operand)
        case ast.Constant(value=bool(value)):
            yield _with(node, value=not value)
        case ast.Constant(value=int(value)):
            yield _with(node, value=value + 1)
        case ast.Constant(value=float(value)):
            yield _with(node, value=value * 1.5 if value else 1.0)
        case ast.Call(func, [first, second, *rest]) if not isinstance(first, ast.Starred):
            if (
                ast.dump(first) != ast.dump(second)
                and getattr(func, "attr", getattr(func, "id", "")) not in COMMUTES
            ):
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


@dataclass
class Reach:
    """What the tests that matter do when nothing is changed.

    Args:
        seconds: How long each takes, by its pytest id.
        lines: Which tests run a line, by file (from the top of the repository) and number.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, list[str]]] = field(default_factory=dict)

    def of(self, mutant: Mutant) -> list[str]:
        """The tests that run a mutant's line; all, where it runs when the module is imported.

        The quickest come first, then those of the file itself, then the others in no order: those alike are not neighbours.
        """
        lines = self.lines.get(mutant.file, {})
        # where a line of a longer statement is not known by itself, the one before tells
        line = next((n for n in range(mutant.line, 0, -1) if n in lines), 0)
        found = lines.get(line, [""])
        found = [] if "" in found else found  # "" is the import, which all tests rest on
        tests = sorted(found or self.seconds, key=lambda test: self.seconds.get(test, 0.0))
        others = tests[FIRST:]
        random.Random(0).shuffle(others)
        return tests[:FIRST] + sorted(
            others, key=lambda test: f"test_{Path(mutant.file).stem}.py" not in test
        )


def matter_for(file: str) -> tuple[str, ...]:
    """Which tests matter for a file, as arguments of pytest; after the last, `::` and the components to conform.

    Args:
        file: Path from the top of the repository.
    """
    path = Path(file)
    if path.parts[1] in ("mechanisms", "fusions"):
        return f"tests/{path.parts[1]}/test_{path.stem}.py", f"tests/test_conformance.py::{path.stem}"
    stems = {
        file.stem for folder in ("core", "functional") for file in (ROOT / "attnzoo" / folder).glob("*.py")
    }
    own = sorted(f"tests/test_{stem}.py" for stem in stems if (ROOT / f"tests/test_{stem}.py").exists())
    more = [
        f"tests/test_{name}.py"
        for name in ("checks_catch", "functional", "ham", "given", "decode", "instruments")
    ]
    return (*own, *more, "tests/mechanisms", "tests/fusions", f"tests/test_conformance.py::{SOME}")


class Selected:
    """A plugin of pytest: only these tests, in this order.

    Args:
        wanted: Ids of tests, or None for all of them.
        components: Of the conformance tests, keep only those of these.
    """

    def __init__(self, wanted: Sequence[str] | None, components: Sequence[str] = ()):
        self.order = None if wanted is None else {test: i for i, test in enumerate(wanted)}
        self.components = tuple(f"test_conformance[{name}-" for name in components)

    def pytest_collection_modifyitems(self, items: list) -> None:
        kept = [item for item in items if self._keeps(item.nodeid)]
        items[:] = kept if self.order is None else sorted(kept, key=lambda item: self.order[item.nodeid])

    def _keeps(self, test: str) -> bool:
        if self.components and "::test_conformance[" in test and not any(c in test for c in self.components):
            return False
        return self.order is None or test in self.order


class Recorded:
    """A plugin of pytest: how long each test takes and which lines it runs."""

    def __init__(self, coverage):
        self.coverage, self.seconds, self.failed = coverage, {}, []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def _pytest(arguments: Sequence[str], *plugins: object) -> int:
    """pytest's exit status; 0 when there were no tests. Every check and oracle is asked, as CI does of what changed."""
    import pytest

    sys.dont_write_bytecode = True
    os.environ["ATTNZOO_SINCE"] = EMPTY
    options = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        "not slow",
        "--deselect",
        THOROUGH,
    ]
    return pytest.main([*options, *arguments], list(plugins)) % 5  # 5: there are none


def reach(arguments: tuple[str, ...], overlay: Path) -> Reach | None:
    """Run tests without a mutant, in a process of their own; None when one fails.

    Args:
        arguments: What `matter_for` said.
        overlay: A copy of the package.
    """
    result = overlay / "reach.json"
    result.unlink(missing_ok=True)

    def run() -> int:
        from coverage import Coverage

        folders = [str(overlay / "attnzoo" / folder) for folder in FOLDERS]
        coverage = Coverage(data_file=None, config_file=False, source=folders)
        recorded = Recorded(coverage)
        files, _, names = " ".join(arguments).partition("::")
        with coverage.collect():
            status = _pytest(files.split(), Selected(None, names.split()), recorded)
        if status:
            result.write_text(json.dumps(recorded.failed))
            return status
        data = coverage.get_data()
        lines = {
            str(Path(file).relative_to(overlay)): data.contexts_by_lineno(file)
            for file in data.measured_files()
        }
        result.write_text(json.dumps([recorded.seconds, lines]))
        return 0

    if _forked(run) != 0:
        print(f"without a mutant fail {result.read_text() if result.exists() else arguments}", flush=True)
        return None
    seconds, lines = json.loads(result.read_text())
    return Reach(seconds, {file: {int(n): tests for n, tests in of.items()} for file, of in lines.items()})


def survives(mutant: Mutant, overlay: Path, tests: Sequence[str], seconds: float) -> bool:
    """Whether all of the tests pass with it.

    Args:
        mutant: What to try.
        overlay: A copy of the package in which it may be written.
        tests: Ids of tests, the most telling first.
        seconds: How long they take without it.
    """
    there = overlay / mutant.file
    kept, times = there.read_bytes(), there.stat()

    def run() -> int:
        for some in (tests[:FIRST], tests[FIRST:]):
            files = list(dict.fromkeys(test.partition("::")[0] for test in some))
            if some and _pytest(files, Selected(some)):
                return 1
        return 0

    there.write_text(mutant.source, encoding="utf-8")
    try:
        return _forked(run, LONGER * seconds + GRACE) == 0
    finally:
        there.write_bytes(kept)
        os.utime(there, ns=(times.st_atime_ns, times.st_mtime_ns))


def _forked(run: Callable[[], int], limit: float = float("inf")) -> int:
    """Exit status of a function in a silent process of its own; 1 when it raises or takes longer than so many seconds."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        status = 1
        try:
            status = run()
        finally:
            os._exit(status)
    began = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - began > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 1
        time.sleep(0.02)


def copied(folder: str) -> Path:
    """A compiled copy of the package, to be changed, with what it finds beside itself.

    Args:
        folder: Where to put it.
    """
    overlay = Path(tempfile.mkdtemp(dir=folder)).resolve()
    shutil.copytree(ROOT / "attnzoo", overlay / "attnzoo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("recipes", "docs", "plugins"):
        (overlay / name).symlink_to(ROOT / name)
    compileall.compile_dir(overlay / "attnzoo", quiet=1)
    return overlay


OVERLAY: list[Path] = []
"""The copy of this process."""


def _own_copy(folder: str) -> None:
    """Give a worker a copy of its own, and let its forks import it."""
    OVERLAY.append(copied(folder))
    sys.path.insert(0, str(OVERLAY[0]))


def _reach(arguments: tuple[str, ...]) -> Reach | None:
    return reach(arguments, OVERLAY[0])


def _judge(mutant: Mutant, tests: list[str], seconds: float) -> bool:
    return survives(mutant, OVERLAY[0], tests, seconds)


def main() -> int:
    """Make mutants, run tests, print who survived; 1 when fewer than 95 % of those that can be noticed die."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--count", type=int, help="how many, drawn at random; all when left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    for file in given.files:
        if not file.is_file():
            parser.error(f"there is no file {file}")
    os.chdir(ROOT)
    files = [file.resolve() for file in given.files] or [
        file for folder in FOLDERS for file in sorted((ROOT / "attnzoo" / folder).rglob("*.py"))
    ]
    mutants = [mutant for file in files for mutant in mutants_of(file)]
    random.Random(given.seed).shuffle(mutants)  # what is printed on the way is a fair sample
    mutants = mutants[: given.count]
    import hypothesis  # noqa: F401 - here, so that forks need not import what no mutant changes
    import pytest  # noqa: F401
    import timm  # noqa: F401
    import torch

    torch.set_num_threads(1)
    tally, survived = Counter[str](), []
    with (
        tempfile.TemporaryDirectory(prefix="attnzoo-mutants-") as folder,
        ProcessPoolExecutor(given.workers, get_context("fork"), _own_copy, (folder,)) as pool,
    ):
        wanted = list(dict.fromkeys(matter_for(mutant.file) for mutant in mutants))
        reached = dict(zip(wanted, pool.map(_reach, wanted), strict=True))
        if None in reached.values():
            return 2
        tried = {}
        for mutant in mutants:
            if f"{mutant.file}: {mutant.what.partition(': ')[2]}" in EQUIVALENT:
                tally["equivalent"] += 1
                continue
            known = reached[matter_for(mutant.file)]
            tests = known.of(mutant)
            tried[pool.submit(_judge, mutant, tests, sum(known.seconds.get(t, 0.0) for t in tests))] = mutant
        for number, future in enumerate(as_completed(tried), 1):
            tally["survived" if future.result() else "killed"] += 1
            if future.result():
                survived.append(tried[future])
                print(f"survived {tried[future]}", flush=True)
            if number % 25 == 0:
                print(f"{number} of {len(tried)}: {tally['killed']} killed", flush=True)
    judged = tally["killed"] + tally["survived"]
    share = 100 * tally["killed"] / judged if judged else 100.0
    print(f"{tally['killed']} of {judged} killed ({share:.1f} %), {tally['equivalent']} equivalent, "
          f"{len(survived)} survived")  # fmt: skip
    for mutant in sorted(survived, key=str):
        print(f"  {mutant}")
    return int(share < 95)


if __name__ == "__main__":
    sys.exit(main())
