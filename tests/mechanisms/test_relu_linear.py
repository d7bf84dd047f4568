"""Multi-scale linear attention of EfficientViT, arXiv:2205.14756, §3.1."""

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, set_all, spread, wrong
from timm.models.efficientvit_mit import LiteMLA
from torch import nn

from attnzoo.core import Law, Layout, Mask, OptionError, Site, options_of
from attnzoo.mechanisms.linear.relu_linear import ReluLinear
from attnzoo.testing import against


def convolved(conv, t, grid, p, there):
    """By channel and token: what lies in the window, special tokens alone; then blocks of a matrix."""
    deep, wide = conv
    half, out = deep.weight.shape[-1] // 2, []
    at = {divmod(i - p, grid[1]): i for i in range(p, len(t))}
    for i in range(len(t)):
        y, x = divmod(i - p, grid[1])
        around = {(0, 0): i}
        if i >= p:
            steps = range(-half, half + 1)
            around = {(dy, dx): at[y + dy, x + dx] for dy in steps for dx in steps if (y + dy, x + dx) in at}
        total = torch.zeros(t.shape[1]).double()
        for (dy, dx), j in around.items():
            if there[j]:
                total = total + deep.weight[:, 0, dy + half, dx + half] * t[j]
        d = wide.weight.shape[1]
        blocks = wide.weight[:, :, 0, 0].split(d)
        out.append(torch.cat([block @ part for block, part in zip(blocks, total.split(d), strict=True)]))
    return torch.stack(out)


@against(ReluLinear, examples=20)
def test_oracle(component, options, x, layout, keys):
    """Sample by sample, head by head, pair by pair: weights relu(q_i)·relu(k_j), divided by their sum and ε."""
    (b, _, c), layers, out = x.shape, component.layers, []
    d = c // component.heads
    for s in range(b):
        qkv = x[s] @ layers.qkv.conv.weight[:, :, 0, 0].T
        maps = [qkv] + [convolved(conv, qkv, layout.grid, layout.prefix, keys[s]) for conv in layers.aggreg]
        merged = []
        for head in torch.cat(maps, 1).split(3 * d, 1):
            q, k, v = head.split(d, 1)
            weights = torch.where(q > 0, q, 0.0) @ torch.where(k > 0, k, 0.0).T
            weights = weights[:, keys[s]]
            merged.append(weights @ v[keys[s]] / (weights.sum(1, keepdim=True) + options["eps"]))
        bias = layers.proj.conv.bias
        out.append(
            torch.cat(merged, 1) @ layers.proj.conv.weight[:, :, 0, 0].T + (0 if bias is None else bias)
        )
    return torch.stack(out)


