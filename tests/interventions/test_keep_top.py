"""`keep_top`: few keys for each query."""

import pytest
import torch
from instruments import images, passing, vit

import attnzoo
from attnzoo.interventions import KeepTop


def by_loop(weights: torch.Tensor, keys: int, rescale: bool) -> torch.Tensor:
    """(b h n m), row by row."""
    out = torch.zeros_like(weights)
    for row, new in zip(weights.flatten(0, 2), out.view(-1, weights.shape[-1]), strict=True):
        best = sorted(range(len(row)), key=lambda j: -float(row[j]))[:keys]
        scale = float(row.sum() / row[best].sum()) if rescale else 1.0
        for j in best:
            new[j] = row[j] * scale
    return out


@pytest.mark.parametrize(("keys", "rescale"), [(1, True), (3, True), (3, False)])
def test_equals_the_loop(keys, rescale):
    (before, _), _ = passing(vit(), "weights")
    (after, _), _ = passing(vit(), "weights", KeepTop(keys=keys, rescale=rescale))
    assert torch.allclose(after, by_loop(before, keys, rescale), atol=1e-6)


def test_is_softmax_over_the_largest_scores():
    (scores, _), _ = passing(vit(), "scores")
    (after, _), _ = passing(vit(), "weights", KeepTop(keys=5))
    least = scores.topk(5, dim=-1).values[..., -1:]
    assert torch.allclose(after, scores.masked_fill(scores < least, float("-inf")).softmax(dim=-1), atol=1e-6)


@pytest.mark.parametrize("keys", [17, 100])
def test_as_many_as_there_are_change_no_bit(keys):
    before, after = (passing(vit(), "weights", *one)[0] for one in ((), (KeepTop(keys=keys),)))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_rows_without_anything_stay_empty():
    model = attnzoo.compose("ham_classic").eval()
    mask = torch.ones(65, 65, dtype=torch.bool)
    mask[3] = False
    seen = []
    batch = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def note(_name: str, weights: torch.Tensor) -> None:
        seen.append(weights)

    with torch.no_grad(), attnzoo.intervene(model, "keep_top(keys=2)"), attnzoo.watch(model, "weights", note):
        out = model(batch, attn_mask=mask)
    assert out.isfinite().all() and not seen[0][:, :, 3].any() and seen[0][:, :, 2].count_nonzero() == 2 * 4


def test_one_key_alone_hands_through_its_value():
    model = vit()
    with torch.no_grad(), attnzoo.intervene(model, "keep_top(keys=1)"):
        out = model(images())
    with torch.no_grad(), attnzoo.intervene(model, "temperature(value=1e-6)"):
        assert torch.allclose(out, model(images()), atol=1e-4)
