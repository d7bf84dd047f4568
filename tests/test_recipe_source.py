"""Recipe text: scalars by YAML 1.2, places of keys and values, `extends`, edits."""

import json

import pytest

from attnzoo.errors import RecipeError
from attnzoo.recipe import compose_file, load
from attnzoo.recipe.source import MAX_BYTES, parse

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
