"""Plugins: found through entry points, kept apart from one another, switched on and off, installed for real."""

import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import venv
from importlib.metadata import distributions
from pathlib import Path

import processes
import pytest

from attnzoo.errors import RecipeError
from attnzoo.recipe import load, resolve
from attnzoo.zoo import Zoo, hookspecs, manager

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "plugins"
PART = """
    from attnzoo import hookimpl
    from attnzoo.core import Card, Family, Head

    class Own(Head):
        card = Card(name="{name}", family=Family.MIXING, summary="What it is.")

        def __init__(self, site):
            super().__init__(site)

        def attend(self, q, k, v, *, mask, layout):
            return v

    @hookimpl
    def attnzoo_mechanisms():
        return [Own]
"""
HOOK = """
    from attnzoo import hookimpl

    @hookimpl
    def attnzoo_{hook}():
        {body}
"""
BROKEN = {
    "import_error": ("AZ001", "import no_such_module_anywhere"),
    "syntax_error": ("AZ001", "def broken(:"),
    "system_exit": ("AZ001", "raise SystemExit(3)"),
    "base_exception": ("AZ001", "raise BaseException"),
    "misspelt_hook": ("AZ002", HOOK.format(hook="mechanism", body="return []")),
    "bad_signature": (
        "AZ003",
        """
        from attnzoo import hookimpl

        @hookimpl
        def attnzoo_mechanisms(registry):
            return []
        """,
    ),
    "other_version": ("AZ004", "ATTNZOO_API = 99"),
    "version_before": ("AZ004", "ATTNZOO_API = 1"),
    "hook_raises": ("AZ005", HOOK.format(hook="fusions", body="raise TypeError('inside')")),
    "hook_exits": ("AZ005", HOOK.format(hook="recipes", body="raise SystemExit")),
    "generator_raises": ("AZ005", HOOK.format(hook="mechanisms", body="yield 1 / 0")),
    "returns_none": ("AZ006", HOOK.format(hook="mechanisms", body="pass")),
    "returns_text": ("AZ006", HOOK.format(hook="recipes", body="return '/'")),
    "returns_numbers": ("AZ006", HOOK.format(hook="mechanisms", body="return [1, 2]")),
    "returns_other_class": ("AZ006", HOOK.format(hook="fusions", body="return [dict]")),
    "returns_abstract": (
        "AZ006",
        "from attnzoo.core import Head\n"
        + textwrap.dedent(HOOK.format(hook="mechanisms", body="return [Head]")),
    ),
    "no_card": ("AZ006", PART.replace('card = Card(name="{name}"', 'no = Card(name="own"')),
    "unreadable_option": (
        "AZ006",
        PART.format(name="odd").replace("(self, site)", "(self, site, *, no: object())"),
    ),
    "recipe_missing": (
        "AZ006",
        HOOK.format(hook="recipes", body="from pathlib import Path; return [Path('/no/where')]"),
    ),
    "recipe_relative": (
        "AZ006",
        HOOK.format(hook="recipes", body="from pathlib import Path; return [Path('.')]"),
    ),
    "same_name_twice": ("AZ009", PART.format(name="twice").replace("[Own]", "[Own, Own]")),
    "slow": ("AZ007", "import time\ntime.sleep(1.05)"),
    "clash_with_builtin": ("AZ012", PART.format(name="softmax")),
    "clash_two": ("AZ012", PART.format(name="shared")),
}
"""Kinds of broken plugin: the code they must get, and their source."""
USABLE = {"slow", "clash_with_builtin", "clash_two"}
"""What is only warned of: the plugin is loaded."""


def write_plugin(folder, name, source, dist=None, target=None):
    """A plugin as pip leaves it: a module and a dist-info with an entry point."""
    if source is not None:
        (folder / f"az_{name}.py").write_text(textwrap.dedent(source))
    info = folder / f"{dist or f'az_{name}'}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist or f'az-{name}'}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[attnzoo]\n{name} = {target or f'az_{name}'}\n")


