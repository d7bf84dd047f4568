"""`rebalance`: scores of chosen keys are raised."""

import pytest
import torch
from instruments import images, pairs, passing, sentences, vit

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.interventions import Rebalance
from attnzoo.lab.calibration import salient_tokens
from attnzoo.lab.maps import collect


def by_hand(scores: torch.Tensor, rows: list[int], top: list[int], bottom: list[int]) -> torch.Tensor:
    """α = 0.5, β = 0.2, number by number."""
    out = scores.clone()
    for i in rows:
        for j in {*top, *bottom}:
            out[:, :, i, j] += (0.2 if j in bottom else 0.5) * scores[:, :, i, j].abs()
    return out


@pytest.mark.parametrize(
    ("queries", "rows"), [("answer", [0]), ("last", [16]), ("all", range(17)), ([2, -1], [2, 16])]
)
def test_equals_the_equation(queries, rows):
    rule = Rebalance(top=[3, 4, 5], bottom=[5, 9], alpha=0.5, beta=0.2, queries=queries)
    (before, _), _ = passing(vit(), "scores")
    (after, _), _ = passing(vit(), "scores", rule)
    assert torch.equal(after, by_hand(before, list(rows), [3, 4, 5], [5, 9]))
    assert (after >= before).all() and (
        before[:, :, list(rows), 3] < 0
    ).any()  # |s|: those below 0 rise as well
    (weights, _), _ = passing(vit(), "weights", rule)
    assert torch.allclose(weights, after.softmax(dim=-1))


def test_one_of_both_strengths_alone():
    (before, _), _ = passing(vit(), "scores")
    (after, _), _ = passing(vit(), "scores", Rebalance(top=[1], bottom=[2], alpha=0.0, queries="all"))
    changed = (after != before).any(dim=(0, 1, 2)).nonzero().flatten().tolist()
    assert changed == [2]


def test_tokens_of_each_image():
    model = vit()
    top, bottom = salient_tokens(model, images(), share=0.25)
    (before, _), _ = passing(model, "scores")
    (after, _), _ = passing(model, "scores", Rebalance(top=top, bottom=bottom, queries="all"))
    assert torch.equal((after != before).any(dim=(1, 2)), top | bottom)
    assert (top.sum(dim=1) <= 4).all() and len(top.unique(dim=0)) > 1
    with (
        torch.no_grad(),
        attnzoo.intervene(model, Rebalance(top=top[:2])),
        pytest.raises(ZooError, match="AZ921"),
    ):
        model(images())


def test_salient_tokens_are_those_of_the_first_layer_and_outliers_of_the_last_but_one():
    model = vit(depth=3)
    top, bottom = salient_tokens(model, images(), share=0.5)
    first, second, _ = collect(model, images()).maps
    for b in range(6):
        scores = first.weights[b, :, 0, 1:].sum(dim=0)
        late = second.weights[b, :, 0, 1:].sum(dim=0).double()
        low, high = late.quantile(0.25), late.quantile(0.75)
        out = late > high + 1.5 * (high - low)
        best = set(scores.argsort(descending=True)[:8].tolist())
        assert bottom[b].tolist() == [False, *out.tolist()]
        assert top[b].tolist() == [False, *[j in best and not out[j] for j in range(16)]]
    assert bottom.any() and not bottom.all()
    more, _ = salient_tokens(model, images(), share=0.25, spatial=0.25)
    fewer, _ = salient_tokens(model, images(), share=0.25)
    assert more.sum() > fewer.sum() and (more | ~fewer).all()


def test_salient_tokens_of_half_precision_and_of_layers_that_there_are():
    for dtype in (torch.bfloat16, torch.float16):
        top, bottom = salient_tokens(vit().to(dtype), images().to(dtype), last=-1)
        assert top.sum(dim=1).add((top & bottom).sum(dim=1)).le(4).all() and bottom.dtype == torch.bool
    for where in ({"first": 2}, {"last": -3}):
        with pytest.raises(ZooError, match="AZ904"):
            salient_tokens(vit(), images(), **where)


def test_a_decoder_looks_more_at_words_of_its_source():
    model = pairs()
    before, _ = passing(model, "weights", inputs=sentences())
    after, _ = passing(
        model, "weights", Rebalance(at="decoder.*.cross", top=[1], alpha=4.0), inputs=sentences()
    )
    assert (after[3][..., 1] >= before[3][..., 1]).all() and (
        after[3][..., 1] > before[3][..., 1] + 0.05
    ).any()
    assert torch.equal(after[2], before[2]) and not after[3][1, :, :, 3:].any()  # padding stays hidden


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"beta": float("nan")}, {"top": "some"}])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ZooError, match="AZ921"):
        Rebalance(**options)
