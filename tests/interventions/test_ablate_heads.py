"""`ablate_heads`: heads that give nothing."""

import pytest
import torch
from instruments import images, vit

import attnzoo
from attnzoo.interventions import AblateHeads


def without(model: torch.nn.Module, layer: int, heads: list[int]) -> torch.Tensor:
    """The same by hand: the columns of the output projection that read these heads are zero."""
    proj = model.blocks[layer].attn.proj
    kept = proj.weight.detach().clone()
    with torch.no_grad():
        for head in heads:
            proj.weight[:, 12 * head : 12 * (head + 1)] = 0
        out = model(images())
        proj.weight.copy_(kept)
    return out


@pytest.mark.parametrize("heads", [[0], [1, 3]])
def test_equals_a_projection_without_these_heads(heads):
    model = vit()
    with torch.no_grad(), attnzoo.intervene(model, AblateHeads(at="blocks.1", heads=heads)):
        out = model(images())
    assert torch.allclose(out, without(model, 1, heads), atol=1e-6)
    assert not torch.allclose(out, model(images()), atol=1e-3)


def test_a_mean_says_the_same_to_every_token():
    model, seen = vit(), []
    hook = model.blocks[0].attn.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), attnzoo.intervene(model, AblateHeads(at="blocks.0", heads=[2], by="mean")):
        model(images())
    hook.remove()
    merged = seen[0].unflatten(-1, (4, 12))  # (b n h d)
    same = (merged - merged[:, :1]).abs().amax(dim=(0, 1, 3)) < 1e-6
    assert same.tolist() == [False, False, True, False]
