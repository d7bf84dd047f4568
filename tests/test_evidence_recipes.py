"""docs/evidence/: the small models of the evidence page are what it says of them."""

from pathlib import Path

import pytest
import torch

from attnzoo.recipe import load
from attnzoo.recipe.composing import compose
from attnzoo.train import prepare

FOLDER = Path(__file__).parent.parent / "docs" / "evidence"


def params(name: str) -> int:
    """How many the model of a recipe has."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in compose(FOLDER / f"{name}.yaml").parameters())


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_a_recipe_says_how_it_is_trained(name):
    assert load(FOLDER / f"{name}.yaml").name == name
    assert prepare(FOLDER / f"{name}.yaml")[1].epochs < 40


def test_deep_head_is_as_large_as_its_control_but_for_the_norms_of_the_skip():
    assert params("small_deep_head") - params("small_transformer") == 3 * 2 * 64
    heads = [load(FOLDER / f"small_{name}.yaml").recipe.heads for name in ("transformer", "deep_head")]
    assert heads[0] == 4 and heads[1].encoder.first == 16 and heads[1].encoder.last == 2


def test_the_transformers_are_trained_alike():
    one, other = (prepare(FOLDER / f"small_{name}.yaml")[1] for name in ("transformer", "deep_head"))
    assert one == other
