"""Maths that mechanisms share: softmax under masks, additive scores, heads."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from attnzoo.core import NO_MASK, Layout, Mask, MultiHead, Site
from attnzoo.functional import (
    MLPByHead,
    additive_scores,
    attention_from_scores,
    by_distance,
    dot_product_attention,
    existing,
    greatest,
    masked_group_norm,
    masked_max,
    masked_mean,
    masked_softmax,
    merge_heads,
    multi_head_attention,
    nearest_factors,
    relative_bias,
    split_heads,
    surroundings,
    unwindows,
    windows,
)
from attnzoo.functional.additive import LIMIT, ROWS, _is_small
from attnzoo.functional.associative import recalled
from attnzoo.functional.causal import stabilised_sums
from attnzoo.functional.chunks import around_chunks, close, in_a_line, in_blocks, in_chunks, with_places
from attnzoo.functional.distances import by_pair, distances, sinusoids
from attnzoo.functional.greatest import first_greatest
from attnzoo.functional.projections import Projected
from attnzoo.functional.sampling import sample_bias, sample_tokens
from attnzoo.functional.segments import segment_means, segments
from attnzoo.functional.softmax import masked_relu
from attnzoo.functional.tokens import picked
from attnzoo.functional.unfolding import at_places, folded, unfolded
from attnzoo.functional.windows import Patches
from attnzoo.mechanisms.dot_product.softmax import Softmax


def double(*shape: int) -> torch.Tensor:
    """Random numbers in float64 that ask for a gradient."""
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# Heads


def test_heads_are_split_and_merged():
    x = torch.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    heads = split_heads(x, 4)
    assert heads.shape == (2, 4, 3, 2)
    assert torch.equal(heads[1, 2, 0], x[1, 0, 4:6])
    assert torch.equal(merge_heads(heads), x)


class Values(Projected):
    """The sum of keys and values, and what the query adds."""

    def __init__(self, site):
        super().__init__(site)
        self.add_projections(site)

    def mix(self, x, source, *, mask, layout):
        q, k, v = self.projected(x, source)
        return q + (k + 2 * v).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("context", [None, 3])
def test_projections_are_those_of_multi_head(context):
    site = Site("here", 4, 2, Layout((5,)), context_dim=context, qk_norm=True)
    part, multi = Values(site), MultiHead(site, Softmax(site))
    keys = {name for name in multi.state_dict() if not name.startswith("proj.")}
    assert set(part.state_dict()) == keys
    part.load_state_dict({name: t for name, t in multi.state_dict().items() if name in keys})
    x, source = torch.randn(2, 5, 4), torch.randn(2, 7, context or 4)
    q, k, v = part.projected(x, x if context is None else source)
    heads = multi.project(x) if context is None else (multi.queries(x), *multi.read(source))
    found = part.q_norm(split_heads(q, 2)), part.k_norm(split_heads(k, 2)), split_heads(v, 2)
    for one, two in zip(found, heads, strict=True):
        torch.testing.assert_close(one, two)


# The greatest


def test_the_greatest():
    shares = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.0, 0.2, 0.1]])
    assert greatest(shares, 2).tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert greatest(shares, 4).tolist() == [[1] * 4] * 2


def test_of_equal_ones_those_that_come_first():
    scores = torch.tensor([[1.0, 3, 2, 2, 2], [0, 0, 0, 0, 0], [5, 4, 3, 2, 1]])
    T, F = True, False
    assert first_greatest(scores, 3).tolist() == [[F, T, T, T, F], [T, T, T, F, F], [T, T, T, F, F]]
    assert first_greatest(scores, 9).all() and first_greatest(scores, 1).sum() == 3


# Blocks and chunks


def test_blocks_overlap_and_are_filled_up():
    t = torch.arange(1.0, 6).reshape(1, 1, 5, 1)
    assert in_blocks(t, 3, 2)[0, 0, :, :, 0].tolist() == [[1, 2, 3], [3, 4, 5], [5, 0, 0]]
    assert in_blocks(t, 2, 2)[0, 0, :, :, 0].tolist() == [[1, 2], [3, 4], [5, 0]]
    assert in_blocks(t > 0, 2, 2)[0, 0, 2, :, 0].tolist() == [True, False]
    placed = with_places(in_blocks(t, 2, 2))
    assert placed.shape == (1, 1, 3, 2, 2) and placed[0, 0, 1].tolist() == [[3, 0], [4, 0.5]]


def test_what_is_close():
    every = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    assert close(every, 1)[0, 0].equal(torch.eye(4).bool())
    assert close(every, 2)[0, 0, 1].tolist() == [True, True, True, False]
    assert not close(~every, 2).any()


@pytest.mark.parametrize("n,m,window,dilation", [(5, 5, 1, 1), (40, 40, 3, 2), (7, 9, 2, 3), (1, 6, 20, 1), (35, 35, 0, 5)])  # fmt: skip
def test_chunks_and_what_is_around_them(n, m, window, dilation):
    q, k = torch.arange(m - n, m).double().reshape(1, 1, n, 1), torch.arange(m).double().reshape(1, 1, m, 1)
    at, seen = around_chunks(q, k, window, dilation)
    chunks = in_chunks(q, at)[0, 0, ..., 0]
    assert torch.equal(in_a_line(in_chunks(q, at), q), q)
    there = at >= m - n
    assert torch.equal(chunks[there], at[there].double()) and not chunks[~there].any()
    for line, queries in enumerate(at):
        for chunk, places in enumerate(queries):
            found = {i for i in seen[line, chunk].tolist() if i >= 0}
            wanted = {i + step * dilation for i in places.tolist() for step in range(-window, window + 1)}
            assert found <= set(range(m))
            assert {i for i in wanted if 0 <= i < m} <= found


def test_stabilised_sums_are_the_definition():
    q, k, log, v = double(2, 1, 7, 3), double(2, 1, 9, 3), double(2, 1, 9, 1), double(2, 1, 9, 2)
    found = stabilised_sums(q, k, 40 * log, v, 0.1, 4)
    for i in range(7):
        seen = slice(i + 3)  # the last query is where the last key is
        logs = 40 * log[:, :, seen]
        keys = k[:, :, seen] * (logs - logs.amax(dim=2, keepdim=True)).exp() + 0.1
        wanted = (q[:, :, i : i + 1] @ keys.mT @ v[:, :, seen])[:, :, 0]
        torch.testing.assert_close(found[:, :, i], wanted, rtol=0, atol=1e-12)


# Instead of a softmax, and the largest


def test_relu_over_how_many_may_be_attended_to():
    scores = torch.tensor([[3.0, -1, 6], [4, 2, -8]])
    assert masked_relu(scores).equal(torch.tensor([[1.0, 0, 2], [4 / 3, 2 / 3, 0]]))
    allowed = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_relu(scores, allowed).tolist() == [[1.5, 0, 0], [0, 0, 0]]


def test_the_largest_that_exists():
    t, there = torch.tensor([[-3.0, 5, -1], [4, 2, 6]]), torch.tensor([[True, False, True], [False] * 3])
    assert masked_max(t, None, 1).tolist() == [5, 6] and masked_max(t, None, 0).tolist() == [4, 5, 6]
    assert masked_max(t, there, 1).tolist() == [-1, 0]


# Windows that overlap


def test_windows_that_overlap_by_hand():
    image = torch.arange(1.0, 7).reshape(1, 1, 2, 3)
    assert unfolded(image, 2, 1)[0, :, 0].tolist() == [1, 2, 4, 5]
    assert unfolded(image, 3, 2).mT[0].tolist() == [[0, 0, 0, 0, 1, 2, 0, 4, 5], [0, 0, 0, 2, 3, 0, 5, 6, 0]]
    assert at_places(image, (2, 3), 3, 2).equal(unfolded(image, 3, 2)[0].mT.long())
    ones = torch.ones(1, 9, 2)  # of windows 3 × 3 around the first and third token
    assert folded(ones, (2, 3), 3, 2)[0, 0].tolist() == [[1, 2, 1], [1, 2, 1]]


@pytest.mark.parametrize("grid,side,stride", [((4, 5), 3, 1), ((5, 4), 4, 2), ((1, 1), 3, 3), ((6, 7), 1, 1)])
def test_folded_is_the_transpose_of_unfolded(grid, side, stride):
    image = double(2, 3, *grid)
    cut = unfolded(image, side, stride)
    more = double(*cut.shape)
    (gradient,) = torch.autograd.grad((cut * more).sum(), image)
    torch.testing.assert_close(folded(more, grid, side, stride), gradient)


def test_a_small_network_of_each_head():
    """One channel throughout: head 0 gives 3 relu(2 x - 1) + 4, head 1 -relu(-x), each of its own x or of one."""
    net = MLPByHead(2, 1, 1, 1)
    with torch.no_grad():
        net.first[:, 0, 0], net.first_bias[:, 0] = torch.tensor([2.0, -1]), torch.tensor([-1.0, 0])
        net.second[:, 0, 0], net.second_bias[:, 0] = torch.tensor([3.0, -1]), torch.tensor([4.0, 0])
    own = net(torch.tensor([2.0, 0, -5, 5]).reshape(1, 2, 2, 1))
    assert own.flatten(1).tolist() == [[13, 4, -5, 0]]
    assert net(torch.tensor([2.0, -5]).reshape(1, 1, 2, 1)).flatten(1).tolist() == [[13, 4, 0, -5]]


def test_a_small_network_starts_within_the_root_of_what_comes_in():
    net = MLPByHead(3, 4, 16, 5)
    for name, parameter in net.named_parameters():
        bound = 0.5 if "first" in name else 0.25
        assert 0.7 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize(
    "number,wanted", [(1, (1, 1)), (7, (1, 7)), (12, (3, 4)), (64, (8, 8)), (192, (12, 16))]
)
def test_the_two_factors_that_are_nearest(number, wanted):
    assert nearest_factors(number) == wanted


# Windows


def places(grid, sides):
    """Window by window, row by row, the number of the token at each place; -1 where there is none."""
    (y, x), (i, j) = grid, sides
    corners = [(r, c) for r in range(0, y, i) for c in range(0, x, j)]
    spots = [[(r + k // j, c + k % j) for k in range(i * j)] for r, c in corners]
    return torch.tensor([[r * x + c if r < y and c < x else -1 for r, c in window] for window in spots])


CUTS = [((4, 6), (2, 3)), ((5, 7), (2, 3)), ((1, 1), (1, 1)), ((1, 1), (3, 2)), ((2, 5), (4, 4)), ((6, 4), (1, 4)), ((3, 8), (8, 3))]  # fmt: skip


@pytest.mark.parametrize("grid,sides", CUTS)
@pytest.mark.parametrize("before", [(), (2,), (2, 3), (1, 2, 3)])
def test_windows_hold_each_token_once_and_zeros(grid, sides, before):
    x, at = double(*before, math.prod(grid), 4), places(grid, sides)
    cut = windows(x, grid, sides)
    assert cut.shape == (*before, *at.shape, 4)
    filled = torch.cat([x, torch.zeros_like(x[..., :1, :])], dim=-2)
    assert torch.equal(cut, filled[..., at.flatten(), :].unflatten(-2, at.shape))  # the last one, -1, is zero
    there = torch.ones(*before, math.prod(grid), dtype=torch.bool)
    assert torch.equal(windows(there[..., None], grid, sides)[..., 0], (at >= 0).expand(*before, *at.shape))
    assert torch.equal(unwindows(cut, grid, sides), x)
    more = double(*cut.shape)
    assert torch.equal(windows(unwindows(more, grid, sides), grid, sides), more * (at >= 0)[..., None])
    (gradient,) = torch.autograd.grad((cut * more).sum(), x)
    assert torch.equal(gradient, unwindows(more, grid, sides))


class Cut(torch.nn.Module):
    """Windows of 2 × 3, each token less its window's sum, and back."""

    def forward(self, x):
        cut = windows(x, (5, 7), (2, 3))
        return unwindows(cut - cut.sum(dim=-2, keepdim=True), (5, 7), (2, 3))


