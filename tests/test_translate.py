"""`attnzoo translate`: lines in, lines out, in their order; what is cut is said, what is wrong loses nothing."""

import json
from pathlib import Path

import pytest
import torch
from training import images, tiny
from typer.testing import CliRunner

import attnzoo
from attnzoo.cli import translate as verb
from attnzoo.cli.app import app
from attnzoo.data.vocabulary import Symbols
from attnzoo.eval.translation import translate
from attnzoo.hosts.decode import beam
from attnzoo.train import open_run, prepare, train

RUNNER = CliRunner()
LETTERS = Symbols("abcdefghijkl")
LONGEST = 10
TINY = ("host.dim=16", "host.mlp_dim=32", "host.layers=1", "heads=2", f"host.max_length={LONGEST}")
LINES = ["a b c", "", "l k j i h g", "  ", "d", "a a a a a a a a a a a a", "b c ~ d", "e f g h"]
"""Short and long ones, empty ones, one that is too long by 4, one with a symbol that is not known."""


class Stand:
    """Stands in for a run: a model without training."""

    kind, device = "pairs", "cpu"

    def __init__(self):
        torch.manual_seed(1)
        sizes = f"host.vocab={LETTERS.size}"
        self.network = attnzoo.compose("transformer", edits=[*TINY, sizes]).eval()
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)

    def model(self, which):
        self.which = which
        return self.network

    def vocabularies(self):
        return LETTERS, LETTERS


@pytest.fixture
def stand(monkeypatch):
    run = Stand()
    monkeypatch.setattr("attnzoo.train.open_run", lambda folder: run)
    return run


def alone(stand, line: str, **how) -> str:
    """A line by itself, as the model decodes it."""
    ids = LETTERS.encode(line)[: LONGEST - 2]
    if not ids:
        return ""
    found = beam(stand.network, torch.tensor([[1, *ids, 2]]), LONGEST - 1, **how)
    return LETTERS.decode(found.tokens[0])


def test_a_line_for_each_line_in_their_order(stand):
    wanted = [alone(stand, line) for line in LINES]
    assert len(set(wanted)) > 3 and wanted[1] == wanted[3] == ""
    for batch in (1, 2, 3, 32):
        made = translate(stand.network, stand.vocabularies(), LINES, batch=batch)
        assert made.texts == wanted and made.truncated == [5]
        assert [made.hypotheses[i].ended for i in (1, 3)] == [True, True]
    ended = [one.ended for one in made.hypotheses]
    assert made.unfinished == [i for i, each in enumerate(ended) if not each]


def test_options_reach_the_search(stand):
    for how in ({"beams": 1}, {"beams": 6, "length_penalty": 3.0}):
        made = translate(stand.network, stand.vocabularies(), LINES, **how)
        assert made.texts == [alone(stand, line, **how) for line in LINES]
    short = translate(stand.network, stand.vocabularies(), LINES, max_length=2)
    assert all(len(one.tokens) + one.ended <= 2 for one in short.hypotheses)
    assert translate(stand.network, stand.vocabularies(), []).texts == []


def test_the_report_counts_lines(stand):
    seen = []
    translate(stand.network, stand.vocabularies(), LINES, batch=4, report=seen.append)
    assert seen == [6, 8]  # two are empty


def test_texts_files_and_standard_input_give_the_same(stand, tmp_path):
    wanted = [alone(stand, line) for line in LINES]
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(LINES) + "\n")
    for given, how in (
        (["run", "--", *LINES], {}),
        (["run", "--file", str(file), "--batch", "2"], {}),
        (["run"], {"input": file.read_bytes()}),
        (["run"], {"input": file.read_bytes().replace(b"\n", b"\r\n")}),
    ):
        made = RUNNER.invoke(app, ["translate", *given], **how)
        assert made.exit_code == 0, made.output
        assert made.stdout.split("\n")[:-1] == wanted
        assert "1 of 8 lines is longer than the 8 tokens that the model reads, and cut: 6" in made.stderr
    assert stand.which == "best"
    RUNNER.invoke(app, ["translate", "run", "a", "--which", "last"])
    assert stand.which == "last"


def test_the_last_line_needs_no_end(stand):
    made = RUNNER.invoke(app, ["translate", "run"], input=b"\xef\xbb\xbfa b c\nd")
    assert made.stdout.split("\n") == [alone(stand, "a b c"), alone(stand, "d"), ""]
    assert RUNNER.invoke(app, ["translate", "run"], input=b"").stdout == ""


def test_many_lines_are_written_by_and_by(stand, monkeypatch):
    monkeypatch.setattr(verb, "WINDOW", 2)
    lines = [" ".join("abcdefghijkl"[i % 12 : i % 12 + 1 + i % 3]) for i in range(23)] + ["a " * 20]
    made = RUNNER.invoke(app, ["translate", "run", "--batch", "3"], input="\n".join(lines))
    assert made.stdout.split("\n")[:-1] == [alone(stand, line) for line in lines]
    assert ": 24" in made.stderr