def points(folder):
    """The entry points of the plugins in a folder."""
    return [p for d in distributions(path=[str(folder)]) for p in d.entry_points if p.group == "attnzoo"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder on `sys.path`; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(manager, "SLOW", math.inf)  # on a busy machine any import may take a second
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("az_")]:
        del sys.modules[name]


def run(*command, python=sys.executable, path=None, code=0, **environment):
    """Run Python, outside the repository, and hold it to its exit code; what it wrote."""
    extra = (
        {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"} if path else {}) | environment
    )
    where = tempfile.gettempdir()
    if python == sys.executable:
        done = processes.run(*command, env=os.environ | extra, cwd=where)
    else:
        done = subprocess.run(
            [python, *command], capture_output=True, text=True, env=os.environ | extra, cwd=where
        )
    assert done.returncode == code, done.stdout + done.stderr
    return done


BUILTIN = Zoo.of()


def assert_builtins(zoo):
    for kind in ("mechanisms", "fusions", "probes", "interventions", "recipes"):
        ours, theirs = getattr(BUILTIN, kind), getattr(zoo, kind)
        assert all(theirs[name] == entry for name, entry in ours.items())


def test_no_plugin_no_problem():
    assert BUILTIN.problems == []
    assert len(BUILTIN.mechanisms) > 5


# Broken plugins


@pytest.fixture(scope="module")
def menagerie(tmp_path_factory):
    """A zoo with all broken plugins at once, loaded through their entry points."""
    folder = tmp_path_factory.mktemp("broken")
    for name, (_, source) in BROKEN.items():
        write_plugin(folder, name, source)
    write_plugin(folder, "clash_three", PART.format(name="shared"))
    write_plugin(folder, "no_module", None)
    write_plugin(folder, "no_attribute", "x = 1", target="az_no_attribute:y")
    write_plugin(folder, "no_sense", None, target="not a module:")
    write_plugin(folder, "attnzoo", "x = 1")
    write_plugin(folder, "healthy", PART.format(name="healthy"))
    (folder / "az_healthy-1.0.dist-info" / "METADATA").unlink()
    sys.path.insert(0, str(folder))
    try:
        return Zoo.of(points=points(folder))
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_named_and_harms_nobody(menagerie, name):
    problem = next(
        p
        for p in menagerie.problems
        if p.plugin == name or (name == "clash_two" and p.plugin == "clash_three")
    )
    assert problem.code == BROKEN[name][0]
    assert problem.reason and "\n" not in problem.reason
    assert problem.fatal == (name not in USABLE)
    status = next(p.status for p in menagerie.providers if p.name == name)
    assert status == ("loaded" if name in USABLE else "failed")


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("no_module", "AZ001", "No module named"),
        ("no_attribute", "AZ001", "'y'"),
        ("no_sense", "AZ001", ""),
        ("attnzoo", "AZ008", ""),
    ],
)
def test_a_broken_entry_point(menagerie, name, code, says):
    problem = next(p for p in menagerie.problems if p.plugin == name)
    assert problem.code == code and says in problem.reason


def test_all_others_are_there(menagerie):
    assert_builtins(menagerie)
    assert menagerie.mechanisms["healthy"].plugin == "healthy"
    assert {p.code for p in menagerie.problems} >= {f"AZ00{i}" for i in (1, 2, 3, 4, 5, 6, 7, 8, 9)} | {
        "AZ012"
    }


def test_details_hold_the_traceback(menagerie):
    details = next(p.details for p in menagerie.problems if p.plugin == "hook_raises")
    assert "az_hook_raises.py" in details and "TypeError: inside" in details


