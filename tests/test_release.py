"""What is released: the distributions that are built, what is in them, and that they do what people will do with them."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from attnzoo.version import VERSION

ROOT = Path(__file__).parent.parent
SOURCES = ("attnzoo", "recipes", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")


def run(*command, cwd, **options):
    """A command that must succeed; its output."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def build(source, folder):
    """The distributions of a source tree: the sdist and the wheel."""
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=source)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def contents(wheel):
    """The bytes of each file of a wheel but of the record of them."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist and the wheel of a copy of this tree."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    return build(source, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def files(built):
    return contents(built[1])


def test_the_version_stands_in_one_place(built, files):
    sdist, wheel = built
    assert sdist.name == f"attnzoo-{VERSION}.tar.gz" and wheel.name == f"attnzoo-{VERSION}-py3-none-any.whl"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+) \((\S+)\)$", changelog, flags=re.M)
    assert newest and newest[1] == VERSION and re.fullmatch(r"\d{4}-\d\d-\d\d|unreleased", newest[2])


def test_the_wheel_has_what_runs_and_nothing_else(files):
    packaged = {
        name.removeprefix("attnzoo/_recipes/") for name in files if name.startswith("attnzoo/_recipes/")
    }
    assert packaged == {
        str(path.relative_to(ROOT / "recipes")) for path in (ROOT / "recipes").rglob("*.yaml")
    }
    here = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "attnzoo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    rest = {
        name for name in files if not name.startswith(("attnzoo/_recipes/", f"attnzoo-{VERSION}.dist-info/"))
    }
    assert rest == here
    assert {"attnzoo/py.typed", "attnzoo/__init__.pyi", "attnzoo/bench/lighthouse.png"} <= rest
    assert any("scaffold" in name and not name.endswith(".py") for name in rest)


def test_the_sdist_builds_the_same_wheel(built, files, tmp_path):
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    (tmp_path / "dist").mkdir()
    _, again = build(unpacked, tmp_path / "dist")
    assert contents(again) == files


def test_the_metadata_say_what_an_index_shows(files):
    metadata = HeaderParser().parsestr(files[f"attnzoo-{VERSION}.dist-info/METADATA"].decode())
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11" and metadata["Description-Content-Type"] == "text/markdown"
    minors = [c.rpartition(" ")[2] for c in metadata.get_all("Classifier") if re.search(r":: 3\.\d+$", c)]
    stated = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert minors == re.findall(r"^\| Python (3\.\d+)", stated, flags=re.M)
    entry = files[f"attnzoo-{VERSION}.dist-info/entry_points.txt"].decode()
    assert "attnzoo = attnzoo.cli.app:main" in entry


@pytest.mark.slow  # half a minute: mypy reads torch
def test_users_are_typed(tmp_path):
    """py.typed holds: what people write passes mypy --strict, and a wrong call does not."""
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        tmp_path / "cache",
    ]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    run(*command, ROOT / "tests" / "typed" / "user.py", cwd=tmp_path, env=environment)
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import attnzoo\nattnzoo.compose('ham_a', edits=3)\nx: int = attnzoo.diff('a', 'b').params\n"
    )
    done = subprocess.run([*command, wrong], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.count("error:") == 2, done.stdout


def environment(folder, *requirements, beside=False):
    """The Python of a new environment with these requirements.

    Args:
        folder: Where.
        requirements: For pip, `--no-deps` among them.
        beside: Whether what is installed here can be imported, too.
    """
    venv.create(folder, with_pip=not beside, symlinks=True)
    python = folder / "bin" / "python"
    if beside:
        site = next(folder.glob("lib/python*/site-packages"))
        site.joinpath("this.pth").write_text(
            f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        )
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*map(str, [*pip, *requirements])], capture_output=True, text=True)
    if done.returncode and re.search(
        r"No matching distribution|connection|Temporary failure", done.stderr, re.I
    ):
        pytest.skip(f"no package index that has {' '.join(map(str, requirements))[-80:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return python


@pytest.mark.slow  # two minutes, with a download of torch
def test_a_bare_environment_composes_checks_and_trains(built, tmp_path):
    constraints = ["--constraint", ROOT / "constraints.txt"]
    python = environment(tmp_path / "bare", *constraints, "torch", "torchvision", built[1])
    attnzoo = python.parent / "attnzoo"
    away = tmp_path / "away"
    away.mkdir()
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    assert VERSION in run(attnzoo, "--version", cwd=away, env=clean)
    assert "parameters" in run(attnzoo, "compose", "ham_a", cwd=away, env=clean)
    assert "softmax" in run(attnzoo, "check", "softmax", "--examples", "5", cwd=away, env=clean)
    run(attnzoo, "train", "digits_softmax", "--epochs", "1", "--out", "trained", cwd=away, env=clean)
    assert "accuracy" in run(attnzoo, "eval", "trained", cwd=away, env=clean)
    code = "import timm, attnzoo; print(type(timm.create_model('ham_vit_b', device='meta')).__module__)"
    assert run(python, "-c", code, cwd=away, env=clean).strip() == "attnzoo.hosts.vision_transformer"
    run(attnzoo, "eject", "ham_b", "--out", "ejected.py", cwd=away, env=clean)
    assert "parameters" in run(python, "ejected.py", cwd=away, env=clean)
    missing = subprocess.run(
        [attnzoo, "gallery", "--out", "gallery"], cwd=away, env=clean, capture_output=True, text=True
    )
    assert missing.returncode == 2 and 'pip install "attnzoo[docs]"' in missing.stderr


@pytest.mark.slow  # a minute and a half each
@pytest.mark.parametrize("wanted", ["oldest", "newest"])
def test_supported_timm(wanted, tmp_path):
    """The tests that lean on timm, with the lower bound of pyproject.toml and with the newest that it allows."""
    lower, upper = re.search(r'"timm>=([\d.]+),<(\d+)"', (ROOT / "pyproject.toml").read_text()).groups()
    requirement = f"timm=={lower}" if wanted == "oldest" else f"timm<{upper}"
    python = environment(tmp_path / "timm", "--no-deps", "--upgrade", requirement, beside=True)
    version = run(python, "-c", "import timm; print(timm.__version__)", cwd=tmp_path).strip()
    assert version == lower if wanted == "oldest" else version.split(".")[0] < upper
    files = ["timm", "bases", "weights", "timm_taps", "graft", "ham", "skip"]
    tests = [ROOT / "tests" / f"test_{name}.py" for name in files]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    run(python, "-m", "pytest", *options, *tests, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
