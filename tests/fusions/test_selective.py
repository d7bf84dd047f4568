"""Channels choose among the branches by what all tokens say, arXiv:1903.06586, eq. 1-6."""

import math

import pytest
import torch
from by_hand import caught, count, from_first, near, normal, place, seen, spread, wrong

from attnzoo.core import Fused, FusedHeads, Layout, Mask, MultiHead
from attnzoo.errors import UnsupportedContext, UnsupportedMask
from attnzoo.functional import mean_token
from attnzoo.fusions.mean import Mean
from attnzoo.fusions.selective import Selective
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.testing import against


def pooled(u, keys):
    """The mean of the tokens that exist, of one sample and head: u (n c)."""
    total, number = torch.zeros_like(u[0]), 0
    for token, there in zip(u, keys, strict=True):
        if there:
            total, number = total + token, number + 1
    return total / max(1, number)


def chosen(component, k, token):
    """The share of each branch in each channel, (k c)."""
    y = component.squeeze.weight @ token
    y = (y - y.mean()) / torch.sqrt(y.var(unbiased=False) + 1e-5)
    z = (component.norm.weight * y + component.norm.bias).clamp(min=0)
    powers = torch.exp((component.choose.weight @ z).reshape(k, -1))
    return powers / powers.sum(0)


@against(Selective)
def test_oracle(component, options, branches, keys):
    """Σ aᵢ ⊙ sᵢ, sample by sample, head by head."""
    width, n = branches[0].shape[-1], branches[0].shape[-2]
    parts = [branch.reshape(len(keys), -1, n, width) for branch in branches]
    out = torch.zeros_like(parts[0])
    for b in range(len(keys)):
        for h in range(parts[0].shape[1]):
            shares = chosen(component, len(branches), pooled(sum(part[b, h] for part in parts), keys[b]))
            for i, part in enumerate(parts):
                out[b, h] = out[b, h] + shares[i] * part[b, h]
    return from_first(component, options, branches, out.reshape(branches[0].shape))


def choosing(
    mean=mean_token, norm=lambda self, y: self.norm(y), act=torch.relu, softmax=lambda t: t.softmax(-2)
):
    """Another way to one of the steps."""

    def merge(self, branches, x, mask):
        z = act(norm(self, self.squeeze(mean(sum(branches), mask))))
        shares = softmax(self.choose(z).unflatten(-1, (self.arity, -1)).squeeze(-3))
        return sum(shares[..., i : i + 1, :] * branch for i, branch in enumerate(branches))

    return wrong(Selective, merge=merge)


