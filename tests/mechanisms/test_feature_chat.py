"""Feature chat, arXiv:2503.05995: the feature interaction block of the authors' code."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, set_all, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask, MultiHead
from attnzoo.functional import masked_softmax, merge_heads, split_heads
from attnzoo.mechanisms.channel.feature_chat import FeatureChat
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.testing import against


def linear(layer, x):
    """W x + b for one token."""
    return layer.weight @ x + (0 if layer.bias is None else layer.bias)


@against(FeatureChat, examples=30)
def test_oracle(component, x, allowed):
    """Token by token and head by head; a query that may attend to nothing receives zeros."""
    (b, n, c), heads = x.shape, component.heads
    d, samples = c // heads, []
    for s in range(b):
        qkv = torch.stack([linear(component.qkv, linear(component.first, x[s, i])) for i in range(n)])
        q, k, v = qkv[:, :c], qkv[:, c : 2 * c], qkv[:, 2 * c :]
        tokens = []
        for i in range(n):
            merged = []
            for h in range(heads):
                mine, see = slice(h * d, (h + 1) * d), [j for j in range(n) if allowed[s, h, i, j]]
                received = torch.zeros(d).double()
                if see:
                    received = (k[see, mine] @ q[i, mine] / math.sqrt(d)).softmax(0) @ v[see, mine]
                merged.append(received)
            tokens.append(linear(component.last, linear(component.proj, torch.cat(merged)) + x[s, i]))
        samples.append(torch.stack(tokens))
    return torch.stack(samples)


def mixed(
    part,
    x,
    mask,
    scale=-0.5,
    first=True,
    inner="x",
    axis=-1,
    swapped=False,
    outer=False,
    relu=False,
    hidden=True,
    last=True,
):
    """The equations with a fault."""
    a = part.first(x) if first else x
    q, k, v = (split_heads(t, part.heads) for t in part.qkv(a).chunk(3, -1))
    q, k = (k, q) if swapped else (q, k)
    scores = q @ k.mT * q.shape[-1] ** scale
    allowed = mask.dense(x.shape[1], x.shape[1]) if hidden else None
    if axis == -1:
        weights = masked_softmax(scores, allowed)
    else:
        weights = masked_softmax(scores.movedim(axis, -1)).movedim(-1, axis)
        weights = weights if allowed is None else weights * allowed
    out = part.proj(merge_heads(weights @ v)) + {"x": x, "a": a, "0": 0 * x}[inner]
    out = part.last(out) if last else out
    out = out + x if outer else out
    return out.relu() if relu else out


def with_fault(**fault):
    """Feature chat with one fault."""
    return wrong(FeatureChat, mix=lambda self, x, source, *, mask, layout: mixed(self, x, mask, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=20).ok


MUTANTS = {
    "no scale": with_fault(scale=0),
    "the scale squared": with_fault(scale=-1),
    "no first projection": with_fault(first=False),
    "no last projection": with_fault(last=False),
    "no sum": with_fault(inner="0"),
    "the sum with what was projected": with_fault(inner="a"),
    "the skip, which is the host's": with_fault(outer=True),
    "relu": with_fault(relu=True),
    "softmax over the queries": with_fault(axis=-2),
    "softmax over the batch": with_fault(axis=0),
    "q and k swapped": with_fault(swapped=True),
    "the mask ignored": with_fault(hidden=False),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def chat(dim=24, heads=4, tokens=5, std=0.4) -> FeatureChat:
    """In float64, with weights of a size that matters."""
    return spread(FeatureChat(place(dim, heads, tokens)), std)


# By hand


def test_hand_one_channel():
    """a = 2 x, q = 0, k = 0, v = a, W_o = 1, W = 3: of tokens 1 and 5 the mean value is 6, and 3 (6 + x)."""
    part = set_all(FeatureChat(place(1)), 0.0)
    with torch.no_grad():
        part.first.weight.fill_(2.0)
        part.qkv.weight[2] = 1.0
        part.proj.weight.fill_(1.0)
        part.last.weight.fill_(3.0)
    x = torch.tensor([[[1.0], [5.0]]]).double()
    near(part(x, layout=Layout((2,))), [21, 33])
    near(part(x, mask=Mask(causal=True), layout=Layout((2,))), [3 * (2 + 1), 33])


def test_hand_parameters():
    """Six layers of c² + c: W_a, q, k, v, W_o, W; at the authors' widths too."""
    for c in (64, 128, 256):
        assert count(FeatureChat(place(c, 8))) == 6 * (c * c + c)
    assert count(FeatureChat(place(64, 8, qkv_bias=False, proj_bias=False))) == 6 * 64 * 64 + 2 * 64