def before(change):
    """The mechanism, changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return ReluLinear.mix(self, x, source, mask=mask, layout=layout)

    return wrong(ReluLinear, mix=mix)


def mixing(change):
    """The mechanism with its inputs changed."""

    def mix(self, x, source, *, mask, layout):
        mask, layout = change(mask, layout)
        return ReluLinear.mix(self, x, source, mask=mask, layout=layout)

    return wrong(ReluLinear, mix=mix)


def attending(change):
    """Other sums."""
    return wrong(ReluLinear, _attend=lambda self, q, k, v: change(self, q, k, v))


def plain(self, q, k, v, eps=True):
    """The equation."""
    return q @ (k.mT @ v) / (q @ k.sum(2)[..., None] + (self.eps if eps else 1e-30))


def each_side_by_side(x, pattern, **sizes):
    """q, k and v of all heads one after the other, rather than head by head."""
    from einops import rearrange

    return rearrange(x, pattern.replace("(h t d)", "(t h d)"), **sizes)


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(attending(plain)).ok


MUTANTS = {
    "queries and keys swapped": attending(lambda self, q, k, v: plain(self, k, q, v)),
    "no normaliser": attending(lambda self, q, k, v: q @ (k.mT @ v)),
    "no ε": attending(lambda self, q, k, v: plain(self, q, k, v, eps=False)),
    "a scale beside ε": attending(lambda self, q, k, v: plain(self, 0.1 * q, k, v)),
    "sums over the batch": attending(lambda self, q, k, v: q @ (k.mT @ v).sum(0) / (q @ k.sum((0, 2))[:, :, None] + self.eps)),
    "keys without relu": attending(lambda self, q, k, v: plain(self, q, k - 0.1, v)),
    "q, k and v not head by head": patched(ReluLinear, "rearrange", each_side_by_side),
    "the convolution turned": before(lambda self: [conv[0].weight.copy_(conv[0].weight.mT.clone()) for conv in self.layers.aggreg]),
    "no convolution by channel": before(lambda self: [nn.init.dirac_(conv[0].weight, groups=conv[0].groups) for conv in self.layers.aggreg]),
    "special tokens on the grid": mixing(lambda mask, layout: (mask, Layout((1, layout.length)))),
    "the mask ignored": mixing(lambda mask, layout: (Mask(), layout)),
    "rows for columns": mixing(lambda mask, layout: (mask, Layout(layout.grid[::-1], layout.prefix))),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((3, 4), 1)


def linear(layout=LAYOUT, dim=8, heads=2, **options) -> ReluLinear:
    """In float64, with weights of a size that matters."""
    return spread(ReluLinear(Site("hand", dim, heads, layout), **options))


# By hand


def test_hand_two_tokens_of_one_channel():
    """x = (1, 3), W_qkv = (1, 1, 2): the mean of 2, 6 by 1, 3 is 5, whatever asks; W = 1."""
    layout = Layout((1, 2))
    part = set_all(linear(layout, 1, 1, scale=0, eps=1e-14), 1.0)
    with torch.no_grad():
        part.layers.qkv.conv.weight.copy_(torch.tensor([1.0, 1, 2])[:, None, None, None])
        part.layers.proj.conv.bias.zero_()
    near(part(torch.tensor([[[1.0], [3]]]).double(), layout=layout), [5, 5])
    x = torch.tensor([[[-1.0], [3]]]).double()  # who is negative neither asks nor answers
    near(part(x, layout=layout), [0, 6])


def test_hand_negative_queries_get_nothing():
    part, x = linear(scale=0), normal(2, 13, 8).abs()
    with torch.no_grad():
        part.layers.qkv.conv.weight.view(2, 3, 4, 8)[:, 0].abs_().neg_()
    near(part(x, layout=LAYOUT), part.layers.proj.conv.bias.expand(2, 13, 8))


def test_hand_the_convolution_sees_its_neighbours_and_special_tokens_themselves():
    """Weights of one: sums over windows of 3 × 3, in a grid of 2 × 3, after one special token."""
    layout = Layout((2, 3), 1)
    part = set_all(linear(layout, 1, 1, scale=3), 1.0)
    t = torch.tensor([9.0, 1, 2, 3, 4, 5, 6]).double()[None, :, None].expand(1, 7, 3)
    near(part._near(part.layers.aggreg[0], t, layout)[0, :, 0], [9, 12, 21, 16, 12, 21, 16])


def test_hand_parameters():
    """timm's of 16 channels, heads of 8, has 2896: of its batch norm's 32 we have 16, the bias."""
    site = Site("hand", 16, 2, LAYOUT)
    assert count(LiteMLA(16, 16, dim=8)) == 2896 and count(ReluLinear(site)) == 2880
    assert count(ReluLinear(site, scale=0)) == 3 * 256 + 256 + 16


def test_defaults_claims_and_refusals():
    assert options_of(ReluLinear)().model_dump() == {"scale": 5, "eps": 1e-5}
    assert ReluLinear.card_for(scale=0).laws == {Law.PERMUTATION_EQUIVARIANT}
    with pytest.raises(OptionError, match="scale of 4 has no middle"):
        linear(scale=4)


# Identities


@pytest.mark.parametrize("scale", [0, 3, 5])
def test_identity_timms(scale):
    """Whose batch norm, in eval mode, is a factor and a bias; it computes in float32."""
    layout = Layout((3, 4))
    part, x = linear(layout, scale=scale), normal(2, 12, 8)
    timms = spread(LiteMLA(8, 8, dim=4, scales=(scale,) if scale else ()))
    norm = timms.proj.norm
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        part.layers.qkv.load_state_dict(timms.qkv.state_dict())
        part.layers.aggreg.load_state_dict(timms.aggreg.state_dict())
        part.layers.proj.conv.weight.copy_(factor[:, None, None, None] * timms.proj.conv.weight)
        part.layers.proj.conv.bias.copy_(norm.bias - factor * norm.running_mean)
    near(layout.to_grid(part(x, layout=layout)), timms(layout.to_grid(x)), 1e-4)


def test_identity_constant_values_stay_constant():
    """As long as a query has a key; with one scale and v = 1."""
    layout = Layout((3, 4))
    part = linear(layout, scale=0, eps=1e-14)
    q, k = normal(2, 2, 2, 12, 4).abs()
    near(part._attend(q, k, torch.ones(2, 2, 12, 4).double()), torch.ones(2, 2, 12, 4))


def test_identity_longer_queries_ask_the_same():
    """Up to ε the length of a query has no say."""
    part, (q, k, v) = linear(eps=1e-14), normal(3, 2, 2, 12, 4).abs()
    near(part._attend(5 * q, k, v), part._attend(q, k, v))


def test_identity_padding_is_a_smaller_picture():
    part, x = linear(Layout((6, 7))), normal(2, 6, 7, 8)
    keys = torch.zeros(2, 6, 7, dtype=torch.bool)
    keys[:, :3, :5] = True
    x[~keys] *= 100
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=Layout((6, 7))).reshape(x.shape)
    near(out[:, :3, :5].flatten(1, 2), part(x[:, :3, :5].flatten(1, 2), layout=Layout((3, 5))))


def test_identity_half_precision_is_summed_in_float32():
    """Sums of 5000 keys of 60 are beyond float16."""
    part = linear(scale=0, eps=1e-5).half()
    q = k = torch.full((1, 2, 5000, 4), 60.0).half()
    assert part._attend(q, k, torch.ones_like(k)).sub(1).abs().max() < 1e-3


def test_narrow_numbers_stay_near():
    narrow(ReluLinear, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))))