MUTANTS = {
    "padding counts": choosing(lambda t, mask: t.mean(-2, keepdim=True)),
    "the sum of the tokens": choosing(lambda t, mask: mean_token(t, mask) * t.shape[-2]),
    "the greatest token": choosing(lambda t, mask: t.amax(-2, keepdim=True)),
    "the first token": choosing(lambda t, mask: t[..., :1, :]),
    "over the samples": choosing(lambda t, mask: mean_token(t, mask).mean(0, keepdim=True).expand(len(t), *t[:1, ..., :1, :].shape[1:])),
    "no norm": choosing(norm=lambda self, y: y),
    "no relu": choosing(act=lambda y: y),
    "over the channels": choosing(softmax=lambda t: t.softmax(-1)),
    "a sigmoid": choosing(softmax=torch.sigmoid),
    "branches the wrong way round": choosing(softmax=lambda t: t.softmax(-2).flip(-2)),
    "one share for all channels": choosing(softmax=lambda t: t.mean(-1, keepdim=True).expand_as(t).softmax(-2)),
    "gamma ignored": wrong(Selective, merge_from_first=lambda self, b, x, **m: self.merge(b, x, **m)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def test_hand_with_nothing_to_choose_it_is_the_mean():
    branches = list(normal(3, 2, 4, 6))
    fusion = Selective(place(6), 3).double()
    near(fusion(branches, branches[0]), Mean(place(6), 3)(branches, branches[0]))
    spread(fusion).reset_parameters()
    near(fusion(branches, branches[0]), Mean(place(6), 3)(branches, branches[0]))


def test_hand_numbers():
    """z = (1, 0) whatever the tokens say; A z = (ln 3, 0) in channel 1 and (0, 0) in channel 2."""
    fusion = Selective(place(2), 2, least=2).double()
    with torch.no_grad():
        fusion.norm.weight.zero_(), fusion.norm.bias.copy_(torch.tensor([1.0, -5]))
        fusion.choose.weight[0, 0] = math.log(3)
    one, two = torch.tensor([[[8.0, 8]]]).double(), torch.tensor([[[4.0, 4]]]).double()
    near(fusion([one, two], one), [7, 6])
    shares = seen(fusion, [one, two], one, tap="shares")
    near(shares, [[[0.75, 0.5], [0.25, 0.5]]])


def test_hand_parameters():
    """W, γ and β of the norm, A; z has max(c / 16, 32) channels."""
    assert count(Selective(place(64), 3)) == 64 * 32 + 2 * 32 + 32 * 3 * 64
    assert count(Selective(place(1024), 2)) == 1024 * 64 + 2 * 64 + 64 * 2 * 1024
    assert count(Selective(place(64), 2, reduction=8, least=2)) == 64 * 8 + 2 * 8 + 8 * 2 * 64


# Identities


def test_identity_equal_branches_give_that_value():
    branch = normal(2, 4, 6)
    near(spread(Selective(place(6), 3))([branch] * 3, branch), branch)


def test_identity_padding_is_as_if_it_were_not_there():
    fusion, branches = spread(Selective(place(6), 2)), list(normal(2, 1, 5, 6))
    keys = torch.tensor([[True, True, True, False, False]])
    lost = [branch.masked_fill(~keys[..., None], 1e6) for branch in branches]
    short = fusion([branch[:, :3] for branch in branches], branches[0][:, :3])
    near(fusion(lost, lost[0], mask=Mask(keys=keys))[:, :3], short)


def test_identity_nobody_there_is_a_mean_of_zero():
    fusion, branches = spread(Selective(place(6), 2)), list(normal(2, 1, 5, 6))
    inputs = [branch.requires_grad_() for branch in branches]
    out = fusion(inputs, inputs[0], mask=Mask(keys=torch.zeros(1, 5, dtype=torch.bool)))
    out.sum().backward()
    assert bool(out.isfinite().all()) and all(bool(t.grad.isfinite().all()) for t in inputs)


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(3, 2, 4, 6)
    fusion = Selective(place(6), 3, start="identity").double()
    keys = torch.rand(2, 4) < 0.5
    assert torch.equal(fusion(list(branches), branches[0], mask=Mask(keys=keys)), branches[0])


# What it refuses


def branch(site):
    """Softmax attention on tokens."""
    return MultiHead(site, Softmax(site))


@pytest.mark.parametrize("build", [lambda s: Fused(s, Selective, [branch] * 2), lambda s: MultiHead(s, FusedHeads(s, Selective, [Softmax] * 2))])  # fmt: skip
def test_where_later_tokens_are_hidden_it_is_refused(build):
    x, part = normal(2, 4, 8), build(place(8, 2, 4)).double()
    assert part.card.masks == {"keys"} and not part.card.context and not part.card.incremental
    for mask in (Mask(causal=True), Mask(pairs=torch.ones(1, 1, 4, 4, dtype=torch.bool))):
        with pytest.raises(UnsupportedMask, match="AZ402.*`selective` honours only keys"):
            part(x, mask=mask, layout=Layout((4,)))
    keys = torch.tensor([[True] * 4, [True, False, True, True]])
    out = part(x, mask=Mask(keys=keys), layout=Layout((4,)))
    moved = part(x + 3 * (~keys)[..., None], mask=Mask(keys=keys), layout=Layout((4,)))
    near(out[keys], moved[keys])


def test_a_context_is_refused_because_masks_are_about_that():
    part = Fused(place(8, 2, 4, context_dim=8), Selective, [branch] * 2).double()
    with pytest.raises(UnsupportedContext, match="AZ404"):
        part(normal(1, 4, 8), normal(1, 3, 8), layout=Layout((4,)))
