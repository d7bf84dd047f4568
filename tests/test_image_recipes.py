"""Every recipe for images trains: fifty steps on digits, after which its loss is lower than at the beginning."""

import pytest

from attnzoo import list_recipes
from attnzoo.recipe import load
from attnzoo.recipe.schema import ImageHost
from attnzoo.train import train
from attnzoo.train.settings import prepare

OWN = ("digits_", "dual_", "pyramid_")
"""Recipes made for digits, which tests of their own train longer."""
NAMES = [
    name
    for name in list_recipes(plugin="attnzoo")
    if isinstance(load(name).recipe.host, ImageHost) and not name.startswith(OWN) and name != "third_party"
]
"""`third_party` names a plugin that is not installed here; `test_plugins.py` has it."""

RATES = {"lit_small": 0.0001}
"""Of those that diverge at the rate of the others when a step has eight images."""


def test_every_image_recipe_is_trained_somewhere():
    """Their tests name them by these prefixes; whatever else is for images is trained here."""
    assert {"ham_a", "ham_b_base", "van_b0", "hat_net_small", "cct_7_3x1", "l_sfan"} <= set(NAMES)
    rest = {name for name in list_recipes(plugin="attnzoo") if name.startswith(OWN)}
    assert all(isinstance(load(name).recipe.host, ImageHost) for name in rest)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name, tmp_path):
    """Of fifty steps of eight images, the last twenty lose less than the first ten."""
    rate = RATES.get(name, 0.0005)
    how = ["batch_size=8", f"optimizer.lr={rate}", "schedule={use: constant}", "augment=[]"]
    loaded, settings = prepare(name, ["train.data=digits", *(f"train.{each}" for each in how)])
    steps = []
    train(loaded, settings, tmp_path / "run", report=steps.append, until=50)
    sums = {step["step"]: step["train_loss"] * step["step"] for step in steps if step["event"] == "step"}
    first, last = sums[10] / 10, (sums[50] - sums[30]) / 20
    assert len(sums) == 50 and last < first, (first, last)
