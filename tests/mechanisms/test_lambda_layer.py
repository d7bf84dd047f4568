"""Lambda layer, arXiv:2102.08602: timm's layers without batch norms, with a key mask, special tokens and taps."""

import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, set_all, spread, wrong
from timm.layers.lambda_layer import LambdaLayer as Timms

from attnzoo.core import Layout, Mask, Site, options_of
from attnzoo.errors import RecipeError
from attnzoo.mechanisms.mixing.lambda_layer import LambdaLayer
from attnzoo.testing import against


@against(LambdaLayer, examples=14, options=lambda options: "depth" in options)
def test_oracle(component, options, x, layout, keys):
    """Token by token: λ is a depth × c/h matrix, a sum over all tokens and over those around."""
    layers, (b, n, c), p, (_, columns) = component.layers, x.shape, layout.prefix, layout.grid
    depth, heads, reach, out = options["depth"], component.heads, options["scope"] // 2, []
    weight = layers.qkv.weight[:, :, 0, 0]
    for s in range(b):
        made = x[s] @ weight.T + (0 if layers.qkv.bias is None else layers.qkv.bias)
        q, k, v = (
            made[:, : heads * depth],
            made[:, heads * depth : (heads + 1) * depth],
            made[:, (heads + 1) * depth :],
        )
        exist = [j for j in range(n) if keys[s, j]]
        e = {j: torch.exp(k[j] - k.max().detach()) for j in exist}
        total, content = sum(e.values()), torch.zeros(depth, c // heads).double()
        for j in exist:
            content = content + torch.outer(e[j] / total, v[j])
        for i in range(n):
            function = content
            if i >= p:
                function = function + layers.conv_lambda.bias[:, None]
                y, z = divmod(i - p, columns)
                for j in exist:
                    down, right = (j - p) // columns - y, (j - p) % columns - z
                    if j >= p and abs(down) <= reach and abs(right) <= reach:
                        way = layers.conv_lambda.weight[:, 0, down + reach, right + reach, 0]
                        function = function + torch.outer(way, v[j])
            asked = [function.T @ q[i, h * depth : (h + 1) * depth] for h in range(heads)]
            out.append(torch.cat(asked))
    return torch.stack(out).reshape(x.shape)


def applied(
    self, x, mask, layout, over=-1, content=True, position=True, hide=lambda k: k, turned=False, heads_first=True,
    scale=1.0, prefix=False, flip=False, bias=True, masked_values=True,
):  # fmt: skip
    """The equations with a fault."""
    keys = torch.ones(x.shape[:2], dtype=torch.bool) if mask.keys is None else hide(mask.keys)
    layers, p, d = self.layers, layout.prefix, self.widths[1]
    q, k, v = layers.qkv(x.mT[..., None])[..., 0].mT.split(self.widths, -1)
    q = q.unflatten(2, (self.heads, d) if heads_first else (d, self.heads))
    q = (q if heads_first else q.mT).transpose(1, 2) * scale
    k = k.mT.masked_fill(~keys[:, None], -1e9).softmax(over) * keys[:, None]
    v = v * keys[..., None] if masked_values else v
    out = q @ (k @ v)[:, None] if content else 0 * (q @ (k @ v)[:, None])
    image = v[:, p:].unflatten(1, layout.grid)[:, None]
    weight = layers.conv_lambda.weight.flip(2, 3) if flip else layers.conv_lambda.weight
    weight = weight.transpose(2, 3) if turned else weight
    r = weight.shape[2] // 2
    near_ = torch.conv3d(image, weight, layers.conv_lambda.bias if bias else None, padding=(r, r, 0)).flatten(
        2, 3
    )
    near_ = torch.einsum("bhnd,bdne->bhne", q[:, :, p:], near_)
    if not position:
        near_ = 0 * near_
    out = torch.cat([out[:, :, :p] * (0 if prefix else 1), out[:, :, p:] + near_], 2)
    return out.transpose(1, 2).flatten(2)


def with_fault(**fault):
    """The mechanism with one fault."""
    return wrong(
        LambdaLayer, mix=lambda self, x, source, *, mask, layout: applied(self, x, mask, layout, **fault)
    )


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=6).ok


