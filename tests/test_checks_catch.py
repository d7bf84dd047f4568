"""The checks themselves: every one catches a part that is broken in its way, and lets a healthy part pass."""

import runpy

import pytest
from broken import BROKEN, HEALTHY
from broken.heads import ForgetsCausality, Healthy, UsesGlobalRandomness

from attnzoo.core import Layout, Site
from attnzoo.errors import CheckError
from attnzoo.mechanisms.channel.squeeze_excite import SqueezeExcite
from attnzoo.testing import CHECKS, Scene, check, load_file
from attnzoo.testing.report import as_dict, summary
from attnzoo.testing.runner import checks_for, run_check


@pytest.mark.parametrize(
    ("name", "broken", "healthy"), BROKEN, ids=lambda v: v if isinstance(v, str) else v.__name__
)
def test_a_broken_part_is_caught(name, broken, healthy):
    assert CHECKS[name] in checks_for(broken)
    result = run_check(broken, CHECKS[name], shrink=False)  # with the 50 examples that everybody gets
    assert result.status == "failed"
    assert result.reason.startswith("claimed: ")
    assert "; but " in result.reason


SIBLINGS = sorted(
    {(name, healthy) for name, _, healthy in BROKEN}, key=lambda pair: (pair[0], pair[1].__name__)
)


@pytest.mark.parametrize(("name", "healthy"), SIBLINGS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_healthy_sibling_passes(name, healthy):
    result = run_check(healthy, CHECKS[name], 10)
    assert result.ok, str(result)


@pytest.mark.slow
@pytest.mark.parametrize("healthy", HEALTHY, ids=lambda cls: cls.__name__)
def test_healthy_parts_pass_every_check(healthy):
    assert [str(result) for result in check(healthy, 50) if not result.ok] == []


def test_a_rectifier_behind_a_mean_is_given_means_to_learn_of():
    """Of this scene's eight rectifiers one stays closed for the mean of tokens that are drawn one by one."""
    site = Site("check", dim=2, heads=1, layout=Layout((3, 5), prefix=2), qkv_bias=False, proj_bias=False)
    CHECKS["check_every_entry_learns"](SqueezeExcite, Scene(SqueezeExcite, site, batch=2, seed=2440))


def test_every_check_catches_something():
    assert {name for name, _, _ in BROKEN} == set(CHECKS)


def test_a_healthy_sibling_is_held_to_the_same_check():
    for name, _, healthy in BROKEN:
        assert healthy in HEALTHY
        assert CHECKS[name] in checks_for(healthy), (name, healthy)


def test_a_failure_is_shrunk_to_code_that_repeats_it():
    result = run_check(ForgetsCausality, CHECKS["check_causality"])
    assert "dim=2, heads=1, layout=Layout((2,), prefix=0)" in result.reproduction
    with pytest.raises(AssertionError, match="masks: causal"):
        exec(result.reproduction, {})


def test_expected_failures_are_strict():
    results = check(ForgetsCausality, 10, {"check_causality": "on purpose", "check_pickles": "not so"})
    status = {result.check: result.status for result in results}
    assert status["check_causality"] == "expected failure"
    assert status["check_pickles"] == "unexpected pass"
    assert not as_dict(results)["ok"]
    assert as_dict(results)["counts"]["expected failure"] == 1
    assert "check_pickles: unexpected pass" in summary(results)


def test_unknown_checks_are_refused():
    with pytest.raises(CheckError, match="AZ501") as caught:
        check(Healthy, 1, {"check_casuality": "a typo"})
    assert "check_causality" in str(caught.value)


def test_a_file_is_checked(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from attnzoo.core import Fusion, FusionCard\n"
        "class Mine(Fusion):\n"
        "    card = FusionCard(name='mine', summary='Mine.')\n"
        "    def merge(self, branches, x):\n"
        "        return sum(branches)\n"
    )
    (mine,) = load_file(file)
    assert all(result.ok for result in check(mine, examples=5))
    file.write_text("import nothing_of_the_kind")
    with pytest.raises(CheckError, match="AZ502"):
        load_file(file)
    with pytest.raises(CheckError, match="AZ502"):
        load_file(tmp_path / "absent.py")
    file.write_text("x = 1")
    with pytest.raises(CheckError, match="AZ503"):
        load_file(file)


def test_results_do_not_depend_on_the_global_random_state():
    first = run_check(UsesGlobalRandomness, CHECKS["check_no_global_randomness"])
    assert first == run_check(UsesGlobalRandomness, CHECKS["check_no_global_randomness"])


@pytest.mark.parametrize("name", ["__main__", "mine"])
def test_a_script_that_checks_its_own_component_runs_once(name, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from pathlib import Path\n"
        "from attnzoo.core import Fusion, FusionCard\n"
        "from attnzoo.testing.checks import CHECKS\n"
        "from attnzoo.testing.runner import run_check\n"
        "class Mine(Fusion):\n"
        "    card = FusionCard(name='mine', summary='Mine.')\n"
        "    def merge(self, branches, x):\n"
        "        return sum(branches)\n"
        f"times = Path({str(tmp_path / 'times')!r})\n"
        "times.write_text((times.read_text() if times.exists() else '') + 'once ')\n"
        "result = run_check(Mine, CHECKS['check_instances_apart'], 1)\n"
    )
    ran = runpy.run_path(str(file), run_name=name)
    assert ran["result"].ok
    assert len((tmp_path / "times").read_text().split()) <= 2