# Identities


def test_identity_the_authors_block_after_the_hosts_skip():
    """relu(c + x), from PyTorch's layers: a convolution of kernel 1, multi-head attention, a linear layer."""
    part, x = chat(64, 8, 21, 0.1), normal(2, 21, 64)
    conv, attention = nn.Conv1d(64, 64, 1).double(), nn.MultiheadAttention(64, 8, batch_first=True).double()
    with torch.no_grad():
        conv.weight.copy_(part.first.weight[..., None]), conv.bias.copy_(part.first.bias)
        attention.in_proj_weight.copy_(part.qkv.weight), attention.in_proj_bias.copy_(part.qkv.bias)
    attention.out_proj.load_state_dict(part.proj.state_dict())
    joints = conv(x.mT).mT
    wanted = (part.last(attention(joints, joints, joints)[0] + x) + x).relu()
    near((part(x, layout=Layout((21,))) + x).relu(), wanted)


def test_identity_a_last_projection_of_zero_leaves_relu_of_x():
    part, x = chat(), normal(2, 5, 24)
    nn.init.zeros_(part.last.weight), nn.init.zeros_(part.last.bias)
    near((part(x, layout=Layout((5,))) + x).relu(), x.relu())


def test_identity_attention_over_one_token_is_linear():
    part, x = chat(tokens=1), normal(3, 1, 24)

    def out(t):
        return part(t, layout=Layout((1,)))

    near(out(2 * x[:1] - 3 * x[1:2]), 2 * out(x[:1]) - 3 * out(x[1:2]) + 2 * out(0 * x[:1]))
    v = nn.functional.linear(part.first(x), part.qkv.weight[48:], part.qkv.bias[48:])
    near(out(x), part.last(part.proj(v) + x))


@pytest.mark.parametrize(
    "mask", [Mask(), Mask(causal=True), Mask(keys=torch.tensor([[1, 0, 1, 1, 0]] * 2).bool())]
)
def test_identity_without_projections_around_it_is_multi_head_attention_and_its_input(mask):
    part, site = chat(), place(24, 4, 5)
    for layer in (part.first, part.last):
        with torch.no_grad():
            layer.weight.copy_(torch.eye(24)), layer.bias.zero_()
    multi = MultiHead(site, Softmax(site)).double()
    multi.qkv.load_state_dict(part.qkv.state_dict())
    multi.proj.load_state_dict(part.proj.state_dict())
    x = normal(2, 5, 24)
    near(part(x, mask=mask, layout=site.layout), multi(x, mask=mask, layout=site.layout) + x)


def test_identity_another_order_gives_the_same_in_that_order():
    part, x, order = chat(), normal(2, 5, 24), [3, 0, 2, 1, 4]
    near(part(x[:, order], layout=Layout((5,))), part(x, layout=Layout((5,)))[:, order])


def test_the_map_is_that_of_the_projected_tokens():
    part, x = chat(), normal(2, 5, 24)
    q, k, _ = (split_heads(t, 4) for t in part.qkv(part.first(x)).chunk(3, -1))
    near(seen(part, x, layout=Layout((5,))), (q @ k.mT / math.sqrt(6)).softmax(-1))


def test_narrow_numbers_stay_near():
    narrow(FeatureChat, [(2, 7, 12)], site=place(12, 3, 7))
