"""`uniform`: rows move towards their mean over the visible keys."""

import pytest
import torch
from instruments import pairs, passing, sentences, vit

import attnzoo
from attnzoo.interventions import Uniform


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_equals_the_equation(strength):
    (before, _), _ = passing(vit(), "weights")
    (after, _), _ = passing(vit(), "weights", Uniform(strength=strength))
    assert torch.allclose(after, (1 - strength) * before + strength / 17, atol=1e-6)


def test_a_causal_row_stays_in_the_past():
    model = attnzoo.compose("task_switching").eval()
    ids = torch.randint(0, 5, (2, 6), generator=torch.Generator().manual_seed(0))
    weights, _ = passing(model, "weights", "uniform", inputs=(ids,))
    wanted = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    assert weights and all(torch.allclose(one, wanted.expand_as(one), atol=1e-6) for one in weights)


def test_padding_receives_nothing():
    (first, *_), _ = passing(pairs(), "weights", Uniform(at="encoder.*"), inputs=sentences())
    assert first[0, 0, 0].tolist() == pytest.approx([1 / 5] * 5)
    assert first[1, 0, 0].tolist() == pytest.approx([1 / 3] * 3 + [0, 0])


def test_what_rows_sum_to_is_kept():
    """Sigmoid attention: rows sum to anything."""
    (before, _), _ = passing(vit("sigmoid"), "weights")
    (after, _), _ = passing(vit("sigmoid"), "weights", Uniform())
    assert torch.allclose(after.sum(dim=-1), before.sum(dim=-1), rtol=1e-5)
    assert float(after.std(dim=-1).max()) < 1e-6 < float(before.std(dim=-1).min())
