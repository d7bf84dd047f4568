"""Window attention, arXiv:2103.14030, §3.2."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, spread, wrong
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention

from attnzoo.core import Layout, Mask, MultiHead, Site
from attnzoo.functional.groups import Groups
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.local import window as module
from attnzoo.mechanisms.local.window import Window
from attnzoo.testing import against


def part_of(at: int, side: int, window: int, shifted: bool) -> int:
    """Which window a row or a column belongs to, as the paper draws them: the first one is short where shifted."""
    window = min(window, side)
    shift = window // 2 if shifted and window < side else 0
    return (at + window - shift) // window if shift else at // window


@against(Window, examples=15)
def test_oracle(component, options, q, k, v, layout, allowed):
    """Query by query: the keys of its window by their places, then the special ones; special queries see all."""
    (b, h, n, d), p, (rows, columns) = q.shape, layout.prefix, layout.grid
    size, shifted = options["window"], options["shift"] == "half"
    places = [divmod(i, columns) for i in range(n - p)]
    box = [(part_of(y, rows, size, shifted), part_of(x, columns, size, shifted)) for y, x in places]
    out = torch.zeros_like(q)
    for s, head, i in itertools.product(range(b), range(h), range(n)):
        keys = [j for j in range(n) if allowed[s, head, i, j] and (min(i, j) < p or box[i - p] == box[j - p])]
        if not keys:
            continue
        scores = k[s, head, keys] @ q[s, head, i] / math.sqrt(d)
        if component.bias is not None and i >= p:
            (y, x), special = places[i - p], sum(j < p for j in keys)
            at = [places[j - p] for j in keys[special:]]
            own = component.bias[
                head, [y - y_ + size - 1 for y_, _ in at], [x - x_ + size - 1 for _, x_ in at]
            ]
            scores = scores + torch.cat([torch.zeros(special).double(), own])
        out[s, head, i] = scores.softmax(0) @ v[s, head, keys]
    return out


def attending(change):
    """The head, with its inputs changed."""

    def attend(self, q, k, v, *, mask, layout):
        q, k, v, mask, layout = change(self, q, k, v, mask, layout)
        return Window.attend(self, q, k, v, mask=mask, layout=layout)

    return wrong(Window, attend=attend)


def grouped(change):
    """The head, with what the attention within groups is told changed."""

    def attend(self, q, k, v, *, mask, layout):
        own = module.attend_in_groups
        module.attend_in_groups = lambda *qkv, **told: own(*qkv, **told | change(**told))
        try:
            return Window.attend(self, q, k, v, mask=mask, layout=layout)
        finally:
            module.attend_in_groups = own

    return wrong(Window, attend=attend)


class Leaking(Groups):
    """A shift without the parts across an edge being told apart."""

    def parts(self, device):
        return torch.ones(math.prod(self.grid), 1, device=device)


class Narrow(Groups):
    """Places that hold no token are taken for tokens."""

    def parts(self, device):
        return super().parts(device) * 0


MUTANTS = {
    "no scale": attending(lambda self, q, k, v, mask, layout: (q * q.shape[-1] ** 0.5, k, v, mask, layout)),
    "q for k": attending(lambda self, q, k, v, mask, layout: (k, q, v, mask, layout)),
    "columns first": attending(
        lambda self, q, k, v, mask, layout: (q, k, v, mask, Layout(layout.grid[::-1], layout.prefix))
    ),
    "the mask ignored": attending(lambda self, q, k, v, mask, layout: (q, k, v, Mask(), layout)),
    "not causal": attending(lambda self, q, k, v, mask, layout: (q, k, v, replace(mask, causal=False), layout)),
    "pairs of other queries": attending(
        lambda self, q, k, v, mask, layout: (
            q, k, v, replace(mask, pairs=None if mask.pairs is None else mask.pairs.flip(2)), layout)
    ),
    "the bias from query to key": grouped(
        lambda bias, **_: {"bias": None if bias is None else bias.mT}
    ),
    "no bias": grouped(lambda **_: {"bias": None}),
    "no shift": grouped(lambda groups, **_: {"groups": groups._replace(shift=(0, 0))}),
    "a shift that leaks across the edge": grouped(lambda groups, **_: {"groups": Leaking(*groups)}),
    "padding that is seen": grouped(lambda groups, **_: {"groups": Narrow(*groups)}),
    "strided": grouped(lambda groups, **_: {"groups": groups._replace(strided=True)}),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def window(layout, dim=8, heads=2, layer=0, **options) -> Window:
    """In float64, with parameters of a size that matters."""
    return spread(Window(Site("hand", dim, heads, layout, layer=layer), **options))


def reads(head, layout, at, dim=8, heads=2):
    """Which grid tokens the output at a place depends on."""
    q, k, v = normal(3, 1, heads, layout.length, dim // heads)
    v.requires_grad_()
    head(q, k, v, layout=layout)[:, :, layout.prefix + at[0] * layout.grid[1] + at[1]].sum().backward()
    felt = v.grad.abs().sum((0, 1, 3))[layout.prefix :].reshape(layout.grid)
    return {tuple(place) for place in (felt > 0).nonzero().tolist()}


# By hand


def test_hand_who_reads_whom_on_eight_by_eight():
    """M = 4, a shift of 2: the corner has a window of its own, and nothing leaks around the edge."""
    layout = Layout((8, 8))
    plain, shifted = window(layout, window=4, shift="none"), window(layout, window=4, shift="half")
    assert reads(plain, layout, (0, 0)) == set(itertools.product(range(4), repeat=2))
    assert reads(shifted, layout, (0, 0)) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert reads(shifted, layout, (7, 7)) == {(6, 6), (6, 7), (7, 6), (7, 7)}
    assert reads(shifted, layout, (2, 0)) == set(itertools.product(range(2, 6), range(2)))
    assert reads(shifted, layout, (3, 3)) == set(itertools.product(range(2, 6), repeat=2))


def test_hand_windows_of_two_in_a_row_of_five():
    """q = 0, no table: each receives the mean of its window; the last window holds one token, or the first."""
    layout, zero = Layout((1, 5)), torch.zeros(1, 1, 5, 1).double()
    v = torch.tensor([1.0, 3, 5, 7, 9]).double().reshape(1, 1, 5, 1)
    for shift, wanted in (("none", [2, 2, 6, 6, 9]), ("half", [1, 4, 4, 8, 8])):
        head = window(layout, 1, 1, window=2, shift=shift, bias=False)
        near(head(zero, zero, v, layout=layout), wanted)


def test_hand_a_table_entry():
    """One row of two, q = 0, ln 3 for a key one to the left: the second token sees the first thrice, itself once."""
    layout, zero = Layout((1, 2)), torch.zeros(1, 1, 2, 1).double()
    head = window(layout, 1, 1, window=2)
    with torch.no_grad():
        head.bias.zero_()[0, 1, 2] = math.log(3)
    near(head(zero, zero, torch.tensor([4.0, 8]).double().reshape(1, 1, 2, 1), layout=layout), [6, 5])


@pytest.mark.parametrize("heads,size", [(2, 2), (4, 7)])
def test_hand_parameters(heads, size):
    site = Site("hand", 8, heads, Layout((14, 14)))
    assert count(Window(site, window=size)) == (2 * size - 1) ** 2 * heads
    assert count(Window(site, window=size, bias=False)) == 0


@pytest.mark.parametrize("layer", range(4))
def test_hand_odd_layers_are_shifted(layer):
    layout = Layout((4, 4))
    heads = {
        shift: window(layout, layer=layer, window=2, shift=shift) for shift in ("none", "half", "alternate")
    }
    for head in heads.values():
        head.load_state_dict(heads["none"].state_dict())
    q, k, v = normal(3, 1, 2, 16, 4)
    outs = {shift: head(q, k, v, layout=layout) for shift, head in heads.items()}
    near(outs["alternate"], outs["half" if layer % 2 else "none"])
    assert (outs["half"] - outs["none"]).abs().max() > 1e-2


def test_the_table_starts_small():
    head = Window(Site("hand", 8, 4, Layout((14, 14))))
    assert 0.015 < head.bias.std() < 0.022 and head.bias.abs().max() <= 0.04


# Identities


@pytest.mark.parametrize("shift", ["none", "half", "alternate"])
def test_identity_one_window_without_a_table_is_softmax(shift):
    layout, (q, k, v) = Layout((3, 4), 1), normal(3, 2, 2, 13, 4)
    head = window(layout, layer=1, window=4, shift=shift, bias=False)
    for mask in (
        Mask(),
        Mask(causal=True),
        Mask(keys=torch.rand(2, 13) < 0.6, pairs=torch.rand(2, 2, 13, 13) < 0.7),
    ):
        wanted = Softmax(Site("hand", 8, 2, layout))(q, k, v, mask=mask, layout=layout)
        near(head(q, k, v, mask=mask, layout=layout), wanted)


def as_timms(head, layers):
    """timm's layers with the same table and projections: theirs is ((2M-1)², h)."""
    layers.double().load_state_dict(
        {
            **{
                f"{name}.{what}": getattr(getattr(head, name), what)
                for name in ("qkv", "proj")
                for what in ("weight", "bias")
            },
            "relative_position_bias_table": head.inner.bias.flatten(1).mT,
        },
        strict=False,
    )
    return layers.eval()


