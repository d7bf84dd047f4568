"""Global context, arXiv:1904.11492, §3.4."""

import math

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, place, seen, spread, wrong
from timm.layers import GlobalContext as Timms
from torch import nn

from attnzoo.core import Layout, Mask
from attnzoo.mechanisms.channel.global_context import GlobalContext
from attnzoo.testing import against


def bottleneck(mlp, t):
    """W₂ relu(norm(W₁ t + b₁)) + b₂, of one vector."""
    t = mlp.fc1.weight[:, :, 0, 0] @ t + mlp.fc1.bias
    centred = t - t.mean()
    t = centred / torch.sqrt((centred**2).mean() + mlp.norm.eps) * mlp.norm.weight + mlp.norm.bias
    return mlp.fc2.weight[:, :, 0, 0] @ torch.where(t > 0, t, 0.0) + mlp.fc2.bias


@against(GlobalContext, examples=40)
def test_oracle(component, options, x, keys):
    """Token by token: the weighted mean of those that exist, through one bottleneck, two, or the other one."""
    layers, out = component.layers, torch.zeros_like(x)
    w = layers.conv_attn.weight[0, :, 0, 0]
    for b in range(x.shape[0]):
        there = [x[b, j] for j in range(x.shape[1]) if keys[b, j]]
        total = sum(torch.exp(w @ token) for token in there)
        context = sum((torch.exp(w @ token) / total * token for token in there), torch.zeros_like(w))
        if options["fuse"] != "add":
            gate = 1 / (1 + torch.exp(-bottleneck(layers.mlp_scale, context)))
            out[b] = torch.stack([gate * token for token in x[b]])
        if options["fuse"] != "scale":
            delta = bottleneck(layers.mlp_add, context)
            out[b] = torch.stack([token + delta for token in out[b]])
    return out


def mixing(change):
    """The mechanism with its inputs changed."""

    def mix(self, x, source, *, mask, layout):
        x, mask = change(x, mask)
        return GlobalContext.mix(self, x, source, mask=mask, layout=layout)

    return wrong(GlobalContext, mix=mix)


def before(change):
    """The mechanism that is changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return GlobalContext.mix(self, x, source, mask=mask, layout=layout)

    return wrong(GlobalContext, mix=mix)


def without_norm(self):
    for mlp in self.layers.mlp_add, self.layers.mlp_scale:
        if mlp is not None:
            mlp.norm = nn.Identity()


def swap(self):
    self.layers.mlp_add, self.layers.mlp_scale = self.layers.mlp_scale, self.layers.mlp_add


def with_residual(self, x, source, *, mask, layout):
    return x + GlobalContext.mix(self, x, source, mask=mask, layout=layout)


def hooked(change):
    """The mechanism whose weights are changed."""

    def mix(self, x, source, *, mask, layout):
        handle = self.weights.register_forward_hook(lambda module, args, seen: change(seen, self))
        out = GlobalContext.mix(self, x, source, mask=mask, layout=layout)
        handle.remove()
        return out

    return wrong(GlobalContext, mix=mix)


MUTANTS = {
    "the mean for the map": hooked(lambda w, self: (w > 0).to(w) / (w > 0).sum(1, keepdim=True).clamp(min=1)),
    "softmax over the batch": hooked(lambda w, self: w / w.sum(0, keepdim=True).clamp(min=1e-30)),
    "sigmoid for softmax": hooked(lambda w, self: w.sigmoid() * (w > 0)),
    "no norm": before(without_norm),
    "the bottlenecks swapped": before(swap),
    "a residual of its own": wrong(GlobalContext, mix=with_residual),
    "the mask ignored": mixing(lambda x, mask: (x, Mask())),
    "the mask inverted": mixing(lambda x, mask: (x, Mask(keys=None if mask.keys is None else ~mask.keys))),
    "scores scaled": before(lambda self: self.layers.conv_attn.weight.mul_(2)),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def block(dim=6, tokens=5, **options) -> GlobalContext:
    """In float64, with weights of a size that matters."""
    return spread(GlobalContext(place(dim, 2, tokens), **options), 0.5)


# By hand


@pytest.mark.parametrize("fuse,wanted", [("add", [5, 5]), ("scale", [0, 5 / 6 * math.log(3)])])
def test_hand_two_tokens_of_one_channel(fuse, wanted):
    """x = (0, ln 3), w = 1: weights (1/4, 3/4). The norm gives one hidden channel alone a 5: δ = 5, or σ(ln 5) = 5/6."""
    part = block(1, 2, fuse=fuse)
    mlp = part.layers.mlp_add or part.layers.mlp_scale
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()
        part.layers.conv_attn.weight.fill_(1)
        mlp.norm.bias[2] = 5.0
        mlp.fc2.weight[:, 2] = 1.0 if fuse == "add" else math.log(5) / 5
    x = line(0, math.log(3))
    near(part(x, layout=Layout((2,))), wanted, 1e-7)
    near(seen(part, x, layout=Layout((2,))), [[0.25, 0.75]])


@pytest.mark.parametrize("fuse,share", [("add", 0), ("scale", 1 / 2), ("both", 1 / 2)])
def test_hand_as_it_starts(fuse, share):
    """δ = 0: beside the host's residual the paper's block is the identity."""
    part, x = GlobalContext(place(6, 2, 5), fuse=fuse).double(), normal(2, 5, 6)
    near(part(x, layout=Layout((5,))), share * x)


def test_hand_parameters():
    """The map; a bottleneck of 64 / 4 channels with biases and a norm. timm's map has a bias more."""
    one = 64 * 16 + 16 + 2 * 16 + 16 * 64 + 64
    assert count(GlobalContext(place(64), ratio=0.25)) == 64 + one
    assert count(GlobalContext(place(64), ratio=0.25, fuse="both")) == 64 + 2 * one
    assert count(Timms(64, rd_ratio=0.25)) == 65 + one


