"""Block and grid attention, arXiv:2204.01697, §3.1-3.2."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, patched, seen, set_all, spread, wrong
from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl

from attnzoo.core import Layout, Mask, Site
from attnzoo.functional import merge_heads, relative_bias
from attnzoo.functional.groups import attend_in_groups
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.local.block_grid import BlockGrid, evenly
from attnzoo.testing import against


def linear(layer, x):
    """x Wᵀ + b."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def place_in(at, side, size, strided):
    """Which group a row or a column belongs to, and which of its rows it is there."""
    if strided:
        step = math.ceil(side / size)  # rows at, at + step, ... are of one group
        return at % step, at // step
    return at // size, at % size


def attended(x, layer, table, size, strided, layout, allowed, heads):
    """Query by query: the tokens of its group by their places, and the special ones; special queries see all."""
    (b, n, c), p, (rows, columns) = x.shape, layout.prefix, layout.grid
    middle = [] if table is None else [of // 2 for of in table.shape[1:]]
    d, qkv, out = c // heads, linear(layer, x), torch.zeros_like(x)
    where = [divmod(i, columns) for i in range(n - p)]
    where = [
        (place_in(y, rows, size[0], strided), place_in(x_, columns, size[1], strided)) for y, x_ in where
    ]
    for s, h, i in itertools.product(range(b), range(heads), range(n)):
        mine = slice(h * d, (h + 1) * d)
        q, k, v = (part[:, mine] for part in qkv[s].chunk(3, -1))
        keys, bias = [], []
        for j in range(n):
            if not allowed[s, h, i, j]:
                continue
            if min(i, j) < p:
                keys.append(j), bias.append(torch.zeros(()).double())
                continue
            (y, x_), (y_, x__) = where[i - p], where[j - p]
            if y[0] == y_[0] and x_[0] == x__[0]:
                keys.append(j)
                bias.append(
                    torch.zeros(()).double()
                    if table is None
                    else table[h, middle[0] + y[1] - y_[1], middle[1] + x_[1] - x__[1]]
                )
        if keys:
            out[s, i, mine] = (k[keys] @ q[i] / math.sqrt(d) + torch.stack(bias)).softmax(0) @ v[keys]
    return out


@against(BlockGrid, examples=12)
def test_oracle(component, x, layout, allowed):
    """Blocks, then grids of what they added to, norm by norm."""
    heads, (blocks, grids) = component.heads, component.sides
    near_ = attended(x, component.qkv_blocks, component.bias_blocks, blocks, False, layout, allowed, heads)
    near_ = linear(component.proj_blocks, near_)
    state = x + near_
    mean = state.mean(-1, keepdim=True)
    off = state - mean
    state = off / (off.square().mean(-1, keepdim=True) + component.norm.eps).sqrt()
    state = state * component.norm.weight + component.norm.bias
    far = attended(state, component.qkv, component.bias, grids, True, layout, allowed, heads)
    return near_ + linear(component.proj, far)


def told(change):
    """Block and grid attention with what an attention is told changed: qkv, table, groups, mask, p."""

    def _attend(self, qkv, table, groups, mask, p):
        return BlockGrid._attend(self, *change(qkv, table, groups, mask), p)

    return wrong(BlockGrid, _attend=_attend)


MUTANTS = {
    "blocks twice": told(lambda qkv, table, groups, mask: (qkv, table, groups._replace(strided=False), mask)),
    "grids twice": told(lambda qkv, table, groups, mask: (qkv, table, groups._replace(strided=True), mask)),
    "no tables": told(lambda qkv, table, groups, mask: (qkv, None, groups, mask)),
    "the way from query to key": patched(
        BlockGrid, "relative_bias", lambda table, sides: relative_bias(table, sides).mT
    ),
    "the mask ignored": told(lambda qkv, table, groups, mask: (qkv, table, groups, Mask())),
    "the mask of blocks alone": told(
        lambda qkv, table, groups, mask: (qkv, table, groups, Mask() if groups.strided else mask)
    ),
    "not causal": told(lambda qkv, table, groups, mask: (qkv, table, groups, replace(mask, causal=False))),
    "no scale": patched(
        BlockGrid, "attend_in_groups", lambda q, *more, **how: attend_in_groups(q * q.shape[-1] ** 0.5, *more, **how)
    ),
    "q for k": patched(
        BlockGrid, "attend_in_groups", lambda q, k, *more, **how: attend_in_groups(k, q, *more, **how)
    ),
    "grids do not read what blocks gave": wrong(
        BlockGrid,
        mix=lambda self, x, source, *, mask, layout: BlockGrid.mix(self, x, source, mask=mask, layout=layout)
        - self.proj(self._attend(self.qkv(self.norm(x + 0 * x)), self.bias, self._groups(layout)[1], mask, layout.prefix)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def both(layout, dim=8, heads=2, **options) -> BlockGrid:
    """In float64, with parameters of a size that matters."""
    return spread(BlockGrid(Site("hand", dim, heads, layout), **options), 0.5)


def near_alone(part):
    """Grids give nothing."""
    torch.nn.init.zeros_(part.proj.weight), torch.nn.init.zeros_(part.proj.bias)
    return part


def far_alone(part):
    """Blocks give nothing."""
    torch.nn.init.zeros_(part.proj_blocks.weight), torch.nn.init.zeros_(part.proj_blocks.bias)
    return part


def reads(part, layout, at):
    """Which tokens the output at a place depends on, as rows and columns."""
    x = normal(1, layout.length, 8).requires_grad_()
    part(x, layout=layout)[:, at].sum().backward()
    felt = x.grad.abs().sum((0, 2)).reshape(layout.grid) > 0
    return felt.any(1).nonzero().flatten().tolist(), felt.any(0).nonzero().flatten().tolist(), int(felt.sum())


# By hand


def test_hand_who_reads_whom_on_eight_by_eight():
    """G = 4: the first grid is rows and columns 0, 2, 4, 6; P = 4: the first block is rows and columns 0 to 3."""
    layout = Layout((8, 8))
    assert reads(near_alone(both(layout, block=4, across=4)), layout, 0) == ([0, 1, 2, 3], [0, 1, 2, 3], 16)
    assert reads(far_alone(both(layout, block=4, across=4)), layout, 0) == ([0, 2, 4, 6], [0, 2, 4, 6], 16)
    assert reads(both(layout, block=4, across=4), layout, 0)[2] == 64  # together they read all


def test_hand_a_row_of_five_in_grids_of_two():
    """Every third column: 0 and 3, 1 and 4, 2 alone. Blocks give nothing, q = 0, norm of one channel is its bias."""
    layout = Layout((1, 5))
    part = set_all(BlockGrid(Site("hand", 2, 1, layout), block=2, across=2, bias=False), 0.0)
    with torch.no_grad():
        part.norm.weight.fill_(1.0)
        part.qkv.weight[4:].copy_(torch.eye(2)), part.proj.weight.copy_(torch.eye(2))
    sign = torch.tensor([1.0, 1, -1, -1, 1]).double()
    x = torch.stack([sign, -sign], -1)[None]  # what norm leaves as it is, but for ε
    near(part(x, layout=layout)[0, :, 0] * (1 + 1e-5) ** 0.5, [0, 1, -1, 0, 1])


def test_hand_parameters():
    c, h = 8, 2
    part = BlockGrid(Site("hand", c, h, Layout((8, 8))), block=3, across=4)
    assert count(part) == 2 * (4 * c * c + 4 * c) + 2 * c + h * (5 * 5 + 7 * 7)


@pytest.mark.parametrize(
    "side,most,wanted", [(8, 7, 4), (8, 4, 4), (5, 2, 2), (14, 7, 7), (3, 7, 3), (9, 4, 3), (1, 1, 1)]
)
def test_hand_how_many_rows_a_grid_takes(side, most, wanted):
    assert evenly(side, most) == wanted
    part = BlockGrid(Site("hand", 2, 1, Layout((side, 6))), block=most, across=most)
    assert part.bias.shape == (1, 2 * wanted - 1, 2 * evenly(6, most) - 1)
    assert part.bias_blocks.shape[1] == 2 * min(side, most) - 1


# Identities


def test_identity_one_block_and_one_grid_are_softmax_of_all():
    layout, x = Layout((3, 4), 1), normal(2, 13, 8)
    part, soft = both(layout, block=4, across=4, bias=False), Softmax(Site("hand", 8, 2, layout))

    def full(qkv, mask):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in qkv.chunk(3, -1))
        return merge_heads(soft(q, k, v, mask=mask, layout=layout))

    for mask in (Mask(), Mask(causal=True), Mask(keys=torch.rand(2, 13) < 0.6)):
        near_ = part.proj_blocks(full(part.qkv_blocks(x), mask))
        wanted = near_ + part.proj(full(part.qkv(part.norm(x + near_)), mask))
        near(part(x, mask=mask, layout=layout), wanted)


def test_identity_a_grid_as_large_as_the_map_is_a_block_as_large_as_the_map():
    layout, x = Layout((4, 4)), normal(1, 16, 8)
    part = both(layout, block=4, across=4)
    blocks, grids = part._groups(layout)
    qkv = part.qkv(x)
    near(part._attend(qkv, part.bias, blocks, Mask(), 0), part._attend(qkv, part.bias, grids, Mask(), 0))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("grid,sides", [((8, 8), (4, 4)), ((5, 7), (3, 2)), ((2, 9), (2, 4))])
def test_identity_joining_undoes_cutting(grid, sides, strided):
    from attnzoo.functional.groups import Groups

    groups, t = Groups(grid, sides, strided=strided), normal(2, math.prod(grid), 3)
    near(groups.join(groups.cut(t)), t)
    first = groups.cut(torch.arange(1, 1 + math.prod(grid))[:, None])[0, :, 0]
    step = (math.ceil(grid[0] / sides[0]), math.ceil(grid[1] / sides[1])) if strided else (1, 1)
    wanted = [
        1 + i * step[0] * grid[1] + j * step[1] if i * step[0] < grid[0] and j * step[1] < grid[1] else 0
        for i in range(sides[0])
        for j in range(sides[1])
    ]
    assert first.tolist() == wanted


@pytest.mark.parametrize("kind", ["block", "grid"])
@pytest.mark.parametrize("grid", [(8, 8), (4, 12)])
def test_identity_timms_partition_attention(kind, grid):
    layout, x = Layout(grid), normal(2, math.prod(grid), 8)
    cfg = MaxxVitTransformerCfg(
        dim_head=4, window_size=(4, 4), grid_size=(4, 4), rel_pos_type="bias", head_first=False
    )
    timms = PartitionAttentionCl(8, kind, cfg).double().eval()
    part = both(layout, block=4, across=4)
    qkv, proj, table = (
        (part.qkv_blocks, part.proj_blocks, part.bias_blocks)
        if kind == "block"
        else (part.qkv, part.proj, part.bias)
    )
    timms.attn.load_state_dict(
        {
            **{f"qkv.{name}": t for name, t in qkv.state_dict().items()},
            **{f"proj.{name}": t for name, t in proj.state_dict().items()},
            "rel_pos.relative_position_bias_table": table.detach().flatten(1).mT,
        },
        strict=False,
    )
    groups = part._groups(layout)[kind == "grid"]
    ours = proj(part._attend(qkv(x), table, groups, Mask(), 0))
    near(ours.unflatten(1, grid), timms._partition_attn(x.unflatten(1, grid)))


def test_identity_a_map_that_is_filled_up_is_a_larger_one_under_a_mask():
    small, large, x = Layout((5, 5)), Layout((6, 6)), normal(2, 6, 6, 8)
    part, keys = both(small, block=3, across=3), torch.zeros(6, 6, dtype=torch.bool)
    keys[:5, :5] = True
    whole = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten().expand(2, -1)), layout=large)
    near(part(x[:, :5, :5].flatten(1, 2), layout=small), whole.unflatten(1, (6, 6))[:, :5, :5].flatten(1, 2))


def test_no_pairs_are_formed():
    layout = Layout((9, 12), 1)
    part, x = both(layout, block=3, across=2), normal(1, 109, 8)
    assert seen(part, x, layout=layout, tap="weights_blocks").shape == (1, 2, 108, 1 + 9)
    assert seen(part, x, layout=layout).shape == (1, 2, 108, 1 + 4)


def test_dropout_drops_weights_of_special_tokens_too():
    layout, x = Layout((2, 3), 1), normal(1, 7, 8)
    part = BlockGrid(Site("hand", 8, 2, layout, attn_drop=0.5)).double()
    assert (part.train()(x, layout=layout) - part.eval()(x, layout=layout))[:, 0].abs().max() > 1e-3


def test_narrow_numbers_stay_near():
    narrow(BlockGrid, [(2, 13, 12)], site=Site("hand", 12, 3, Layout((3, 4), 1)), block=2, across=2)