def test_identity_timms_window_attention():
    layout, site = Layout((4, 4)), Site("hand", 8, 2, Layout((4, 4)))
    head = spread(MultiHead(site, Window(site, window=4)))
    timms = as_timms(head, WindowAttention(8, 2, window_size=(4, 4)))
    x = normal(2, 16, 8)
    near(head(x, layout=layout), timms(x))


@pytest.mark.parametrize("grid,shift", [((8, 8), 0), ((8, 8), 2), ((8, 12), 2), ((6, 9), 0)])
def test_identity_timms_block(grid, shift):
    """Away from windows that timm fills up with zeros that are seen."""
    layout = Layout(grid)
    site = Site("hand", 8, 2, layout)
    head = spread(MultiHead(site, Window(site, window=4, shift="half" if shift else "none")))
    block = SwinTransformerBlock(8, grid, num_heads=2, window_size=4, shift_size=shift).double().eval()
    as_timms(head, block.attn)
    x = normal(2, layout.length, 8)
    ours = head(x, layout=layout).unflatten(1, grid)
    theirs = block._attn(x.unflatten(1, grid))
    y, x_ = (side // 4 * 4 for side in grid)
    near(ours[:, :y, :x_], theirs[:, :y, :x_])  # -100 leaves e^-100


def test_identity_each_window_on_its_own():
    layout, small = Layout((4, 6)), Layout((2, 2))
    head, (q, k, v) = window(layout, window=2), normal(3, 1, 2, 24, 4)
    out = head(q, k, v, layout=layout).unflatten(2, (4, 6))
    for y, x in itertools.product(range(0, 4, 2), range(0, 6, 2)):
        own = (t.unflatten(2, (4, 6))[:, :, y : y + 2, x : x + 2].flatten(2, 3) for t in (q, k, v))
        near(out[:, :, y : y + 2, x : x + 2].flatten(2, 3), head(*own, layout=small))


@pytest.mark.parametrize("shift", ["none", "half"])
def test_identity_a_grid_that_is_filled_up_is_a_larger_one_under_a_mask(shift):
    small, large, qkv = Layout((5, 5)), Layout((6, 6)), normal(3, 2, 2, 6, 6, 4)
    head, keys = window(small, window=3, shift=shift), torch.zeros(6, 6, dtype=torch.bool)
    keys[:5, :5] = True
    whole = head(*(t.flatten(2, 3) for t in qkv), mask=Mask(keys=keys.flatten().expand(2, -1)), layout=large)
    near(head(*(t[:, :, :5, :5].flatten(2, 3) for t in qkv), layout=small),
         whole.unflatten(2, (6, 6))[:, :, :5, :5].flatten(2, 3))  # fmt: skip


def test_identity_a_shift_by_a_window_shifts_the_output():
    layout, qkv = Layout((4, 6)), normal(3, 1, 2, 24, 4)
    head = window(layout, window=2, shift="none")
    moved = (t.unflatten(2, (4, 6)).roll((2, 4), (2, 3)).flatten(2, 3) for t in qkv)
    out = head(*qkv, layout=layout).unflatten(2, (4, 6)).roll((2, 4), (2, 3)).flatten(2, 3)
    near(head(*moved, layout=layout), out)


def test_no_pairs_are_formed():
    layout = Layout((9, 12), 1)
    assert seen(window(layout, window=3), *normal(3, 1, 2, 109, 4), layout=layout).shape == (1, 2, 108, 1 + 9)


def test_dropout_drops_weights_of_all_tokens():
    layout, (q, k, v) = Layout((4, 4), 1), normal(3, 1, 2, 17, 4)
    head = Window(Site("hand", 8, 2, layout, attn_drop=0.5), window=2).double()
    moved = (head.train()(q, k, v, layout=layout) - head.eval()(q, k, v, layout=layout)).abs()
    assert moved[:, :, 0].max() > 1e-3 and moved[:, :, 1:].max() > 1e-3


def test_narrow_numbers_stay_near():
    narrow(Window, [(2, 3, 13, 4)] * 3, site=Site("hand", 12, 3, Layout((3, 4), 1)), window=2, shift="half")


def test_reach_default_and_table():
    """Windows of 7 × 7, so a token reaches 6 away; the table from N(0, 0.02²), cut at two deviations."""
    assert (
        Window(Site("hand", 8, 2, Layout((8, 8)))).window == 7
        and Window(Site("hand", 8, 2, Layout((8, 8)))).reach() == 6
    )
    table = Window(Site("hand", 8, 4, Layout((8, 8))), window=30).bias.detach()
    assert float(table.abs().max()) <= 0.04 and 0.0165 < float(table.std()) < 0.0187  # 0.88 of 0.02
