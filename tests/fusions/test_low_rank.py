"""Low-rank bilinear pooling, arXiv:1610.04325, eq. 6-8."""

import pytest
import torch
from by_hand import caught, from_first, merging, near, normal, place, wrong
from torch import nn

from attnzoo.fusions.low_rank import LowRank
from attnzoo.testing import against


@against(LowRank)
def test_oracle(component, options, branches):
    """P (σ(U₁ s₁ + b₁) ∘ … ∘ σ(U_k s_k + b_k)) + b, token by token."""
    width, up = branches[0].shape[-1], component.up
    rows, out = [branch.reshape(-1, width) for branch in branches], []
    for i in range(rows[0].shape[0]):
        product = torch.ones(options["rank"] or width).double()
        for down, row in zip(component.down, rows, strict=True):
            y = down.weight @ row[i] + down.bias
            product = product * (torch.tanh(y) if options["activation"] == "tanh" else y)
        out.append(up.weight @ product + up.bias)
    return from_first(component, options, branches, torch.stack(out).reshape(branches[0].shape))


def factors(self, branches):
    """σ(Uᵢ sᵢ + bᵢ)."""
    return [self.activation(down(branch)) for down, branch in zip(self.down, branches, strict=True)]


MUTANTS = {
    "a sum": merging(LowRank, lambda self, b, x: self.up(sum(factors(self, b)))),
    "the first projection for all": merging(
        LowRank,
        lambda self, b, x: self.up(torch.stack([self.activation(self.down[0](s)) for s in b]).prod(0)),
    ),
    "σ after the product": merging(
        LowRank,
        lambda self, b, x: self.up(
            self.activation(torch.stack([down(s) for down, s in zip(self.down, b, strict=True)]).prod(0))
        ),
    ),
    "σ after P": merging(
        LowRank, lambda self, b, x: self.activation(self.up(torch.stack(factors(self, b)).prod(0)))
    ),
    "no bias after P": merging(
        LowRank, lambda self, b, x: self.up(torch.stack(factors(self, b)).prod(0)) - self.up.bias
    ),
    "gamma ignored": wrong(LowRank, merge_from_first=lambda self, b, x: self.merge(b, x)),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


# By hand


def bilinear(rank: int | None, activation: str, c: int = 3) -> LowRank:
    """The fusion with no biases."""
    fusion = LowRank(place(c), 2, rank=rank, activation=activation).double()
    for layer in (*fusion.down, fusion.up):
        nn.init.zeros_(layer.bias)
    return fusion


def test_hand_with_identities_it_is_a_dot_product():
    fusion = bilinear(None, "none")
    with torch.no_grad():
        for down in fusion.down:
            down.weight.copy_(torch.eye(3))
        fusion.up.weight.fill_(1)
    x, y = normal(2, 3)
    near(fusion([x, y], x), [float(x @ y)] * 3)


def test_hand_parameters():
    fusion = LowRank(place(6), 2, rank=4)
    weights = sum(p.numel() for name, p in fusion.named_parameters() if name.endswith("weight"))
    assert weights == 4 * (6 + 6 + 6)
    assert sum(p.numel() for p in fusion.parameters()) == weights + 4 + 4 + 6


# Identities


def test_identity_bilinear_without_activation():
    fusion = bilinear(2, "none")
    x, y = normal(2, 3)
    u, v = (down.weight.T for down in fusion.down)  # (c r)
    for i, p in enumerate(fusion.up.weight):
        form = u @ torch.diag(p) @ v.T
        near(fusion([x, y], x)[i], (x @ form @ y).detach())
        assert torch.linalg.matrix_rank(form) <= 2


@pytest.mark.parametrize("activation", ["tanh", "none"])
def test_identity_swaps_and_zeros(activation):
    fusion, swapped = bilinear(4, activation), bilinear(4, activation)
    swapped.load_state_dict(fusion.state_dict())
    swapped.down[0], swapped.down[1] = swapped.down[1], swapped.down[0]
    x, y = normal(2, 3)
    near(swapped([y, x], x), fusion([x, y], x).tolist())
    near(fusion([x, torch.zeros(3, dtype=torch.float64)], x), [0, 0, 0])


def test_identity_at_the_start_it_is_the_first_branch_bit_for_bit():
    branches = normal(3, 2, 4, 6)
    assert torch.equal(
        LowRank(place(6), 3, start="identity").double()(list(branches), branches[0]), branches[0]
    )


def test_a_branch_too_few_is_no_product_of_the_others():
    with pytest.raises(ValueError, match="shorter"):
        LowRank(place(6), 3).double()([normal(1, 2, 6)] * 2, normal(1, 2, 6))
