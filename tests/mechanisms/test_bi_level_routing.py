"""Bi-level routing attention, arXiv:2303.08810, §3.2."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, seen, spread, wrong
from torch import fx, nn
from torch.nn import functional as F

import attnzoo
from attnzoo.core import Layout, Mask, Site
from attnzoo.functional import merge_heads
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.sparse import bi_level_routing as module
from attnzoo.mechanisms.sparse.bi_level_routing import BiLevelRouting
from attnzoo.testing import against


def linear(layer, x):
    """x Wᵀ + b."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


@against(BiLevelRouting, examples=14)
def test_oracle(component, options, x, layout, keys):
    """Region by region: which regions it chooses by means of those who exist; then query by query; then neighbours."""
    (b, n, c), p, (rows, columns), heads = x.shape, layout.prefix, layout.grid, component.heads
    zeros, d, out = options["padding"] == "zeros", c // heads, torch.zeros_like(x)
    qkv = linear(
        component.qkv, torch.cat([x, 0 * x[:, :1]], 1)
    )  # number n is a token of zero, beyond the grid
    keys = torch.cat([keys, keys[:, :1] | True], 1)
    side = [
        math.ceil(of / (options["regions"] if zeros else min(options["regions"], of))) for of in layout.grid
    ]
    filled = [options["regions"] * of for of in side] if zeros else layout.grid
    places = {
        (y, x_): p + y * columns + x_ if y < rows and x_ < columns else n
        for y, x_ in itertools.product(*map(range, filled))
    }
    regions: dict = {}
    for (y, x_), i in places.items():
        regions.setdefault((y // side[0], x_ // side[1]), []).append(i)
    for s in range(b):
        q, k, v = qkv[s].chunk(3, -1)
        alive = {at: [i for i in tokens if keys[s, i]] for at, tokens in regions.items()}
        special = [i for i in range(p) if keys[s, i]]
        reads = {i: [j for j in range(n) if keys[s, j]] for i in range(p)}
        for at, tokens in regions.items():
            mine = q[alive[at]].mean(0) if alive[at] else torch.zeros(c).double()
            suits = sorted(
                (-float((mine @ k[others].mean(0)).detach()), to) for to, others in alive.items() if others
            )
            suits = suits if alive[at] else []  # where nobody asks, special tokens alone are read
            chosen = [j for _, to in suits[: options["chosen"]] for j in alive[to]]
            reads |= dict.fromkeys(tokens, special + chosen)
        for i, h in itertools.product(range(n), range(heads)):
            if not reads[i]:
                continue
            part = slice(h * d, (h + 1) * d)
            scores = k[reads[i], part] @ q[i, part] / math.sqrt(c if options["scale"] == "full" else d)
            out[s, i, part] = scores.softmax(0) @ v[reads[i], part]
        if component.local is not None:
            size, kernel = options["local"], component.local.weight[:, 0]
            for y, x_ in itertools.product(range(rows), range(columns)):
                total = component.local.bias
                for i, j in itertools.product(range(size), repeat=2):
                    at = y + i - (size - 1) // 2, x_ + j - (size - 1) // 2
                    if at in places and keys[s, places[at]]:
                        total = total + kernel[:, i, j] * v[places[at]]
                out[s, p + y * columns + x_] = out[s, p + y * columns + x_] + total
    return linear(component.proj, out)


def masked(change):
    """Under another mask."""

    def mix(self, x, source, *, mask, layout):
        return BiLevelRouting.mix(self, x, source, mask=change(mask), layout=layout)

    return wrong(BiLevelRouting, mix=mix)


def before(change):
    """Changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return BiLevelRouting.mix(self, x, source, mask=mask, layout=layout)

    return wrong(BiLevelRouting, mix=mix)


def routed(q=lambda t: t, k=lambda t: t, best=lambda best: best):
    """Regions chosen in another way."""
    return patched(
        BiLevelRouting, "route", lambda q_, k_, there, chosen: best(ROUTE(q(q_), k(k_), there, chosen))
    )


def every_place(q, k, there, chosen):
    """Places that do not exist enter the means."""
    return (q.mean(2) @ k.mean(2).mT).topk(min(chosen, k.shape[1]), dim=-1).indices


ROUTE, FILLED_UP = module.route, module.filled_up
MUTANTS = {
    "the worst regions": routed(q=lambda q: -q),
    "always the first regions": routed(best=lambda best: torch.zeros_like(best) + torch.arange(best.shape[-1])),
    "means of all places": patched(BiLevelRouting, "route", every_place),
    "the best region alone": patched(
        BiLevelRouting, "route", lambda q, k, there, chosen: ROUTE(q, k, there, chosen)[..., :1]
    ),
    "the other scale": before(lambda self: setattr(self, "factor", self.factor * self.heads**0.5)),
    "the mask ignored": masked(lambda mask: Mask()),
    "the mask inverted": masked(lambda mask: replace(mask, keys=None if mask.keys is None else ~mask.keys)),
    "no neighbours": before(lambda self: setattr(self, "local", None)),
    "the convolution turned": before(
        lambda self: None if self.local is None else self.local.weight.copy_(self.local.weight.flip(2).clone())
    ),
    "zeros are nobody": before(lambda self: setattr(self, "zeros", False)),
    "zeros have no biases": patched(
        BiLevelRouting, "filled_up", lambda parts, there, groups, bias: FILLED_UP(parts, there, groups, None)
    ),
    "columns first": wrong(
        BiLevelRouting,
        mix=lambda self, x, source, *, mask, layout: BiLevelRouting.mix(
            self, x, source, mask=mask, layout=Layout(layout.grid[::-1], layout.prefix)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def routing(layout, dim=8, heads=2, **options) -> BiLevelRouting:
    """In float64, with parameters of a size that matters."""
    return spread(BiLevelRouting(Site("hand", dim, heads, layout), **options), 0.5)


# By hand


def test_hand_a_row_of_four_in_regions_of_two():
    """q = x and k = v = x of one channel: means -1 and 3; the first region chooses the first, the second the second."""
    layout, x = Layout((1, 4)), torch.tensor([-3.0, 1, 2, 4]).double().reshape(1, 4, 1)
    part = routing(layout, 1, 1, regions=2, chosen=1, local=1)
    with torch.no_grad():
        part.qkv.weight.fill_(1.0), part.qkv.bias.zero_(), part.proj.weight.fill_(1.0), part.proj.bias.zero_()

    def mix(q, *values):
        values = torch.tensor(values).double()
        return (q * values).softmax(0) @ values

    near(part(x, layout=layout), torch.stack([mix(-3, -3, 1), mix(1, -3, 1), mix(2, 2, 4), mix(4, 2, 4)]))


def test_hand_best_regions_come_first_and_have_no_gradient():
    q = torch.tensor([[1.0], [-1.0]]).double().reshape(1, 2, 1, 1).requires_grad_()
    k = torch.tensor([[2.0], [5.0]]).double().reshape(1, 2, 1, 1)
    there = torch.ones(1, 2, 1, 1, dtype=torch.bool)
    assert module.route(q, k, there, 2).tolist() == [[[1, 0], [0, 1]]]
    there[0, 1] = False  # nobody lives there: it comes last
    assert module.route(q, k, there, 1).tolist() == [[[0], [0]]]
    assert not module.route(q, k, there, 1).requires_grad


def test_hand_parameters():
    part = BiLevelRouting(Site("hand", 16, 2, Layout((14, 14))))
    assert count(part) == 16 * 48 + 48 + 25 * 16 + 16 + 16 * 16 + 16
    assert (
        count(BiLevelRouting(Site("hand", 16, 2, Layout((14, 14))), local=1)) == 16 * 48 + 48 + 16 * 16 + 16
    )


# Identities


@pytest.mark.parametrize("scale", ["full", "dim"])
@pytest.mark.parametrize("grid,regions", [((4, 4), 2), ((3, 5), 2), ((2, 2), 7)])
def test_identity_all_regions_without_neighbours_are_full_attention(grid, regions, scale):
    """With a scale of c^-½, which is d^-½ / √h."""
    layout = Layout(grid, 1)
    part, x = routing(layout, regions=regions, chosen=99, local=1, scale=scale), normal(2, layout.length, 8)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in part.qkv(x).chunk(3, -1))
    q = q / math.sqrt(2) if scale == "full" else q
    for mask in (Mask(), Mask(keys=torch.rand(2, layout.length) < 0.7)):
        wanted = Softmax(Site("hand", 8, 2, layout))(q, k, v, mask=mask, layout=layout)
        exist = torch.ones(2, layout.length, 1) if mask.keys is None else mask.keys[..., None]
        near(part(x, mask=mask, layout=layout) * exist, part.proj(merge_heads(wanted)) * exist)


def test_identity_constant_values_stay_constant_without_neighbours():
    layout = Layout((4, 6))
    part = routing(layout, regions=3, chosen=2, local=1)
    with torch.no_grad():
        part.qkv.weight[16:] = 0
    near(part(normal(2, 24, 8), layout=layout), part.proj(part.qkv.bias[16:]).expand(2, 24, 8))


def test_identity_the_convolution_is_pytorchs():
    layout, x = Layout((5, 6)), normal(1, 30, 8)
    part = routing(layout, local=3)
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8).double()
    conv.load_state_dict(part.local.state_dict())
    with torch.no_grad():
        plain = routing(layout, local=1)
        plain.load_state_dict(part.state_dict(), strict=False)
    v = layout.to_grid(part.qkv(x)[..., 16:])
    near(part(x, layout=layout) - plain(x, layout=layout), (conv(v).flatten(2).mT @ part.proj.weight.T))


@pytest.mark.parametrize(("grid", "filled"), [((5, 4), (6, 6)), ((2, 7), (3, 9)), ((6, 3), (6, 3))])
def test_identity_zeros_are_tokens_of_a_larger_grid(grid, filled):
    """Three regions along each side in any case; without a fault where they divide the grid."""
    small, large = Layout(grid), Layout(filled)
    part = routing(small, regions=3, chosen=2, local=3, padding="zeros")
    plain = routing(large, regions=3, chosen=2, local=3)
    plain.load_state_dict(part.state_dict())
    x = normal(2, small.length, 8)
    wide = F.pad(small.to_grid(x), (0, filled[1] - grid[1], 0, filled[0] - grid[0]))
    out = large.to_grid(plain(wide.flatten(2).mT, layout=large))[..., : grid[0], : grid[1]]
    near(part(x, layout=small), out.flatten(2).mT)


def test_identity_a_grid_that_is_filled_up_is_a_larger_one_under_a_mask():
    small, large, x = Layout((5, 5)), Layout((6, 6)), normal(2, 6, 6, 8)
    part, keys = routing(small, regions=2, chosen=2), torch.zeros(6, 6, dtype=torch.bool)
    keys[:5, :5] = True
    whole = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten().expand(2, -1)), layout=large)
    near(part(x[:, :5, :5].flatten(1, 2), layout=small), whole.unflatten(1, (6, 6))[:, :5, :5].flatten(1, 2))


def test_a_token_reads_the_chosen_regions_and_no_pairs_are_formed():
    layout, x = Layout((8, 8), 1), normal(1, 65, 8)
    assert seen(routing(layout, regions=4, chosen=3), x, layout=layout).shape == (1, 2, 64, 1 + 3 * 4)


def test_dropout_drops_weights_of_special_tokens_too():
    layout, x = Layout((2, 3), 1), normal(1, 7, 8)
    part = BiLevelRouting(Site("hand", 8, 2, layout, attn_drop=0.5)).double()
    assert (part.train()(x, layout=layout) - part.eval()(x, layout=layout))[:, 0].abs().max() > 1e-3


@pytest.mark.parametrize("padding", ["hidden", "zeros"])
def test_symbolic_tracing_follows_it(padding):
    layout, x = Layout((5, 4), 1), normal(2, 21, 8)
    options = {"regions": 3, "chosen": 2, "padding": padding}
    part = spread(attnzoo.create("bi_level_routing", 8, 2, grid=layout.grid, prefix=1, **options)).eval()
    near(fx.symbolic_trace(part)(x), part(x))


def test_narrow_numbers_stay_near():
    narrow(BiLevelRouting, [(2, 13, 12)], site=Site("hand", 12, 3, Layout((3, 4), 1)), chosen=99)
