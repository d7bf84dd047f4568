"""Every recipe for images trains: ninety steps on digits, after which its loss is lower than at the beginning."""

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


def test_every_image_recipe_is_trained_somewhere():
    """Their tests name them by these prefixes; whatever else is for images is trained here."""
    assert {"ham_a", "ham_b_base", "van_b0", "hat_net_small", "cct_7_3x1", "l_sfan"} <= set(NAMES)
    rest = {name for name in list_recipes(plugin="attnzoo") if name.startswith(OWN)}
    assert all(isinstance(load(name).recipe.host, ImageHost) for name in rest)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name, tmp_path):
    """The mean loss of the second epoch, steps 46 to 90, is below that of the first."""
    edits = ["train.epochs=2", "train.batch_size=32", "train.optimizer.lr=0.0005", "train.augment=[]"]
    loaded, settings = prepare(name, ["train.data=digits", *edits])
    losses = [epoch["train_loss"] for epoch in train(loaded, settings, tmp_path / "run").log()]
    assert len(losses) == 2 and losses[1] < losses[0], losses
