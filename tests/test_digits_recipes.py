"""Every mechanism, and every later fusion, has a recipe of its own on digits, small enough to train while one looks on, and learns there."""

import pytest
from typer.testing import CliRunner

from attnzoo import list_fusions, list_mechanisms, list_recipes
from attnzoo.cli.app import app
from attnzoo.recipe import load
from attnzoo.train import train
from attnzoo.train.settings import prepare

NAMES = [name.removeprefix("digits_") for name in list_recipes("digits_*", plugin="attnzoo")]
WITHOUT = {  # they read a second stream, which a ViT has not
    "class_cross",
    "class_semantics",
    "conv_transformer",
    "cross_scale",
    "global_query",
    "medusa",
    "pairwise_cross",
    "prior_cross",
    "window_cross",
}

ELSEWHERE = {  # in recipes of HAM, or nested ones
    "add",
    "concat",
    "difference",
    "gated",
    "hadamard",
    "head_split",
    "low_rank",
    "max",
    "mean",
    "weighted_sum",
}


def test_every_mechanism_and_fusion_has_its_recipe():
    found = [*list_mechanisms(plugin="attnzoo"), *list_fusions(plugin="attnzoo")]
    assert sorted([*NAMES, *WITHOUT, *ELSEWHERE]) == sorted(found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sample(5)
def test_it_differs_in_its_mechanism_alone(name):
    """It puts what it is called after at every site, or the last, and trains as the others do."""
    recipe, plain = load(f"digits_{name}").recipe, load("digits_softmax").recipe
    result = CliRunner().invoke(app, ["compose", f"digits_{name}"])
    assert result.exit_code == 0 and name in result.output
    assert recipe.train == plain.train and recipe.host.base == plain.host.base
    arguments = dict(plain.host.arguments)
    if recipe.pool:
        del arguments["global_pool"]  # which a pool takes the place of
    if name == "global_local_cross":
        arguments["class_token"] = True  # it asks where that looked
        assert [override.put.use for override in recipe.overrides] == [name]
    assert recipe.host.arguments == arguments


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name, tmp_path):
    """The mean loss of the fourth epoch, steps 70 to 92, is below that of the first by a tenth at least."""
    loaded, settings = prepare(f"digits_{name}", ["train.epochs=4"])
    losses = [epoch["train_loss"] for epoch in train(loaded, settings, tmp_path / "run").log()]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0], losses