@pytest.mark.sample(2)
def test_windows_are_traced_compiled_and_exported():
    module, x, other = Cut(), torch.randn(2, 3, 35, 4), torch.randn(5, 3, 35, 4)
    traced = torch.fx.symbolic_trace(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(module, (x,), dynamic_shapes=(batch,)).module()
    for call in (traced, compiled, exported):
        assert torch.equal(call(x), module(x)) and torch.equal(call(other), module(other))


@pytest.mark.parametrize("sides", [(2, 3), (1, 1), (3, 3), (3, 1)])
def test_relative_bias_is_what_the_table_holds_for_the_way(sides):
    table, (i, j) = double(2, 5, 7), sides  # of windows of 3 × 4 at most
    found = relative_bias(table, sides)
    assert found.shape == (2, i * j, i * j)
    for a in range(i * j):
        for b in range(i * j):
            assert torch.equal(found[:, a, b], table[:, a // j - b // j + 2, a % j - b % j + 3])


def test_patches_are_windows_around_the_edges_with_room_for_whole_chunks():
    """Three rows of two, by windows of 2 × 2 moved a row down and a column to the right; chunks of three: w = 6."""
    tokens = torch.arange(1.0, 7).reshape(1, 1, 6, 1)
    patches = Patches((3, 2), (2, 2), 3, True)
    cut = patches.cut(tokens)
    assert cut[0, 0, :, :, 0].tolist() == [[4, 3, 6, 5, 0, 0], [2, 1, 0, 0, 0, 0]]
    assert torch.equal(patches.join(cut), tokens)
    assert patches._replace(roll=False).cut(tokens)[0, 0, 0, :, 0].tolist() == [1, 2, 3, 4, 0, 0]


# Distances along a line


def test_distances_are_by_how_much_a_key_lies_before_a_query():
    q = torch.zeros(1, 1, 3, 2, dtype=torch.float64)
    assert distances(q).tolist() == [2, 1, 0, -1, -2]
    rows = 10 * torch.arange(3.0)[:, None] + distances(q)
    assert by_pair(rows[None, None])[0, 0].tolist() == [[0, -1, -2], [11, 10, 9], [22, 21, 20]]


@pytest.mark.parametrize("c", [3, 4])
def test_sinusoids_are_sines_then_cosines(c):
    """Of r and of r 10000^{-2/c}, for r = 1, 0, -1; of an odd width the last cosine is left out."""
    slow = 10_000.0 ** (-2 / c)
    wanted = [[math.sin(r), math.sin(r * slow), math.cos(r), math.cos(r * slow)][:c] for r in (1, 0, -1)]
    found = sinusoids(torch.zeros(1, 1, 2, 2, dtype=torch.float64), c)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)


# A line cut into stretches


def test_segments_are_as_long_as_each_other_or_one_longer():
    t = torch.tensor([1.0, 3, 5, 7, 9]).reshape(1, 1, 5, 1)
    assert segments(t, 2).int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]
    assert segment_means(t, 2).flatten().tolist() == [2, 7]
    assert segment_means(t[:, :, :4], 2).flatten().tolist() == [2, 6]
    assert torch.equal(segment_means(t, 9), t)  # each token is one
    share = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0.5, 0, 0.5]])[None, None]
    assert segment_means(t, 2, share).flatten().tolist() == [1, 7]


