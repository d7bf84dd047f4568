"""Errors: the text a person reads, and the same as data."""

import pickle

import pytest

from attnzoo import errors
from attnzoo.errors import Diagnostic, OptionError, Place, PluginError, RecipeError, ZooError, did_you_mean

PLACE = Place("recipes/ham_a.yaml", 14, 12, 6, "    - use: softmx")


def test_the_whole_text():
    fault = Diagnostic(
        "AZ201", "there is no `softmx`", PLACE, why="it is not listed", help="did you mean `softmax`?"
    )
    assert fault.lines() == [
        "error[AZ201]: there is no `softmx`",
        "  --> recipes/ham_a.yaml:14:12",
        "   |",
        "14 |     - use: softmx",
        "   |            ^^^^^^",
        "  = why:  it is not listed",
        "  = help: did you mean `softmax`?",
    ]


def test_parts_that_are_missing_are_left_out():
    assert Diagnostic("AZ201", "no").lines() == ["error[AZ201]: no"]
    assert Diagnostic("AZ201", "no", Place("a.yaml", 3, 4)).lines() == ["error[AZ201]: no", " --> a.yaml:3:4"]
    assert Diagnostic("AZ201", "no", help="yes").lines()[1:] == ["  = help: yes"]


@pytest.mark.parametrize("column", [1, 50, 60, 150, 399, 400])
def test_long_lines_are_cut_around_the_spot(column):
    text = "".join(chr(ord("a") + i % 26) for i in range(400))
    lines = Diagnostic("AZ1", "m", Place("f", 1, column, 1, text)).lines()
    shown, marker = lines[3].removeprefix("1 | "), lines[4].removeprefix("  | ")
    assert len(shown) <= 100 and shown in text
    assert marker.strip() == "^" and shown[len(marker) - 1] == text[column - 1]


def test_a_wide_spot_is_underlined_so_far():
    lines = Diagnostic("AZ1", "m", Place("f", 1, 1, 500, "x" * 500)).lines()
    assert lines[4].count("^") == 60
    assert Diagnostic("AZ1", "m", Place("f", 1, 1, 0, "x")).lines()[4].count("^") == 1


@pytest.mark.parametrize("evil", ["\x1b[2J", "\r", "\n", "\x00", "\u202e", "\u200b", "\x9b31m", "\ud800"])
def test_what_does_not_print_is_made_visible(evil):
    place = Place(f"a{evil}.yaml", 1, 1, 1, f"x{evil}y")
    fault = Diagnostic("AZ1", f"the name `{evil}`", place, why=f"why{evil}", help=f"help{evil}")
    text = "\n".join(fault.lines())
    assert evil == "\n" or evil not in text
    assert all(line.isprintable() for line in fault.lines()) and len(fault.lines()) == 7
    assert "·" in fault.message and "·" in fault.why and "·" in fault.help


def test_letters_of_all_languages_are_kept():
    fault = Diagnostic("AZ1", "Martínez · 注意 · σ(Wx)")
    assert fault.message == "Martínez · 注意 · σ(Wx)"


def test_as_data():
    fault = Diagnostic("AZ201", "no", PLACE, "why", "help")
    assert fault.as_dict() == {
        "code": "AZ201",
        "message": "no",
        "place": {"file": "recipes/ham_a.yaml", "line": 14, "column": 12},
        "why": "why",
        "help": "help",
    }
    assert Diagnostic("AZ201", "no").as_dict()["place"] is None


def test_an_error_is_its_text():
    error = RecipeError("AZ308", "no", place=PLACE, why="w", help="h")
    assert error.code == "AZ308" and len(error.diagnostics) == 1
    assert str(error) == "\n".join(Diagnostic("AZ308", "no", PLACE, "w", "h").lines())
    assert isinstance(error, ZooError) and error.exit_code == 2
    assert PluginError("AZ001", "no").exit_code == 3


def fault(code: str, file: str | None = None, line: int = 1, column: int = 1) -> Diagnostic:
    """A fault with a place, or without."""
    return Diagnostic(code, code.lower(), Place(file, line, column) if file else None)


def test_faults_are_sorted_by_place():
    given = [
        fault("D", "a", 9, 1),
        fault("E", "b", 1),
        fault("B", "a", 2, 5),
        fault("A"),
        fault("C", "a", 2, 10),
    ]
    error = RecipeError.of(given)
    assert [d.code for d in error.diagnostics] == ["A", "B", "C", "D", "E"]
    assert type(error) is RecipeError and error.code == "A"
    assert str(error).count("error[") == 5 and "\n\nerror[B]" in str(error)
    assert [d.code for d in ZooError.of(iter([fault("Y", "z"), fault("X", "a")])).diagnostics] == ["Y", "X"]


@pytest.mark.parametrize("cls", [getattr(errors, name) for name in dir(errors) if name.endswith(("Error", "Mismatch", "Mask", "Context"))])  # fmt: skip
def test_errors_survive_pickling(cls):
    error = cls.of([fault("B", "a", 2), Diagnostic("A", "a", PLACE, "w", "h")])
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(again) is cls and issubclass(cls, ZooError)
    assert again.diagnostics == error.diagnostics and str(again) == str(error)
    single = OptionError("one", help="h") if cls is OptionError else cls("A", "one", place=PLACE, help="h")
    assert str(pickle.loads(pickle.dumps(single))) == str(single)  # noqa: S301


NAMES = ["softmax", "soft", "luong_global", "luong_local", "add", "mean", "max", "gated", "elu_linear"]


@pytest.mark.parametrize(
    "word,meant",
    [
        ("softmx", "softmax"), ("SOFTMAX", "softmax"), ("sotf", "soft"), ("ad", "add"), ("addd", "add"), ("adx", "add"),
        ("mx", "max"), ("maen", "mean"), ("luong_globl", "luong_global"), ("luong-local", "luong_local"), ("elulinear", "elu_linear"),
    ],
)  # fmt: skip
def test_did_you_mean(word, meant):
    assert did_you_mean(word, NAMES) == f"did you mean `{meant}`?"


@pytest.mark.parametrize("word", ["", "zzzzzz", "performer"])
def test_nothing_was_meant(word):
    assert did_you_mean(word, NAMES) == "" and did_you_mean(word, []) == ""


def test_suggestions_keep_their_spelling():
    assert did_you_mean("vit_BASE", ["ViT_Base"]) == "did you mean `ViT_Base`?"
