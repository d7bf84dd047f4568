"""`MultiGroup`, a linear layer that is a sum of grouped branches, and `fold`, which makes one matrix of each."""

import copy
import math

import pytest
import torch
from by_hand import count, near, normal, spread
from torch import fx, nn

from attnzoo.core import Layout, MultiGroup, Site
from attnzoo.core.multi_group import fold
from attnzoo.errors import OptionError
from attnzoo.mechanisms.projection.rlmhsa import Rlmhsa


def test_two_branches_of_two_channels():
    """W_1 = [[1, 2], [3, 4]], W_2 = diag(5, 6), γ_1 = (1, 10), γ_2 = (1, 100), γ = (2, 3), β = (7, 8)."""
    layer = MultiGroup(2, 2, 2, True, True).double()
    with torch.no_grad():
        layer.blocks[0].copy_(torch.tensor([[[1.0, 2], [3, 4]]]))
        layer.blocks[1].copy_(torch.tensor([[[5.0]], [[6]]]))
        layer.scales[0].copy_(torch.tensor([1.0, 10]))
        layer.scales[1].copy_(torch.tensor([1.0, 100]))
        layer.own.copy_(torch.tensor([2.0, 3]))
        layer.bias.copy_(torch.tensor([7.0, 8]))
    near(layer.matrix(), [[1 + 5 + 2, 2], [30, 40 + 600 + 3]])
    near(layer(torch.tensor([[1.0, 1]]).double()), [10 + 7, 673 + 8])


@pytest.mark.parametrize("identity,branches", [(False, 3), (True, 4)])
def test_the_start_is_the_mean_of_the_branches(identity, branches):
    layer = MultiGroup(64, 64, 4, identity, True)
    near(
        torch.stack([*layer.scales, *([layer.own] if identity else [])]),
        torch.ones(branches, 64) / branches,
        1e-7,
    )
    for blocks, g in zip(layer.blocks, (1, 2, 4), strict=True):
        assert blocks.shape == (g, 64 // g, 64 // g)
        assert 0.9 < blocks.abs().max() * math.sqrt(64 / g) <= 1 and not layer.bias.any()


def convolutions(layer, dim, out):
    """Grouped 1 × 1 convolutions with a batch norm each, and one of x itself, with statistics of their own."""
    branches = [
        (nn.Conv1d(dim, out, 1, groups=len(b), bias=False), nn.BatchNorm1d(out)) for b in layer.blocks
    ]
    branches += [(nn.Identity(), nn.BatchNorm1d(out))] if layer.own is not None else []
    for conv, norm in branches:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        conv.double().eval(), norm.double().eval()
    return branches


@pytest.mark.parametrize("out,identity", [(8, True), (8, False), (4, False)])
def test_batch_norms_in_eval_mode(out, identity):
    """γ / √(σ² + ε) is the scale of a branch, Σ (β - μ γ / √(σ² + ε)) the shift."""
    layer = MultiGroup(8, out, 4, identity, True).double()
    branches = convolutions(layer, 8, out)
    with torch.no_grad():
        layer.bias.zero_()
        for (conv, norm), scale, blocks in zip(branches, [*layer.scales, layer.own], [*layer.blocks, None]):  # noqa: B905
            scale.copy_(norm.weight / torch.sqrt(norm.running_var + norm.eps))
            layer.bias += norm.bias - norm.running_mean * scale
            if blocks is not None:
                blocks.copy_(conv.weight[..., 0].unflatten(0, (conv.groups, -1)))
    x = normal(2, 5, 8)
    wanted = sum(norm(conv(x.mT)) for conv, norm in branches).mT
    near(layer(x), wanted)
    near(layer.fold()(x), wanted)


class Shared(nn.Module):
    """One layer in two places, one deep inside a list, and layers that have nothing to do with it."""

    def __init__(self):
        super().__init__()
        self.a = MultiGroup(8, 4)
        self.again = self.a
        self.parts = nn.ModuleList([nn.Sequential(MultiGroup(4, 4, 2, True), nn.ReLU()), nn.Linear(4, 8)])
        self.mechanism = Rlmhsa(Site("hand", 8, 2, Layout((3, 4))))

    def forward(self, x):
        first, last = self.parts
        return self.mechanism(last(first(self.a(x)) + self.again(x)), layout=Layout((3, 4)))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_fold_of_a_whole_model(dtype, tolerance):
    model, x = spread(Shared(), 0.4).to(dtype), normal(2, 12, 8).to(dtype)
    wanted, before = model(x).detach(), count(model)
    assert fold(model) is model and count(model) < before
    near(model(x), wanted, tolerance)
    assert not any(isinstance(part, MultiGroup) for part in model.modules())
    assert model.a is model.again and type(model.parts[0][0]) is nn.Linear
    state = model.state_dict()
    assert fold(model).state_dict().keys() == state.keys()  # a second time changes nothing
    x.requires_grad_()
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and x.grad is not None


def test_fold_of_the_layer_itself():
    layer = spread(MultiGroup(8, 8, identity=True))
    folded = fold(layer)
    assert type(folded) is nn.Linear and folded is not layer and not folded.training
    near(folded(x := normal(2, 3, 5, 8)), layer(x))
    assert fold(nn.ReLU()) is not None


def test_what_is_frozen_stays_so():
    layer = MultiGroup(4, 4).requires_grad_(False)
    assert not any(p.requires_grad for p in layer.fold().parameters())


def test_it_is_traced_compiled_and_copied():
    model, x = nn.Sequential(spread(MultiGroup(8, 4, bias=False)), nn.ReLU()), normal(2, 3, 8)
    near(fx.symbolic_trace(model)(x), model(x))
    near(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    near(fold(copy.deepcopy(model))(x), model(x))


@pytest.mark.parametrize("wrong", [(8, 8, 3), (8, 8, 16), (6, 8, 4), (8, 4, 8), (8, 8, 0), (8, 4, 4, True)])
def test_what_does_not_divide_is_refused(wrong):
    with pytest.raises(OptionError, match="AZ214"):
        MultiGroup(*wrong)
