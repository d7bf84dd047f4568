"""`reposition`: subjects at the same place while they attend."""

import pytest
import torch
from instruments import images, vit
from torch import Tensor
from torch.nn import functional as F

import attnzoo
from attnzoo.errors import ZooError
from attnzoo.interventions import Reposition

BOXES = [(0, 0, 2, 2), (1, 1, 4, 4), (2, 2, 4, 4), (0, 1, 1, 2), (1, 1, 4, 4), (0, 0, 1, 4)]
"""Of six samples; the second is the largest."""


def around(model: torch.nn.Module, *interventions) -> tuple[Tensor, Tensor]:
    """What the first attention reads, and what is added to the residual, as grids (b c 4 4)."""
    seen, inner = {}, {}
    with torch.no_grad(), attnzoo.intervene(model, *interventions):
        hooks = [
            model.blocks[0].attn.qkv.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
            model.blocks[0].attn.proj.register_forward_hook(lambda _, args, out: inner.update(out=out)),
            model.blocks[0].attn.register_forward_hook(lambda _, args, out: seen.update(out=out)),
        ]
        model(images())
        for hook in hooks:
            hook.remove()
    return *(t[:, 1:].mT.unflatten(2, (4, 4)) for t in (seen["x"], inner["out"], seen["out"])), seen["x"][
        :, 0
    ]


def test_subjects_go_to_the_common_box_and_back():
    model = vit()
    x, _, _, prefix = around(model)
    moved, inner, out, same_prefix = around(model, Reposition(boxes=BOXES, at="blocks.0"))
    assert torch.equal(prefix, same_prefix)
    for b, (top, left, bottom, right) in enumerate(BOXES):
        size = bottom - top, right - left
        wanted, back = x[b].clone(), inner[b].clone()
        if b not in (1, 4):
            wanted[:, 1:4, 1:4] = F.interpolate(
                x[b, None, :, top:bottom, left:right], size=(3, 3), mode="bilinear"
            )[0]
            back[:, top:bottom, left:right] = F.interpolate(
                inner[b, None, :, 1:4, 1:4], size=size, mode="bilinear"
            )[0]
        assert torch.equal(moved[b], wanted) and torch.equal(out[b], back)


def test_equal_boxes_change_no_bit():
    model = vit()
    with torch.no_grad():
        plain = model(images())
        with attnzoo.intervene(model, Reposition(boxes=[(1, 0, 3, 2)] * 6)):
            assert torch.equal(model(images()), plain)


def test_two_boxes_of_one_size_are_exchanged_exactly():
    """Nothing is resized: a subject is read at the place of the other."""
    model = vit()
    x, *_ = around(model)
    boxes = [(0, 0, 2, 2)] + [(2, 2, 4, 4)] * 5
    moved, *_ = around(model, Reposition(boxes=boxes, at="blocks.0"))
    assert torch.equal(moved[0], x[0]) and torch.equal(moved[3, :, :2, :2], x[3, :, 2:, 2:])


@pytest.mark.parametrize(
    "boxes", [[(0, 0, 2, 2)], [(0, 0, 5, 2)] * 6, [(2, 0, 2, 2)] * 6, [(0, 0, 2)] * 6, [(-1, 0, 2, 2)] * 6]
)
def test_boxes_that_do_not_fit_are_refused(boxes):
    model = vit()
    with attnzoo.intervene(model, Reposition(boxes=boxes)), pytest.raises(ZooError, match="AZ921"):
        model(images())


def test_a_line_of_tokens_has_no_boxes():
    model = attnzoo.compose("task_switching")
    ids = torch.zeros(1, 5, dtype=torch.long)
    with attnzoo.intervene(model, Reposition(boxes=[(0, 0, 1, 1)])), pytest.raises(ZooError, match="AZ921"):
        model(ids)
