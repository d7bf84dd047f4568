"""`temperature`: scores are divided."""

import pytest
import torch
from instruments import images, passing, vit

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.interventions import Temperature


@pytest.mark.parametrize("value", [0.5, 3.0])
def test_equals_the_equation(value):
    (scores, _), _ = passing(vit(), "scores")
    (weights, _), _ = passing(vit(), "weights", Temperature(value=value))
    assert torch.equal(weights, (scores / value).softmax(dim=-1))


def test_equals_a_projection_of_queries_divided_by_it():
    """Of softmax(q kᵀ / √d): T divides q as well."""
    model, other = vit(), vit()
    with torch.no_grad():
        for block in other.blocks:
            block.attn.qkv.weight[:48] /= 4
            block.attn.qkv.bias[:48] /= 4
        with attnzoo.intervene(model, "temperature(value=4.0)"):
            out = model(images())
        assert torch.allclose(out, other(images()), atol=1e-5)


def test_of_a_causal_model_the_future_stays_hidden():
    model = attnzoo.compose("task_switching").eval()
    ids = torch.randint(0, 5, (2, 7), generator=torch.Generator().manual_seed(0))
    weights, _ = passing(model, "weights", Temperature(value=1e4), inputs=(ids,))
    seen = torch.ones(7, 7).tril() / torch.arange(1, 8)[:, None]
    assert weights and all(torch.allclose(one, seen.expand_as(one), atol=1e-3) for one in weights)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "hot"])
def test_what_is_no_temperature_is_refused(value):
    with pytest.raises(ZooError, match="AZ921"):
        Temperature(value=value)
