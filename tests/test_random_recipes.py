"""Random recipes over the whole zoo: each composes and works, or is refused with a reason before anything is built."""

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import attnzoo
from attnzoo.core import auxiliary_losses
from attnzoo.errors import ZooError
from attnzoo.hosts.given import stand_ins, taken
from attnzoo.hosts.seq2seq import Seq2Seq
from attnzoo.hosts.sequence import SequenceModel
from attnzoo.testing import random_recipe, recipes
from attnzoo.testing.recipes import HOSTS


def inputs(model: nn.Module) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """A batch of two for any model."""
    if isinstance(model, Seq2Seq):
        return (torch.randint(3, 11, (2, 7)), torch.randint(3, 11, (2, 5))), {}
    if isinstance(model, SequenceModel):
        return (torch.randint(0, 11, (2, 9)),), {}
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    return (images,), stand_ins(images, taken(model))


def tried(recipe: Mapping[str, Any]) -> str:
    """Compose it; then it must learn and survive saving. `composed`, or the code it is refused with."""
    try:
        model = attnzoo.compose(recipe)
    except ZooError as error:
        for fault in error.diagnostics:
            assert fault.code.startswith(("AZ1", "AZ2", "AZ3", "AZ4")) and fault.message, str(error)
        return error.code
    x, more = inputs(model)
    with auxiliary_losses(model) as losses:
        out = model.train()(*x, **more)
    assert bool(out.isfinite().all())
    (out.float().square().mean() + 0.01 * losses.mean()).backward()
    for name, p in model.named_parameters():
        assert p.grad is None or bool(p.grad.isfinite().all()), name
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    other = attnzoo.compose(recipe)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(*x, **more), other.eval()(*x, **more))
    return "composed"


many = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)


@settings(many, max_examples=100)
@given(recipes())
def test_every_recipe_works_or_is_refused(recipe):
    tried(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_two_thousand_of_them(part):
    """Other draws than those of every day, the same each time."""
    source = random.Random(part)
    found = Counter(tried(random_recipe(source)) for _ in range(100))
    assert found["composed"] > 5, found


def test_every_host_and_most_of_the_zoo_is_drawn():
    source = random.Random(0)
    drawn = [random_recipe(source) for _ in range(1500)]
    assert {recipe["host"]["kind"] for recipe in drawn} == set(HOSTS)
    text = repr(drawn)
    missing = [
        name
        for name in [*attnzoo.list_mechanisms(plugin="attnzoo"), *attnzoo.list_fusions(plugin="attnzoo")]
        if f"'{name}'" not in text
    ]
    assert not missing
    assert all(f"'{key}'" in text for key in ("overrides", "heads", "skip", "pool", "level", "with"))


def test_only_what_was_asked_for():
    source = random.Random(0)
    for _ in range(30):
        recipe = random_recipe(source, hosts=["cct"], mechanisms=["softmax", "agent"])
        assert recipe["host"]["kind"] == "cct"
        others = set(attnzoo.list_mechanisms()) - {"softmax", "agent"} - {recipe.get("pool")}
        assert not any(f"'{name}'" in repr(recipe) for name in others)


def test_what_breaks_is_seen(monkeypatch):
    """A model whose weights are not all in its state dict, and one whose gradient is not finite."""
    from attnzoo.mechanisms.dot_product.softmax import Softmax

    plain = {"recipe": 1, "host": {"kind": "cct", "model": {"img_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 4}}, "attention": "softmax"}  # fmt: skip
    assert tried(plain) == "composed"
    attend = Softmax.attend

    def infinite(self, q, k, v, *, mask, layout):
        return attend(self, q, k, (v * 0).sqrt() + v, mask=mask, layout=layout)

    monkeypatch.setattr(Softmax, "attend", infinite)
    with pytest.raises(AssertionError):
        tried(plain)