def test_an_interrupt_is_no_problem_of_a_plugin(folder):
    write_plugin(folder, "interrupted", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        Zoo.of(points=points(folder))


def test_one_broken_plugin_at_a_time(folder):
    """Also alone: no problem is hidden by another plugin's."""
    for name, (code, source) in BROKEN.items():
        if name in {"slow", "clash_two"}:
            continue
        own = folder / name
        own.mkdir()
        sys.path.insert(0, str(own))
        write_plugin(own, name, source)
        zoo = Zoo.of(points=points(own))
        sys.path.remove(str(own))
        assert [(p.plugin, p.code) for p in zoo.problems] == [(name, code)]
        assert_builtins(zoo)


# Names


def test_two_plugins_of_one_name(folder):
    write_plugin(folder, "waves", PART.format(name="first"), dist="az_one")
    write_plugin(folder, "waves", None, dist="az_two", target="az_other")
    (folder / "az_other.py").write_text(textwrap.dedent(PART.format(name="second")))
    zoo = Zoo.of(points=points(folder))
    assert [(p.plugin, p.code) for p in zoo.problems] == [("waves", "AZ008")]
    assert "first" in zoo.mechanisms and "second" not in zoo.mechanisms


def test_a_plugin_cannot_take_a_builtin_name(folder):
    write_plugin(folder, "usurper", PART.format(name="softmax"))
    zoo = Zoo.of(points=points(folder))
    assert zoo.mechanisms["softmax"].plugin == "attnzoo"
    assert zoo.mechanisms["usurper/softmax"].plugin == "usurper"


RECIPE = """
recipe: 1
host: {kind: vit, base: vit_tiny_patch16_224}
attention: {use: NAME}
"""


def test_an_ambiguous_name_is_settled_by_plugin_slash_name(folder):
    write_plugin(folder, "east", PART.format(name="shared"))
    write_plugin(folder, "west", PART.format(name="shared"))
    zoo = Zoo.of(points=points(folder))
    with pytest.raises(RecipeError) as caught:
        resolve(load(RECIPE.replace("NAME", "shared")), zoo=zoo)
    assert caught.value.code == "AZ202"
    assert "east/shared" in str(caught.value) and "west/shared" in str(caught.value)
    plan = resolve(load(RECIPE.replace("NAME", "west/shared")), zoo=zoo).plans["blocks.0"]
    assert plan.entry.plugin == "west"


# Switches


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"east", "west"}),
        ({"ATTNZOO_PLUGINS": "east"}, {"east"}),
        ({"ATTNZOO_PLUGINS": "az-west, nobody"}, {"west"}),
        ({"ATTNZOO_PLUGINS": ""}, set()),
        ({"ATTNZOO_DISABLE_PLUGINS": "east"}, {"west"}),
        ({"ATTNZOO_DISABLE_PLUGINS": "az-east,west"}, set()),
        ({"ATTNZOO_DISABLE_PLUGINS": ""}, {"east", "west"}),
        ({"ATTNZOO_DISABLE_PLUGINS": "attnzoo"}, {"east", "west"}),
        ({"ATTNZOO_PLUGINS": "east,west", "ATTNZOO_DISABLE_PLUGINS": "west"}, {"east"}),
    ],
)
def test_switches(folder, monkeypatch, environment, expected):
    for variable in ("ATTNZOO_PLUGINS", "ATTNZOO_DISABLE_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    write_plugin(folder, "east", PART.format(name="east"))
    write_plugin(folder, "west", PART.format(name="west"))
    zoo = Zoo.of(points=points(folder))
    assert_builtins(zoo)
    status = {p.name: p.status for p in zoo.providers if p.name != "attnzoo"}
    assert {name for name, value in status.items() if value == "loaded"} == expected
    assert {value for name, value in status.items() if name not in expected} <= {"switched off"}
    assert {name for name in ("east", "west") if name in zoo.mechanisms} == expected
    for name in {"east", "west"} - expected:
        assert f"az_{name}" not in sys.modules


# In other processes

LOUD = 'print("noise on import")\n' + textwrap.dedent(PART.format(name="loud")).replace(
    "    return [Own]", '    print("noise in a hook")\n    return [Own]'
)
WITH_RECIPE = """
    from pathlib import Path
    {first}
    from attnzoo import hookimpl

    @hookimpl
    def attnzoo_recipes():
        return [Path(__file__).parent / "recipes"]
"""
TIMM_RECIPE = RECIPE.replace("NAME", "softmax").replace(
    "}\nattention", ", registers: early_vit_tiny}\nattention"
)


def test_noise_does_not_spoil_json_and_haste_is_explained(tmp_path):
    write_plugin(tmp_path, "loud", LOUD)
    write_plugin(tmp_path, "hasty", "import attnzoo\nattnzoo.load_zoo()")
    done = run("-m", "attnzoo", "plugins", "--json", path=tmp_path)
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["loud"]["mechanisms"] == ["loud"]
    assert "noise on import" in done.stderr and "noise in a hook" in done.stderr
    (problem,) = rows["hasty"]["problems"]
    assert "AZ001" in problem and "AZ010" in problem


def test_list_works_and_doctor_names_every_broken_plugin(tmp_path):
    for name, (_, source) in BROKEN.items():
        write_plugin(tmp_path, name, source)
    listed = run("-m", "attnzoo", "list", "mechanisms", "--json", path=tmp_path)
    assert "softmax" in {row["name"] for row in json.loads(listed.stdout)["mechanisms"]}
    seen = run("-m", "attnzoo", "doctor", path=tmp_path, code=3)
    assert "Traceback" not in seen.stdout + seen.stderr
    for name, (code, _) in BROKEN.items():
        if (
            name != "clash_two"
        ):  # alone, without the rival that the other tests give it, it clashes with nobody
            assert f"{name} [{code}]" in seen.stdout, name


@pytest.mark.parametrize(
    ("own", "first"),
    [
        ("import timm", "import timm, attnzoo"),
        ("import timm", "import attnzoo, timm"),
        ("", "import timm, az_early"),
    ],
)
def test_a_plugin_that_imports_timm_has_its_recipes_in_timm(tmp_path, own, first):
    if "az_early" in first:
        first += "\nimport attnzoo; attnzoo.load_zoo()"  # it could not be asked while it was being imported
    write_plugin(tmp_path, "early", WITH_RECIPE.format(first=own))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "early.yaml").write_text(TIMM_RECIPE)
    (tmp_path / "recipes" / "faulty.yaml").write_text(
        "recipe: 1\nhost: {kind: vit}\nattention: {yuse: softmax}\n"
    )
    code = f"""
{first}
import timm
assert timm.is_model("early_vit_tiny")
from attnzoo.zoo import load_zoo
zoo = load_zoo()
assert not zoo.unfinished
(problem,) = zoo.problems
print(problem.plugin, problem.code)
timm.create_model("early_vit_tiny", device="meta")
"""
    plugin, code = run("-c", code, path=tmp_path).stdout.split()
    assert plugin == "early" and code.startswith("AZ1")


