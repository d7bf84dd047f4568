"""`multi_reference`: MRSA, against loops, and its limits."""

import pytest
import torch
from instruments import images, vit
from torch import Tensor

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.interventions import MultiReference

MASKS = torch.zeros(2, 4, 4)
MASKS[0, :2], MASKS[1, 1:3, 1:3] = 1, 1
"""The concepts of two references, on the grid of 4 × 4 patches."""


def called(model: torch.nn.Module, *interventions, **more) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of the heads of the first block and what they give, (b h n d) each."""
    seen = []
    with torch.no_grad(), attnzoo.intervene(model, *interventions):
        hook = model.blocks[0].attn.inner.register_forward_hook(
            lambda _, args, out: seen.append((*args[:3], out))
        )
        model(images(), **more)
        hook.remove()
    return seen[0]


def by_loop(
    q: Tensor, k: Tensor, v: Tensor, target: int, references: list[int], marked: Tensor, w: float, form: str
):
    """What a target receives, (h n d), query by query."""
    out = torch.zeros_like(q[target])
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            logits = [q[target, h, i] @ key / 12**0.5 for key in k[target, h]]
            values = list(v[target, h])
            for r, reference in enumerate(references):
                for j, key in enumerate(k[reference, h]):
                    s, m = q[target, h, i] @ key / 12**0.5, float(marked[r, j])
                    if form == "paper":
                        logits.append(s * w * m)
                    elif m:
                        logits.append(s + w)
                    if form == "paper" or m:
                        values.append(v[reference, h, j])
            out[h, i] = torch.stack(logits).softmax(dim=0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("form", ["code", "paper"])
def test_equals_the_loop(form):
    rule = MultiReference(references=[4, 1], masks=MASKS, weight=2.0, form=form, at="blocks.0")
    q, k, v, out = called(vit(), rule)
    marked = torch.cat([torch.zeros(2, 1), MASKS.flatten(1)], dim=1)
    for target in (0, 5):
        wanted = by_loop(q, k, v, target, [4, 1], marked, 2.0, form)
        assert torch.allclose(out[target], wanted, atol=1e-5)


def test_references_attend_to_themselves_as_ever():
    *_, plain = called(vit(), "temperature(at='blocks.0', value=1.0)")
    *_, out = called(vit(), MultiReference(references=[0, 3], at="blocks.0"))
    assert torch.equal(out[[0, 3]], plain[[0, 3]])
    assert not torch.allclose(out[1], plain[1], atol=1e-3)


def test_without_a_concept_the_code_gives_plain_attention_and_the_paper_does_not():
    *_, plain = called(vit())
    nothing = torch.zeros(1, 4, 4)
    *_, code = called(vit(), MultiReference(references=[0], masks=nothing, at="blocks.0"))
    *_, paper = called(vit(), MultiReference(references=[0], masks=nothing, form="paper", at="blocks.0"))
    assert torch.allclose(code, plain, atol=1e-6)
    assert not torch.allclose(paper[1:], plain[1:], atol=1e-2)


def test_a_reference_that_is_the_image_itself_changes_nothing():
    model, batch = vit(), images(1).repeat(2, 1, 1, 1)
    with torch.no_grad():
        plain = model(batch)
        with attnzoo.intervene(model, MultiReference(references=[1], weight=0.0)):
            assert torch.allclose(model(batch), plain, atol=1e-4)


def test_a_large_weight_leaves_only_references():
    q, k, v, out = called(vit(), MultiReference(references=[2], weight=1e4, at="blocks.0"))
    wanted = (q[0] @ k[2].mT / 12**0.5).softmax(dim=-1) @ v[2]
    assert torch.allclose(out[0], wanted, atol=1e-2)  # scores near 10000 are coarse in single precision


def test_masks_and_keys_at_another_size_and_behind_padding():
    large = MASKS[:1].repeat_interleave(4, 1).repeat_interleave(4, 2)
    *_, at_tokens = called(vit(), MultiReference(references=[0], masks=MASKS[:1]))
    *_, at_pixels = called(vit(), MultiReference(references=[0], masks=large))
    assert torch.equal(at_tokens, at_pixels)


def test_regions_meet_their_own_reference_alone():
    """Two subjects, a reference for each: the image of the other subject's reference does not count."""
    regions = torch.zeros(4, 4)
    regions[:, 0], regions[:, 3] = 1, 2
    flat = torch.tensor([0, *regions.flatten().tolist()])
    rule = MultiReference(references=[0, 1], regions=regions, at="blocks.0")
    q, k, v, out = called(vit(), rule)
    for subject in (1, 2):
        for i in (flat == subject).nonzero().flatten().tolist():
            own = (flat == subject) | (flat == 0)
            logits = torch.cat(
                [q[3, :, i, None] @ k[3].mT[..., own], q[3, :, i, None] @ k[subject - 1].mT + 3 * 12**0.5], -1
            )
            values = torch.cat([v[3][:, own], v[subject - 1]], dim=1)
            wanted = (logits / 12**0.5).softmax(dim=-1) @ values
            assert torch.allclose(out[3, :, i], wanted[:, 0], atol=1e-5)
    *_, plain = called(vit())
    assert torch.allclose(
        out[3][:, flat == 0], plain[3][:, flat == 0], atol=1e-6
    )  # the background sees no reference


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"references": [6]}, "AZ921"),
        ({"references": [-1]}, "AZ921"),
        ({"references": [0, 1, 2], "masks": MASKS}, "AZ921"),
    ],
)
def test_what_does_not_fit_the_batch_is_refused(options, code):
    model = vit()
    with attnzoo.intervene(model, MultiReference(**options)), pytest.raises(ZooError, match=code):
        model(images())


def test_only_the_maths_of_softmax_is_known():
    with (
        pytest.raises(ZooError, match="AZ924"),
        attnzoo.intervene(vit("cosine"), MultiReference(references=[0])),
    ):
        pass
