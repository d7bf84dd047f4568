"""LIT's blocks without attention, arXiv:2105.14217, §3."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, wrong
from capabilities import images, made, recipe

import attnzoo
from attnzoo.core import Layout, Mask
from attnzoo.mechanisms.mixing.nothing import Nothing
from attnzoo.testing import against


@against(Nothing)
def test_oracle(x):
    """Zeros, whatever is asked; they depend on nothing."""
    return [[[0.0] * x.shape[2] for _ in range(x.shape[1])] for _ in range(x.shape[0])]


def mixing(change):
    """Something in its place."""
    return wrong(Nothing, mix=lambda self, x, source, *, mask, layout: change(x, mask, layout))


MUTANTS = {
    "the tokens themselves": mixing(lambda x, mask, layout: x),
    "ones": mixing(lambda x, mask, layout: torch.ones_like(x)),
    "the mean token": mixing(lambda x, mask, layout: x.mean(1, keepdim=True).expand_as(x)),
    "a gradient through zeros": mixing(lambda x, mask, layout: x - x.detach()),
    "special tokens as they went in": mixing(
        lambda x, mask, layout: torch.cat([x[:, : layout.prefix], 0 * x[:, layout.prefix :]], 1)
    ),
    "only what does not exist is zero": mixing(
        lambda x, mask, layout: 0 * x if mask.keys is None else x.masked_fill(~mask.keys[..., None], 0.0)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_zeros_even_of_what_is_no_number():
    x = torch.tensor([[[1.0, -2], [math.nan, math.inf]]], requires_grad=True)
    out = Nothing(place(2))(x, layout=Layout((2,)))
    assert torch.equal(out, torch.zeros(1, 2, 2))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros(1, 2, 2))


def test_hand_it_has_no_parameters():
    assert count(Nothing(place(4))) == 0 and not Nothing(place(4)).state_dict()


# Identities


def test_identity_a_block_is_its_mlp():
    """x + MLP(LN x), bit for bit, and no token of a block hears of another."""
    block = made("nothing").blocks[0].double()
    x = normal(2, 17, 32)
    near(block(x), x + block.mlp(block.norm2(x)), 0)
    jacobian = torch.autograd.functional.jacobian(lambda t: block(t)[0].sum(-1), x[:1])[:, 0]  # (n n c)
    assert (jacobian.abs().sum(-1) > 0).equal(torch.eye(17, dtype=torch.bool))


def test_identity_patches_stay_apart_up_to_the_first_attention():
    """Attention in the second block alone: before it each patch answers for itself, after it for all."""
    mixed = recipe("nothing") | {"overrides": [{"at": "blocks.1", "put": "softmax"}]}
    model = attnzoo.compose(mixed).eval()
    x, other = images(1), images(1).clone()
    other[..., :8, :8] += 1  # the first patch
    first, second = ([t[0] for t in model.forward_intermediates(i, norm=False, intermediates_only=True)] for i in (x, other))  # fmt: skip
    moved = [(a - b).abs().amax(0) > 0 for a, b in zip(first, second, strict=True)]
    assert moved[0].sum() == 1 and moved[0][0, 0] and moved[1].all()


def test_identity_what_stands_before_gets_gradients_of_zero():
    model = made("nothing").train()
    model(images(2)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not model.blocks[0].norm1.weight.grad.any() and model.blocks[0].norm2.weight.grad.any()


def test_identity_masks_change_nothing():
    part, x = Nothing(place(6, 2, 5)), normal(2, 5, 6)
    for mask in (Mask(causal=True), Mask(keys=torch.zeros(2, 5, dtype=torch.bool))):
        near(part(x, mask=mask, layout=Layout((5,))), torch.zeros(2, 5, 6), 0)


def test_narrow_numbers_stay_near():
    narrow(Nothing, [(2, 7, 12)], site=place(12, 3, 7))
