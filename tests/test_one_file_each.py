"""Every mechanism and fusion has a test file of its own, found in one guess, with a hand case, an oracle, an identity and
wrong versions that the oracle catches."""

import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KINDS = {"mechanisms": "mechanisms/*/*.py", "fusions": "fusions/*.py"}
FILES = [
    (kind, file)
    for kind, pattern in KINDS.items()
    for file in sorted((ROOT / "attnzoo").glob(pattern))
    if file.name != "__init__.py"
]


def functions_of(kind, name):
    """The test functions of a file by name."""
    module = importlib.import_module(f"{kind}.test_{name}")
    return {n: f for n, f in vars(module).items() if n.startswith("test_") and inspect.isfunction(f)}, module


def oracles(kind, name):
    """Those that compare with an oracle."""
    return {n: f for n, f in functions_of(kind, name)[0].items() if hasattr(f, "oracle")}


@pytest.mark.parametrize("kind,file", FILES, ids=lambda v: getattr(v, "stem", v))
def test_every_mechanism_and_fusion_has_its_file(kind, file):
    own = f"tests/{kind}/test_{file.stem}.py"
    assert (ROOT / own).is_file(), f"{file.relative_to(ROOT)} wants {own}"
    tests, module = functions_of(kind, file.stem)
    for start, what in (("test_hand_", "numbers worked out by hand"), ("test_identity_", "an identity")):
        assert any(name.startswith(start) for name in tests), f"{own} has no {start}...: {what}"
    home = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    compared = {f.component.__module__ for f in oracles(kind, file.stem).values()}
    assert compared == {home}, f"{own} has no @against test of what {file.name} defines"
    assert len(getattr(module, "MUTANTS", {})) >= 3 and "test_mutants" in tests, f"{own} has too few MUTANTS"


def test_no_file_is_about_nothing():
    names = {(kind, f"test_{file.stem}") for kind, file in FILES}
    found = {(kind, file.stem) for kind in KINDS for file in (ROOT / "tests" / kind).glob("test_*.py")}
    assert found == names


@pytest.mark.slow
@pytest.mark.parametrize("kind,file", FILES, ids=lambda v: getattr(v, "stem", v))
def test_oracles_in_200_scenes(kind, file):
    for oracle_test in oracles(kind, file.stem).values():
        result = oracle_test.compare(examples=200)
        assert result.ok, str(result)