def test_a_line_reads_its_table_by_distance_and_the_longest_beyond():
    table = torch.tensor([[10.0], [20], [30], [40], [50]])  # of two to the left, ..., two to the right
    assert by_distance(table, 2)[..., 0].tolist() == [[30, 20], [40, 30]]
    assert by_distance(table, 4)[3, :, 0].tolist() == [50, 50, 40, 30]


def test_surroundings_are_what_lies_around_by_tap():
    """Of 1 2 3; 4 5 6: around the first, with zeros beyond the border or around the corner; and two steps away."""
    x = torch.arange(1.0, 7)[:, None]
    assert surroundings(x, (2, 3), 1)[0, 0].tolist() == [0, 0, 0, 0, 1, 2, 0, 4, 5]
    assert surroundings(x, (2, 3), 1)[4, 0].tolist() == [1, 2, 3, 4, 5, 6, 0, 0, 0]
    assert surroundings(x, (2, 3), 1, circular=True)[0, 0].tolist() == [6, 4, 5, 3, 1, 2, 6, 4, 5]
    assert surroundings(x, (2, 3), 1, 2)[0, 0].tolist() == [0, 0, 0, 0, 1, 3, 0, 0, 0]
    assert surroundings(x[None, None] > 3, (2, 3), 1).shape == (1, 1, 6, 1, 9)


