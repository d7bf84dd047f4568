"""Halo attention, arXiv:2103.12731, §2.2."""

import itertools
import math

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, set_all, spread, wrong
from timm.layers.halo_attn import HaloAttn
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, Site
from attnzoo.functional import merge_heads
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.local import halo as module
from attnzoo.mechanisms.local.halo import Halo
from attnzoo.testing import against


def one_by_one(conv, x):
    """A 1 × 1 convolution of tokens (n c)."""
    return x @ conv.weight[:, :, 0, 0].T + (0 if conv.bias is None else conv.bias)


@against(Halo, examples=25)
def test_oracle(component, options, x, layout, allowed):
    """Query by query: its block, the window around that, each place of the window by its distance from the query."""
    (b, n, c), p, (rows, columns), heads = x.shape, layout.prefix, layout.grid, component.heads
    side, halo, d, layers = options["block"], options["halo"], c // heads, component.layers
    middle = side - 1 + halo  # the row of the tables for a distance of 0
    of_y, of_x = layers.pos_embed.height_rel, layers.pos_embed.width_rel
    scale = 1 / math.sqrt(d)
    out = torch.zeros_like(x)
    for s in range(b):
        q, kv = one_by_one(layers.q, x[s]), F.pad(one_by_one(layers.kv, x[s]), (0, 0, 0, 1))  # the last is 0
        for h, i in itertools.product(range(heads), range(n)):
            query = q[i, h * d : (h + 1) * d]
            k, v = kv[:, 2 * h * d : (2 * h + 1) * d], kv[:, (2 * h + 1) * d : (2 * h + 2) * d]
            special = [j for j in range(p if i >= p else n) if allowed[s, h, i, j]]
            window = []  # a key, and its distances
            if i >= p:
                y, x_ = divmod(i - p, columns)
                for at_y in range(y // side * side - halo, y // side * side + side + halo):
                    for at_x in range(x_ // side * side - halo, x_ // side * side + side + halo):
                        j = p + at_y * columns + at_x
                        if not (0 <= at_y < rows and 0 <= at_x < columns):
                            if options["padding"] == "zeros":
                                window.append((n, at_y - y, at_x - x_))
                        elif allowed[s, h, i, j]:
                            window.append((j, at_y - y, at_x - x_))
            keys = [*special, *(j for j, _, _ in window)]
            if keys:
                bias = (of_y @ query)[[middle + dy for _, dy, _ in window]]
                bias = bias + (of_x @ query)[[middle + dx for _, _, dx in window]]
                bias = bias * (scale if options["scale_bias"] else 1)
                scores = k[keys] @ query * scale + torch.cat([torch.zeros(len(special)).double(), bias])
                out[s, i, h * d : (h + 1) * d] = scores.softmax(0) @ v[keys]
    return out


def before(change):
    """Halo attention that is changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return Halo.mix(self, x, source, mask=mask, layout=layout)

    return wrong(Halo, mix=mix)


def by(name, change):
    """Halo attention with another function of the module in the place of one of its own."""

    def mix(self, x, source, *, mask, layout):
        own = getattr(module, name)
        setattr(module, name, lambda *args, **told: change(own, *args, **told))
        try:
            return Halo.mix(self, x, source, mask=mask, layout=layout)
        finally:
            setattr(module, name, own)

    return wrong(Halo, mix=mix)


def flip_tables(self):
    for table in (self.layers.pos_embed.height_rel, self.layers.pos_embed.width_rel):
        table.copy_(table.flip(0))


def swap_tables(self):
    tables = self.layers.pos_embed
    kept = tables.height_rel.clone()
    tables.height_rel.copy_(tables.width_rel), tables.width_rel.copy_(kept)


def swap_keys_and_values(self):
    for t in (self.layers.kv.weight, self.layers.kv.bias):
        if t is not None:
            halves = t.unflatten(0, (self.heads, 2, -1))
            t.copy_(halves.flip(1).reshape(t.shape))


MUTANTS = {
    "no scale": by("read_in_groups", lambda own, q, k, v, **how: own(q * q.shape[-1] ** 0.5, k, v, **how)),
    "distances from key to query": before(flip_tables),
    "rows for columns": before(swap_tables),
    "keys for values": before(swap_keys_and_values),
    "the bias scaled or not": before(
        lambda self: setattr(self.layers, "scale_pos_embed", not self.layers.scale_pos_embed)
    ),
    "the border the other way": before(lambda self: setattr(self, "zeros", not self.zeros)),
    "no halo": by(
        "around",
        lambda own, x, layout, block, halo: torch.where(
            torch.cat([torch.ones(1, layout.prefix), F.pad(torch.ones(1, block, block), [halo] * 4).flatten(1)], 1) > 0,
            own(x, layout, block, halo),
            -1,
        ),
    ),
    "the halo one too narrow": by(
        "visible",
        lambda own, at, *more: own(at, *more) & (torch.arange(at.shape[1]) < at.shape[1] - 1),
    ),
    "the mask inverted": by(
        "visible",
        lambda own, at, groups, first, mask: own(
            at, groups, first, Mask(None if mask.keys is None else ~mask.keys, mask.pairs, mask.causal)
        ),
    ),
    "the mask ignored": by("visible", lambda own, at, groups, first, mask: own(at, groups, first, Mask())),
    "causal off by one": by(
        "visible",
        lambda own, at, groups, first, mask: own(at, groups, first, mask)
        & ((at[:, None] < first + groups.cut(torch.arange(math.prod(groups.grid))[:, None])) | (not mask.causal)),
    ),
    "rows of pairs off by the special tokens": by("visible", lambda own, at, groups, first, mask: own(at, groups, 0, mask)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def halo(layout, dim=8, heads=2, *, bias=True, drop=0.0, **options) -> Halo:
    """In float64, with parameters of a size that matters."""
    site = Site("hand", dim, heads, layout, qkv_bias=bias, attn_drop=drop)
    return spread(Halo(site, **options), 0.5)


def without_positions(part: Halo) -> Halo:
    """r = 0."""
    for table in part.layers.pos_embed.parameters():
        torch.nn.init.zeros_(table)
    return part


def projected(part, x):
    """q, k and v, (b h n d) each."""
    q = one_by_one(part.layers.q, x).unflatten(-1, (part.heads, -1)).transpose(1, 2)
    kv = one_by_one(part.layers.kv, x).unflatten(-1, (part.heads, 2, -1)).permute(3, 0, 2, 1, 4)
    return q, *kv


def bias_of_all(part, q, layout):
    """q (r_Δy + r_Δx) for all pairs of grid tokens, where the tables hold all distances."""
    tables, at = part.layers.pos_embed, layout.coords()
    apart = at[None] - at[:, None] + len(tables.height_rel) // 2
    r = tables.height_rel[apart[..., 0]] + tables.width_rel[apart[..., 1]]
    return torch.einsum("bhnd,nmd->bhnm", q, r)


# By hand


def test_hand_a_row_of_three_tokens():
    """b = 1, η = 1, q = 0: all scores are 0, and the first token's window holds three places and two tokens."""
    layout, x = Layout((1, 3)), torch.tensor([3.0, 6, 9]).double().reshape(1, 3, 1)
    for padding, wanted in (("hidden", [4.5, 6, 7.5]), ("zeros", [9 / 9, 18 / 9, 15 / 9])):
        part = set_all(Halo(Site("hand", 1, 1, layout), block=1, halo=1, padding=padding), 0.0)
        with torch.no_grad():
            part.layers.kv.weight[1] = 1.0  # v = x
        near(part(x, layout=layout), wanted)  # of zeros there are nine places: three rows of three


def test_hand_blocks_of_two_without_a_halo():
    """Five tokens in blocks of two, q = 0: each receives the mean of its block; the last block holds one token."""
    layout, x = Layout((1, 5)), torch.tensor([1.0, 3, 5, 7, 9]).double().reshape(1, 5, 1)
    part = set_all(Halo(Site("hand", 1, 1, layout), block=2, halo=0), 0.0)
    with torch.no_grad():
        part.layers.kv.weight[1] = 1.0
    near(part(x, layout=layout), [2, 2, 6, 6, 9])
    weights = seen(part, x, layout=layout)
    near(weights[0, 0], [[1 / 2, 1 / 2, 0, 0]] * 4 + [[1, 0, 0, 0]])


def test_hand_a_score_by_distance():
    """q = 1, k = 0, r of one column to the right ln 3: the first of two tokens sees itself once, its neighbour thrice."""
    layout, x = Layout((1, 2)), torch.tensor([4.0, 8]).double().reshape(1, 2, 1)
    part = set_all(Halo(Site("hand", 1, 1, layout), block=1, halo=1), 0.0)
    with torch.no_grad():
        part.layers.q.bias.fill_(1.0)
        part.layers.kv.weight[1] = 1.0
        part.layers.pos_embed.width_rel[:, 0] = torch.tensor([0.0, 0.0, math.log(3)])  # of -1, 0 and 1
    near(part(x, layout=layout), [7, 6], 1e-6)  # the second sees both alike


def test_hand_parameters():
    """timm's 12720 for 64 channels in blocks of 8 with a halo of 3, less 2 η rows of both tables."""
    part = Halo(Site("hand", 64, 8, Layout((16, 16)), qkv_bias=False), block=8, halo=3)
    assert count(HaloAttn(64, num_heads=8, block_size=8, halo_size=3)) == 12720
    assert count(part) == 64 * 64 + 64 * 128 + 2 * (2 * 11 - 1) * 8 == 12720 - 2 * 6 * 8


def test_it_starts_as_timms_does():
    part = Halo(Site("hand", 64, 4, Layout((16, 16))), block=8)
    for t, std in ((part.layers.q.weight, 1 / 8), (part.layers.pos_embed.height_rel, 1 / 4)):
        assert 0.85 * std < t.std() < 1.1 * std and not torch.equal(t, torch.zeros_like(t))


# Identities


@pytest.mark.parametrize("scale_bias", [False, True])
@pytest.mark.parametrize("block,size,grid", [(4, 3, (8, 12)), (8, 3, (8, 8)), (2, 0, (4, 6)), (1, 2, (3, 5))])
def test_identity_timms_with_zeros_beyond_the_border(block, size, grid, scale_bias):
    layout = Layout(grid)
    part = halo(layout, block=block, halo=size, padding="zeros", scale_bias=scale_bias)
    timms = HaloAttn(
        8, num_heads=2, block_size=block, halo_size=size, qkv_bias=True, dim_head=4, scale_pos_embed=scale_bias
    ).double()  # fmt: skip
    state = part.layers.state_dict()
    for name in ("pos_embed.height_rel", "pos_embed.width_rel"):
        state[name] = torch.cat([normal(2 * size, 4), state[name]])  # rows that nothing reads
    timms.load_state_dict(state)
    x = normal(2, layout.length, 8)
    near(layout.to_grid(part(x, layout=layout)), timms(layout.to_grid(x)))


@pytest.mark.parametrize("padding", ["hidden", "zeros"])
def test_identity_without_a_halo_blocks_are_windows_on_their_own(padding):
    layout, window = Layout((4, 6)), Layout((2, 2))
    part = halo(layout, block=2, halo=0, padding=padding)
    x = normal(1, 24, 8)
    out, grid = layout.to_grid(part(x, layout=layout)), layout.to_grid(x)
    for y, x_ in itertools.product(range(0, 4, 2), range(0, 6, 2)):
        alone = window.from_grid(x[:, :0], grid[:, :, y : y + 2, x_ : x_ + 2])
        near(out[:, :, y : y + 2, x_ : x_ + 2], window.to_grid(part(alone, layout=window)))


@pytest.mark.parametrize("size,padding", [(0, "hidden"), (0, "zeros"), (2, "hidden")])
def test_identity_one_block_is_full_attention_with_relative_positions(size, padding):
    """With a halo only where what is beyond the border is hidden."""
    layout, x = Layout((3, 3)), normal(2, 9, 8)
    part = halo(layout, block=3, halo=size, padding=padding)
    q, k, v = projected(part, x)
    scores = q @ k.mT / 2 + bias_of_all(part, q, layout)
    near(part(x, layout=layout), merge_heads(scores.softmax(-1) @ v))
    if size:
        other = halo(layout, block=3, halo=size, padding="zeros")
        other.load_state_dict(part.state_dict())
        assert (other(x, layout=layout) - part(x, layout=layout)).abs().max() > 1e-2


@pytest.mark.parametrize("causal", [False, True])
def test_identity_blocks_of_one_are_a_sliding_window(causal):
    layout, size = Layout((4, 5)), 1
    part = without_positions(halo(layout, block=1, halo=size))
    at, x = layout.coords(), normal(2, 20, 8)
    pairs = ((at[:, None] - at[None]).abs().amax(-1) <= size)[None, None]
    q, k, v = projected(part, x)
    site, mask = Site("hand", 8, 2, layout), Mask(pairs=pairs, causal=causal)
    wanted = merge_heads(Softmax(site)(q, k, v, mask=mask, layout=layout))
    near(part(x, mask=Mask(causal=causal), layout=layout), wanted)


def test_identity_constant_values_stay_constant_where_the_border_is_hidden():
    layout, x = Layout((5, 6)), normal(2, 30, 8)
    for padding in ("hidden", "zeros"):
        part = halo(layout, block=2, halo=1, padding=padding)
        with torch.no_grad():
            part.layers.kv.weight.unflatten(0, (2, 2, 4))[:, 1] = 0
        value = part.layers.kv.bias.unflatten(0, (2, 2, 4))[:, 1].flatten()
        share = layout.to_grid(part(x, layout=layout) / value)
        if padding == "hidden":
            near(share, torch.ones_like(share))
        else:  # less at the border; the last row of blocks is filled up
            near(share[:, :, 2:4, 2:4], torch.ones(2, 8, 2, 2))
            assert share[:, :, [0, 1, 4]].max() < 1 - 1e-9
            assert share[:, :, :, [0, 1, 4, 5]].max() < 1 - 1e-9


def test_identity_a_shift_by_a_block_shifts_what_the_border_is_far_from():
    layout, x = Layout((8, 10)), normal(1, 80, 8)
    part = halo(layout, block=2, halo=2)
    shifted = layout.from_grid(x[:, :0], layout.to_grid(x).roll((2, 2), (2, 3)))
    one, two = (layout.to_grid(part(t, layout=layout)) for t in (x, shifted))
    near(two[:, :, 4:6, 4:8], one[:, :, 2:4, 2:6])
    odd = layout.from_grid(x[:, :0], layout.to_grid(x).roll((1, 1), (2, 3)))
    assert (layout.to_grid(part(odd, layout=layout))[:, :, 4:6, 4:7] - one[:, :, 3:5, 3:6]).abs().max() > 1e-2


def test_identity_a_grid_that_is_filled_up_is_a_larger_one_under_a_mask():
    small, large = Layout((3, 5)), Layout((4, 6))
    part, x = halo(small, block=2, halo=1), normal(2, 4, 6, 8)
    keys = torch.zeros(4, 6, dtype=torch.bool)
    keys[:3, :5] = True
    whole = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten().expand(2, -1)), layout=large)
    near(part(x[:, :3, :5].flatten(1, 2), layout=small), whole.unflatten(1, (4, 6))[:, :3, :5].flatten(1, 2))


