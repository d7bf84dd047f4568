"""Coordinate attention, arXiv:2103.02907, §3.2, eq. 4-9."""

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, seen, set_all, spread, wrong
from timm.layers import LayerNorm2d
from timm.layers.coord_attn import CoordAttn
from torch import nn

from attnzoo.core import Layout, Mask, Site
from attnzoo.mechanisms.channel.coordinate import Coordinate
from attnzoo.testing import against


def normed(layer, t):
    """Layer normalisation of one vector, written out."""
    centred = t - t.mean()
    return centred / torch.sqrt((centred**2).mean() + layer.eps) * layer.weight + layer.bias


def one_by_one(conv, t):
    """A 1 × 1 convolution of one vector."""
    return conv.weight[:, :, 0, 0] @ t + (0 if conv.bias is None else conv.bias)


def hidden(layers, z):
    """hswish(norm(W₁ z)), hswish(t) = t relu6(t + 3) / 6."""
    t = normed(layers.bn1, one_by_one(layers.conv1, z))
    return t * (t + 3).clamp(0, 6) / 6


@against(Coordinate, examples=30)
def test_oracle(component, x, layout, keys):
    """Token (i, j) is multiplied by the gate of row i and by that of column j; special tokens by nothing."""
    layers, (rows, columns), p = component.layers, layout.grid, layout.prefix
    samples = []
    for s in range(x.shape[0]):

        def gates(conv, lines, s=s):
            """For each line of places the gate, from the mean of those that exist."""
            found = []
            for line in lines:
                there = [x[s, i] for i in line if keys[s, i]]
                mean = sum(there) / len(there) if there else torch.zeros(x.shape[-1]).double()
                found.append(1 / (1 + torch.exp(-one_by_one(conv, hidden(layers, mean)))))
            return found

        places = [[p + i * columns + j for j in range(columns)] for i in range(rows)]
        of_rows = gates(layers.conv_h, places)
        of_columns = gates(layers.conv_w, list(zip(*places, strict=True)))
        out = list(x[s, :p])
        out += [x[s, places[i][j]] * of_rows[i] * of_columns[j] for i in range(rows) for j in range(columns)]
        samples.append(torch.stack(out))
    return torch.stack(samples)


def before(change):
    """Coordinate attention that is changed after it was built."""

    def mix(self, x, source, *, mask, layout):
        with torch.no_grad():
            change(self)
        return Coordinate.mix(self, x, source, mask=mask, layout=layout)

    return wrong(Coordinate, mix=mix)


def swap(self):
    self.layers.conv_h, self.layers.conv_w = self.layers.conv_w, self.layers.conv_h


def masked_nowhere(self, x, source, *, mask, layout):
    return Coordinate.mix(self, x, source, mask=Mask(), layout=layout)


def padding_counted(self, grid, mask, layout):
    if mask.keys is not None:
        grid = grid * layout.to_grid(mask.keys[:, layout.prefix :, None])
    return Coordinate._strips(self, grid, Mask(), layout)


def other_axes(self, grid, mask, layout):
    """The strips of columns where those of rows belong, cut or repeated to fit."""
    strips, (rows, columns) = Coordinate._strips(self, grid, mask, layout), layout.grid
    at = [rows + i % columns for i in range(rows)] + [j % rows for j in range(columns)]
    return strips[:, :, at]


def sums(self, grid, mask, layout):
    rows, columns = layout.grid
    strips = Coordinate._strips(self, grid, mask, layout)
    return torch.cat([strips[:, :, :rows] * columns, strips[:, :, rows:] * rows], 2)


def added(self, x, source, *, mask, layout):
    """The mean of the gates in the place of their product."""
    gates = {}
    for name in ("gate_rows", "gate_columns"):
        gates[name] = seen_inside(self, x, mask, layout, name)
    prefix, grid = x[:, : layout.prefix], layout.to_grid(x[:, layout.prefix :])
    gate = (gates["gate_rows"][:, :, :, None] + gates["gate_columns"][:, :, None]) / 2
    return layout.from_grid(prefix, grid * gate)


def seen_inside(self, x, mask, layout, name):
    kept = []
    handle = getattr(self, name).register_forward_hook(lambda module, args, gate: kept.append(gate))
    Coordinate.mix(self, x, x, mask=mask, layout=layout)
    handle.remove()
    return kept[0]


