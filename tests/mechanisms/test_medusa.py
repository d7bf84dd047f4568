"""MEDUSA, arXiv:2110.06063: a head that reads the one guide map."""

import pytest
import torch
from by_hand import caught, count, near, normal, seen, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask, Site
from attnzoo.errors import RecipeError
from attnzoo.mechanisms.cross.medusa import Medusa
from attnzoo.testing import against


def stretched(values, size):
    """A line of tensors resized as images are: linear between the middles of its entries, constant beyond them."""
    out = []
    for i in range(size):
        at = min(max((i + 0.5) * len(values) / size - 0.5, 0), len(values) - 1)
        left = int(at)
        right = min(left + 1, len(values) - 1)
        out.append(values[left] * (1 - (at - left)) + values[right] * (at - left))
    return out


@against(Medusa)
def test_oracle(component, options, x, source, layout, context_layout, keys):
    """Sample by sample, place by place."""
    (rows, columns), (high, wide), p, q = (
        layout.grid,
        context_layout.grid,
        layout.prefix,
        context_layout.prefix,
    )
    near_, last = component.near, component.to_gate
    out = []
    for s in range(x.shape[0]):
        guide = [t if there else torch.zeros_like(t) for t, there in zip(source[s], keys[s], strict=True)]
        lines = [stretched(guide[q + i * wide : q + (i + 1) * wide], columns) for i in range(high)]
        lines = stretched([torch.stack(line) for line in lines], rows)
        places = {}
        for i in range(rows):
            for j in range(columns):
                held = [lines[i][j]]
                if options["local"]:
                    held.append(component.reduce.weight @ x[s, p + i * columns + j])
                places[i, j] = torch.cat(held)
        gates = []
        for i, j in places:
            total = near_.bias
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if (i + di, j + dj) in places:
                        total = total + near_.weight[:, :, di + 1, dj + 1] @ places[i + di, j + dj]
            logits = last.weight[:, :, 0, 0] @ total.clamp(min=0) + last.bias
            gates.append(1 / (1 + (-logits).exp()))
        gates = [sum(gates) / len(gates)] * p + gates
        one = 1 if options["mode"] == "residual" else 0
        out.append(torch.stack([t * (one + gate) for t, gate in zip(x[s], gates, strict=True)]))
    return torch.stack(out)


def mixing(change):
    """The mechanism with its inputs or parameters changed."""

    def mix(self, x, source, *, mask, layout, context_layout=None):
        with torch.no_grad():
            x, source, mask = change(self, x, source, mask)
        return Medusa.mix(self, x, source, mask=mask, layout=layout, context_layout=context_layout)

    return wrong(Medusa, mix=mix)


def turned(self, x, source, mask):
    self.near.weight.copy_(self.near.weight.mT.clone())
    return x, source, mask


def blind(self, x, source, mask):
    if self.reduce is not None:
        self.reduce.weight.zero_()
    return x, source, mask


def other_order(self, x, source, mask):
    self.near.weight.copy_(self.near.weight.roll(source.shape[-1], 1))
    return x, source, mask


def other_mode(self, x, source, *, mask, layout, context_layout=None):
    out = Medusa.mix(self, x, source, mask=mask, layout=layout, context_layout=context_layout)
    return out + x if self.mode == "gate" else out


def special_as_they_are(self, x, source, *, mask, layout, context_layout=None):
    out = Medusa.mix(self, x, source, mask=mask, layout=layout, context_layout=context_layout)
    return torch.cat([x[:, : layout.prefix], out[:, layout.prefix :]], dim=1)


def nearest(self, x, source, *, mask, layout, context_layout=None):
    """A guide resized by repeating its places."""
    (y, z), p = layout.grid, context_layout.prefix
    if mask.keys is not None:
        source = source.masked_fill(~mask.keys[..., None], 0.0)
    guide = nn.functional.interpolate(context_layout.to_grid(source[:, p:]), (y, z), mode="nearest")
    near = Layout((y, z))
    return Medusa.mix(self, x, guide.flatten(2).mT, mask=Mask(), layout=layout, context_layout=near)


