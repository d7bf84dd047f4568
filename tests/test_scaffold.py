"""What `attnzoo new` writes, and the guide that starts from it."""

import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from typer.testing import CliRunner

from attnzoo.cli import new
from attnzoo.core import Family
from attnzoo.errors import ZooError
from attnzoo.recipe import compose_file
from attnzoo.scaffold import FAMILIES, new_fusion, new_mechanism, new_plugin, new_recipe
from attnzoo.testing import check, load_file

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "writing-a-plugin.md").read_text()


def written(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def failures(path, examples=3):
    return [str(result) for cls in load_file(path) for result in check(cls, examples) if not result.ok]


def test_the_sample_is_what_is_written(tmp_path):
    fresh, kept = new_plugin("template", tmp_path), ROOT / "plugins" / "attnzoo-template"
    sample = {
        path: text
        for path, text in written(kept).items()
        if not any(part.startswith((".", "__p")) for part in path.parts)
    }
    assert sample == written(fresh)


def test_a_kebab_name(tmp_path):
    root = new_plugin("slow-waves", tmp_path)
    assert root == tmp_path / "attnzoo-slow-waves"
    source = (root / "src" / "attnzoo_slow_waves" / "__init__.py").read_text()
    assert "class SlowWaves(Head)" in source and 'name="slow_waves"' in source
    assert (root / "src" / "attnzoo_slow_waves" / "recipes" / "slow_waves_vit.yaml").is_file()


def test_the_mechanism_passes_all_checks(tmp_path):
    file = new_mechanism("my_own", tmp_path / "deep" / "er", "linear")
    assert file.name == "my_own.py" and "Family.LINEAR" in file.read_text()
    assert failures(file) == []


def test_the_fusion_passes_all_checks(tmp_path):
    assert failures(new_fusion("blend", tmp_path)) == []


def test_the_recipe_composes(tmp_path):
    assert len(compose_file(new_recipe("first", tmp_path)).plans) == 12


def test_families_are_those_of_the_cards():
    assert tuple(Family) == FAMILIES


@pytest.mark.parametrize(
    "make", [new_plugin, new_fusion, new_recipe, lambda n, f: new_mechanism(n, f, "local")]
)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "such as"), ("9lives", "`lives`"), ("MyThing", "`my_thing`"), ("a b", "`a_b`"), ("a--b", "`a_b`"),
        ("a" * 41, "at most 40"), ("../up", "`up`"), ("é", "such as"), ("x\n", "`x`"), ("none", "`None`"),
        ("head", "`Head`"), ("attnzoo-x", "leave"), ("attnzoo", "leave"), ("true", "`True`"), ("path", "`Path`"),
    ],
)  # fmt: skip
def test_bad_names(tmp_path, make, name, says):
    with pytest.raises(ZooError) as caught:
        make(name, tmp_path)
    assert caught.value.code == "AZ601" and says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    for make in (new_plugin, new_fusion, new_recipe):
        path = make("mine", tmp_path)
        before = written(tmp_path)
        with pytest.raises(ZooError) as caught:
            make("mine", tmp_path)
        assert caught.value.code == "AZ602" and str(path) in str(caught.value)
        assert written(tmp_path) == before


def test_an_unknown_family(tmp_path):
    with pytest.raises(ZooError) as caught:
        new_mechanism("mine", tmp_path, "liner")
    assert caught.value.code == "AZ603" and "`linear`" in str(caught.value)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError) as caught:
        new_recipe("mine", tmp_path / "file")
    assert caught.value.code == "AZ602"


@pytest.mark.parametrize(
    "arguments",
    [["plugin", "mine"], ["mechanism", "mine", "--family", "local"], ["fusion", "mine"], ["recipe", "mine"]],
)
def test_the_command_line_tells_what_was_written_and_what_is_next(tmp_path, arguments):
    result = CliRunner().invoke(new.app, [*arguments, "--into", str(tmp_path)], catch_exceptions=False)
    *told, following = result.stdout.splitlines()
    assert {line.removeprefix("wrote ") for line in told} == {
        str(tmp_path / path) for path in written(tmp_path)
    }
    assert following.startswith("next: ")


def test_in_a_checkout_files_go_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "attnzoo" / "mechanisms" / "local").mkdir(parents=True)
    CliRunner().invoke(new.app, ["mechanism", "mine", "--family", "local"], catch_exceptions=False)
    CliRunner().invoke(new.app, ["recipe", "mine"], catch_exceptions=False)
    assert set(written(tmp_path)) == {Path("attnzoo/mechanisms/local/mine.py"), Path("mine.yaml")}


def test_writing_needs_no_torch():
    code = "import sys, attnzoo.scaffold, attnzoo.cli.new; assert not {'torch', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The guide


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.M | re.S)


def test_the_walkthrough_of_the_guide(tmp_path):
    """Write the plugin, put the guide's mechanism in its one file, check it, compose its recipe: as the guide says."""
    root = new_plugin("mine", tmp_path)
    file = root / "src" / "attnzoo_mine" / "__init__.py"
    (whole,) = [block for block in blocks("python") if "class Mine(Head)" in block]
    file.write_text(whole)
    assert failures(file, examples=5) == []
    code = f"""
import sys
sys.path.insert(0, {str(file.parent.parent)!r})
import attnzoo_mine
from attnzoo.recipe import load, resolve
from attnzoo.zoo import Zoo
zoo = Zoo.of(plugins=[("mine", attnzoo_mine)])
assert not zoo.problems, zoo.problems
resolve(load(str(zoo.recipes["mine_vit"].value)), zoo=zoo)
"""
    processes.run("-c", code, check=True)


def test_all_python_of_the_guide_runs():
    code = "\n".join(blocks("python"))
    processes.run("-c", f"__file__ = {str(ROOT / 'x.py')!r}\n{code}", check=True)


def test_the_guide_names_what_there_is():
    from attnzoo.core.card import MECHANISM_LAWS, Card

    for law in MECHANISM_LAWS:
        assert f"`{law.name}`" in GUIDE
    for name in Card.__dataclass_fields__:
        assert f"`{name}`" in GUIDE
    for verb in re.findall(r"attnzoo new (\w+)", GUIDE):
        assert verb in {command.name for command in new.app.registered_commands}