MUTANTS = {
    "softmax over the depth": with_fault(over=1),
    "softmax over the batch": with_fault(over=0),
    "no content": with_fault(content=False),
    "no positions": with_fault(position=False),
    "no bias of positions": with_fault(bias=False),
    "ways turned round": with_fault(flip=True),
    "rows and columns exchanged": with_fault(turned=True),
    "heads and depth interleaved": with_fault(heads_first=False),
    "a scale of attention": with_fault(scale=0.5),
    "special tokens receive nothing": with_fault(prefix=True),
    "padding is seen around": with_fault(masked_values=False),
    "the mask ignored": with_fault(hide=torch.ones_like),
    "the mask inverted": with_fault(hide=torch.logical_not),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((3, 4))


def at(dim=8, layout=LAYOUT, **wishes) -> Site:
    """A site on a plane."""
    return Site("hand", dim, 2, layout, **wishes)


def lambdas(dim=8, layout=LAYOUT, **options) -> LambdaLayer:
    """In float64, with weights of a size that matters."""
    return spread(LambdaLayer(at(dim, layout), **{"depth": 3, "scope": 3} | options), 0.5)


# By hand


def test_hand_two_tokens():
    """k = (0, ln 3), v = (4, 8): the content is 7; with E = (1, 10, 100) around it is 840 and 84 more."""
    part = set_all(LambdaLayer(Site("hand", 1, 1, Layout((1, 2)), qkv_bias=False), depth=1, scope=3), 0.0)
    x = torch.tensor([[[4.0], [8.0]]]).double()
    with torch.no_grad():
        part.layers.conv_lambda.weight[0, 0, 1, :, 0] = torch.tensor([1.0, 10, 100])
        part.layers.qkv.weight[0] = 0.25  # q = (1, 2)
        part.layers.qkv.weight[1] = math.log(3) / 4  # k = (ln 3, 2 ln 3)
        part.layers.qkv.weight[2] = 1
    near(seen(part, x, layout=Layout((1, 2))), [[[0.25, 0.75]]])
    near(part(x, layout=Layout((1, 2))), [[[7 + 840], [2 * (7 + 84)]]], 1e-10)


@pytest.mark.parametrize("dim,depth,scope", [(8, 16, 9), (8, 3, 3), (12, 5, 1)])
def test_hand_parameters(dim, depth, scope):
    """(h + 1) depth + c/h rows of a projection, and depth (scope² + 1); timm's, less its batch norms."""
    wanted = (dim + 1) * (3 * depth + dim // 2) + depth * (scope**2 + 1)
    assert count(LambdaLayer(at(dim), depth=depth, scope=scope)) == wanted
    theirs = Timms(dim, num_heads=2, dim_head=depth, r=scope, qkv_bias=True)
    assert count(theirs) == wanted + 2 * (2 * depth + dim // 2)
    assert count(LambdaLayer(at(dim, qkv_bias=False), depth=depth, scope=scope)) == wanted - (
        3 * depth + dim // 2
    )


def test_defaults():
    assert options_of(LambdaLayer)().model_dump() == {"depth": 16, "scope": 9}
    with pytest.raises(RecipeError, match="AZ214.*scope of 8 has no middle"):
        lambdas(scope=8)


def test_hand_the_start():
    part = LambdaLayer(Site("hand", 256, 2, LAYOUT), depth=64)
    part.init_weights()
    assert abs(part.layers.qkv.weight.detach().std() * 16 - 1) < 0.1
    assert abs(part.layers.conv_lambda.weight.detach().std() * 8 - 1) < 0.1


# Identities


@pytest.mark.parametrize("heads,depth,scope", [(1, 4, 3), (2, 3, 5), (4, 16, 9)])
def test_identity_timms_layer_in_eval_mode(heads, depth, scope):
    """Batch norms of a trained model fold into the rows of q and v."""
    theirs = spread(Timms(8, num_heads=heads, dim_head=depth, r=scope, qkv_bias=True), 0.5)
    for norm in (theirs.norm_q, theirs.norm_v):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    part = spread(LambdaLayer(Site("hand", 8, heads, LAYOUT), depth=depth, scope=scope))
    k = torch.ones(depth).double()
    scales = [n.weight / torch.sqrt(n.running_var + n.eps) for n in (theirs.norm_q, theirs.norm_v)]
    shifts = [
        n.bias - n.running_mean * s for n, s in zip((theirs.norm_q, theirs.norm_v), scales, strict=True)
    ]
    scale, shift = torch.cat([scales[0], k, scales[1]]), torch.cat([shifts[0], 0 * k, shifts[1]])
    with torch.no_grad():
        part.layers.qkv.weight.copy_(theirs.qkv.weight * scale[:, None, None, None])
        part.layers.qkv.bias.copy_(theirs.qkv.bias * scale + shift)
    part.layers.conv_lambda.load_state_dict(theirs.conv_lambda.state_dict())
    x = normal(3, 12, 8)
    near(part(x, layout=LAYOUT), theirs(x.mT.unflatten(2, (3, 4))).flatten(2).mT, 1e-10)


def test_identity_without_ways_it_does_not_know_the_order():
    part, x, order = lambdas(), normal(2, 12, 8), torch.randperm(12)
    with torch.no_grad():
        part.layers.conv_lambda.weight.zero_()
    near(part(x[:, order], layout=LAYOUT), part(x, layout=LAYOUT)[:, order])


def test_identity_without_content_it_is_local():
    part, x = lambdas(layout=Layout((1, 9))), normal(1, 9, 8)
    with torch.no_grad():
        part.layers.qkv.weight[6:9].zero_(), part.layers.qkv.bias[6:9].zero_()  # all tokens alike
    other, content = x.clone(), Layout((1, 9))
    other[:, 4] += 1
    mean = [part.layers.qkv(t.mT[..., None])[..., 0].mT[..., 9:].mean(1) for t in (x, other)]
    q = [
        part.layers.qkv(t.mT[..., None])[..., 0].mT[..., :6].unflatten(2, (2, 3)).sum(-1) for t in (x, other)
    ]
    alone = [
        part(t, layout=content) - (s[..., None] * m[:, None, None]).flatten(2)
        for t, s, m in zip((x, other), q, mean, strict=True)
    ]
    moved = (alone[0] - alone[1]).abs().amax((0, 2)) > 1e-12
    assert moved.tolist() == [False] * 3 + [True] * 3 + [False] * 3


def test_identity_it_is_linear_in_queries():
    part, x = lambdas(), normal(2, 12, 8)
    out = part(x, layout=LAYOUT)
    with torch.no_grad():
        part.layers.qkv.weight[:6].mul_(2), part.layers.qkv.bias[:6].mul_(2)
    near(part(x, layout=LAYOUT), 2 * out)


def test_identity_padding_is_a_border():
    part, x = lambdas(), normal(2, 3, 4, 8)
    keys = torch.ones(2, 3, 4, dtype=torch.bool)
    keys[:, :, 2:] = False
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=LAYOUT).unflatten(1, (3, 4))
    near(out[:, :, :2].flatten(1, 2), part(x[:, :, :2].flatten(1, 2), layout=Layout((3, 2))))


def test_identity_special_tokens_have_no_place():
    """They are keys like all others: without ways the output is that of a line of tokens."""
    part, x = lambdas(), normal(2, 14, 8)
    with torch.no_grad():
        part.layers.conv_lambda.weight.zero_(), part.layers.conv_lambda.bias.zero_()
    near(part(x, layout=Layout((3, 4), 2)), part(x, layout=Layout((2, 7))))


def test_where_no_token_exists_nothing_is_nan():
    part, x = lambdas(), normal(2, 12, 8).requires_grad_()
    out = part(x, mask=Mask(keys=torch.zeros(2, 12, dtype=torch.bool)), layout=LAYOUT)
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in part.parameters())


def test_narrow_numbers_stay_near():
    narrow(LambdaLayer, [(2, 12, 12)], site=Site("hand", 12, 3, LAYOUT), depth=4, scope=3)


def test_gradients_in_autocast_read_what_was_written():
    """In bfloat16 on a CPU the gradient of a convolution in three dimensions holds what lay in the memory before."""
    layout = Layout((5, 5))
    for _ in range(20):
        layer, x = LambdaLayer(Site("here", 2, 1, layout)), torch.randn(2, 25, 2)
        lain = [torch.full((n,), torch.nan) for n in (256, 529, 1058, 1296, 2116, 2592) for _ in range(4)]
        del lain
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x, layout=layout)
        out.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
