"""Losses that mechanisms add in training, collected in anybody's loop."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import attnzoo
from attnzoo.core import auxiliary_losses, find_taps
from attnzoo.functional import balance_loss


def model(recipe: str = "digits_mixture_of_heads"):
    torch.manual_seed(0)
    return attnzoo.compose(recipe)


def images(count: int = 3, seed: int = 0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def by_hand(net, x):
    """The balance losses of all blocks, of what their routers say to what the blocks are given."""
    inputs, losses = [], []
    hooks = [b.attn.register_forward_hook(lambda m, args, out: inputs.append(args[0])) for b in net.blocks]
    net(x)
    for hook in hooks:
        hook.remove()
    for block, given in zip(net.blocks, inputs, strict=True):
        shares = block.attn.route(given).softmax(dim=-1)
        losses.append(balance_loss(shares, block.attn.active))
    return torch.stack(losses)


def test_the_mean_is_that_of_the_components():
    net, x = model(), images()
    with auxiliary_losses(net) as extra:
        net(x)
    assert sorted(extra.by_component()) == ["blocks.0.attn", "blocks.1.attn"]
    assert torch.allclose(torch.stack(list(extra.by_component().values())), by_hand(net, x))
    assert torch.allclose(extra.mean(), by_hand(net, x).mean())


def test_several_forwards_count_alike():
    net = model()
    with auxiliary_losses(net) as extra:
        net(images()), net(images(seed=1))
    apart = torch.stack([by_hand(net, images()), by_hand(net, images(seed=1))]).mean(dim=0)
    assert torch.allclose(torch.stack(list(extra.by_component().values())), apart)


def test_only_routers_learn_of_it():
    net = model()
    with auxiliary_losses(net) as extra:
        net(images())
    extra.mean().backward()
    assert all(bool(block.attn.route.weight.grad.any()) for block in net.blocks)
    assert net.blocks[-1].attn.proj.weight.grad is None and net.head.weight.grad is None


def test_nothing_is_kept_on_the_model():
    net = model()
    before = {name: set(vars(module)) for name, module in net.named_modules()}
    with auxiliary_losses(net) as extra:
        net(images())
    net(images(seed=1))
    assert torch.allclose(extra.mean(), by_hand(net, images()).mean())
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before
    assert not any(tap.watched for tap in find_taps(net).values())


def test_a_model_without_any_adds_nothing():
    net = model("digits_softmax")
    with auxiliary_losses(net) as extra:
        net(images())
    assert extra.by_component() == {} and extra.mean() == 0


def test_without_a_forward_there_is_nothing():
    with auxiliary_losses(model()) as extra:
        pass
    assert extra.mean() == 0


def test_gradient_checkpointing_changes_nothing():
    net = model()
    other = copy.deepcopy(net)
    other.set_grad_checkpointing()
    found = []
    for one in (net, other):
        with auxiliary_losses(one.train()) as extra:
            out = one(images())
        (out.square().sum() + extra.mean()).backward()
        found.append([p.grad for p in one.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_threads_do_not_mix():
    net, many = model().eval(), [images(seed=i) for i in range(8)]
    with auxiliary_losses(net) as extra, ThreadPoolExecutor(4) as pool:
        list(pool.map(net, many))
    apart = torch.stack([by_hand(net, x) for x in many]).mean(dim=0)
    assert torch.allclose(torch.stack(list(extra.by_component().values())), apart, atol=1e-5)


@pytest.mark.parametrize("active,expected", [(1, 1.0), (3, 3.0), (4, 4.0)])
def test_balance_by_hand(active, expected):
    """A router that treats four experts alike: the least there can be."""
    assert balance_loss(torch.full((2, 5, 4), 0.25), active).item() == pytest.approx(expected)


def test_balance_of_a_router_that_always_says_the_same():
    shares = torch.tensor([0.7, 0.2, 0.1, 0.0]).expand(2, 5, 4)
    assert balance_loss(shares, 1).item() == pytest.approx(4 * 0.7)
    assert balance_loss(shares, 2).item() == pytest.approx(4 * 0.9)
