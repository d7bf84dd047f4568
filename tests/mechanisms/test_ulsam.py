"""Subspace attention, arXiv:2006.15102, §3, eq. 1-4."""

import math

import pytest
import torch
from by_hand import caught, count, line, narrow, near, normal, seen, spread, wrong
from torch import nn

from attnzoo.core import Layout, Mask, Site
from attnzoo.errors import RecipeError
from attnzoo.mechanisms.channel.ulsam import Ulsam
from attnzoo.testing import against


def at(grid, prefix=0, dim=8) -> Site:
    """A site on a plane."""
    return Site("hand", dim, 1, Layout(grid, prefix))


def rectified(norm, values, which):
    """relu(γ (t - μ) / √(σ² + 10⁻⁵) + β) of some channels, over the places that are there."""
    mean = sum(values.values()) / len(values)
    deviation = torch.sqrt(sum((v - mean) ** 2 for v in values.values()) / len(values) + 1e-5)
    normed = {
        place: norm.gain[which] * (v - mean) / deviation + norm.shift[which] for place, v in values.items()
    }
    return {place: v * (v > 0) for place, v in normed.items()}


@against(Ulsam, examples=30)
def test_oracle(component, options, x, layout, keys):
    """Sample by sample, group by group: the greatest of the scaled neighbours, summed, softmax over places, 1 + A."""
    (b, _, c), (_, columns), p = x.shape, layout.grid, layout.prefix
    groups = options["groups"] or max(g for g in (4, 2, 1) if c % g == 0)
    scale, point, out = component.scale.weight.flatten(), component.point.weight[:, :, 0, 0], x.clone()
    for s in range(b):
        places = {divmod(i - p, columns): i for i in range(p, layout.length) if keys[s, i]}
        for g in range(groups if places else 0):
            mine = slice(g * c // groups, (g + 1) * c // groups)
            scaled = {place: scale[mine] * x[s, i, mine] for place, i in places.items()}
            if options["norm"] == "places":
                scaled = rectified(component.scale_norm, scaled, mine)
            total = {}
            for y, z in places:
                around = [(y + dy, z + dz) for dy in (-1, 0, 1) for dz in (-1, 0, 1)]
                most = torch.stack([scaled[place] for place in around if place in scaled]).amax(0)
                total[y, z] = (point[g] * most).sum()
            if options["norm"] == "places":
                total = rectified(component.point_norm, total, g)
            weights = torch.stack(list(total.values())).softmax(0)
            for weight, i in zip(weights, places.values(), strict=True):
                out[s, i, mine] = x[s, i, mine] * (1 + weight)
    return out


def mixed(
    part, x, mask, layout, rows=False, pool=None, dim=2, residual=True, empty="-inf", lazy=False, dealt=False
):
    """The equations with a fault."""
    p, c = layout.prefix, x.shape[-1]
    there = torch.ones_like(x[..., 0], dtype=torch.bool) if mask.keys is None else mask.keys
    there = there[:, None, p:].unflatten(2, layout.grid)
    image = part.scale(layout.to_grid(x[:, p:]))
    if part.scale_norm is not None:
        image = part.scale_norm(image, None if lazy else there).relu()
    image = (pool or part.pool)(image.masked_fill(~there, float(empty)))
    maps = part.point(image.masked_fill(~there, 0.0))
    if part.point_norm is not None:
        maps = part.point_norm(maps, None if lazy else there).relu()
    maps = maps.masked_fill(~there, -1e9)
    weights = maps.softmax(3).flatten(2) if rows else maps.flatten(2).softmax(dim)
    weights = weights.masked_fill(~there.flatten(2), 0.0)
    groups = weights.shape[1]
    weights = weights.repeat(1, c // groups, 1) if dealt else weights.repeat_interleave(c // groups, 1)
    gain = nn.functional.pad(weights, (p, 0)).mT
    return x * (gain + 1) if residual else x * gain


def with_fault(**fault):
    """Subspace attention with one fault."""
    return wrong(Ulsam, mix=lambda self, x, source, *, mask, layout: mixed(self, x, mask, layout, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=15).ok


MUTANTS = {
    "softmax over the columns": with_fault(rows=True),
    "softmax over the groups": with_fault(dim=1),
    "softmax over the batch": with_fault(dim=0),
    "no maximum": with_fault(pool=nn.Identity()),
    "a mean": with_fault(pool=nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    "a maximum of 5 × 5": with_fault(pool=nn.MaxPool2d(5, 1, 2)),
    "no residual": with_fault(residual=False),
    "padding is zero in the maximum": with_fault(empty="0"),
    "padding in the norms": with_fault(lazy=True),
    "channels dealt in turn": with_fault(dealt=True),
    "the mask ignored": wrong(
        Ulsam, mix=lambda self, x, source, *, mask, layout: mixed(self, x, Mask(), layout)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def constant(part, value=1.0):
    """The module with all its convolutions at one number."""
    with torch.no_grad():
        part.scale.weight.fill_(value)
        part.point.weight.fill_(value)
    return part


# By hand


def test_hand_four_tokens_in_a_row():
    """One channel (0, 0, 0, ln 2): the maxima are (0, 0, ln 2, ln 2), the weights (1, 1, 2, 2) / 6."""
    part = constant(Ulsam(at((1, 4), dim=1)).double())
    x = line(0, 0, 0, math.log(2))
    near(seen(part, x, layout=Layout((1, 4))), [[[1 / 6, 1 / 6, 1 / 3, 1 / 3]]])
    near(part(x, layout=Layout((1, 4))), [0, 0, 0, math.log(2) * 4 / 3])


def test_hand_parameters():
    """Two for each channel; the authors' 332 for 64 channels in 4 groups has norms, and biases that they cancel."""
    assert count(Ulsam(at((7, 7), dim=64))) == 2 * 64
    published = nn.ModuleList(
        [nn.Conv2d(16, 16, 1, groups=16), nn.BatchNorm2d(16), nn.Conv2d(16, 1, 1), nn.BatchNorm2d(1)]
    )
    assert 4 * count(published) == 332 == 5 * 64 + 3 * 4
    assert count(Ulsam(at((7, 7), dim=64), norm="places")) == 332 - 64 - 4


@pytest.mark.parametrize("norm", ["none", "places"])
@pytest.mark.parametrize("grid", [(4, 5), (1, 1), (1, 7)])
def test_hand_constant_maps(grid, norm):
    """A = 1 / n wherever a token lies, at borders too; one token alone is doubled."""
    part, n = spread(Ulsam(at(grid), norm=norm)), math.prod(grid)
    x = normal(2, 1, 8).expand(2, n, 8)
    near(part(x, layout=Layout(grid)), x * (1 + 1 / n))


def test_hand_a_pointwise_convolution_of_zero():
    part, x = spread(Ulsam(at((3, 4)))), normal(2, 12, 8)
    nn.init.zeros_(part.point.weight)
    near(part(x, layout=Layout((3, 4))), x * 13 / 12)


def test_hand_as_many_groups_as_divide():
    assert [Ulsam(at((2, 2), dim=c)).point.out_channels for c in (1, 2, 6, 12, 9, 64)] == [1, 2, 2, 4, 1, 4]
    with pytest.raises(RecipeError, match="AZ214.*3 groups do not divide 8 channels"):
        Ulsam(at((2, 2)), groups=3)


# Identities


@pytest.mark.parametrize("norm", ["none", "places"])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_identity_one_map_for_all_channels_of_a_group(groups, norm):
    """y / x - 1 is the same for them, not negative, and sums to 1; so x grows by at most itself."""
    part, x = spread(Ulsam(at((3, 4), 1), groups=groups, norm=norm)), normal(2, 13, 8)
    gain = (part(x, layout=Layout((3, 4), 1)) / x - 1).unflatten(2, (groups, -1))
    near(gain, gain[..., :1].expand_as(gain), 1e-9)
    near(gain.sum(1), torch.ones(2, groups, 8 // groups), 1e-9)
    assert gain.min() > -1e-12 and gain.max() <= 1
    near(gain[..., 0].mT, seen(part, x, layout=Layout((3, 4), 1)), 1e-9)
    near(gain[:, 0], torch.zeros(2, groups, 8 // groups))  # a special token


@pytest.mark.parametrize("norm", ["none", "places"])
def test_identity_groups_in_another_order(norm):
    part, other = (spread(Ulsam(at((3, 4)), groups=4, norm=norm)) for _ in range(2))
    groups = torch.tensor([2, 0, 3, 1])
    channels = (2 * groups[:, None] + torch.arange(2)).flatten()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            order = channels if parameter.shape[0] == 8 else groups
            parameter.copy_(part.get_parameter(name)[order])
    x = normal(2, 12, 8)
    near(other(x[..., channels], layout=Layout((3, 4))), part(x, layout=Layout((3, 4)))[..., channels])


def test_identity_the_authors_layers_for_one_sample():
    """Batch norms in training mode, of a batch of one, are norms over its places; biases before them have no say."""
    part, x = spread(Ulsam(at((3, 4)), groups=2, norm="places")), normal(1, 12, 8)
    halves = []
    for g in range(2):
        mine = slice(4 * g, 4 * g + 4)
        scale, one = nn.Conv2d(4, 4, 1, groups=4).double(), nn.BatchNorm2d(4).double()
        point, two = nn.Conv2d(4, 1, 1).double(), nn.BatchNorm2d(1).double()
        with torch.no_grad():
            scale.weight.copy_(part.scale.weight[mine])
            point.weight.copy_(part.point.weight[g : g + 1])
            for norm, own, which in ((one, part.scale_norm, mine), (two, part.point_norm, slice(g, g + 1))):
                norm.weight.copy_(own.gain[which])
                norm.bias.copy_(own.shift[which])
        image = x[..., mine].mT.unflatten(2, (3, 4))
        layers = nn.Sequential(scale, one, nn.ReLU(), nn.MaxPool2d(3, 1, 1), point, two, nn.ReLU())
        halves.append(image + image * layers(image).flatten(2).softmax(2).unflatten(2, (3, 4)))
    near(part(x, layout=Layout((3, 4))), torch.cat(halves, 1).flatten(2).mT, 1e-10)


@pytest.mark.parametrize("norm", ["none", "places"])
def test_identity_padding_is_a_smaller_picture(norm):
    part, x = spread(Ulsam(at((5, 6)), norm=norm)), normal(2, 5, 6, 8)
    keys = torch.zeros(2, 5, 6, dtype=torch.bool)
    keys[:, :3, :4] = True
    x[~keys] = math.nan
    out = part(x.flatten(1, 2), mask=Mask(keys=keys.flatten(1)), layout=Layout((5, 6))).reshape(x.shape)
    near(out[:, :3, :4].flatten(1, 2), part(x[:, :3, :4].flatten(1, 2), layout=Layout((3, 4))))


@pytest.mark.parametrize("norm", ["none", "places"])
def test_where_no_token_exists_nothing_changes(norm):
    part, x = spread(Ulsam(at((3, 4)), norm=norm)), normal(1, 12, 8)
    near(part(x, mask=Mask(keys=torch.zeros(1, 12, dtype=torch.bool)), layout=Layout((3, 4))), x)


def test_a_norm_is_said_to_be_adapted():
    assert Ulsam.card.fidelity == "exact" and Ulsam.card_for(norm="places").fidelity == "adapted"


@pytest.mark.parametrize("norm", ["none", "places"])
def test_narrow_numbers_stay_near(norm):
    narrow(Ulsam, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))), norm=norm)
