"""The transform, the mechanism and the fusion against numbers worked out by hand."""

from itertools import chain, product

import attnzoo
import pytest
import torch
from attnzoo.core import Layout, Site

from attnzoo_wavelets import BandEnergy, Haar, Subband, WithoutDetails
from attnzoo_wavelets.transform import analyse, join, split, synthesise

ROOT2 = 2**0.5
GRIDS = [(1,), (2,), (5,), (8,), (13,), (1, 1), (4, 4), (3, 5), (1, 6), (7, 2), (3, 2, 5)]


def coefficients(x, dims, levels):
    coarse, details = analyse(x, dims, levels)
    return torch.cat([band.flatten() for band in chain([coarse], *details)])


def test_split_by_hand():
    low, high = split(torch.tensor([[1.0, 3.0, 10.0, 4.0, 7.0]]), 1)
    torch.testing.assert_close(low, torch.tensor([[4 / ROOT2, 14 / ROOT2, 7.0]]))
    torch.testing.assert_close(high, torch.tensor([[-2 / ROOT2, 6 / ROOT2]]))


def test_two_levels_by_hand():
    coarse, (fine, coarser) = analyse(torch.tensor([[4.0, 2.0, 5.0, 9.0]]), [1], 2)
    torch.testing.assert_close(coarse, torch.tensor([[10.0]]))
    torch.testing.assert_close(fine[0], torch.tensor([[2 / ROOT2, -4 / ROOT2]]))
    torch.testing.assert_close(coarser[0], torch.tensor([[-4.0]]))


def test_two_dimensions_by_hand():
    coarse, [[across, down, diagonal]] = analyse(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), [0, 1], 1)
    seen = [band.item() for band in (coarse, across, down, diagonal)]
    assert seen == pytest.approx([6.0, -2.0, -3.0, 1.0])


@pytest.mark.parametrize(("grid", "levels"), product(GRIDS, [1, 2, 3, 5]))
def test_reconstruction_and_energy(grid, levels):
    x = torch.randn(2, 3, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dims = range(2, x.ndim)
    seen = coefficients(x, dims, levels)
    assert seen.numel() == x.numel()
    torch.testing.assert_close(seen.square().sum(), x.square().sum())
    torch.testing.assert_close(synthesise(*analyse(x, dims, levels), dims), x)


@pytest.mark.parametrize("grid", [(7,), (8,), (3, 5)])
def test_the_transform_is_orthonormal(grid):
    size = torch.Size(grid).numel()
    basis = torch.eye(size, dtype=torch.float64)
    matrix = torch.stack([coefficients(row.reshape(grid), range(len(grid)), 3) for row in basis])
    torch.testing.assert_close(matrix @ matrix.T, basis)


def test_join_inverts_split_along_every_axis():
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    for dim in range(3):
        torch.testing.assert_close(join(*split(x, dim), dim), x)


def haar(grid, prefix=0, **options):
    """A `haar` whose projection changes nothing."""
    mechanism = Haar(Site("test", 4, 2, Layout(grid, prefix)), **options)
    torch.nn.init.eye_(mechanism.proj.weight)
    torch.nn.init.zeros_(mechanism.proj.bias)
    return mechanism


def test_gains_of_one_change_nothing():
    mechanism, layout = haar((3, 5)), Layout((3, 5))
    torch.nn.init.ones_(mechanism.gain)
    x = torch.randn(2, 15, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mechanism(x, layout=layout), x)


def test_without_details_blocks_become_their_mean():
    mechanism, layout = haar((4, 4), levels=1), Layout((4, 4))
    with torch.no_grad():
        mechanism.gain[1:] = 0
    x = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
    means = (
        torch.nn.functional.avg_pool2d(layout.to_grid(x), 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    torch.testing.assert_close(layout.to_grid(mechanism(x, layout=layout)), means)


def test_special_tokens_receive_the_mean_of_the_grid():
    mechanism, layout = haar((4,), prefix=2), Layout((4,), 2)
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        mechanism(x, layout=layout)[:, :2], x[:, :2] + x[:, 2:].mean(dim=1, keepdim=True)
    )


@pytest.mark.parametrize(("grid", "rows"), [((1,), 1), ((2,), 2), ((5,), 4), ((14, 14), 4), ((3, 1), 3)])
def test_levels_stop_where_the_grid_is_one_token(grid, rows):
    assert haar(grid).gain.shape == (rows, 4)


def test_subband_by_hand():
    site = Site("test", 1, 1, Layout((3,), 1))
    first, second = (
        torch.tensor([[[8.0], [1.0], [3.0], [5.0]]]),
        torch.tensor([[[2.0], [10.0], [4.0], [7.0]]]),
    )
    merged = Subband(site, 2)([first, second], first)
    # special: mean; pair: mean 2 of the first, half difference 3 of the second; last of three: mean
    torch.testing.assert_close(merged, torch.tensor([[[5.0], [5.0], [-1.0], [6.0]]]))


@pytest.mark.parametrize("arity", [2, 3, 4])
def test_subband_is_the_same_at_both_levels(arity):
    site = Site("test", 6, 2, Layout((5,), 1))
    tokens = [torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(arity)]
    heads = [token.unflatten(2, (2, 3)).transpose(1, 2) for token in tokens]
    fusion = Subband(site, arity)
    inside = fusion(heads, heads[0]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(inside, fusion(tokens, tokens[0]))


def test_the_recipe_trains():
    model = attnzoo.compose("wavelet_vit", num_classes=3)
    model(torch.randn(2, 3, 224, 224)).sum().backward()
    gains = [p for name, p in model.named_parameters() if name.endswith("fusion.gain")]
    assert len(gains) == 12
    assert all(p.grad.any() for p in gains)


def test_band_energy_of_constant_tokens_is_coarse():
    model = attnzoo.compose("wavelet_vit", num_classes=3, depth=1).eval()
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    found = attnzoo.probe(model, BandEnergy(levels=3), inputs=x)
    shares = [found[name][0] for name in ("coarse", "level_1", "level_2", "level_3")]
    assert sum(shares) == pytest.approx(1.0) and min(shares) > 0.001
    with torch.no_grad():
        model.pos_embed.zero_()
    flat = attnzoo.probe(model, BandEnergy(), inputs=torch.zeros_like(x))
    assert flat["coarse"][0] == pytest.approx(1.0)


def test_without_details_two_by_two_keys_share():
    model = attnzoo.compose("wavelet_vit", num_classes=3, depth=1).eval()
    x, seen = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)), []
    with (
        torch.no_grad(),
        attnzoo.intervene(model, WithoutDetails()),
        attnzoo.watch(model, "weights", lambda name, weights: seen.append(weights)),
    ):
        model(x)
    rows = seen[0][..., 1:].unflatten(-1, (7, 2, 7, 2))
    torch.testing.assert_close(rows, rows.mean(dim=(-3, -1), keepdim=True).expand_as(rows))
    torch.testing.assert_close(seen[0].sum(dim=-1), torch.ones_like(seen[0][..., 0]))