def test_identity_special_tokens_see_all_and_are_seen_by_all():
    """Without positions in one block it is softmax attention of all tokens."""
    layout, x = Layout((2, 3), 2), normal(2, 8, 8)
    part = without_positions(halo(layout, block=3, halo=1))
    for mask in (
        Mask(),
        Mask(causal=True),
        Mask(keys=torch.rand(2, 8) < 0.6, pairs=torch.rand(2, 2, 8, 8) < 0.7),
    ):
        wanted = Softmax(Site("hand", 8, 2, layout))(*projected(part, x), mask=mask, layout=layout)
        near(part(x, mask=mask, layout=layout), merge_heads(wanted))


def test_no_pairs_are_formed():
    """Tokens by keys of a window, however large the grid is."""
    layout = Layout((9, 12), 1)
    part = halo(layout, block=2, halo=1)
    assert seen(part, normal(1, 109, 8), layout=layout).shape == (1, 2, 108, 1 + 16)


def test_dropout_drops_weights_of_special_tokens_too():
    part = halo(Layout((2, 3), 1), drop=0.5).train()
    x = normal(1, 7, 8)
    assert (part(x, layout=Layout((2, 3), 1)) - part.eval()(x, layout=Layout((2, 3), 1)))[
        :, 0
    ].abs().max() > 1e-3


def test_narrow_numbers_stay_near():
    narrow(Halo, [(2, 13, 12)], site=Site("hand", 12, 3, Layout((3, 4), 1)), block=2, halo=1)
