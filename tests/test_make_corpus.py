"""docs/make_corpus.py: what is kept of the catalogues of programs."""

import runpy
import sys
from pathlib import Path

import pytest
from parallel_corpus import as_mo

from attnzoo.data.parallel import read_corpus

SCRIPT = Path(__file__).parent.parent / "docs" / "make_corpus.py"
KEPT = [
    ("File not found", "Fichier introuvable"),
    ("Open", "Ouvrir"),
    ("%s: cannot stat", "%s : stat impossible"),
]
LEFT = {
    "a near copy": ("file not found: %d!", "fichier introuvable : %d !"),
    "too many words": ("one two three four five", "un deux trois"),
    "too many words in the translation": ("one two", "un deux trois quatre cinq"),
    "two lines": ("first\nsecond", "premier deuxième"),
    "a tab": ("left\tright", "gauche droite"),
    "no word": ("%s: %d", "%s : %d"),
    "not translated": ("attnzoo", "attnzoo"),
    "no translation": ("nothing here", " "),
}


@pytest.fixture
def catalogues(tmp_path) -> Path:
    """A folder of two programs and of the names of languages."""
    folder = tmp_path / "fr"
    folder.mkdir()
    as_mo(folder / "a.mo", [KEPT[0]])
    as_mo(folder / "b.mo", [("_Open", "_Ouvrir"), KEPT[2], *LEFT.values()])
    as_mo(folder / "iso_639.mo", [("French", "français"), ("Middle Low German", "moyen bas allemand")])
    return folder


def short_pairs(folder: Path, words: int) -> list[tuple[str, str]]:
    """What the script keeps."""
    return runpy.run_path(str(SCRIPT))["short_pairs"](read_corpus(f"gettext:{folder}").lines, words)


def test_what_is_kept_and_what_is_left(catalogues):
    assert sorted(short_pairs(catalogues, 4)) == sorted(KEPT)
    longer = short_pairs(catalogues, 5)
    assert LEFT["too many words"] in longer and LEFT["too many words in the translation"] in longer


@pytest.mark.parametrize("why", LEFT)
def test_each_reason_alone(why, tmp_path):
    """The first text stays, the other does not."""
    as_mo(tmp_path / "a.mo", [KEPT[0]])
    as_mo(tmp_path / "b.mo", [LEFT[why]])
    assert short_pairs(tmp_path, 4) == [KEPT[0]]


def test_the_file_is_one_that_training_reads(catalogues, tmp_path, monkeypatch, capsys):
    out = tmp_path / "made" / "en-fr.tsv"
    monkeypatch.setattr(sys, "argv", ["make_corpus.py", str(catalogues), "--words", "4", "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out == f"3 pairs in {out}\n"
    lines = read_corpus(f"tsv:{out}").lines
    assert sorted((line.source, line.target) for line in lines) == sorted(KEPT)


def test_a_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["make_corpus.py", str(tmp_path / "no"), "--out", str(tmp_path / "x.tsv")]
    )
    with pytest.raises(SystemExit, match="AZ709"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
