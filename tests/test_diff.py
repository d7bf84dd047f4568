"""`attnzoo diff`: what two recipes differ in."""

import json

import pytest
from typer.testing import CliRunner

import attnzoo
from attnzoo.bench.diff import laws, masks
from attnzoo.cli.app import app
from attnzoo.errors import RecipeError
from attnzoo.recipe import load, resolve

BASE = "recipe: 1\nname: first\nextends: ham_classic\n"


def changed(text: str) -> dict[tuple[str, str], tuple[str, str]]:
    """What a recipe differs in from `ham_classic`."""
    found = attnzoo.diff("ham_classic", BASE + text)
    return {(one.about, one.where): (one.first, one.second) for one in found.changes}


def test_equal_recipes_do_not_differ_however_they_are_written():
    assert attnzoo.diff("ham_a", "ham_a").changes == ()
    assert changed("attention: softmax\n") == {}
    assert changed("attention: {use: softmax}\noverrides: [{at: blocks.1, put: softmax}]\n") == {}


def test_sites_are_told_in_runs():
    found = changed("overrides: [{at: 'blocks.[12]', put: fourier}]\n")
    assert found["sites", "blocks.1 to blocks.2"] == ("softmax", "fourier")
    assert found["masks", "causal"] == found["masks", "keys"] == ("everywhere", "lost")
    assert found["laws", "stochastic"] == ("everywhere", "lost")


def test_options_depth_heads_and_training():
    found = changed(
        "host: {model: {depth: 5}}\nheads: [4, 4, 2, 2, 2]\ntrain: {epochs: 3}\n"
        "attention: {use: sigmoid, with: {}}\n"
    )
    assert found["sites", "blocks.4"] == ("–", "sigmoid")
    assert found["heads", "blocks"] == ("4 4 4 4", "4 4 2 2 2")
    assert found["train", "epochs"][1] == "3" and found["model", "model.depth"] == ("4", "5")


def test_figures_are_those_of_the_models():
    found = attnzoo.diff("ham_classic", "ham_a")
    counts = tuple(sum(p.numel() for p in attnzoo.compose(name).parameters()) for name in found.names)
    assert found.params == counts == (119098, 121786)
    assert found.flops[1] > found.flops[0]


@pytest.mark.parametrize(
    ("attention", "kept"),
    [
        (
            "{fuse: add, of: [softmax, elu_linear]}",
            {"permutation_equivariant", "linear_in_values", "heads_apart"},
        ),
        ("{fuse: hadamard, of: [softmax, elu_linear]}", {"permutation_equivariant", "heads_apart"}),
        (
            "{fuse: mean, of: [softmax, softmax]}",
            {"permutation_equivariant", "linear_in_values", "bounded", "heads_apart"},
        ),
    ],
)
def test_laws_of_fusions_follow_from_their_branches(attention, kept):
    found = resolve(load(f"{BASE}attention: {attention}\n"))
    assert laws(found) == kept
    assert "keys" in masks(found)


def test_the_verb_prints_and_gives_data():
    runner = CliRunner()
    printed = runner.invoke(app, ["diff", "ham_a", "ham_b"])
    assert printed.exit_code == 0 and "hadamard(softmax" in printed.output and "add(softmax" in printed.output
    data = json.loads(runner.invoke(app, ["diff", "ham_a", "ham_b", "--json"]).stdout)
    assert data["changes"][0]["about"] == "sites" and data["params"] == [121786, 121786]
    assert "same model" in runner.invoke(app, ["diff", "ham_a", "ham_a"]).output


def test_a_recipe_that_is_none_is_told_with_its_place():
    with pytest.raises(RecipeError, match="AZ204"):
        attnzoo.diff("ham_a", "ham_z")
