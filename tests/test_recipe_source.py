"""Recipe text: scalars by YAML 1.2, places of keys and values, `extends`, edits."""

import copy
import enum
import json
import time
import types

import numpy as np
import pytest
import timm
import torch
from typer.testing import CliRunner

from attnzoo.cli.app import app
from attnzoo.errors import RecipeError, ZooError
from attnzoo.recipe import compose, compose_file, load
from attnzoo.recipe.source import MAX_BYTES, parse
from attnzoo.train.check import checked

SCALARS = {
    "null": None, "~": None, "Null": None, "NULL": None, "": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False,
    "tRUE": "tRUE", "yes": "yes", "no": "no", "on": "on", "Off": "Off", "y": "y", "N": "N",
    "0": 0, "-0": 0, "+7": 7, "42": 42, "017": 17, "121_786": 121786, "1_000_000": 1000000, "_1": "_1", "1_": "1_", "1__0": "1__0",
    "1e-3": 0.001, "1E3": 1000.0, "1.": 1.0, ".5": 0.5, "-1.5": -1.5, "+.5e+2": 50.0, "0.4914": 0.4914, "1e": "1e", "e3": "e3",
    "0x1F": "0x1F", "0o17": "0o17", "0b11": "0b11", "12:30:45": "12:30:45", "2026-11-20": "2026-11-20", "1.2.3": "1.2.3",
    "'5'": "5", '"5"': "5", '"true"': "true", "'null'": "null", "''": "", '"a\\tb"': "a\tb", '"\\u00e9"': "é",
    "inf": "inf", "nan": "nan", "Infinity": "Infinity", "'.inf'": ".inf", "=": "=", "a b c": "a b c", "vit_base": "vit_base",
    "über": "über", "שלום": "שלום", "🦓": "🦓", "a#b": "a#b", "a:b": "a:b", "x # comment": "x", "---x": "---x", "<<": "<<",
}  # fmt: skip
TEXT = """\
# a comment
recipe: 1
host:
  kind: vit
  model: {depth: 2, img_size: [32, 64]}
attention:
  fuse: add
  of:
    - softmax
    - {use: soft, with: {variant: gated}}
"""


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalars(text, value):
    found = parse(f"a: {text}\n", "t").tree["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("|\n  a\n  b\n", "a\nb\n"),
        (">\n  a\n  b\n", "a b\n"),
        ("|-\n  a\n", "a"),
        ("[1, [2, {b: 3}], ]\n", [1, [2, {"b": 3}]]),
        ("{}\n", {}),
        ("[]\n", []),
    ],
)
def test_blocks_and_collections(text, value):
    assert parse(f"a: {text}", "t").tree == {"a": value}