def test_between_tokens_lie_their_means():
    """Two groups of one channel with points of their own: 1 3; 5 11 and 0 0; 0 8; beyond the border is the border."""
    x = torch.tensor([[1.0, 0], [3, 0], [5, 0], [11, 8]])[None]
    at = torch.tensor([[[0.5, 0], [0, 0.25], [9, 9]], [[0.5, 0.5], [1, 0.5], [0, 0]]])[None]
    found = sample_tokens(x, at, (2, 2))
    assert torch.allclose(found, torch.tensor([[3.0, 2], [1.5, 4], [11, 0]])[None])


def test_between_the_entries_of_a_table_lie_their_means():
    """A line of three; the table says 10 times how far a token lies behind a point, and 7 more for the second head."""
    table = torch.tensor([-20.0, -10, 0, 10, 20]) + torch.tensor([[0.0], [7]])
    at = torch.tensor([[0.0, 0], [0, 0.5]])[None, None]
    found = sample_bias(table[:, None], at, (1, 3))
    assert torch.allclose(found[0, 0], torch.tensor([[0.0, -5], [10, 5], [20, 15]]))
    assert torch.allclose(found[0, 1], found[0, 0] + 7)


def test_rows_are_picked_by_their_index():
    t, index = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[2, 0, 0, 1], [1, 1, 2, 0]])
    found = picked(t, index)
    assert found.shape == (2, 4, 2)
    assert found[..., 0].tolist() == [[4, 0, 0, 2], [8, 8, 10, 6]]


class Placed(torch.nn.Module):
    """Tokens and entries of a table, chosen by places."""

    def forward(self, tokens, table, at, index):
        near = sample_tokens(tokens, at, (2, 3)), sample_bias(table[:, None], at, (1, 3))
        return *near, by_distance(table.mT, 4), picked(tokens, index)


def test_what_places_choose_is_traced():
    traced = torch.fx.symbolic_trace(Placed())
    for b in (2, 3):
        given = torch.randn(b, 6, 4), torch.randn(2, 5), torch.rand(b, 2, 7, 2), torch.randint(6, (b, 5))
        for found, wanted in zip(traced(*given), Placed()(*given), strict=True):
            assert torch.equal(found, wanted)


# Associative memories


@pytest.mark.parametrize(
    "rule,wanted",
    [("hebb", [1.0, 2, 5.25]), ("delta", [1.0, 2, 5]), ("oja", [1.0, 2, 1])],
)
def test_what_is_recalled_of_keys_that_come_again(rule, wanted):
    """λ = ½: keys e₁, e₂, e₁ with values 1, 2, 5 are asked for as they come; Oja's has values of 1 throughout."""
    k = torch.eye(2).double()[[0, 1, 0]][None, None]
    v = torch.tensor([1.0, 2, 5] if rule != "oja" else [1.0, 1, 1]).double().reshape(1, 1, 3, 1)
    found = recalled(k, k, v, torch.ones(1, 1, 3).double(), 1.0, 0.5, rule, True)
    wanted = wanted if rule != "oja" else [1.0, 1, 1]
    assert torch.allclose(found.flatten(), torch.tensor(wanted).double())
    last = recalled(k[:, :, :2], k, v, torch.ones(1, 1, 3).double(), 1.0, 0.5, rule, False).flatten()
    second = {"hebb": 1.0, "delta": 1.0, "oja": 0.0}[rule]  # half of 2, or forgotten
    assert torch.allclose(last, torch.tensor([wanted[2], second]).double())


# Means and norms of those who exist