MUTANTS = {
    "W_y and W_x swapped": before(swap),
    "no norm": before(lambda self: setattr(self.layers, "bn1", nn.Identity())),
    "relu for hswish": before(lambda self: setattr(self.layers, "act", nn.ReLU())),
    "the mask ignored": wrong(Coordinate, mix=masked_nowhere),
    "padding in the means": wrong(Coordinate, _strips=padding_counted),
    "rows for columns": wrong(Coordinate, _strips=other_axes),
    "sums for means": wrong(Coordinate, _strips=sums),
    "gates added": wrong(Coordinate, mix=added),
    "special tokens dropped": wrong(
        Coordinate,
        mix=lambda self, x, source, *, mask, layout: (
            Coordinate.mix(self, x, source, mask=mask, layout=layout)
            * (torch.arange(x.shape[1]) >= layout.prefix)[:, None]
        ),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((3, 4), 1)


def coordinate(layout=LAYOUT, dim=6, **options) -> Coordinate:
    """In float64, with weights of a size that matters."""
    return spread(Coordinate(Site("hand", dim, 2, layout), **options), 0.5)


def gates(part, x, layout=LAYOUT):
    """Of rows (b c y) and of columns (b c x)."""
    return [seen(part, x, layout=layout, tap=tap) for tap in ("gate_rows", "gate_columns")]


# By hand


@pytest.mark.parametrize("bias", [True, False])
def test_hand_gates_of_zero_weights_leave_a_quarter(bias):
    """σ(0)² = 1/4 of all grid tokens; the special token is as it was."""
    part = set_all(coordinate(bias=bias), 0.0)
    x = normal(2, 13, 6)
    near(part(x, layout=LAYOUT), torch.cat([x[:, :1], x[:, 1:] / 4], 1))


def test_hand_one_row_and_two_columns():
    """One hidden channel is on, hswish of it 4 × 7 / 6 → 4: with W_y = ln 3 / 4 the row's gate is 3/4; columns' 1/2."""
    layout = Layout((1, 2))
    part = set_all(coordinate(layout, 1), 0.0)
    with torch.no_grad():
        part.layers.bn1.bias[0] = 4.0
        part.layers.conv_h.weight[:, 0] = torch.log(torch.tensor(3.0)) / 4
    x = normal(1, 2, 1)
    near(part(x, layout=layout), x * 3 / 8, 1e-7)


@pytest.mark.parametrize("dim,width", [(64, 8), (512, 16), (1024, 32)])
def test_hand_the_width_of_the_bottleneck(dim, width):
    assert Coordinate(Site("hand", dim, 2, LAYOUT)).layers.conv1.out_channels == width


def test_hand_parameters():
    """The authors' module of 64 channels has 1688: two for each channel of its norm, as here."""
    assert count(Coordinate(Site("hand", 64, 2, LAYOUT))) == 1688
    assert count(Coordinate(Site("hand", 64, 2, LAYOUT), bias=False)) == 1688 - 8 - 64 - 64


# Identities


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_identity_timms_on_the_grid(prefix, bias):
    layout = Layout((3, 4), prefix)
    part = spread(Coordinate(Site("hand", 16, 2, layout), bias=bias))
    timms = CoordAttn(16, rd_channels=8, bias=bias, norm_layer=LayerNorm2d).double()
    timms.load_state_dict(part.layers.state_dict())
    x = normal(2, layout.length, 16)
    found = part(x, layout=layout)
    near(found[:, :prefix], x[:, :prefix])
    near(layout.to_grid(found[:, prefix:]), timms(layout.to_grid(x[:, prefix:])))


def test_identity_gates_are_separable_and_never_make_a_number_larger():
    part, x = coordinate(), normal(2, 13, 6)
    ratio = LAYOUT.to_grid((part(x, layout=LAYOUT) / x)[:, 1:])
    of_rows, of_columns = gates(part, x)
    near(ratio, of_rows[:, :, :, None] * of_columns[:, :, None], 1e-10)
    assert torch.linalg.matrix_rank(ratio, rtol=1e-8).max() == 1
    assert (ratio > 0).all() and (ratio < 1).all()


def test_identity_a_turned_grid_gives_a_turned_output_when_the_gates_are_tied():
    part, turned = coordinate(Layout((3, 4))), Layout((4, 3))
    part.layers.conv_w.load_state_dict(part.layers.conv_h.state_dict())
    x = normal(2, 12, 6)
    grid = Layout((3, 4)).to_grid(x)
    none = x[:, :0]
    out = part(turned.from_grid(none, grid.mT), layout=turned)
    near(turned.to_grid(out).mT, Layout((3, 4)).to_grid(part(x, layout=Layout((3, 4)))))


def test_identity_equal_columns_have_equal_gates():
    part = coordinate(Layout((3, 4)))
    x = normal(2, 3, 1, 6).expand(2, 3, 4, 6).reshape(2, 12, 6)  # constant along each row
    of_columns = gates(part, x, Layout((3, 4)))[1]
    near(of_columns, of_columns[..., :1].expand_as(of_columns))


def test_identity_rows_in_another_order_give_the_same_in_that_order():
    part, layout, order = coordinate(Layout((3, 4))), Layout((3, 4)), [2, 0, 1]
    x = normal(2, 3, 4, 6)
    out = part(x.reshape(2, 12, 6), layout=layout).reshape(2, 3, 4, 6)
    near(part(x[:, order].reshape(2, 12, 6), layout=layout).reshape(2, 3, 4, 6), out[:, order])


def test_identity_padded_columns_are_a_narrower_image():
    part, x = coordinate(Layout((3, 4))), normal(2, 3, 4, 6)
    keys = (torch.arange(12) % 4 < 3).expand(2, 12)
    padded = part(x.reshape(2, 12, 6), mask=Mask(keys=keys), layout=Layout((3, 4))).reshape(2, 3, 4, 6)
    narrower = part(x[:, :, :3].reshape(2, 9, 6), layout=Layout((3, 3))).reshape(2, 3, 3, 6)
    near(padded[:, :, :3], narrower)


def test_padding_of_any_content_is_invisible():
    part, x = coordinate(Layout((3, 4))), normal(1, 12, 6)
    keys = torch.rand(1, 12) < 0.6
    wild = torch.where(keys[..., None], x, float("inf"))
    outs = [part(t, mask=Mask(keys=keys), layout=Layout((3, 4)))[:, keys[0]] for t in (x, wild)]
    near(outs[0], outs[1])


def test_narrow_numbers_stay_near():
    narrow(Coordinate, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))))
