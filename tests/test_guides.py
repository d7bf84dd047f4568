"""The guides run, by themselves and in any folder, leave nothing behind, and what they say of what they print is so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from attnzoo.cli.app import app

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.py"))
NOWHERE = "http://127.0.0.1:9"  # nothing answers there


def percent(text: str) -> float:
    """The first percentage in a text."""
    found = re.search(r"([\d.]+) ?%", text)
    assert found, text
    return float(found[1])


def line(output: str, beginning: str) -> str:
    """The only line that begins so."""
    (found,) = [line for line in output.splitlines() if line.startswith(beginning)]
    return found


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a guide in an empty folder, without a network; gives what it printed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, NOWHERE)
        monkeypatch.setenv(name.upper(), NOWHERE)
    folders = [tmp_path / "here", tmp_path / "temporary"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folders[1]))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))  # torch's own, which it keeps

    def run(name: str) -> str:
        guide = ROOT / "docs" / "guides" / f"{name}.py"
        done = subprocess.run(
            [sys.executable, str(guide)], cwd=folders[0], capture_output=True, text=True, env=dict(os.environ)
        )
        assert done.returncode == 0, done.stderr[-3000:]
        left = [str(path) for folder in folders for path in folder.iterdir()]
        assert left == []
        return done.stdout

    return run


@pytest.mark.slow
def test_ten_minutes(run):
    output = run("01_ten_minutes")
    assert "padding has no say: True" in output
    assert "error[AZ402]" in output
    assert "starts equal to vit_tiny_patch16_224: yes, bit for bit" in output
    assert percent(line(output, "test accuracy")) > 60
    passed, of = re.search(r"(\d+) of (\d+) checks hold", output).groups()
    assert passed == of != "0"


@pytest.mark.slow
def test_a_mechanism_in_one_file(run):
    output = run("02_a_mechanism_in_one_file")
    assert "hasty: check_causality: failed" in output
    assert "hasty: check_output: failed" in output and "\"cdist\" not implemented for 'BFloat16'" in output
    assert re.search(r"^\d+ checks hold$", output, re.M)
    assert line(output, "the checks accept the mistake").endswith("True")
    assert line(output, "the reference accepts it").endswith("False")
    assert line(output, "later tokens have no influence").endswith("True")
    assert re.search(r"tempered +\d+ +0", output)


@pytest.mark.slow
def test_graft(run):
    output = run("03_graft_a_pretrained_vit")
    assert "difference of the first logits: 0.0\n" in output
    assert line(output, "bit for bit on the test images").endswith("True")
    assert line(output, "the donor again, bit for bit").endswith("True")
    donor, graft = (percent(part) for part in line(output, "accuracy: donor").split(","))
    assert graft < donor - 20
    assert percent(line(output, "graft ").split("accuracy")[1]) == graft  # as `distil` measures it
    assert 60 < percent(output.strip().splitlines()[-1]) < 110


@pytest.mark.slow
def test_which_attention(run):
    output = run("04_which_attention_for_my_data")
    fit, of, linear = map(int, re.search(r"(\d+) of (\d+) mechanisms.*?(\d+) of them", output).groups())
    assert 0 < linear < fit < of
    params = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) parameters", output)]
    assert len(params) == 3 and max(params) < 1.02 * min(params)
    assert output.count("(95 % interval") == 4  # two against the first, of the best epoch and of the last


@pytest.mark.slow
def test_what_is_my_model_looking_at(run):
    output = run("05_what_is_my_model_looking_at")
    as_it_is = percent(line(output, "as it is:"))
    assert percent(line(output, "as it was:")) == as_it_is > 75
    assert percent(line(output, "without the most")) < percent(line(output, "without the least"))
    assert percent(line(output, "all heads look everywhere alike")) < as_it_is
    assert line(output, "answers unchanged").endswith("True")
    assert 0.9 < float(line(output, "shares of the most entropy").split()[-1]) <= 1


@pytest.mark.slow
def test_translate(run):
    output = run("06_translate")
    assert "error[AZ302]: `linformer` cannot be put at decoder.0.self" in output
    right, of = map(int, re.search(r"(\d+) of (\d+) numbers of the test side", output).groups())
    assert right > 0.8 * of
    assert "\nneun hundert sieben und achtzig\n" in output
    assert len(re.findall(r"^(?:softmax|additive) .*epoch 8", output, re.M)) == 2


@pytest.mark.slow
def test_a_plugin(run):
    output = run("07_a_plugin_from_nothing_to_pypi")
    passed, of = re.search(r"(\d+) of (\d+) checks hold", output).groups()
    assert passed == of != "0"
    assert "attnzoo_l2/recipes/l2_vit.yaml" in output and "l2 = attnzoo_l2" in output
    assert re.search(r"blocks\.0 … blocks\.11 \(12\) +l2 ", output)
    assert output.index("License-Expression: None") < output.index("License-Expression: Apache-2.0")


def test_coming_from(run):
    output = run("08_coming_from")
    assert "equal to timm, bit for bit: True" in output
    differences = [float(found) for found in re.findall(r"largest difference (\S+)", output)]
    assert len(differences) >= 6 and max(differences) < 1e-5
    assert differences[:2] == [0.0, 0.0]  # timm's own layer


def test_every_guide_is_run():
    text = Path(__file__).read_text(encoding="utf-8")
    assert len(GUIDES) == 8 and not [guide for guide in GUIDES if f'run("{guide.stem}")' not in text]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_what_a_guide_names_exists(guide):
    """Pages that it links, and verbs of its commands."""
    text = guide.read_text(encoding="utf-8")
    pages = re.findall(r":doc:`([^`]+)`", text)
    assert pages
    for page in pages:
        file = ROOT / f"{page[1:]}.md" if page.startswith("/") else guide.with_name(f"{page}.py")
        assert file.is_file(), page
    verbs = set(typer.main.get_command(app).list_commands(None))  # type: ignore[arg-type]
    assert set(re.findall(r"\$ attnzoo (\w+)", text)) <= verbs
