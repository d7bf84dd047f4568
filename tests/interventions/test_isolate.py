"""`isolate`: subjects do not see each other."""

import pytest
import torch
from instruments import images, passing, subject, vit

import attnzoo
from attnzoo.core import watch
from attnzoo.errors import ZooError
from attnzoo.interventions import Isolate

REGIONS = [[1, 1, 0, 2], [1, 1, 0, 2], [0, 0, 0, 0], [0, 3, 3, 0]]
"""Of the 4 × 4 patches; the class token, before them, is background."""
FLAT = [0, *[number for row in REGIONS for number in row]]


def hidden(background: str = "all") -> torch.Tensor:
    """Who may not see whom, (17 17), pair by pair."""
    out = torch.zeros(17, 17, dtype=torch.bool)
    for i, a in enumerate(FLAT):
        for j, b in enumerate(FLAT):
            out[i, j] = a != b and b > 0 and (a > 0 or background == "background")
    return out


@pytest.mark.parametrize("background", ["all", "background"])
def test_equals_softmax_over_who_may_be_seen(background):
    (scores, _), _ = passing(vit(), "scores")
    (weights, later), _ = passing(vit(), "weights", Isolate(regions=REGIONS, background=background))
    wanted = scores.masked_fill(hidden(background), float("-inf")).softmax(dim=-1)
    assert torch.equal(weights, wanted)
    assert not weights[..., hidden(background)].any() and not later[..., hidden(background)].any()
    assert torch.allclose(weights.sum(dim=-1), torch.ones(()), atol=1e-6)


def test_no_gradient_goes_from_one_subject_to_another():
    """Within a layer: what enters the attention as a token of subject 2 does not move what subject 1 receives."""
    model, seen = vit(), {}

    def before(_module, args):
        seen["x"] = args[0].detach().requires_grad_()
        return (seen["x"], *args[1:])

    hooks = [
        model.blocks[0].attn.register_forward_pre_hook(before),
        model.blocks[0].attn.register_forward_hook(lambda _, args, out: seen.update(out=out)),
    ]
    with attnzoo.intervene(model, Isolate(regions=REGIONS)):
        model(images())
    for hook in hooks:
        hook.remove()
    numbers = torch.tensor(FLAT)
    seen["out"][:, numbers == 1].square().sum().backward()
    moved = seen["x"].grad.abs().amax(dim=(0, 2))
    assert not moved[(numbers == 2) | (numbers == 3)].any()
    assert moved[(numbers == 0) | (numbers == 1)].all()


@pytest.mark.parametrize("regions", [[[1] * 4] * 4, [[0] * 4] * 4])
def test_one_subject_alone_changes_nothing(regions):
    model = vit()
    for kind in ("scores", "weights"):
        plain, same = (passing(model, kind, *one)[0] for one in ((), (Isolate(regions=regions),)))
        assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


def test_regions_at_the_size_of_the_image_and_of_each_sample():
    large = torch.tensor(REGIONS).repeat_interleave(4, 0).repeat_interleave(4, 1)
    (at_tokens, _), _ = passing(vit(), "weights", Isolate(regions=REGIONS))
    (at_pixels, _), _ = passing(vit(), "weights", Isolate(regions=large))
    assert torch.equal(at_tokens, at_pixels)
    each = torch.stack([large if i % 2 else torch.zeros_like(large) for i in range(6)])
    (mixed, _), _ = passing(vit(), "weights", Isolate(regions=each))
    (plain, _), _ = passing(vit(), "weights")
    assert torch.equal(mixed[1::2], at_tokens[1::2]) and torch.equal(mixed[::2], plain[::2])


@pytest.mark.parametrize("attention", ["cosine", "entmax", "sigmoid", "softmax_one", "top_k", "alibi"])
def test_other_mechanisms_keep_them_apart_too(attention):
    model, seen = vit(attention), []

    def note(_name: str, weights: torch.Tensor) -> None:
        seen.append(weights)

    with torch.no_grad(), attnzoo.intervene(model, Isolate(regions=REGIONS)), watch(model, "weights", note):
        out = model(images())
    assert out.isfinite().all()
    assert len(seen) == 2 and not any(one[..., hidden()].any() for one in seen)


@pytest.mark.parametrize("regions", [[1, 2], [[[[1]]]], [[1, 2], [3]], "all", [[[1]], [[2]]], [["a"]]])
def test_regions_that_fit_no_grid_are_refused(regions):
    with pytest.raises(ZooError, match="AZ921"):
        subject(vit()).outputs(Isolate(regions=regions))


def test_who_weighs_a_score_of_minus_infinity_is_refused():
    """Expressive attention squares its scores."""
    model = vit("expressive")
    with attnzoo.intervene(model, Isolate(regions=REGIONS)), pytest.raises(ZooError, match="AZ924"):
        model(images())


def test_heads_that_are_not_named_see_everything():
    (plain, _), _ = passing(vit(), "weights")
    (one, _), _ = passing(vit(), "weights", Isolate(regions=REGIONS, heads=[1]))
    assert torch.equal(one[:, [0, 2, 3]], plain[:, [0, 2, 3]]) and not one[:, 1][..., hidden()].any()
