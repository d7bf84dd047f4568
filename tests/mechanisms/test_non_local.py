"""Non-local block, arXiv:1711.07971, §3: timm's layers without a batch norm, with masks and taps."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, set_all, spread, wrong
from timm.layers.non_local_attn import NonLocalAttn
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, MultiHead, Site, options_of
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.mixing.non_local import NonLocal
from attnzoo.testing import against


def linear(conv, x):
    """W x + b of a 1 × 1 convolution, of each row."""
    return x @ conv.weight[:, :, 0, 0].T + (0 if conv.bias is None else conv.bias)


@against(NonLocal, examples=24)
def test_oracle(component, options, x, layout, allowed, keys):
    """Query by query; where φ and g are pooled, the largest of the tokens of a window that exist."""
    layers, (b, n, c), p, (rows, *rest), out = component.layers, x.shape, layout.prefix, layout.grid, []
    for s in range(b):
        theta, phi, g = (linear(layer, x[s]) for layer in (layers.t, layers.p, layers.g))
        groups = [[j] for j in range(n)]
        if options["subsample"]:
            (columns,) = rest
            groups = [[j] for j in range(p)] + [
                [p + y * columns + z for y in (i, i + 1) for z in (j, j + 1) if y < rows and z < columns]
                for i in range(0, rows, 2)
                for j in range(0, columns, 2)
            ]
        for i in range(n):
            some, read = (
                [[j for j in group if allowed[s, 0, i, j]] for group in groups],
                torch.zeros_like(g[0]),
            )
            if any(some):
                k = torch.stack([phi[group].amax(0) for group in some if group])
                v = torch.stack([g[group].amax(0) for group in some if group])
                scores = k @ theta[i] / (math.sqrt(c) if options["scaled"] else 1)
                e = torch.exp(scores - scores.max().detach())
                read = e / e.sum() @ v
            out.append(linear(layers.z, read))
    return torch.stack(out).reshape(x.shape)


def read(
    self, x, mask, layout, over=-1, scale=None, swap=False, hide=lambda a: a, residual=0.0, pool=F.max_pool2d,
    ceil=True, values=True, back=True,
):  # fmt: skip
    """The equations with a fault."""
    layers, p, n, image = self.layers, layout.prefix, x.shape[1], x.mT[..., None]
    q, k, v = (layer(image)[..., 0] for layer in (layers.t, layers.p, layers.g))
    q, k = (k, q) if swap else (q, k)
    allowed = mask.dense(n, n)
    allowed = torch.ones(1, 1, n, n, dtype=torch.bool) if allowed is None else hide(allowed)
    if self.subsample:
        keys = allowed.expand(len(x), 1, allowed.shape[2], n)[:, 0, :1]

        def pooled(t):
            grid = cut(t.masked_fill(~keys, -1e30)[..., p:].unflatten(2, layout.grid))
            return torch.cat([t[..., :p], pool(grid, 2, ceil_mode=True).flatten(2)], 2)

        def cut(t):  # sides that are odd lose their last place
            return t if ceil else t[..., : max(1, t.shape[2] // 2 * 2), : max(1, t.shape[3] // 2 * 2)]

        one = keys.double().expand(len(x), 1, n)
        there = F.max_pool2d(cut(one[..., p:].unflatten(2, layout.grid)), 2, ceil_mode=True).flatten(2)
        allowed = torch.cat([one[..., :p], there], 2)[:, None] > 0
        k, v = (
            pooled(k),
            pooled(v) if values else F.avg_pool2d(v[..., p:].unflatten(2, layout.grid), 2, ceil_mode=True),
        )
        v = v if values else torch.cat([layers.g(image)[..., :p, 0], v.flatten(2)], 2)
        k, v = (t.masked_fill(~allowed[:, 0], 0.0) for t in (k, v))
    scores = q.mT @ k * (layers.scale if scale is None else scale)
    weights = scores.masked_fill(~allowed[:, 0], -1e20).softmax(over) * allowed[:, 0]
    return layers.z((weights @ v.mT).mT[..., None])[..., 0].mT + residual * x


def with_fault(**fault):
    """The mechanism with one fault."""
    return wrong(NonLocal, mix=lambda self, x, source, *, mask, layout: read(self, x, mask, layout, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=10).ok


MUTANTS = {
    "always scaled": with_fault(scale=0.5),
    "never scaled": with_fault(scale=1.0),
    "softmax over the queries": with_fault(over=-2),
    "softmax over the batch": with_fault(over=0),
    "θ and φ swapped": with_fault(swap=True),
    "a residual of its own": with_fault(residual=1.0),
    "only whole windows": with_fault(ceil=False),
    "the mean of g": with_fault(values=False),
    "the mask ignored": with_fault(hide=torch.ones_like),
    "the mask inverted": with_fault(hide=torch.logical_not),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((3, 4))
FORMS = pytest.mark.parametrize("subsample", [False, True])


def at(dim=8, layout=LAYOUT, **wishes) -> Site:
    """A site on a plane."""
    return Site("hand", dim, 2, layout, **wishes)


def non_local(dim=8, layout=LAYOUT, **options) -> NonLocal:
    """In float64, with weights of a size that matters."""
    return spread(NonLocal(at(dim, layout), **options))


# By hand


def test_hand_two_tokens():
    """x = (ln 3, 0) and weights of 1: scores of the first are (ln² 3, 0), those of the second 0."""
    part = set_all(NonLocal(at(1, Layout((1, 2)), qkv_bias=False, proj_bias=False)), 1.0)
    x = torch.tensor([[[math.log(3)], [0.0]]], dtype=torch.float64)
    share = 1 / (1 + math.exp(-(math.log(3) ** 2)))
    near(part(x, layout=Layout((1, 2))), [[[share * math.log(3)], [math.log(3) / 2]]])


def test_hand_the_largest_of_four():
    """Of 1, 2, 3 and 4 in one window all receive 4."""
    part = set_all(NonLocal(at(1, Layout((2, 2)), qkv_bias=False, proj_bias=False), subsample=True), 1.0)
    x = torch.tensor([[[1.0], [2], [3], [4]]]).double()
    near(part(x, layout=Layout((2, 2))), torch.full((1, 4, 1), 4.0))
    keys = torch.tensor([[True, True, True, False]])
    near(part(x, mask=Mask(keys=keys), layout=Layout((2, 2))), torch.full((1, 4, 1), 3.0))


@pytest.mark.parametrize("dim,ratio,width", [(64, 0.5, 32), (64, 0.125, 8), (9, 0.5, 4), (3, 0.0, 1)])
def test_hand_parameters(dim, ratio, width):
    """timm's has a bias of φ and a batch norm, 2 c, besides."""
    part = NonLocal(at(dim), ratio=ratio)
    assert count(part) == 4 * dim * width + 2 * width + dim
    assert count(NonLocalAttn(dim, rd_channels=width)) == count(part) + width + 2 * dim
    assert count(NonLocal(at(dim, qkv_bias=False, proj_bias=False), ratio=ratio)) == 4 * dim * width