def test_out_and_json(stand, tmp_path):
    out = tmp_path / "made" / "lines.txt"
    made = RUNNER.invoke(app, ["translate", "run", "a b", "c", "--out", str(out)])
    assert made.exit_code == 0 and made.stdout == ""
    assert out.read_text() == f"{alone(stand, 'a b')}\n{alone(stand, 'c')}\n"
    made = RUNNER.invoke(app, ["translate", "run", "a b", "a " * 12, "--json"])
    told = json.loads(made.stdout)
    assert told["truncated"] == [1] and told["lines"] == 2 and told["beams"] == 4
    assert [row["translation"] for row in told["translations"]] == [
        alone(stand, "a b"),
        alone(stand, "a " * 12),
    ]
    assert set(told["translations"][0]) == {"text", "translation", "score", "ended"}
    RUNNER.invoke(app, ["translate", "run", "a b", "--json", "--out", str(out)])
    (one,), first = json.loads(out.read_text())["translations"], told["translations"][0]
    assert one == first | {
        "score": pytest.approx(first["score"], rel=1e-5)
    }  # beside another line it is rounded otherwise


def test_a_translation_is_one_line(stand, monkeypatch):
    monkeypatch.setattr(Symbols, "decode", lambda self, ids: "one\r\ntwo")
    assert RUNNER.invoke(app, ["translate", "run", "a", "b"]).stdout == "one two\none two\n"


def test_translations_that_do_not_end_are_told(stand):
    with torch.no_grad():
        stand.network.head.bias[2] = -1e9
    made = RUNNER.invoke(app, ["translate", "run", *"abcdefg"])
    assert "7 of 7 lines are not at their end" in made.stderr and "cut: 1, 2, 3, 4, 5 ..." in made.stderr


def wrong(*arguments: str, **how) -> str:
    """What is said of a fault; exit code 2, no traceback, nothing on stdout."""
    made = RUNNER.invoke(app, ["translate", *arguments], **how)
    assert made.exit_code == 2 and made.stdout == "" and "Traceback" not in made.stderr
    return made.stderr


def test_another_encoding(stand, tmp_path):
    file, out = tmp_path / "lines.txt", tmp_path / "made.txt"
    file.write_bytes("a b\nel año\n".encode("latin-1"))
    said = wrong("run", "--file", str(file), "--out", str(out))
    assert "AZ711" in said and "byte 5 of line 2 is 0xF1" in said and not out.exists()
    said = wrong("run", input=file.read_bytes())
    assert "AZ711" in said and "standard input:2:5" in said
    assert "AZ711" in wrong("run", "a\udcf1o")


def test_files_that_cannot_be(stand, tmp_path):
    file = tmp_path / "lines.txt"
    assert "AZ709" in wrong("run", "--file", str(file))
    file.write_text("a b\n")
    assert "AZ602" in wrong("run", "--file", str(file), "--out", str(file)) and file.read_text() == "a b\n"
    assert "AZ602" in wrong("run", "a", "--out", str(tmp_path))
    assert "AZ602" in wrong("run", "a", "--out", str(file / "below.txt"))


def test_what_is_said_twice_or_not_at_all(stand, tmp_path, monkeypatch):
    assert "AZ612" in wrong("run", "a", "--file", "b")
    monkeypatch.setattr(verb.sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    with pytest.raises(attnzoo.errors.ZooError, match="AZ612.*nothing to translate"):
        verb._lines([], None)


def test_runs_that_do_not_translate(tmp_path, monkeypatch):
    monkeypatch.setattr("attnzoo.train.kinds.load_images", images)
    tiny(tmp_path / "run", epochs=1)
    said = wrong(str(tmp_path / "run"), "a")
    assert "AZ814" in said and "does not translate" in said
    assert "AZ801" in wrong(str(tmp_path / "nothing"), "a")


def test_progress_is_drawn_on_a_terminal_only(stand, monkeypatch, capsys):
    def drawn(terminal: bool, hidden: bool = False) -> str:
        monkeypatch.setattr(verb.sys.stderr, "isatty", lambda: terminal)
        with verb._progress(4, hidden) as report:
            report(2)
            report(4)
        return capsys.readouterr().err

    assert drawn(False) == drawn(True, hidden=True) == ""
    assert "translating" in drawn(True) and "4/4" in drawn(True)


def test_a_run_that_was_trained(tmp_path):
    edits = [*TINY, "host.max_length=16", "train.data=reverse:train=400,test=40,length=8", "train.epochs=1"]
    run: Path = tmp_path / "run"
    train(*prepare("transformer", edits, device="cpu"), run)
    lines = ["a b c d", "", "b a"]
    made = RUNNER.invoke(app, ["translate", str(run), *lines])
    assert made.exit_code == 0, made.output
    found = open_run(run)
    assert made.stdout.split("\n")[:-1] == translate(found.model(), found.vocabularies(), lines).texts
    assert made.stdout.split("\n")[1] == ""