def test_those_who_exist_are_what_the_mask_says_or_all():
    x, keys = double(2, 3, 4), torch.tensor([[True, False, True], [False, True, True]])
    assert existing(x, Mask(keys=keys)) is keys
    assert torch.equal(existing(x, NO_MASK), torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("dim", [1, (1, 2)])
def test_masked_mean_is_the_mean_of_those_who_exist(dim, keepdim):
    t, there = double(3, 4, 5, 2), torch.rand(3, 4, 5, 1) < 0.5
    there[0] = False  # of nobody: zero
    axes = (dim,) if isinstance(dim, int) else dim
    found = masked_mean(t, there, dim, keepdim)
    wanted = t.new_zeros(found.shape).reshape(
        3, *(1 if axis in axes else t.shape[axis] for axis in (1, 2)), 2
    )
    for b, y, x, c in torch.cartesian_prod(*map(torch.arange, wanted.shape)).tolist():
        rows, columns = (range(4) if 1 in axes else [y], range(5) if 2 in axes else [x])
        held = [t[b, i, j, c].item() for i in rows for j in columns if there[b, i, j]]
        wanted[b, y, x, c] = math.fsum(held) / len(held) if held else 0.0
    torch.testing.assert_close(found, wanted.reshape(found.shape), rtol=0, atol=1e-14)
    assert torch.equal(masked_mean(t, None, dim, keepdim), t.mean(dim, keepdim=keepdim))
    with torch.no_grad():
        t[~there.expand(t.shape)] = math.nan
    (gradient,) = torch.autograd.grad(masked_mean(t, there, dim).sum(), t)
    assert not gradient[~there.expand(t.shape)].any() and gradient.isfinite().all()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_masked_group_norm_is_that_of_the_tokens_that_exist(groups):
    norm, x = torch.nn.GroupNorm(groups, 6).double(), double(3, 7, 6)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    there = torch.rand(3, 7) < 0.6
    there[:, :2], there[0] = True, False
    found = masked_group_norm(norm, x, there)
    for sample in (1, 2):
        wanted = norm(x[sample, there[sample]].mT[None])[0].mT
        torch.testing.assert_close(found[sample, there[sample]], wanted, rtol=0, atol=1e-12)
    assert found.isfinite().all()
    everyone = torch.ones_like(there)
    torch.testing.assert_close(masked_group_norm(norm, x, everyone), norm(x.mT).mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(masked_group_norm(norm, x), norm(x.mT).mT, rtol=0, atol=1e-12)
    other = torch.where(there[..., None], x, 100.0)
    assert torch.equal(masked_group_norm(norm, other, there)[there], found[there])
    one = masked_group_norm(norm, x[:1, :1])  # of one number: β, where PyTorch's layer refuses
    torch.testing.assert_close(one, masked_group_norm(norm, x[:1, :1], everyone[:1, :1]), rtol=0, atol=1e-12)
    half = masked_group_norm(norm.to(torch.bfloat16), x.to(torch.bfloat16), there)
    assert half.dtype == torch.bfloat16 and (half - found)[there].abs().max() < 0.1


# Softmax


def test_masked_softmax_is_softmax_over_the_allowed():
    scores, allowed = double(2, 3, 4, 5), torch.rand(2, 1, 4, 5) < 0.6
    found = masked_softmax(scores, allowed)
    for index in torch.cartesian_prod(*map(torch.arange, (2, 3, 4))).tolist():
        keep = allowed[index[0], 0, index[2]]
        row = torch.zeros(5, dtype=torch.float64)
        row[keep] = scores[tuple(index)][keep].softmax(-1) if keep.any() else row[keep]
        torch.testing.assert_close(found[tuple(index)], row, rtol=0, atol=1e-14)
    assert torch.equal(masked_softmax(scores), scores.softmax(-1))
    assert torch.equal(masked_softmax(scores, torch.ones(5, dtype=torch.bool)), scores.softmax(-1))


def test_an_empty_row_gives_zeros_and_zero_gradient():
    scores = double(2, 3)
    allowed = torch.tensor([[False, False, False], [True, True, False]])
    found = masked_softmax(scores, allowed)
    assert torch.equal(found[0], torch.zeros(3, dtype=torch.float64)) and found[1].sum() == 1
    (found * torch.randn(2, 3)).sum().backward()
    assert torch.equal(scores.grad[0], torch.zeros(3, dtype=torch.float64))
    assert scores.grad[1, 2] == 0 and scores.grad[1, :2].abs().min() > 0


def test_an_empty_row_makes_no_nan_on_the_way():
    scores = double(1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that looking for anomalies is slow
        anomaly = torch.autograd.detect_anomaly()
    with anomaly:
        masked_softmax(scores, torch.zeros(1, 3, dtype=torch.bool)).sum().backward()
    assert not scores.grad.any()


def test_masked_softmax_has_the_right_gradient():
    allowed = torch.tensor(
        [[False, False, False, False], [True, False, True, True], [False, True, False, False]]
    )
    assert gradcheck(lambda s: masked_softmax(s, allowed), double(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_masked_softmax_survives_large_scores(dtype):
    top = torch.finfo(dtype).max
    found = masked_softmax(torch.tensor([[top, -top, 0.0]], dtype=dtype), torch.tensor([[True, True, False]]))
    assert found.tolist() == [[1, 0, 0]] and found.dtype == dtype
    hidden = masked_softmax(
        torch.tensor([[top, -top, 0.0]], dtype=dtype), torch.tensor([[False, True, True]])
    )
    assert hidden.tolist() == [[0, 0, 1]]


def test_what_is_hidden_does_not_matter():
    scores = torch.tensor([[1.0, float("inf"), float("nan"), 2.0]], dtype=torch.float64)
    allowed = torch.tensor([[True, False, False, True]])
    wanted = torch.tensor([[1.0, 2.0]], dtype=torch.float64).softmax(-1)
    found = masked_softmax(scores, allowed)
    assert torch.equal(found[:, [0, 3]], wanted) and torch.equal(
        found[:, 1:3], torch.zeros(1, 2, dtype=torch.float64)
    )


def softmax_head(tokens: int = 3, heads: int = 1, attn_drop: float = 0.0) -> Softmax:
    """A component with taps for scores and weights."""
    return Softmax(Site("here", heads * 4, heads, Layout((tokens,)), attn_drop=attn_drop))


def test_dropout_falls_on_the_weights_after_the_tap():
    seen, dropped = [], softmax_head(50, attn_drop=0.5)
    dropped.weights.register_forward_hook(lambda _module, _args, out: seen.append(out))
    scores, v = torch.zeros(1, 1, 400, 50), torch.ones(1, 1, 50, 1)
    out = attention_from_scores(dropped, scores, v, None)
    torch.testing.assert_close(seen[0], torch.full((1, 1, 400, 50), 1 / 50))
    assert 0.95 < out.mean() < 1.05 and out.std() > 0.05
    assert torch.equal(attention_from_scores(dropped.eval(), scores, v, None), seen[0] @ v)


@pytest.mark.parametrize("kinds", [(), ("keys",), ("causal",), ("pairs",), ("keys", "causal", "pairs")])
@pytest.mark.parametrize("n,m", [(5, 5), (3, 5), (5, 3)])
def test_both_paths_of_dot_product_attention_agree(kinds, n, m):
    q, k, v = double(2, 3, n, 4), double(2, 3, m, 4), double(2, 3, m, 4)
    mask = Mask(
        keys=torch.rand(2, m) < 0.5 if "keys" in kinds else None,
        pairs=torch.rand(2, 1, n, m) < 0.5 if "pairs" in kinds else None,
        causal="causal" in kinds,
    )
    watched = softmax_head(m, 3)
    watched.weights.register_forward_hook(lambda *_: None)
    outs, gradients = [], []
    for component in (softmax_head(m, 3), watched):
        out = dot_product_attention(component, q, k, v, mask)
        outs.append(out)
        gradients.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
        assert out.isfinite().all() and all(g.isfinite().all() for g in gradients[-1])
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-12)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_dot_product_attention_of_nothing_to_attend_to_is_zero():
    q, k, v = double(2, 1, 3, 4), double(2, 1, 3, 4), double(2, 1, 3, 4)
    keys = torch.tensor([[True, True, True], [False, False, False]])
    out = dot_product_attention(softmax_head(), q, k, v, Mask(keys=keys))
    assert not out[1].any() and out[0].all()
    out.sum().backward()
    assert not q.grad[1].any() and not v.grad[1].any() and v.grad[0].any()
    assert dot_product_attention(softmax_head(), q, k, v, NO_MASK).all()


def test_multi_head_attention_is_that_of_each_head_side_by_side():
    q, k, v = double(2, 3, 8), double(2, 5, 8), double(2, 5, 8)
    mask = Mask(keys=torch.rand(2, 5) < 0.5)
    out = multi_head_attention(softmax_head(5, 2), q, k, v, mask)
    for h, own in enumerate((slice(0, 4), slice(4, 8))):
        one = dot_product_attention(softmax_head(5), *(t[:, None, :, own] for t in (q, k, v)), mask)
        torch.testing.assert_close(out[..., own], one[:, 0], rtol=0, atol=1e-12, msg=f"head {h}")


# Additive scores


def naive(q, k, weight):
    """wᵀ tanh(q_i + k_j), with the (n, m, a) tensor."""
    return torch.einsum("bhnma,ha->bhnm", torch.tanh(q[:, :, :, None] + k[:, :, None]), weight)


SIZES = [1, 2, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 2 * ROWS + 3]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("m", [1, 5])
def test_additive_scores_are_the_definition(n, m):
    q, k, weight = double(2, 3, n, 4), double(2, 3, m, 4), double(3, 4)
    found, wanted = additive_scores(q, k, weight), naive(q, k, weight)
    assert found.shape == (2, 3, n, m)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    out = torch.randn(found.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((form * out).sum(), (q, k, weight)) for form in (found, wanted)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(additive_scores(q, k, weight), found)


@pytest.mark.parametrize("tile", [1, 4, 5 * 4 - 1, 5 * 4, 2 * 5 * 4 + 1, 7 * 5 * 4, 3 * 7 * 5 * 4 + 2, 10**6])
def test_additive_scores_in_tiles_of_any_size(tile, monkeypatch):
    """Tiles of some columns, some rows, some samples, with a rest of each."""
    monkeypatch.setattr("attnzoo.functional.additive.TILE", tile)
    test_additive_scores_are_the_definition(7, 5)


def test_additive_scores_have_the_right_gradient():
    assert gradcheck(additive_scores, (double(1, 2, 3, 2), double(1, 2, 4, 2), double(2, 2)))
    assert gradcheck(additive_scores, (double(1, 1, ROWS + 1, 1), double(1, 1, 2, 1), double(1, 1)))
    assert gradgradcheck(additive_scores, (double(1, 2, 3, 2), double(1, 2, 4, 2), double(2, 2)))
    assert gradgradcheck(additive_scores, (double(1, 1, ROWS + 1, 1), double(1, 1, 2, 1), double(1, 1)))


def test_a_frozen_weight_needs_no_gradient():
    q, k, weight = double(1, 2, 3, 2), double(1, 2, 4, 2), double(2, 2)
    frozen = partial(additive_scores, weight=weight.detach())
    assert gradgradcheck(frozen, (q, k))
    both = torch.autograd.grad(frozen(q, k).sum(), (q, k))
    for one, two in zip(both, torch.autograd.grad(naive(q, k, weight).sum(), (q, k)), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_additive_scores_compiled(size):
    """In one graph, for values of any size, with gradients, without, and checkpointed."""
    torch._dynamo.reset()
    compiled = torch.compile(additive_scores, backend="aot_eager", fullgraph=True)
    q, k, weight = (size * double(2, 3, 5, 4)).detach(), (size * double(2, 3, 7, 4)).detach(), double(3, 4)
    wanted = naive(q, k, weight)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, weight), wanted, rtol=0, atol=1e-13)
    (slope,) = torch.autograd.grad(wanted.square().sum(), weight)
    for form in (
        compiled,
        torch.compile(partial(checkpoint, additive_scores, use_reentrant=False), backend="aot_eager"),
    ):
        found = form(q, k, weight)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
        torch.testing.assert_close(
            torch.autograd.grad(found.square().sum(), weight)[0], slope, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_additive_scores_in_narrow_numbers(dtype, tolerance):
    q, k, weight = (
        t.detach().to(dtype) for t in (double(2, 2, 20, 8) * 3, double(2, 2, 7, 8) * 3, double(2, 8))
    )
    found = additive_scores(q, k, weight)
    assert found.dtype == dtype
    wanted = naive(q.double(), k.double(), weight.double())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [19.0, 100.0, 1e4])
def test_additive_scores_saturate_and_stay_finite(dtype, size):
    q = torch.tensor([size, -size, 0.0], dtype=dtype).reshape(1, 1, 3, 1).requires_grad_()
    k = torch.tensor([size, -size, 0.0], dtype=dtype).reshape(1, 1, 3, 1).requires_grad_()
    found = additive_scores(q, k, torch.ones(1, 1, dtype=dtype))
    wanted = [[1.0, 0, 1], [0, -1, -1], [1, -1, 0]]
    torch.testing.assert_close(
        found[0, 0].detach().double(), torch.tensor(wanted).double(), rtol=0, atol=1e-6
    )
    found.sum().backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()


def test_additive_scores_are_exact_up_to_the_limit():
    for dtype, limit in LIMIT.items():
        values = torch.linspace(-limit, limit, 41, dtype=torch.float64).to(dtype)
        q, k = values.reshape(1, 1, -1, 1), values.flip(0).add(0.25).clamp(-limit, limit).reshape(1, 1, -1, 1)
        wanted = torch.tanh(q.double() + k.double().mT)
        found = additive_scores(q, k, torch.ones(1, 1, dtype=dtype))
        torch.testing.assert_close(found[0, 0].double(), wanted[0, 0], rtol=0, atol=3e-6 if dtype == torch.float32 else 1e-12)  # fmt: skip


SIZES_OF_VALUES = [0.0, 1e-8, 1e-3, 1.0, 19.0, 20.0, 21.0, 40.0, 88.0, 169.0, 171.0, 355.0, 710.0, 1e4]
SIGNED = [sign * size for size in SIZES_OF_VALUES for sign in (1, -1)]


def by_hand(q, k, weight, weights_of_sum):
    """wᵀ tanh(q_i + k_j) in float64, and the gradients of its weighted sum by q, k and w, each with what its terms weigh.

    Of one head of one sample: (n a), (m a), (a), (n m).
    """
    x = q[:, None] + k  # (n m a)
    slope = (2 * (-x.abs()).exp() / (1 + (-2 * x.abs()).exp())) ** 2  # 1 / cosh²
    terms = weight * weights_of_sum[..., None] * slope
    sums = [(weight * x.tanh(), -1), (terms, 1), (terms, 0), (weights_of_sum[..., None] * x.tanh(), (0, 1))]
    return [(each.sum(dim), each.abs().sum(dim).max()) for each, dim in sums]


@pytest.mark.parametrize(
    "dtype,tolerance",
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("largest", [1.0, 19.0, 20.0, 40.0, 169.0, 1e4])
def test_additive_scores_are_exact_whatever_the_signs_and_sizes(dtype, tolerance, largest):
    values = torch.tensor([value for value in SIGNED if abs(value) <= largest], dtype=dtype)
    opposite = -values * (1 + 2.0**-6)  # sums near zero of numbers that are not
    q = torch.stack([values, values.flip(0)], dim=-1)[None, None].requires_grad_()
    k = torch.stack([values, opposite], dim=-1)[None, None].requires_grad_()
    weight = torch.tensor([[0.75, -0.5]], dtype=dtype, requires_grad=True)
    found = additive_scores(q, k, weight)
    positions = torch.arange(len(values), dtype=torch.float64)
    weights = (positions[:, None] - 2 * positions).cos()
    gradients = torch.autograd.grad((found[0, 0].double() * weights).sum(), (q, k, weight))
    wanted = by_hand(*(t.detach().double() for t in (q[0, 0], k[0, 0], weight[0])), weights)
    for one, (two, scale) in zip([found, *gradients], wanted, strict=True):
        torch.testing.assert_close(
            one.double(), two.reshape(one.shape), rtol=0, atol=tolerance * float(scale)
        )


def test_additive_scores_of_far_apart_signs_that_nearly_cancel():
    for dtype, size in ((torch.float32, 21.0), (torch.float64, 171.0), (torch.float16, 21.0)):
        q, k = (torch.full((1, 1, 1, 1), value, dtype=dtype) for value in (size, 1 - size))
        found = additive_scores(q, k, torch.ones(1, 1, dtype=dtype)).item()
        assert found == pytest.approx(math.tanh(1), rel=1e-3 if dtype == torch.float16 else 1e-6)


torch.fx.wrap("additive_scores")  # which wraps a name of the module that says so


class Scores(torch.nn.Module):
    """Additive scores as a module, for exporting and tracing."""

    def forward(self, q, k, weight):
        return additive_scores(q, k, weight)


GRAPHS = {
    "compile": lambda given: torch.compile(Scores(), fullgraph=True, backend="aot_eager"),
    "export": lambda given: torch.export.export(
        Scores(), given, dynamic_shapes=({0: torch.export.Dim("b")}, {0: torch.export.Dim("b")}, None)
    ).module(),
    "fx": lambda given: torch.fx.symbolic_trace(Scores()),
    "make_fx": lambda given: make_fx(Scores(), tracing_mode="fake")(*given),
}


@pytest.mark.parametrize("made", GRAPHS)
def test_a_graph_of_additive_scores_holds_for_small_and_large_values(made):
    q, k, weight = (t.detach() for t in (double(2, 1, 3, 4), double(2, 1, 5, 4), double(1, 4)))
    graph = GRAPHS[made]((q, k, weight))  # made from small values
    for q_of, k_of in ((q, k), (1e3 * q, -1e3 * k), (q + 200, k - 200)):
        wanted = naive(q_of, k_of, weight)
        torch.testing.assert_close(graph(q_of, k_of, weight), wanted, rtol=0, atol=1e-12)
    if made in ("compile", "export", "fx"):
        q, k = double(3, 1, 3, 4), double(3, 1, 5, 4)
        torch.testing.assert_close(graph(q, k, weight), naive(q, k, weight), rtol=0, atol=1e-12)


def test_additive_scores_without_values_keep_their_shape():
    q, k, weight = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5), torch.randn(3, 5)
    assert additive_scores(*(t.to("meta") for t in (q, k, weight))).shape == (2, 3, 4, 6)
    assert additive_scores(q[:, :, :0], k, weight).shape == (2, 3, 0, 6)
    assert additive_scores(q, k[:, :, :0], weight).shape == (2, 3, 4, 0)
    each = torch.func.vmap(lambda q, k: additive_scores(q[None], k[None], weight)[0])(q, k)
    torch.testing.assert_close(each, additive_scores(q, k, weight))


def test_additive_scores_of_a_nan_are_nan():
    q = torch.tensor([0.0, float("nan")]).reshape(1, 1, 2, 1)
    found = additive_scores(q, torch.zeros(1, 1, 1, 1), torch.ones(1, 1))
    assert found[0, 0, 0].item() == 0 and found[0, 0, 1].isnan()


def peak(run) -> int:
    """The most memory that was taken at a time while something ran, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("training", [False, True])
def test_additive_scores_never_hold_all_pairs_of_all_channels(training):
    n, a = 512, 16
    q, k, weight = (t.requires_grad_(training) for t in (torch.randn(1, 1, n, a), torch.randn(1, 1, n, a), torch.randn(1, a)))  # fmt: skip

    def run(form):
        out = form(q, k, weight)
        if training:
            out.sum().backward()

    whole = 4 * n * n * a  # bytes of the (n, m, a) tensor
    small, large = peak(lambda: run(additive_scores)), peak(lambda: run(naive))
    assert large >= whole  # the measurement sees such a tensor
    assert small < whole / 3 and small < large / 3, (small, large, whole)


def test_notation_is_one_node_of_a_traced_graph():
    """What stands for a tensor in symbolic tracing has no shape to look at: the graph calls the notation when it runs."""
    from attnzoo.functional import einsum, rearrange

    def heads(x, y):
        x = rearrange(x, "b n (h d) -> b h n d", h=2)
        return einsum(x, y, "b h n d, b m d -> b h n m")

    graph = torch.fx.symbolic_trace(heads)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [rearrange, einsum]
    for n in (3, 5):
        x, y = torch.randn(2, n, 6), torch.randn(2, 4, 3)
        torch.testing.assert_close(graph(x, y), heads(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_additive_scores_of_small_entries_go_by_exponentials(dtype):
    """The quick way is taken where it is exact, and nowhere else."""
    small, most = torch.ones(1, 1, 2, 3, dtype=dtype), LIMIT[dtype]
    assert _is_small(small, -small) and _is_small(most * small, -most * small)
    for other in (1.01 * most, -1.01 * most, float("inf"), float("nan")):
        assert not _is_small(small, other * small) and not _is_small(other * small, small)
    assert not _is_small(small.to("meta"), small.to("meta")) and not _is_small(small[:, :, :0], small)