@FORMS
def test_hand_it_starts_with_zero(subsample):
    """So a residual around it is an identity, as timm's block is; and so it is again."""
    part, x = NonLocal(at(), subsample=subsample).double(), normal(2, 12, 8)
    assert not part(x, layout=LAYOUT).any()
    image = x.mT.unflatten(2, (3, 4))
    assert torch.equal(NonLocalAttn(8).double().eval()(image), image)
    spread(part).init_weights()
    assert not part(x, layout=LAYOUT).any() and part.layers.t.weight.any()
    large = NonLocal(at(400), subsample=subsample).layers
    for layer in (large.t, large.p, large.g):
        assert abs(layer.weight.detach().std() * 100 - 1) < 0.02


def test_defaults():
    assert options_of(NonLocal)().model_dump() == {"ratio": 0.5, "scaled": False, "subsample": False}


# Identities


@pytest.mark.parametrize("scaled", [False, True])
def test_identity_timms_layer_in_eval_mode(scaled):
    """Less the residual; the batch norm folds into W_z."""
    theirs, x = spread(NonLocalAttn(8, use_scale=scaled, rd_channels=4)), normal(3, 12, 8)
    theirs.norm.running_mean.normal_(), theirs.norm.running_var.uniform_(0.5, 2)
    part = non_local(scaled=scaled)
    scale = theirs.norm.weight / torch.sqrt(theirs.norm.running_var + theirs.norm.eps)
    with torch.no_grad():
        for name in ("t", "g"):
            getattr(part.layers, name).load_state_dict(getattr(theirs, name).state_dict())
        part.layers.p.weight.copy_(theirs.p.weight)
        part.layers.z.weight.copy_(theirs.z.weight * scale[:, None, None, None])
        part.layers.z.bias.copy_((theirs.z.bias - theirs.norm.running_mean) * scale + theirs.norm.bias)
    wanted = theirs(x.mT.unflatten(2, (3, 4))).flatten(2).mT
    near(x + part(x, layout=LAYOUT), wanted, 1e-10)