# The samples, installed


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of a scratch environment that sees this one's packages and has the sample plugins installed by pip."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    site.joinpath("this.pth").write_text(
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n{ROOT}\n"
    )
    sources = tmp_path_factory.mktemp("sources")
    shutil.copytree(SAMPLES, sources, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    samples = [str(path) for path in sorted(sources.iterdir())]
    options = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        "--no-cache-dir",
    ]
    run("-m", "pip", "install", *options, *samples, python=python)
    return python


@pytest.fixture(scope="module")
def installed(python):
    """The folder of that environment's packages, for a process of this Python, which starts sooner."""
    return next(python.parent.parent.glob("lib/python*/site-packages"))


def test_installed_sample_is_listed_with_its_provider(python):
    listing = json.loads(run("-m", "attnzoo", "list", "--json", python=python).stdout)
    providers = {row["name"]: row for rows in listing.values() for row in rows}
    for name in ("haar", "subband", "band_energy", "without_details", "wavelet_vit"):
        assert "wavelets" in providers[name].values()


def test_installed_sample_passes_its_checks(installed):
    done = run("-m", "attnzoo", "check", "--plugin", "attnzoo-wavelets", "--examples", "8", path=installed)
    assert "haar" in done.stdout and "subband" in done.stdout


def test_installed_recipes_compose_and_train(installed):
    code = """
import timm, attnzoo
import torch
from attnzoo.zoo import load_zoo

assert not load_zoo().problems, load_zoo().problems
torch.manual_seed(0)
small = timm.create_model("vit_wavelet_tiny_patch16_224", num_classes=2, depth=2)
plain = timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=2).eval()
missing = small.eval().load_state_dict(
    {k.replace("attn.", "attn.branches.softmax."): v for k, v in plain.state_dict().items()}, strict=False
)
assert not missing.unexpected_keys
x = torch.randn(1, 3, 224, 224)
with torch.no_grad():
    assert torch.equal(small(x), plain(x))
for recipe in ("wavelet_vit", "third_party"):
    model = attnzoo.compose(recipe, num_classes=2, depth=2)
    model(x).square().sum().backward()
    waits = "branches.haar" if recipe == "wavelet_vit" else "nothing"
    silent = [n for n, p in model.named_parameters() if not (p.grad is not None and p.grad.any()) and waits not in n]
    assert not silent, silent
timm.create_model("template_vit_tiny", device="meta")
"""
    run("-c", code, path=installed)


