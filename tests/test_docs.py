"""The documentation is true: tables, code, recipes, links."""

import importlib
import re
import runpy
from pathlib import Path

import pytest
import typer

from attnzoo.cli.app import app
from attnzoo.zoo import Zoo

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    + [page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts]
)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def test_tables_and_reference_are_fresh():
    made = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "[`softmax`](docs/reference/softmax.md)" in text
    assert made["with_tables"](text) == text, "run `make docs`"
    text = (ROOT / "docs" / "mission.md").read_text(encoding="utf-8")
    assert made["mission"](text) == text, "run `make docs`"
    pages = made["pages"]()
    assert set((ROOT / "docs" / "reference").rglob("*.md")) == pages.keys()
    for file, page in pages.items():
        assert file.read_text(encoding="utf-8") == page, f"{file.name}: run `make docs`"


def test_the_mission_names_what_there_is():
    """Every name of the table is in the zoo, a verb, or importable; every built-in of the zoo is in the table."""
    text = (ROOT / "docs" / "mission.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| .*`", line)]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row[1])}
    zoo = Zoo.of()
    components = {*zoo.mechanisms, *zoo.fusions, *zoo.probes, *zoo.interventions}
    cards = {e.name: e.value.card for registry in zoo.registries[:-1] for e in registry.values()}
    verbs = {f"attnzoo {name}" for name in typer.main.get_command(app).list_commands(None)}
    assert len(rows) > 50 and "planned" not in text
    for name in named - components - set(zoo.recipes) - verbs:
        module, _, attribute = name.rpartition(".")
        assert module.startswith("attnzoo.") and hasattr(importlib.import_module(module), attribute), name
    assert components - named == set()
    for row in rows:
        names = re.findall(r"`([^`]+)`", row[1])
        fidelities = {cards[name].fidelity for name in names if name in components}
        assert set(filter(None, row[2].strip().split(", "))) == fidelities, row


def test_a_page_of_the_reference_says_what_the_card_says():
    """What stands on a page is written down here once by hand, so that the generator cannot leave it out."""
    text = (ROOT / "docs" / "reference" / "linformer.md").read_text(encoding="utf-8")
    for said in (
        "# linformer",
        "arXiv:2006.04768",
        "- **form**: head",
        "- **family**: linear: how to avoid n × m?",
        "- **masks**: keys",
        "- **time**: ",
        "- **memory**: ",
        "- **fidelity**: ",
        "- **tap** `weights`: (b h n r)",
        "- **law** `linear_in_values`: for fixed queries and keys the head is linear in the values",
        "| option | type | default | meaning |",
        "attention: linformer",
        "As a whole, `digits_linformer`:\n\n```yaml\nrecipe: 1\nname: digits_linformer\n",
        "`attnzoo check linformer`",
        "(../../tests/mechanisms/test_linformer.py)",
        "@misc{wang2020linformer,",
        "- [`efficient`](efficient.md): A softmax over the channels",
    ):
        assert said in text, said


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md", "docs/text.md"])
def test_recipes_of_the_pages_compose(page, tmp_path):
    from attnzoo.recipe import compose_file

    found = blocks(ROOT / page, "yaml")
    assert found
    for text in found:
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        assert compose_file(tmp_path / "mine.yaml").plans


def test_python_of_the_readme_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    for text in blocks(ROOT / "README.md", "python"):
        scope: dict = {}
        exec(text, scope)
        assert scope["model"]


def test_the_readme_shows_what_is_printed():
    """Every line of the cast but the times stands in today's output."""
    from typer.testing import CliRunner

    from attnzoo.cli.app import app

    output = CliRunner().invoke(app, ["compose", str(ROOT / "recipes" / "ham_a.yaml")]).output
    printed = {" ".join(line.split()) for line in output.splitlines()}
    cast = next(text for text in blocks(ROOT / "README.md", "text") if "$ attnzoo compose" in text)
    shown = [" ".join(line.split()) for line in cast.splitlines()[2:]]
    steady = [
        s for s in shown if s and "─" not in s and " ms" not in s and "..." not in s and "next:" not in s
    ]
    assert len(steady) >= 8
    assert not [line for line in steady if line not in printed]


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


def test_tests_named_in_pages_exist():
    for page in PAGES:
        for path, name in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), (page, path)
            assert not name or f"def {name}" in (ROOT / path).read_text(encoding="utf-8"), (page, name)


def test_benchmarks_stand_beside_their_commands():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "attnzoo bench vit_ham_b_base_patch16_224 --against vit_base_patch16_224" in text
