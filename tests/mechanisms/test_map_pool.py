"""Attention pooling, arXiv:2106.04560, §2.1: timm's `AttentionPoolLatent`, with a key mask and taps."""

import math

import pytest
import torch
from by_hand import caught, count, near, normal, place, seen, spread, wrong
from timm.layers import AttentionPoolLatent
from torch import nn

from attnzoo.core import Layout, Mask
from attnzoo.mechanisms.latent.map_pool import MapPool
from attnzoo.testing import against


def normed(layer, y):
    """Layer normalisation, written out."""
    centred = y - y.mean()
    return centred / torch.sqrt((centred**2).mean() + layer.eps) * layer.weight + layer.bias


def linear(layer, x):
    """W x + b."""
    return layer.weight @ x + (0 if layer.bias is None else layer.bias)


@against(MapPool)
def test_oracle(component, x, keys):
    """One learned query reads the tokens that exist, head by head; then y + W₂ gelu(W₁ norm(y))."""
    layers, (b, n, c), heads = component.layers, x.shape, component.heads
    d, pooled = c // heads, []
    query = linear(layers.q, layers.latent[0, 0])
    for s in range(b):
        there = [linear(layers.kv, x[s, i]) for i in range(n) if keys[s, i]]
        read = torch.zeros(c).double()
        for h in range(heads):
            mine = slice(h * d, (h + 1) * d)
            if there:
                scores = torch.stack([kv[:c][mine] @ query[mine] / math.sqrt(d) for kv in there])
                read[mine] = sum(w * kv[c:][mine] for w, kv in zip(scores.softmax(0), there, strict=True))
        y = linear(layers.proj, read)
        hidden = linear(layers.mlp.fc1, normed(layers.norm, y))
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        pooled.append(y + linear(layers.mlp.fc2, hidden))
    return torch.stack(pooled)


def pooling(change):
    """The pool with its inputs or layers changed."""

    def pool(self, x, *, mask, layout):
        return change(self, x, mask, layout)

    return wrong(MapPool, pool=pool)


def without_residual(self, x, mask, layout):
    with torch.no_grad():
        self.layers.mlp.fc2.weight.zero_()
    return MapPool.pool(self, x, mask=mask, layout=layout)


def scaled(self, x, mask, layout):
    with torch.no_grad():
        self.layers.latent.mul_(2)
    return MapPool.pool(self, x, mask=mask, layout=layout)


MUTANTS = {
    "the mask ignored": pooling(lambda self, x, mask, layout: MapPool.pool(self, x, mask=Mask(), layout=layout)),
    "special tokens left out": pooling(
        lambda self, x, mask, layout: MapPool.pool(
            self, x[:, layout.prefix :], mask=Mask(keys=None if mask.keys is None else mask.keys[:, layout.prefix :]), layout=layout
        )
    ),
    "no MLP": pooling(without_residual),
    "a wrong scale": pooling(scaled),
    "the mean": pooling(lambda self, x, mask, layout: x.mean(1)),
    "other samples' keys": pooling(
        lambda self, x, mask, layout: MapPool.pool(
            self, x, mask=Mask(keys=None if mask.keys is None else mask.keys.flip(0)), layout=layout
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def pool(dim=8, heads=2, tokens=5, **options) -> MapPool:
    """In float64, with weights of a size that matters."""
    return spread(MapPool(place(dim, heads, tokens), **options), 0.5)


# By hand


def test_hand_a_query_of_zero_reads_the_mean():
    part = pool()
    with torch.no_grad():
        part.layers.q.weight.zero_()
        part.layers.q.bias.zero_()
        part.layers.mlp.fc2.weight.zero_()
        part.layers.mlp.fc2.bias.zero_()
    x = normal(2, 5, 8)
    v = part.layers.kv(x)[..., 8:]
    near(part(x, layout=Layout((5,))), part.layers.proj(v.mean(1)))


def test_hand_two_tokens_one_channel():
    """q = 1, k = (0, ln 3), v = k: the pool reads 3/4 ln 3, and the MLP of weight zero adds nothing."""
    part = pool(1, 1, 2)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()
        for weight in (
            part.layers.latent,
            part.layers.q.weight,
            part.layers.kv.weight,
            part.layers.proj.weight,
        ):
            weight.fill_(1)
    x = torch.tensor([[[0.0], [math.log(3)]]], dtype=torch.float64)
    near(part(x, layout=Layout((2,))), [0.75 * math.log(3)])
    near(seen(part, x, layout=Layout((2,))), [[[[0.25, 0.75]]]])


def test_hand_parameters():
    c = 8
    attention = c + (c * c + c) + 2 * (c * c + c) + (c * c + c)  # the query, q, kv, proj
    assert count(pool()) == attention + 2 * c + (4 * c * c + 4 * c) + (4 * c * c + c)


# Identities


@pytest.mark.parametrize("heads,ratio", [(1, 4.0), (2, 4.0), (4, 2.0)])
def test_identity_timms_bit_for_bit(heads, ratio):
    timms = AttentionPoolLatent(8, num_heads=heads, mlp_ratio=ratio, norm_layer=nn.LayerNorm).eval()
    part = MapPool(place(8, heads, 7), mlp_ratio=ratio).eval()
    part.layers.load_state_dict(timms.state_dict())
    x = torch.randn(3, 7, 8)
    assert torch.equal(part(x, layout=Layout((7,))), timms(x))


def test_identity_tokens_in_another_order_give_the_same():
    part, x = pool(), normal(2, 5, 8)
    near(part(x[:, [3, 0, 4, 1, 2]], layout=Layout((5,))), part(x, layout=Layout((5,))))


def test_identity_padding_is_a_shorter_input():
    part, x = pool(), normal(2, 5, 8)
    keys = torch.tensor([[True, False, True, True, False]]).expand(2, 5)
    near(part(x, mask=Mask(keys=keys), layout=Layout((5,))), part(x[:, keys[0]], layout=Layout((3,))))


def test_identity_the_same_token_many_times_is_one():
    part, x = pool(), normal(2, 1, 8)
    near(part(x.expand(-1, 5, -1), layout=Layout((5,))), part(x, layout=Layout((1,))))


def test_the_map_is_one_row_for_each_head():
    weights = seen(pool(), normal(2, 5, 8), layout=Layout((5,)))
    assert weights.shape == (2, 2, 1, 5)
    near(weights.sum(-1), torch.ones(2, 2, 1))


def test_the_query_starts_anew():
    """A host that initialises once more gets timm's start for the learned query: N(0, 1 / c)."""
    part = MapPool(place(64, 2, 4))
    with torch.no_grad():
        part.layers.latent.fill_(7.0)
    part.init_weights()
    assert 0 < part.layers.latent.abs().max() < 1