def test_an_installed_probe_works_in_python_and_in_a_notebook(installed):
    code = """
import attnzoo
import torch

model = attnzoo.compose("wavelet_vit", num_classes=2, depth=2)
found = attnzoo.probe(model, "band_energy(levels=1)", inputs=torch.randn(2, 3, 224, 224))
assert list(found.columns) == ["site", "coarse", "level_1"] and len(found) == 2, found
assert "<table>" in found._repr_html_() and "band_energy(levels=1)" in found._repr_html_()
plain = model(torch.zeros(1, 3, 224, 224))
with attnzoo.intervene(model, "wavelets/without_details(strength=0.0)"):
    assert torch.equal(model(torch.zeros(1, 3, 224, 224)), plain)
"""
    run("-c", code, path=installed)


@pytest.mark.slow  # a run is trained
def test_an_installed_probe_works_on_the_command_line(installed, tmp_path):
    folder, out = str(tmp_path / "run"), tmp_path / "out"
    train = ["train", "digits_softmax", "--data", "synthetic", "--epochs", "1", "--out", folder]
    run("-m", "attnzoo", *train, path=installed)
    run("-m", "attnzoo", "probe", folder, "band_energy", "--count", "8", "--out", str(out), path=installed)
    assert (out / "band_energy.csv").read_text().startswith("site,coarse,level_1,level_2\n")
    assert "band_energy" in (out / "index.html").read_text()


def test_installed_sample_can_be_switched_off(installed):
    code = "import attnzoo; zoo = attnzoo.load_zoo(); print('haar' in zoo.mechanisms, 'template' in zoo.mechanisms)"
    assert run("-c", code, path=installed, ATTNZOO_DISABLE_PLUGINS="wavelets").stdout.split() == [
        "False",
        "True",
    ]


def test_every_hook_is_implemented_by_a_sample_and_named_in_a_test():
    hooks = {name for name in vars(hookspecs) if name.startswith("attnzoo_")}
    sources = "".join(path.read_text() for path in SAMPLES.rglob("__init__.py"))
    tests = Path(__file__).read_text()
    assert len(hooks) >= 3
    for hook in hooks:
        assert f"@hookimpl\ndef {hook}(" in sources
        assert hook.removeprefix("attnzoo_") in tests


@pytest.mark.parametrize(
    "which",
    [
        "check_o or not (conformance or recipe)",  # that of the template is found and runs
        pytest.param("template or not (conformance or recipe)", marks=pytest.mark.slow),
    ],
)
def test_the_own_tests_of_the_samples_pass(installed, tmp_path, which):
    tests = [str(path) for path in sorted(SAMPLES.glob("*/tests"))]
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={tmp_path}"]
    options += ["-k", which]  # those of the wavelets are checked above
    done = run("-m", "pytest", *options, *tests, path=installed, PYTHONDONTWRITEBYTECODE="1")
    assert "failed" not in done.stdout
