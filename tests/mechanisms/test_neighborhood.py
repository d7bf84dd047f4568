"""Neighborhood attention, arXiv:2204.07143 and arXiv:2504.16922."""

import itertools
import math
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import wraps

import pytest
import torch
from by_hand import caught, narrow, near, normal, place, wrong
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnzoo
from attnzoo.core import NO_MASK, Layout, Mask, Site, evaluate, watch
from attnzoo.errors import LayoutMismatch, RecipeError
from attnzoo.functional import Windows, tiles_save
from attnzoo.functional.neighbours import each
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.local.neighborhood import Neighborhood
from attnzoo.mechanisms.local.window import Window
from attnzoo.testing import against


def windows(length, window, stride, dilation, causal):
    """Who sees whom along one dimension."""
    return Windows(length, window, stride, dilation, causal).seen(torch.device("cpu"))


def window_of(
    i: int, length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> list[int]:
    """The keys of token i along one dimension."""
    group = [j for j in range(length) if j % dilation == i % dilation]
    a, members = group.index(i), len(group)
    window = min(window, members)
    left, right = window // 2, window - 1 - window // 2
    if causal:
        leader = min((a // stride) * stride + stride - 1, members - 1)
        start, end = max(leader - window + 1, 0), a + 1
    else:
        leader = min((a // stride) * stride + stride // 2, members - 1)
        start = max(leader - left, 0)
        if leader + right >= members:
            start = members - window
        end = start + window
    return group[start:end]


@against(Neighborhood)
def test_oracle(component, options, q, k, v, layout, allowed):
    """Token i sees token j when j lies in its window along every dimension, or when one of them is special."""
    grid, p, options = layout.grid, layout.prefix, dict(options)
    table, step = component.bias if options.pop("bias") else None, options["dilation"]
    places = list(itertools.product(*(range(side) for side in grid)))
    along = [
        {name: one[i] if isinstance(one, list) else one for name, one in options.items()}
        for i in range(len(grid))
    ]
    boxes = [
        [set(window_of(at, side, **own)) for at, side, own in zip(here, grid, along, strict=True)]
        for here in places
    ]
    near = torch.ones(layout.length, layout.length, dtype=torch.bool)
    for i, j in itertools.product(range(len(places)), repeat=2):
        near[p + i, p + j] = all(at in box for at, box in zip(places[j], boxes[i], strict=True))
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        see = allowed[b, h, i] & near[i]
        if see.any():
            scores = k[b, h, see] @ q[b, h, i] / math.sqrt(q.shape[-1])
            for at, j in enumerate(see.nonzero()[:, 0].tolist()):
                if table is not None and min(i, j) >= p:
                    ways = zip(places[i - p], places[j - p], table.shape[1:], strict=True)
                    # the last entry is oneself where windows are causal, else the middle one
                    scores[at] += table[(h, *((to - here) // step + (e - 1 if options["causal"] else e // 2) for here, to, e in ways))]  # fmt: skip
            out[b, h, i] = scores.softmax(0) @ v[b, h, see]
    return out


test_oracle_of_small_windows = against(
    Neighborhood, options=lambda options: options.get("window") in (2, 3) and not options.get("bias")
)(test_oracle.oracle)
test_oracle_of_tables = against(
    Neighborhood, options=lambda options: options.get("window") in (2, 3) and options.get("bias")
)(test_oracle.oracle)


def built_with(change):
    """The head built with other options than asked for."""

    @wraps(Neighborhood.__init__)  # the same options
    def init(self, site, **options):
        Neighborhood.__init__(self, site, **options)
        vars(self).update(
            change(**{"window": 7, "stride": 1, "dilation": 1, "causal": False, "bias": False} | options)
        )

    return wrong(Neighborhood, __init__=init)


def attending(change):
    """The head with its mask or layout changed."""

    def attend(self, q, k, v, *, mask, layout):
        mask, layout = change(mask, layout)
        return Neighborhood.attend(self, q, k, v, mask=mask, layout=layout)

    return wrong(Neighborhood, attend=attend)


def neighbours(change):
    """The head with who sees whom (1 1 n n) changed."""

    def seen(self, layout, device):
        return change(Neighborhood.neighbours(self, layout, device).clone(), layout)

    return wrong(Neighborhood, neighbours=seen)


def with_ways(change):
    """The head with what its table holds for each way (h n n) changed."""

    def ways(self, layout, table):
        return change(self, Neighborhood.ways(self, layout, table), layout)

    return wrong(Neighborhood, ways=ways)


def special_ways(self, found, layout):
    """On the way to special tokens lies the entry of the way to oneself."""
    middle = self.bias[(slice(None), *(e - 1 if self.causal else e // 2 for e in self.bias.shape[1:]))]
    found = found.clone()
    found[:, :, : layout.prefix] = middle[:, None, None]
    return found


def in_tokens(self, found, layout):
    """Ways are counted in tokens, not in steps of the dilation."""
    plain = copy(self)
    plain.dilation = 1
    return Neighborhood.ways(plain, layout, self.bias)


def special_blind(seen, layout):
    seen[..., : layout.prefix, layout.prefix :] = False
    return seen


MUTANTS = {
    "a window too wide": built_with(lambda window, **_: {"window": window + 1}),
    "a window too narrow": built_with(lambda window, **_: {"window": max(window - 1, 1)}),
    "no stride": built_with(lambda **_: {"stride": 1}),
    "no dilation": built_with(lambda **_: {"dilation": 1}),
    "not causal": built_with(lambda **_: {"causal": False}),
    "stride and dilation swapped": built_with(
        lambda stride, dilation, **_: {"stride": dilation, "dilation": stride}
    ),
    "special tokens are blind": neighbours(special_blind),
    "who is seen sees": neighbours(lambda seen, layout: seen.mT),
    "columns first": attending(lambda mask, layout: (mask, Layout(layout.grid[::-1], layout.prefix))),
    "pairs ignored": attending(lambda mask, layout: (replace(mask, pairs=None), layout)),
    "a line": attending(lambda mask, layout: (mask, Layout((layout.length - layout.prefix,), layout.prefix))),
}


TABLES = {
    "no table": with_ways(lambda self, found, layout: 0 * found),
    "ways turned round": with_ways(lambda self, found, layout: found.mT),
    "heads exchange their tables": with_ways(lambda self, found, layout: found.roll(1, 0)),
    "ways of special tokens": with_ways(special_ways),
    "rows as columns": with_ways(
        lambda self, found, layout: Neighborhood.ways(self, layout, self.bias.transpose(1, -1))
    ),
    "ways in tokens": with_ways(in_tokens),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle_of_small_windows, mutant)


@pytest.mark.parametrize("mutant", TABLES.values(), ids=TABLES)
def test_mutants_of_tables(mutant):
    caught(test_oracle_of_tables, mutant)


# By hand


WINDOWS = [
    (8, {"window": 3}, "03 03 14 25 36 47 58 58"),
    (8, {"window": 4}, "04 04 04 15 26 37 48 48"),
    (8, {"window": 4, "stride": 2}, "04 04 15 15 37 37 48 48"),
    (8, {"window": 4, "stride": 4}, "04 04 04 04 48 48 48 48"),
    (8, {"window": 4, "stride": 2, "causal": True}, "01 02 03 04 25 26 47 48"),
]
"""Length, options, and start and end of each token's window."""


def keys_of(
    length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> list[list[int]]:
    """The keys that each token sees."""
    return [line.nonzero().flatten().tolist() for line in windows(length, window, stride, dilation, causal)]


@pytest.mark.parametrize("length,options,table", WINDOWS)
def test_hand_windows(length, options, table):
    wanted = [list(range(int(pair[0]), int(pair[1]))) for pair in table.split()]
    assert keys_of(length, **options) == wanted
    assert [window_of(i, length, **options) for i in range(length)] == wanted


def test_hand_dilated():
    keys = keys_of(7, 3, dilation=2)
    assert keys[0] == [0, 2, 4] and keys[6] == [2, 4, 6] and keys[5] == [1, 3, 5]


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_limits_of_windows(length):
    assert windows(length, length, 1, 1, False).all()
    assert torch.equal(windows(length, length, 1, 1, True), torch.ones(length, length).tril().bool())
    for window in range(1, length + 1):
        for stride in range(1, window + 1):
            seen = windows(length, window, stride, 1, False)
            assert (seen.sum(dim=1) == window).all()
            assert torch.equal(seen[:-1:stride], seen[: length - 1 : stride])
            assert all(
                torch.equal(seen[i], seen[i - i % stride]) for i in range(length)
            )  # one stride, one window


def test_hand_counts_on_a_plane_and_special_tokens():
    layout = Layout((4, 5), prefix=2)
    head = Neighborhood(Site("hand", 2, 1, layout), window=3)
    seen = head.neighbours(layout, torch.device("cpu"))[0, 0]
    assert seen[:2].all() and seen[:, :2].all()
    assert (seen[2:, 2:].sum(dim=1) == 9).all()
    assert seen[2, 2:].nonzero().flatten().tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]


def test_hand_a_window_for_each_dimension():
    """Columns of 3 by causal rows of 2, every second row: of 4 × 3 tokens the one at (2, 1)."""
    layout = Layout((4, 3))
    head = Neighborhood(Site("hand", 2, 1, layout), window=[2, 2], dilation=[2, 1], causal=[False, True])
    seen = head.neighbours(layout, torch.device("cpu"))[0, 0, 2 * 3 + 1]
    assert seen.nonzero().flatten().tolist() == [0, 1, 6, 7]  # rows 0 and 2, columns 0 and 1
    assert head.reach() == 2 and head.card.grid == 2


def test_hand_the_table():
    """By rows and columns from query to key, in steps of the dilation; special tokens have none."""
    layout = Layout((1, 5), prefix=1)
    head = Neighborhood(Site("hand", 2, 2, layout), window=3, dilation=2, bias=True)
    assert head.bias.shape == (2, 1, 5) and 0 < head.bias.abs().max() <= 0.04
    with torch.no_grad():
        head.bias[1, 0] = torch.tensor([-2.0, -1, 0, 1, 2])
    found = head.ways(layout, head.bias)[1]
    assert not found[0].any() and not found[:, 0].any()
    seen = head.neighbours(layout, torch.device("cpu"))[0, 0, 1:, 1:]
    assert (found[1:, 1:] * seen).tolist() == [
        [0, 0, 1, 0, 2], [0, 0, 0, 1, 0], [-1, 0, 0, 0, 1], [0, -1, 0, 0, 0], [-2, 0, -1, 0, 0],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "options", "table"),
    [
        ((14, 14), {}, (13, 13)),  # NATTEN's: 2 k - 1 along each side
        ((14, 14), {"dilation": 2}, (13, 13)),
        ((14, 13), {"dilation": 3}, (9, 9)),
        ((3, 14), {"window": 5}, (5, 9)),
        ((14,), {"window": 4, "causal": True}, (4,)),
        ((8, 8, 2), {"window": 3}, (5, 5, 3)),
        ((8, 6), {"window": [3, 5], "dilation": [1, 2], "causal": [True, False]}, (3, 5)),
    ],
)
def test_hand_the_size_of_the_table(grid, options, table):
    assert Neighborhood(Site("hand", 4, 2, Layout(grid)), bias=True, **options).bias.shape == (2, *table)


def test_a_larger_grid_uses_the_farthest_ways():
    head = Neighborhood(Site("hand", 2, 1, Layout((2,))), window=3, bias=True)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([[5.0, 6, 7]]))
    assert head.ways(Layout((3,)), head.bias).tolist() == [[[6, 7, 7], [5, 6, 7], [5, 5, 6]]]


# Identities


EACH = [
    {"window": [3, 5]},
    {"window": [4, 3], "stride": [2, 1]},
    {"window": 2, "dilation": [1, 2], "causal": [True, False]},
]


@pytest.mark.parametrize("options", EACH)
def test_identity_dimensions_by_themselves(options):
    """Who sees whom on a plane is who does so along both lines; so is the oracle's answer."""
    layout = Layout((6, 5), 1)
    site = Site("hand", 6, 2, layout)
    head = Neighborhood(site, **options)
    lines = [
        windows(side, *(each({"window": 7, "stride": 1, "dilation": 1, "causal": False}[o] if o not in options
                             else options[o], 2)[i] for o in ("window", "stride", "dilation", "causal")))
        for i, side in enumerate(layout.grid)
    ]  # fmt: skip
    near(head.neighbours(layout, torch.device("cpu"))[0, 0, 1:, 1:].double(), torch.kron(*lines).double())
    q, k, v = normal(3, 2, 2, 31, 3)
    full = {"window": 7, "stride": 1, "dilation": 1, "causal": False, "bias": False} | options
    allowed = torch.ones(2, 2, 31, 31, dtype=torch.bool)
    wanted = test_oracle.oracle(component=head, options=full, q=q, k=k, v=v, layout=layout, allowed=allowed)
    near(head(q, k, v, layout=layout), wanted)


def test_identity_as_many_alike_are_one_for_all():
    one, many = (Neighborhood(place(4, 2, 4), window=w, stride=s) for w, s in ((3, 2), ([3], [2])))
    q, k, v = normal(3, 1, 2, 4, 2)
    assert torch.equal(*(head(q, k, v, layout=Layout((4,))) for head in (one, many)))


def test_identity_a_table_of_zero_is_none():
    layout, (q, k, v) = Layout((20, 24), 1), normal(3, 1, 2, 481, 3)
    site = Site("hand", 6, 2, layout)
    with_table, without = (Neighborhood(site, window=3, bias=bias).double() for bias in (True, False))
    torch.nn.init.zeros_(with_table.bias)
    near(with_table(q, k, v, layout=layout), without(q, k, v, layout=layout))


@pytest.mark.parametrize("size", [3, 4])
def test_identity_one_window_has_the_table_of_swin(size):
    """Whose table is by the way from key to query."""
    layout, (q, k, v) = Layout((size, size)), normal(3, 1, 2, size**2, 3)
    site = Site("hand", 6, 2, layout)
    head, swin = Neighborhood(site, window=size, bias=True).double(), Window(site, window=size).double()
    with torch.no_grad():
        swin.bias.copy_(head.bias.flip(1, 2))
    near(head(q, k, v, layout=layout), swin(q, k, v, layout=layout))


def test_identity_the_whole_window_is_softmax():
    q, k, v = normal(3, 1, 2, 13, 3)
    layout = Layout((3, 4), 1)
    site = Site("hand", 6, 2, layout)
    near(Neighborhood(site, window=4)(q, k, v, layout=layout), Softmax(site)(q, k, v, layout=layout).tolist())
    causal = Neighborhood(Site("hand", 6, 2, Layout((13,))), window=13, causal=True)
    wanted = Softmax(site)(q, k, v, mask=Mask(causal=True), layout=Layout((13,)))
    near(causal(q, k, v, layout=Layout((13,))), wanted.tolist())


# Refusals


def test_a_stride_longer_than_the_window_is_refused():
    with pytest.raises(RecipeError, match="AZ214.*stride of 4.*window of 3"):
        Neighborhood(place(2), window=3, stride=4)


def test_narrow_numbers_stay_near():
    narrow(Neighborhood, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7), window=3)


def test_alone_it_takes_a_tuple_as_well_and_asks_for_a_plane():
    part = attnzoo.create("neighborhood", dim=4, heads=2, grid=(3, 5), window=(3, 2))
    assert part.attn.inner.window == [3, 2] and part(torch.randn(1, 15, 4)).shape == (1, 15, 4)
    with pytest.raises(LayoutMismatch, match="AZ401.*2-D"):
        attnzoo.create("neighborhood", dim=4, grid=15, window=(3, 2))


def test_lists_of_another_number_of_dimensions_are_refused():
    with pytest.raises(RecipeError, match=r"AZ214.*window \[3, 3\] for a 1-D grid"):
        Neighborhood(place(2), window=[3, 3])
    with pytest.raises(RecipeError, match="AZ214.*stride of 4.*window of 3"):
        Neighborhood(Site("hand", 2, 1, Layout((4, 4))), window=[5, 3], stride=4)
    head = Neighborhood(Site("hand", 2, 1, Layout((4, 4))), window=[3, 2])
    with pytest.raises(LayoutMismatch, match="AZ401.*2-D"):
        head(*normal(3, 1, 1, 16, 2), layout=Layout((16,)))


def test_the_cost_counts_each_dimension():
    """As many operations as the tiles that are laid out; with lists that say the same, the same."""
    site = Site("hand", 8, 2, Layout((64, 48), 1))
    one, many, other = (
        evaluate(Neighborhood.card.flops, site, {"window": w, "stride": s, "dilation": d, "causal": False})
        for w, s, d in ((5, 2, 1), ([5, 5], [2, 2], [1, 1]), ([5, 3], [2, 1], [1, 2]))
    )
    assert one == many
    sides = Neighborhood(site, window=[5, 3], stride=[2, 1], dilation=[1, 2]).along(site.layout)
    made = [side.tiles(8, torch.device("cpu")) for side in sides]
    asking, asked = (math.prod(t[i].numel() if i == 0 else t[i].shape[1] for t in made) for i in (0, 2))
    assert other == 4 * 8 * (asking * (1 + asked) + 1 * site.layout.length)


# Tiles


TILED = [
    ((24, 40), 1, {"window": [3, 5], "stride": [1, 4], "dilation": [2, 1], "causal": [False, True]}),
    ((300,), 0, {}),
    ((300,), 2, {"window": 5, "dilation": 3}),
    ((257,), 1, {"window": 9, "stride": 4, "causal": True}),
    ((24, 20), 0, {}),
    ((31, 29), 3, {"window": 5, "stride": 3}),
    ((25, 33), 1, {"window": 3, "dilation": 2, "causal": True}),
    ((33, 39), 0, {"window": 7, "stride": 7}),
    ((9, 8, 10), 2, {"window": 3}),
]


def both(grid, prefix, options, mask=NO_MASK, batch=2, dim=6):
    """What tiles give and what the dense form gives, with the gradients of a random sum, in float64."""
    layout = Layout(grid, prefix)
    head = Neighborhood(Site("hand", dim, 2, layout), **options).double()
    assert tiles_save(head.along(layout))
    inputs = [t.requires_grad_() for t in normal(3, batch, 2, layout.length, dim // 2)]
    found = []
    for watched in (False, True):
        with watch(head, None, lambda name, seen: None) if watched else nullcontext():
            out = head(*inputs, mask=mask, layout=layout)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        found.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    return found


@pytest.mark.parametrize(("grid", "prefix", "options"), TILED)
@pytest.mark.parametrize("kind", ["no mask", "keys", "causal", "keys and causal"])
def test_identity_tiles_are_the_dense_form(grid, prefix, options, kind):
    length = math.prod(grid) + prefix
    keys = torch.rand(2, length) > 0.3 if "keys" in kind else None
    tiles, dense = both(grid, prefix, options, Mask(keys=keys, causal="causal" in kind))
    for one, other in zip(tiles, dense, strict=True):
        near(one, other)


def test_identity_tiles_of_a_sample_without_keys_are_zero():
    keys = torch.ones(2, 480, dtype=torch.bool)
    keys[1] = False
    tiles, dense = both((24, 20), 0, {}, Mask(keys=keys))
    assert not tiles[0][1].any() and all(bool(t.isfinite().all()) for t in tiles)
    near(tiles[0], dense[0])


def test_identity_small_grids_are_dense():
    assert not tiles_save(Neighborhood(place(4, 2, 4)).along(Layout((7, 7))))
    assert tiles_save(Neighborhood(place(4, 2, 4)).along(Layout((64, 64))))


@pytest.mark.parametrize("fault", ["another tile's keys", "one key too few"])
def test_wrong_tiles_are_seen(fault, monkeypatch):
    tiles = Windows.tiles

    def wrong_tiles(self, tile, device):
        queries, there, keys, seen = tiles(self, tile, device)
        if fault == "another tile's keys":
            keys = keys.roll(1, 0)
        else:
            seen = seen & (torch.arange(seen.shape[2]) > 0)
        return queries, there, keys, seen

    monkeypatch.setattr(Windows, "tiles", wrong_tiles)
    one, other = both((24, 20), 1, {})
    assert not torch.allclose(one[0], other[0])


def test_tiles_form_no_tensor_of_all_pairs():
    """Of 64 × 64 tokens the largest tensor has fewer numbers than a tenth of n²."""
    layout, head = Layout((64, 64)), Neighborhood(place(8, 1, 4))
    q, k, v = (t.float() for t in normal(3, 1, 1, layout.length, 8))
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    with Sizes():
        head(q, k, v, layout=layout)
    assert 10 * largest < layout.length**2