def test_identity_scaled_and_with_all_channels_it_is_one_head_of_softmax_attention():
    part, x, site = non_local(ratio=1.0, scaled=True), normal(2, 12, 8), Site("hand", 8, 1, LAYOUT)
    plain = MultiHead(site, Softmax(site)).double()
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([getattr(part.layers, i).weight for i in "tpg"])[..., 0, 0])
        plain.qkv.bias.copy_(torch.cat([part.layers.t.bias, torch.zeros(8), part.layers.g.bias]))
        plain.proj.weight.copy_(part.layers.z.weight[..., 0, 0]), plain.proj.bias.copy_(part.layers.z.bias)
    mask = Mask(keys=torch.rand(2, 12) < 0.7, pairs=torch.rand(2, 1, 12, 12) < 0.8, causal=True)
    for one in (Mask(), mask):
        near(part(x, mask=one, layout=LAYOUT), plain(x, mask=one, layout=LAYOUT))


def test_identity_equal_tokens_of_a_window_are_one():
    """Pooling them changes their number alone, and that of all windows alike."""
    part, one, x = non_local(subsample=True), non_local(), normal(2, 2, 2, 8)
    one.load_state_dict(part.state_dict())
    large = x.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    near(part(large, layout=Layout((4, 4))), one(large, layout=Layout((4, 4))))


@FORMS
def test_identity_padding_is_a_border(subsample):
    part, x = non_local(subsample=subsample), normal(2, 3, 4, 8)
    keys = torch.ones(2, 3, 4, dtype=torch.bool)
    keys[:, :, 3:] = False
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=LAYOUT).unflatten(1, (3, 4))
    near(out[:, :, :3].flatten(1, 2), part(x[:, :, :3].flatten(1, 2), layout=Layout((3, 3))))


@FORMS
def test_where_no_token_exists_nothing_is_nan(subsample):
    part, x = non_local(subsample=subsample), normal(2, 12, 8).requires_grad_()
    out = part(x, mask=Mask(keys=torch.zeros(2, 12, dtype=torch.bool)), layout=LAYOUT)
    near(out, part.layers.z.bias.expand(2, 12, 8))
    out.sum().backward()
    assert not x.grad.any() and all(p.grad is None or p.grad.isfinite().all() for p in part.parameters())


def test_the_map_of_windows_is_stochastic():
    part = non_local(layout=Layout((3, 4), 2), subsample=True)
    weights = seen(part, normal(2, 14, 8), layout=Layout((3, 4), 2))
    assert weights.shape == (2, 1, 14, 2 + 2 * 2)
    near(weights.sum(-1), torch.ones(2, 1, 14))


@FORMS
def test_narrow_numbers_stay_near(subsample):
    narrow(NonLocal, [(2, 12, 12)], site=Site("hand", 12, 3, LAYOUT), subsample=subsample)