def test_places():
    source = parse(TEXT, "r.yaml")
    values = {
        (): (2, 1), ("recipe",): (2, 9), ("host",): (4, 3), ("host", "kind"): (4, 9), ("host", "model"): (5, 10),
        ("host", "model", "depth"): (5, 18), ("host", "model", "img_size"): (5, 31), ("host", "model", "img_size", 1): (5, 36),
        ("attention", "fuse"): (7, 9), ("attention", "of", 0): (9, 7), ("attention", "of", 1, "use"): (10, 13),
        ("attention", "of", 1, "with", "variant"): (10, 35),
    }  # fmt: skip
    keys = {
        ("recipe",): (2, 1),
        ("host", "kind"): (4, 3),
        ("attention", "of"): (8, 3),
        ("attention", "of", 1, "with"): (10, 19),
    }
    assert {loc: (source.values[loc].line, source.values[loc].column) for loc in values} == values
    assert {loc: (source.keys[loc].line, source.keys[loc].column) for loc in keys} == keys
    assert source.values["host", "kind"].width == 3 and source.values["host", "kind"].text == "  kind: vit"
    assert source.value_place(("attention", "of", 7, "x")) == source.values["attention", "of"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff", "---\n", "%YAML 1.2\n---\n"])
def test_line_ends_and_starts(end, start):
    source = parse((start + TEXT).replace("\n", end), "r.yaml")
    place = source.values["host", "kind"]
    assert (place.line - start.count("\n"), place.column, place.text) == (4, 9, "  kind: vit")


def test_limits():
    def nested(depth: int) -> str:
        return "a: " + "[" * (depth - 1) + "]" * (depth - 1)

    parse(nested(32), "t")
    with pytest.raises(RecipeError, match="AZ108"):
        parse(nested(33), "t")
    parse("a: 1\n#" + "x" * (MAX_BYTES - 6), "t")
    with pytest.raises(RecipeError, match="AZ102"):
        parse("a: 1\n#" + "x" * (MAX_BYTES - 5), "t")


def test_a_recipe_is_whole_in_its_text():
    for name in ("ham_a", "ham_b_small", "nested", "local_then_global"):
        loaded = load(name)
        again = load(loaded.text)
        assert again.recipe == loaded.recipe and json.loads(loaded.text) == loaded.source.tree


@pytest.fixture
def family(tmp_path):
    """A recipe that extends one that extends another."""
    (tmp_path / "a.yaml").write_text(TEXT + "name: a\nsummary: A.\nexpect: {params: 5}\n")
    (tmp_path / "b.yaml").write_text(
        "recipe: 1\nname: b\nextends: a.yaml\nhost:\n  model: {num_heads: 3}\n  registers: b_vit\n"
    )
    (tmp_path / "c.yaml").write_text(
        "recipe: 1\nextends: b.yaml\nhost: {model: {depth: 3}}\nattention: soft\n"
    )
    return tmp_path


def test_extends_merges_the_host_and_nothing_else(family):
    recipe = load(family / "c.yaml").recipe
    assert recipe.host.model.model_dump(exclude_unset=True) == {
        "depth": 3,
        "num_heads": 3,
        "img_size": [32, 64],
    }
    assert (recipe.summary, recipe.expect.params, recipe.host.registers, recipe.attention.use) == (
        "",
        None,
        None,
        "soft",
    )
    assert load(family / "b.yaml").recipe.host.registers == "b_vit"


def test_extends_keeps_places_of_the_other_file(family):
    source = load(family / "c.yaml").source
    places = {
        loc: (place.file.rpartition("/")[2], place.line, place.column) for loc, place in source.values.items()
    }
    assert places["host", "model", "depth"] == ("c.yaml", 3, 23)
    assert places["host", "model", "num_heads"] == ("b.yaml", 5, 22)
    assert places["host", "model", "img_size", 1] == ("a.yaml", 5, 36)
    assert places["host", "kind"] == ("a.yaml", 4, 9)
    assert places["attention",] == ("c.yaml", 4, 12)
    assert (
        ("attention", "of") not in places
        and ("extends",) not in places
        and ("host", "registers") not in places
    )


def test_a_recipe_may_extend_one_of_the_zoo_of_its_own_name(tmp_path):
    (tmp_path / "ham_a.yaml").write_text("recipe: 1\nname: ham_a\nextends: ham_a\nattention: soft\n")
    assert load(tmp_path / "ham_a.yaml").recipe.attention.use == "soft"


@pytest.mark.parametrize(
    ("edit", "formula"),
    [
        ("attention.with.start=free", "hadamard[start=free](softmax, soft)"),
        ("attention.of.1.with.variant=gated", "hadamard[start=identity](softmax, soft[variant=gated])"),
        (
            "attention.of.1.with={variant: gated, gate_scale: one}",
            "hadamard[start=identity](softmax, soft[variant=gated, gate_scale=one])",
        ),
        ("attention.of.0=fourier", "hadamard[start=identity](fourier, soft)"),
        ("attention.of=[softmax, soft, elu_linear]", "hadamard[start=identity](softmax, soft, elu_linear)"),
        ("attention=soft", "soft"),
        ("attention={use: neighborhood, with: {window: 3}}", "neighborhood[window=3]"),
        ("attention.fuse=add", "add[start=identity](softmax, soft)"),
        ("attention.with={}", "hadamard(softmax, soft)"),
        ('overrides=[{at: "blocks.*", put: soft}]', "soft"),
    ],
)
def test_edits(edit, formula):
    composition = compose_file("ham_a_tiny", [edit])
    assert str(composition.plans["blocks.0"]) == formula and composition.loaded.edited


def test_edits_of_short_forms_and_of_what_is_not_there():
    text = "recipe: 1\nhost: {kind: vit, base: vit_tiny_patch16_224}\nattention: soft\n"
    loaded = load(text, ["attention.with.variant=gated", "host.model.depth=2", "host.model.drop_rate=1e-3"])
    assert loaded.recipe.attention.with_ == {"variant": "gated"}
    assert (loaded.recipe.host.model.depth, loaded.recipe.host.model.drop_rate) == (2, 0.001)
    loaded = load(
        text,
        [
            "overrides=[{at: blocks.0, put: soft}]",
            "overrides.0.put.with.variant=gated",
            "overrides.0.at=blocks.1",
        ],
    )
    assert (
        loaded.recipe.overrides[0].put.with_ == {"variant": "gated"}
        and loaded.recipe.overrides[0].at == "blocks.1"
    )


def test_later_edits_win_and_null_takes_back():
    loaded = load(
        "ham_a", ["host.model.depth=3", "host.model.depth=2", "host.model.final_norm=", "name=null"]
    )
    assert (loaded.recipe.host.model.depth, loaded.recipe.host.model.final_norm, loaded.recipe.name) == (
        2,
        None,
        None,
    )


def test_places_of_edits():
    place = load("ham_a", ["attention.of.1.with={variant: gated}"]).source.values[
        "attention", "of", 1, "with", "variant"
    ]
    assert (str(place), place.text) == ("--set:1:31", "attention.of.1.with={variant: gated}")


# --------------------------------------------------------------------------------------------------------- prose


@pytest.mark.parametrize(
    "text",
    [
        "Ein Überblick über große Köpfe", "¿Qué mira la atención?", "注意力\u3000機構", "שלום עולם", "می\u200cخواهم", "10\u00a0% schneller",
        "👨\u200d👩\u200d👧 ❤\ufe0f", "葛\U000e0100飾", "e\u0301",
    ],
)  # fmt: skip
def test_people_write_as_they_do_elsewhere(text):
    recipe = f"{TEXT}summary: {text} # {text}\nsource: '{text}'\n"
    for loaded in (load(recipe), load(TEXT, [f"summary={text}", f"source={text}"])):
        assert (loaded.recipe.summary, loaded.recipe.source) == (text, text)
        assert load(loaded.text).recipe == loaded.recipe


def test_a_strange_space_in_prose_is_not_blamed_for_a_fault_of_syntax():
    with pytest.raises(RecipeError, match="AZ105"):
        load(f"{TEXT}summary: 10\u00a0%\nname: [a\n")


# ---------------------------------------------------------------------------------------------------------- dicts

TREE = {
    "recipe": 1,
    "host": {"kind": "vit", "base": "vit_tiny_patch16_224", "model": {"depth": 2, "img_size": [32, 64]}},
    "attention": {"fuse": "add", "of": ["softmax", {"use": "soft", "with": {"variant": "gated"}}]},
}


class Count(enum.IntEnum):
    """A whole number that is more than one."""

    TWO = 2


class Word(str):
    """A text that is more than one."""


def changed(loc, value) -> dict:
    """The tree with another value."""
    tree = copy.deepcopy(TREE)
    inner = tree
    for step in loc[:-1]:
        inner = inner[step]
    inner[loc[-1]] = value
    return tree


DEPTH = ("host", "model", "depth")
DICTS = {
    "range": (changed(DEPTH, 10**6), "host.model.depth", "AZ113 from 1 to 96; this is 1000000"),
    "bool": (changed(DEPTH, True), "host.model.depth", "AZ112 this is true"),
    "array": (changed(DEPTH, np.int64(3)), "host.model.depth", "AZ112 `numpy.int64`"),
    "array_of_float": (changed(DEPTH, np.float64(3)), "host.model.depth", "AZ112 `numpy.float64`"),
    "tensor": (changed(DEPTH, torch.tensor(3)), "host.model.depth", "AZ112 `torch.Tensor`"),
    "enum": (changed(DEPTH, Count.TWO), "host.model.depth", "AZ112 Count`"),
    "huge": (changed(DEPTH, 10**30), "host.model.depth", "AZ113 more than 20 digits"),
    "not_finite": (changed(("host", "model", "drop_rate"), float("nan")), "host.model.drop_rate", "AZ113 not a finite"),
    "text": (changed(("attention",), Word("softmax")), "attention", "AZ112 Word`"),
    "bytes": (changed(("attention",), b"softmax"), "attention", "AZ112 `builtins.bytes`"),
    "set": (changed(("attention", "of"), {"softmax"}), "attention.of", "AZ112 `builtins.set`"),
    "function": (changed(("attention", "of", 0), len), "attention.of.0", "AZ112 a recipe cannot hold"),
    "none": (changed(("attention",), None), "attention", "AZ114 nothing stands here"),
    "unknown_key": ({**TREE, "attenton": 1}, "attenton", "AZ110 did you mean `attention`?"),
    "number_as_key": ({**TREE, 1: 2}, "", "AZ109 `builtins.int`"),
    "empty_key": (changed(("host", ""), 2), "host", "AZ109 an empty key"),
    "hidden": (changed(("attention",), "soft\u200bmax"), "attention", "AZ104 U+200B"),
    "hidden_key": (changed(("host", "bas\u00ade"), "x"), "host.bas\u00b7e", "AZ104 U+00AD"),
    "option": (changed(("attention", "of", 1, "with"), {"variant": "gatd"}), "attention.of.1.with.variant", "AZ212 `gated`?"),
    "mechanism": (changed(("attention", "of", 0), "sofmax"), "attention.of.0", "AZ201 did you mean `softmax`?"),
    "both_names": (changed(("attention", "of", 1, "with"), {"variant": "gated", "reading": "gated"}),
                   "attention.of.1.with.reading", "AZ217 leave `reading` out"),
    "image": (changed(("host", "model", "img_size"), (8, 8)), "host.model.img_size", "AZ320 no patch"),
    "extends_file": ({"recipe": 1, "extends": "x.yaml"}, "extends", "AZ116 has no folder"),
    "long": ({**TREE, "summary": "x" * MAX_BYTES}, "summary", "AZ102 more than 65,536 characters"),
    "wide": (changed(("attention", "of"), [0] * 20_000), "attention.of.", "AZ108 more than 10,000 values"),
    "data": ({**TREE, "train": {"data": "cifar11"}}, "train.data", "AZ701 did you mean `cifar10`?"),
}  # fmt: skip


@pytest.mark.parametrize(("tree", "keys", "expected"), DICTS.values(), ids=DICTS)
def test_a_bad_dict(tree, keys, expected):
    began = time.process_time()
    with pytest.raises(ZooError) as caught:
        checked(load(tree))
    assert time.process_time() - began < 1
    fault = caught.value.diagnostics[0]
    assert fault.code == expected[:5] and expected[6:] in f"{fault.message} | {fault.help}"
    assert str(fault.place).startswith(f"<recipe>: {keys}" if keys else "<recipe>")
    assert fault.as_dict()["place"].keys() == {"file", "keys"}


def test_a_dict_that_holds_itself():
    tree = copy.deepcopy(TREE)
    tree["host"]["model"]["img_size"] = tree
    with pytest.raises(RecipeError, match="AZ108.*32 levels"):
        load(tree)
    tree["attention"] = {"fuse": "add", "of": []}
    tree["attention"]["of"] += [tree["attention"]] * 16
    with pytest.raises(RecipeError, match="AZ108"):
        load(tree)


def test_a_good_dict():
    before = copy.deepcopy(TREE)
    loaded = load(TREE, ["host.model.depth=1", "attention.of.0=soft"])
    assert before == TREE and loaded.edited and loaded.name == "recipe"
    assert load(types.MappingProxyType(TREE)).recipe == load(json.dumps(TREE)).recipe
    assert load(changed(("host", "model", "img_size"), (32, 64))).recipe == load(TREE).recipe
    assert load({"recipe": 1, "extends": "ham_a"}).recipe.attention == load("ham_a").recipe.attention
    model = timm.create_model("attnzoo_vit", recipe=TREE, num_classes=3)
    assert compose(TREE, num_classes=3)(torch.zeros(1, 3, 32, 64)).shape == (1, 3)
    assert load(model._model_args["recipe"]).recipe == load(TREE).recipe


# ---------------------------------------------------------------------------------------------------------- notes


def test_an_option_by_its_old_name_works_with_a_note(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(f"{TEXT.replace('variant', 'reading')}")
    composition = compose_file(str(file))
    assert str(composition.plans["blocks.0"]) == "add(softmax, soft[variant=gated])"
    (note,) = composition.notes
    assert note.message == "the option `reading` of `soft` is now called `variant`"
    assert str(note.place) == f"{file}:10:26" and note.lines()[0].startswith("note: ")
    result = CliRunner().invoke(app, ["compose", str(file), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["name"] == "r"
    assert "note: the option `reading`" in result.stderr and "r.yaml:10:26" in result.stderr
    assert compose_file(TEXT).notes == ()


def test_an_edit_by_an_old_name():
    composition = compose_file("ham_a", ["attention.of.1.with={reading: gated}"])
    (note,) = composition.notes
    assert str(note.place) == "--set:1:22"
    assert "soft[variant=gated]" in str(composition.plans["blocks.0"])