MUTANTS = {
    "the convolution turned": mixing(turned),
    "blind to the tokens": mixing(blind),
    "tokens before the guide": mixing(other_order),
    "the mask ignored": mixing(lambda self, x, source, mask: (x, source, Mask())),
    "the first sample's guide for all": mixing(
        lambda self, x, source, mask: (x, source[:1].expand_as(source), mask)
    ),
    "always with a residual": wrong(Medusa, mix=other_mode),
    "special tokens as they are": wrong(Medusa, mix=special_as_they_are),
    "the nearest place of the guide": wrong(Medusa, mix=nearest),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


GRID, GUIDE = Layout((4, 6), 1), Layout((2, 3))


def medusa(grid=GRID, guide=GUIDE, dim=8, width=5, **options) -> Medusa:
    """A head for a guide of five channels."""
    site = Site("hand", dim, 2, grid, context_dim=width, context_layout=guide)
    return spread(Medusa(site, **options), 0.5)


def run(part, x, guide, layout=GRID, context=GUIDE, **arguments):
    """Its output."""
    return part(x, guide, layout=layout, context_layout=context, **arguments)


def closed(part, bias):
    """The last convolution without weights: every gate is σ(bias)."""
    nn.init.zeros_(part.to_gate.weight)
    nn.init.constant_(part.to_gate.bias, bias)
    return part


# By hand


def test_hand_gates_without_weights_are_a_half():
    x, guide = normal(2, 25, 8), normal(2, 6, 5)
    near(run(closed(medusa(), 0.0), x, guide), x / 2)
    near(run(closed(medusa(mode="residual"), 0.0), x, guide), 1.5 * x)


def test_hand_saturated_gates_leave_tokens_as_they_are():
    x, guide = normal(2, 25, 8), normal(2, 6, 5)
    near(run(closed(medusa(), 40.0), x, guide), x)
    near(run(closed(medusa(mode="residual"), -40.0), x, guide), x)


def test_hand_a_guide_twice_as_wide():
    """Places 0 and 4 of a guide resized to four: 0, 1, 3, 4; conv₃ is the identity, relu and σ follow."""
    site = Site("hand", 1, 1, Layout((1, 4)), context_dim=1, context_layout=Layout((1, 2)))
    part = Medusa(site, local=False, hidden=1).double()
    with torch.no_grad():
        for conv in part.near, part.to_gate:
            conv.weight.zero_()
            conv.bias.zero_()
        part.near.weight[0, 0, 1, 1] = part.to_gate.weight[0, 0, 0, 0] = 1.0
    guide = torch.tensor([[[0.0], [4.0]]], dtype=torch.float64)
    found = run(part, torch.ones(1, 4, 1).double(), guide, Layout((1, 4)), Layout((1, 2)))
    near(found, torch.tensor([0.0, 1, 3, 4]).double().sigmoid())


def test_hand_parameters():
    assert count(medusa()) == 8 * 16 + (9 * 21 * 16 + 16) + (16 * 8 + 8)
    assert count(medusa(local=False, gates="place", hidden=4)) == (9 * 5 * 4 + 4) + (4 + 1)


# Identities


def test_identity_torchs_layers_on_a_guide_of_the_same_grid():
    part, layout = medusa(Layout((4, 6)), Layout((4, 6))), Layout((4, 6))
    x, guide = normal(2, 24, 8), normal(2, 24, 5)
    held = torch.cat([guide, x @ part.reduce.weight.T], -1)
    head = nn.Sequential(part.near, nn.ReLU(), part.to_gate, nn.Sigmoid())
    near(run(part, x, guide, layout, layout), x * head(layout.to_grid(held)).flatten(2).mT)


def test_identity_a_constant_guide_is_one_place():
    part, x, one = medusa(), normal(1, 25, 8), normal(1, 1, 5)
    near(run(part, x, one.expand(1, 6, 5)), run(part, x, one, context=Layout((1, 1))))


def test_identity_residual_is_tokens_and_gated_tokens():
    one, two = medusa(), medusa(mode="residual")
    two.load_state_dict(one.state_dict())
    x, guide = normal(1, 25, 8), normal(1, 6, 5)
    near(run(two, x, guide), x + run(one, x, guide))


def test_identity_without_a_local_view_heads_share_the_guide_and_nothing_else():
    """The gates of a later head do not move with the tokens of an earlier one; with a local view its own move them."""
    guide = normal(1, 6, 5)
    shown = [
        [seen(part, x, guide, tap="gate", layout=GRID, context_layout=GUIDE) for x in normal(2, 1, 25, 8)]
        for part in (medusa(local=False), medusa())
    ]
    assert torch.equal(*shown[0]) and not torch.allclose(*shown[1])


def test_gates_lie_between_zero_and_one_and_special_tokens_have_the_mean():
    x, guide, where = normal(2, 25, 8) / 9, normal(2, 6, 5) / 9, {"layout": GRID, "context_layout": GUIDE}
    for gates, shape in ("channel", (2, 25, 8)), ("place", (2, 25)):
        gate = seen(medusa(gates=gates), x, guide, tap="gate", **where)
        assert gate.shape == shape and (gate > 0).all() and (gate < 1).all()
        near(gate[:, 0], gate[:, 1:].mean(1))


def test_a_place_has_influence_on_its_neighbours_only():
    part, x, guide = medusa(Layout((4, 6)), GUIDE), normal(1, 24, 8), normal(1, 6, 5)
    other = x.clone()
    other[:, 0] += 3.0  # the corner
    layout = Layout((4, 6))
    moved = layout.to_grid(run(part, other, guide, layout) - run(part, x, guide, layout)).abs().amax((0, 1))
    assert moved[:2, :2].all() and not moved[2:].any() and not moved[:, 2:].any()


def test_any_size_will_do():
    part, layout = medusa(), Layout((3, 5), 2)
    assert run(part, normal(1, 17, 8), normal(1, 20, 5), layout, Layout((4, 5))).shape == (1, 17, 8)


def test_hidden_places_of_the_guide_are_zero():
    part, x, guide = medusa(), normal(2, 25, 8), normal(2, 6, 5)
    keys = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    near(run(part, x, guide, mask=Mask(keys=keys)), run(part, x, guide * keys[..., None]))


def test_a_site_without_a_guide_is_refused():
    with pytest.raises(RecipeError, match="AZ214.*no guide"):
        Medusa(Site("hand", 8, 2, GRID))
