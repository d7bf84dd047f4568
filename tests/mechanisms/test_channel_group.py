"""Channel group attention of DaViT, arXiv:2204.03645, §3.3."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, place, seen, set_all, spread, wrong
from timm.models.davit import ChannelAttention, ChannelAttentionV2

from attnzoo.core import Layout, Mask, options_of
from attnzoo.mechanisms.channel.channel_group import ChannelGroup
from attnzoo.testing import against


@against(ChannelGroup, examples=20)
def test_oracle(component, options, x, keys):
    """Channel by channel: s Σ_i q_ia k_ib over the tokens that exist, a softmax over b, and Σ_b A_ab v_ib."""
    (b, _, c), groups, layers, out = x.shape, component.heads, component.layers, []
    d = c // groups
    for s in range(b):
        qkv = x[s] @ layers.qkv.weight.T + (0 if layers.qkv.bias is None else layers.qkv.bias)
        first, second, third = qkv.split(c, 1)
        there = [i for i in range(len(qkv)) if keys[s, i]]
        if options["scale"] == "tokens":
            q, k, v, scale = first, second, third, 1 / math.sqrt(max(1, len(there)))
        else:  # as the authors' code names them, softmax(kᵀ v) q
            q, k, v, scale = second, third, first, 1 / math.sqrt(d)
        columns = []
        for a in range(c):
            group = range(a // d * d, a // d * d + d)
            scores = torch.stack([scale * (q[there, a] @ k[there, e]) for e in group])
            columns.append(v[:, group] @ scores.softmax(0))
        out.append(torch.stack(columns, 1) @ layers.proj.weight.T + layers.proj.bias)
    return torch.stack(out)


def form(self, x, mask, order=None, axis=-1, scale=None, hide=True, deal=True):
    """The equation, with a fault or without."""
    b, n, c = x.shape
    qkv = self.layers.qkv(x).reshape(b, n, 3, *((self.heads, -1) if deal else (-1, self.heads)))
    parts = (qkv if deal else qkv.mT).permute(2, 0, 3, 4, 1)  # (b h d n)
    q, k, v = (parts[i] for i in order or ((0, 1, 2) if self.by_tokens else (1, 2, 0)))
    keys = torch.ones(b, n, dtype=torch.bool) if mask.keys is None else mask.keys
    if hide:
        q, k = q * keys[:, None, None], k * keys[:, None, None]
    number = keys.sum(1).clamp(min=1).double()[:, None, None, None] if self.by_tokens else c // self.heads
    s = number**-0.5 if scale is None else scale(n, c, c // self.heads)
    out = ((q @ k.mT * s).softmax(axis) @ v).permute(0, 3, 1, 2)
    return self.layers.proj((out if deal else out.mT).reshape(b, n, c))


def with_fault(**fault):
    """The mechanism with one fault."""
    return wrong(ChannelGroup, mix=lambda self, x, source, *, mask, layout: form(self, x, mask, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault()).ok


MUTANTS = {
    "no scale": with_fault(scale=lambda n, c, d: 1.0),
    "the scale of the whole width": with_fault(scale=lambda n, c, d: c**-0.5),
    "padding counts as tokens": with_fault(scale=lambda n, c, d: n**-0.5),
    "always the scale of channels": with_fault(scale=lambda n, c, d: d**-0.5),
    "the names of the equation for the code's": with_fault(order=(0, 1, 2)),
    "queries and keys swapped": with_fault(order=(2, 1, 0)),
    "softmax over the other axis": with_fault(axis=-2),
    "softmax over the batch": with_fault(axis=0),
    "padding is summed": with_fault(hide=False),
    "channels dealt to groups in turn": with_fault(deal=False),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((5,))
SCALES = pytest.mark.parametrize("scale", ["channels", "tokens"])


def part_of(dim=6, heads=2, **options) -> ChannelGroup:
    """In float64, with weights of a size that matters."""
    return spread(ChannelGroup(place(dim, heads, 5), **options))


# By hand


@pytest.mark.parametrize("scale,by", [("channels", math.sqrt(2)), ("tokens", math.sqrt(3))])
def test_hand_two_channels_of_three_tokens(scale, by):
    """q = k = v = x, channels (1, 1, 0) and (0, 1, 0): sums 2, 1 and 1, 1; ln 3 for each, by the scale."""
    part = set_all(ChannelGroup(place(2), scale=scale), 0.0)
    with torch.no_grad():
        part.layers.qkv.weight.copy_(torch.eye(2).repeat(3, 1))
        part.layers.proj.weight.copy_(torch.eye(2))
    x = math.sqrt(math.log(3) * by) * torch.tensor([[[1.0, 0], [1, 1], [0, 0]]]).double()
    near(seen(part, x, layout=Layout((3,))), [[[[0.75, 0.25], [0.5, 0.5]]]])
    near(part(x, layout=Layout((3,))) / x[0, 0, 0], [[[0.75, 0.5], [1, 1], [0, 0]]])


def test_hand_parameters_and_default():
    assert count(ChannelGroup(place(64, 4))) == 4 * 64 * 65
    assert count(ChannelGroup(place(64, 4, qkv_bias=False), scale="tokens")) == 4 * 64 * 64 + 64
    assert options_of(ChannelGroup)().model_dump() == {"scale": "channels"}


# Identities


@pytest.mark.parametrize("scale,theirs", [("channels", ChannelAttention), ("tokens", ChannelAttentionV2)])
def test_identity_timms(scale, theirs):
    part, x = part_of(scale=scale), normal(2, 5, 6)
    timms = theirs(6, 2, qkv_bias=True).double()
    timms.load_state_dict(part.layers.state_dict())
    near(part(x, layout=LAYOUT), timms(x))


@SCALES
def test_identity_groups_of_one_channel_read_themselves(scale):
    part, x = part_of(6, 6, scale=scale), normal(2, 5, 6)
    q, _, v = part.layers.qkv(x).chunk(3, -1)
    near(part(x, layout=LAYOUT), part.layers.proj(v if scale == "tokens" else q))


@SCALES
def test_identity_permuted_tokens_are_permuted(scale):
    part, x, order = part_of(scale=scale), normal(2, 5, 6), torch.tensor([3, 0, 4, 1, 2])
    near(part(x[:, order], layout=LAYOUT), part(x, layout=LAYOUT)[:, order])


def test_identity_the_scales_agree_where_there_are_as_many_tokens_as_channels():
    one, two = part_of(10), part_of(10, scale="tokens")
    with torch.no_grad():
        two.layers.qkv.weight.copy_(one.layers.qkv.weight.roll(-10, 0))
        two.layers.qkv.bias.copy_(one.layers.qkv.bias.roll(-10, 0))
        two.layers.proj.load_state_dict(one.layers.proj.state_dict())
    x = normal(2, 5, 10)  # five tokens, groups of five
    near(one(x, layout=LAYOUT), two(x, layout=LAYOUT))


@SCALES
def test_identity_padding_is_a_shorter_line(scale):
    part, x = part_of(scale=scale), normal(2, 5, 6)
    mask = Mask(keys=(torch.arange(5) < 3).expand(2, 5))
    near(part(x, mask=mask, layout=LAYOUT)[:, :3], part(x[:, :3], layout=Layout((3,))))


@SCALES
def test_narrow_numbers_stay_near(scale):
    narrow(ChannelGroup, [(2, 7, 12)], site=place(12, 3, 7), scale=scale)
