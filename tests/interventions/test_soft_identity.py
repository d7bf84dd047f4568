"""`soft_identity`: SoftPAG."""

import pytest
import torch
from instruments import images, pairs, passing, vit

import attnzoo
from attnzoo.core import Here
from attnzoo.errors import ZooError
from attnzoo.interventions import SoftIdentity


def given(model: torch.nn.Module, *interventions) -> tuple[torch.Tensor, torch.Tensor]:
    """What the heads of the first block give, (b h n d), and their values."""
    seen, head = [], model.blocks[0].attn.inner
    with torch.no_grad(), attnzoo.intervene(model, *interventions):
        hook = head.register_forward_hook(lambda _, args, out: seen.append((out, args[2])))
        model(images())
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_equals_the_equation(strength):
    (before, _), _ = passing(vit(), "weights")
    (after, _), _ = passing(vit(), "weights", SoftIdentity(strength=strength))
    assert torch.allclose(after, (1 - strength) * before + strength * torch.eye(17), atol=1e-6)
    assert torch.allclose(after.sum(dim=-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("attention", ["softmax", "elu_linear"])
def test_what_heads_give_is_linear_in_the_strength(attention):
    """(1 − u) A v + u v, also where no weights are formed."""
    plain, v = given(vit(attention))
    for strength in (0.25, 0.5, 1.0):
        out, _ = given(vit(attention), SoftIdentity(strength=strength, at="blocks.0"))
        assert torch.allclose(out, (1 - strength) * plain + strength * v, atol=1e-5)


def test_a_token_that_may_not_see_itself_keeps_its_row():
    model = attnzoo.compose("ham_classic").eval()
    mask = torch.ones(65, 65, dtype=torch.bool)
    mask[3, 3] = False
    seen = []
    batch = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def note(_name: str, weights: torch.Tensor) -> None:
        seen.append(weights)

    with (
        torch.no_grad(),
        attnzoo.intervene(model, SoftIdentity(at="blocks.0")),
        attnzoo.watch(model, "weights", note),
    ):
        model(batch, attn_mask=mask)
    first = seen[0][0]
    assert not first[:, 3, 3].any() and torch.allclose(first[:, 3].sum(dim=-1), torch.ones(4))
    assert torch.equal(first[:, 4], torch.eye(65)[4].expand(4, -1))


def test_newest_tokens_of_a_sequence_are_themselves():
    model, source, target = pairs(), torch.tensor([[5, 6, 7, 2]]), torch.tensor([[1, 5, 9, 6, 7]])
    with torch.no_grad(), attnzoo.intervene(model, SoftIdentity(strength=0.5)):
        whole = model(source, target)
        state = model.start(model.encode(source))
        steps = [model.step(target[:, i : i + 1], state) for i in range(5)]
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-5)


def test_newest_tokens_without_weights():
    """Two queries, the last of five tokens: their own values are the last two."""
    v = torch.randn(1, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    here = Here("layers.0", 0, 1, "elu_linear", "elu_linear", 2, v=v)
    out = SoftIdentity(strength=0.25).edit_heads(torch.ones(1, 2, 2, 3), here)
    assert torch.allclose(out, 0.75 + 0.25 * v[:, :, 3:])


def test_cross_attention_is_left_alone():
    with (
        pytest.raises(ZooError, match="reads another sequence"),
        attnzoo.intervene(pairs(), SoftIdentity(at="decoder.*.cross")),
    ):
        pass