@pytest.mark.parametrize("dim,width", [(16, 8), (256, 16), (512, 32)])
def test_hand_the_width_of_the_bottleneck(dim, width):
    assert GlobalContext(place(dim)).layers.mlp_add.fc1.out_channels == width


# Identities


@pytest.mark.parametrize("fuse", ["add", "scale", "both"])
def test_identity_timms_on_the_grid(fuse):
    """timm's adds the residual itself where it adds. Its bias of the map has no say."""
    layout = Layout((3, 4))
    part = block(16, 12, fuse=fuse, ratio=0.5)
    timms = Timms(16, fuse_add=fuse != "scale", fuse_scale=fuse != "add", rd_channels=8).double()
    missing, unexpected = timms.load_state_dict(part.layers.state_dict(), strict=False)
    assert missing == ["conv_attn.bias"] and not unexpected
    x = normal(2, 12, 16)
    found = part(x, layout=layout) + (x if fuse == "add" else 0)
    near(layout.to_grid(found), timms(layout.to_grid(x)))


def test_identity_every_token_receives_the_same():
    out = block()(normal(2, 5, 6), layout=Layout((5,)))
    near(out, out[:, :1].expand_as(out))


def test_identity_a_map_of_zero_pools_the_mean():
    """Then its gate is squeeze-and-excitation with a norm."""
    part, x = block(fuse="scale"), normal(2, 5, 6)
    nn.init.zeros_(part.layers.conv_attn.weight)
    gate = part.layers.mlp_scale(x.mean(1)[..., None, None]).sigmoid()[..., 0, 0]
    near(part(x, layout=Layout((5,))), x * gate[:, None])


def test_identity_tokens_in_another_order_give_the_same_in_that_order():
    part, x, order = block(fuse="both"), normal(2, 5, 6), [4, 2, 0, 1, 3]
    near(part(x[:, order], layout=Layout((5,))), part(x, layout=Layout((5,)))[:, order])


def test_identity_padding_is_a_shorter_input():
    part, x = block(fuse="both"), normal(2, 5, 6)
    keys = torch.tensor([[True, False, True, True, False]]).expand(2, 5)
    out = part(x, mask=Mask(keys=keys), layout=Layout((5,)))[:, keys[0]]
    near(out, part(x[:, keys[0]], layout=Layout((3,))))


def test_narrow_numbers_stay_near():
    for fuse in ("add", "scale", "both"):
        narrow(GlobalContext, [(2, 7, 12)], site=place(12, 3, 7), fuse=fuse)
