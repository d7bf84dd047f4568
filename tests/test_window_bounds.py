"""Bounds of attention to windows, arXiv:2504.16922."""

import itertools
import math

import pytest

from attnzoo.bench import windows
from attnzoo.bench.windows import Bounds, window_bounds
from attnzoo.errors import ZooError


def near(found, flops, tiles):
    assert (found.flops, found.tiles) == (pytest.approx(flops), pytest.approx(tiles))


def test_hand_a_line():
    """Of 8 x 8 tiles 3 are seen by 6 tiles of queries and 2 by those at the ends; a window of one stride begins at
    2, 6, ..., so that it touches 3 tiles, or 2 that begin with it."""
    line = {"queries": 4, "keys": 4}
    near(window_bounds((32,), 8, **line), 4, 64 / 22)
    near(window_bounds((32,), 8, stride=4, **line), 4, 64 / 22)
    near(window_bounds((32,), 8, stride=4, moving=True, **line), 4, 4)
    near(window_bounds((32,), 8, stride=8, **line), 4, 4)
    near(window_bounds((32,), 8, stride=8, moving=True, **line), 4, 4)


def test_hand_what_is_seen_whole_saves_nothing():
    near(window_bounds((6, 4), (6, 4), queries=(2, 2), keys=(3, 2)), 1, 1)
    near(window_bounds((6, 4), 9, queries=5, keys=7), 1, 1)
    near(window_bounds((8,), 8, causal=True, queries=1, keys=1), 64 / 36, 64 / 36)


def test_identity_dimensions_multiply():
    """Tiles with sides: a plane has the product of what its lines have."""
    one = window_bounds((12,), 5, stride=2, queries=3, keys=4)
    two = window_bounds((9,), 3, dilation=2, queries=2, keys=2)
    both = window_bounds((12, 9), (5, 3), stride=(2, 1), dilation=(1, 2), queries=(3, 2), keys=(4, 2))
    near(both, one.flops * two.flops, one.tiles * two.tiles)


@pytest.mark.parametrize("side", [4, 8, 16])
def test_identity_blocks_visit_nothing_in_vain(side):
    found = window_bounds((32, 48), side, stride=side, queries=(4, side), keys=(side // 2, 4))
    near(found, 32 * 48 / side**2, 32 * 48 / side**2)


def window_of(i, length, window, stride, dilation, causal):
    """The keys of token i along one dimension, places of its group."""
    members, a = len(range(i % dilation, length, dilation)), i // dilation
    window = min(window, members)
    if causal:
        leader = min(a // stride * stride + stride - 1, members - 1)
        return range(max(leader - window + 1, 0), a + 1)
    leader = min(a // stride * stride + stride // 2, members - 1)
    start = max(leader - window // 2, 0)
    return range(members - window, members) if start + window > members else range(start, start + window)


def counted(grid, options, queries, keys, moving):
    """Tile by tile and pair by pair."""
    seen, boxes = 0, {}
    for here in itertools.product(*map(range, grid)):
        own = [window_of(i, n, *o) for i, n, o in zip(here, grid, options, strict=True)]
        seen += math.prod(map(len, own))
        groups = tuple(i % o[2] for i, o in zip(here, options, strict=True))
        if isinstance(queries, int):
            flat = [
                sum(p * math.prod(grid[a + 1 :]) for a, p in enumerate(at)) for at in itertools.product(*own)
            ]
            at = sum(p * math.prod(grid[a + 1 :]) for a, p in enumerate(here))
            boxes.setdefault((groups, at // queries), [set()])[0].update(flat)
            continue
        tile = tuple(i // o[2] // q for i, o, q in zip(here, options, queries, strict=True))
        for box, places in zip(boxes.setdefault((groups, tile), [set() for _ in grid]), own, strict=True):
            box.update(places)
    lined = isinstance(queries, int)
    sizes, tiles = ((math.prod(grid),), (queries,)) if lined else (grid, queries)
    of = (keys,) if lined else keys
    visited = 0
    for box in boxes.values():
        starts = [min(places) if moving else 0 for places in box]
        touched = [
            {(place - start) // k for place in range(min(places), max(places) + 1)}
            for places, start, k in zip(box, starts, of, strict=True)
        ]
        visited += math.prod(map(len, touched))
    dense = math.prod(math.ceil(n / q) * math.ceil(n / k) for n, q, k in zip(sizes, tiles, of, strict=True))
    return math.prod(grid) ** 2 / seen, dense / visited


CASES = [
    ((13,), [(4, 2, 1, False)], (3,), (2,)),
    ((11,), [(3, 1, 3, True)], (2,), (3,)),
    ((7, 6), [(3, 1, 1, False), (4, 3, 1, False)], (2, 3), (3, 2)),
    ((7, 6), [(3, 2, 2, False), (2, 1, 1, False)], (2, 3), (1, 2)),
    ((7, 6), [(3, 1, 1, False), (4, 3, 1, False)], 5, 4),
    ((3, 4, 5), [(2, 1, 1, True), (3, 2, 1, True), (4, 4, 1, True)], 6, 8),
]


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("grid,options,queries,keys", CASES)
def test_equals_the_count(grid, options, queries, keys, moving):
    window, stride, dilation, causal = zip(*options, strict=True)
    found = window_bounds(
        grid,
        window,
        stride=stride,
        dilation=dilation,
        causal=causal[0],
        queries=queries,
        keys=keys,
        moving=moving,
    )
    near(found, *counted(grid, options, queries, keys, moving))


FAULTS = {
    "windows that are cut at the ends": ("_groups", lambda w: [[(max(0, i - w.window // 2), min(w.length, i + w.window - w.window // 2)) for i in range(w.length)]]),
    "tiles of keys that always move": ("_visited", lambda b, q, k, moving, real=windows._visited: real(b, q, k, True)),
    "tiles of keys that never move": ("_visited", lambda b, q, k, moving, real=windows._visited: real(b, q, k, False)),
    "queries one by one": ("_visited", lambda b, q, k, moving, real=windows._visited: real(b, 1, k, moving)),
}  # fmt: skip


@pytest.mark.parametrize("name,fault", FAULTS.values(), ids=FAULTS)
def test_wrong_counts_are_noticed(monkeypatch, name, fault):
    monkeypatch.setattr(windows, name, fault)
    with pytest.raises(AssertionError):
        for case, moving in itertools.product(CASES, (False, True)):
            test_equals_the_count(*case, moving)


@pytest.mark.parametrize(
    "grid,options",
    [
        ((8,), {"window": 3, "stride": 4}),
        ((8, 8), {"window": (3, 3, 3)}),
        ((8, 0), {"window": 3}),
        ((), {"window": 3}),
        ((8, 8), {"window": 3, "queries": (4, 4), "keys": (4,)}),
        ((8, 8), {"window": 3, "dilation": 2}),
    ],
)
def test_what_cannot_be_is_refused(grid, options):
    with pytest.raises(ZooError, match="AZ214"):
        window_bounds(grid, **options)


def test_it_is_data():
    assert window_bounds((4,), 2, stride=2, queries=2, keys=2) == Bounds(2.0, 2.0)
