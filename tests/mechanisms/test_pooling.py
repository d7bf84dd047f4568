"""Pooling of PoolFormer, arXiv:2111.11418, eq. 4."""

import pytest
import torch
from by_hand import caught, count, narrow, near, normal, wrong
from timm.models.efficientformer import Pooling as EfficientFormers
from timm.models.metaformer import Pooling as Timms
from torch.nn import functional as F

from attnzoo.core import Layout, Mask, Site, options_of
from attnzoo.mechanisms.mixing.pooling import Pooling
from attnzoo.testing import against


@against(Pooling)
def test_oracle(options, x, layout, keys):
    """Token by token: the mean of those that exist, at most size // 2 away in rows and columns, less itself."""
    (rows, columns), p, reach = layout.grid, layout.prefix, options["size"] // 2
    out = []
    for s in range(x.shape[0]):
        means = list(x[s, :p])
        for i in range(rows):
            for j in range(columns):
                at = [
                    p + y * columns + z
                    for y in range(max(0, i - reach), min(rows, i + reach + 1))
                    for z in range(max(0, j - reach), min(columns, j + reach + 1))
                ]
                some = [x[s, t] for t in at if keys[s, t]]
                means.append(sum(some) / len(some) if some else torch.zeros_like(x[0, 0]))
        out.append(torch.stack(means) - (x[s] if options["subtract"] else 0))
    return torch.stack(out)


def pooled(self, x, mask, layout, border=False, minus=1.0, size=0, hide=lambda k: k, count_hidden=False, most=False,
           prefix=False, turned=False):  # fmt: skip
    """The equation with a fault."""
    p, size = layout.prefix, self.size + size
    keys = torch.ones(x.shape[:2], dtype=torch.bool) if mask.keys is None else hide(mask.keys)
    image, there = layout.to_grid(x[:, p:]), layout.to_grid(keys[:, p:, None]).double()
    image = image.mT.reshape(image.shape) if turned else image
    pool = F.max_pool2d if most else F.avg_pool2d
    total = pool(image * there, size, 1, size // 2)
    share = F.avg_pool2d(torch.ones_like(there) if count_hidden else there, size, 1, size // 2)
    mean = total if border or most else total / share.clamp(min=1e-9)
    out = layout.from_grid(x[:, :p] * (0 if prefix else 1), mean)
    return out - minus * x if self.subtract else out


def with_fault(**fault):
    """The mechanism with one fault."""
    return wrong(Pooling, mix=lambda self, x, source, *, mask, layout: pooled(self, x, mask, layout, **fault))


def test_the_form_without_a_fault_is_not_caught():
    assert test_oracle.compare(with_fault(), examples=20).ok


MUTANTS = {
    "zeros beyond the border are counted": with_fault(border=True),
    "padding is counted": with_fault(count_hidden=True),
    "the token itself is not taken off": with_fault(minus=0.0),
    "a wider window": with_fault(size=2),
    "the largest for the mean": with_fault(most=True),
    "the mask ignored": with_fault(hide=torch.ones_like),
    "the mask inverted": with_fault(hide=torch.logical_not),
    "special tokens are no means of themselves": with_fault(prefix=True),
    "rows and columns exchanged": with_fault(turned=True),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


def at(grid=(4, 5), prefix=0, dim=6) -> Site:
    """A site on a plane."""
    return Site("hand", dim, 2, Layout(grid, prefix))


def run(x, grid, prefix=0, mask=Mask(), **options):  # noqa: B008 - a mask does not change
    """What pooling gives."""
    layout = Layout(grid, prefix)
    return Pooling(at(grid, prefix, x.shape[2]), **options)(x, mask=mask, layout=layout)


# By hand


def test_hand_a_plane_of_three_by_three():
    """In the middle the mean of 1 to 9 is 5, and 5 is taken off; the first corner has 1, 2, 4 and 5."""
    out = run(torch.arange(1.0, 10).double().reshape(1, 9, 1), (3, 3))[0, :, 0]
    near(out[[0, 1, 4, 8]], [3 - 1, 21 / 6 - 2, 0, 7 - 9])


def test_hand_one_pulse():
    """A one among zeros is 1/9 for those around it; without a neighbour it would be alone."""
    x = torch.zeros(1, 25, 1).double()
    x[0, 12] = 1
    wanted = torch.zeros(5, 5).double()
    wanted[1:4, 1:4] = 1 / 9
    near(run(x, (5, 5), subtract=False).reshape(5, 5), wanted)
    keys = torch.zeros(1, 25, dtype=torch.bool)
    keys[0, 12] = True
    wanted[1:4, 1:4] = 1
    near(run(x, (5, 5), mask=Mask(keys=keys), subtract=False).reshape(5, 5), wanted)


def test_hand_parameters():
    assert count(Pooling(at())) == 0


def test_defaults():
    assert options_of(Pooling)().model_dump() == {"size": 3, "subtract": True}


# Identities


@pytest.mark.parametrize("size", [3, 5, 7, 9])
def test_identity_a_constant_gives_zero(size):
    near(run(normal(2, 1, 6).expand(2, 20, 6), (4, 5), size=size), torch.zeros(2, 20, 6))


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("timms", [EfficientFormers, Timms])
def test_identity_timms(size, timms):
    x = normal(2, 20, 6)
    theirs = timms(size)(x.mT.unflatten(2, (4, 5))).flatten(2).mT
    near(run(x, (4, 5), size=size), theirs)


def test_identity_a_window_over_all_is_the_mean():
    x = normal(2, 20, 6)
    near(run(x, (4, 5), size=9, subtract=False), x.mean(1, keepdim=True).expand(2, 20, 6))


def test_identity_it_is_linear():
    x, y = normal(2, 2, 20, 6)
    near(run(2 * x - 3 * y, (4, 5)), 2 * run(x, (4, 5)) - 3 * run(y, (4, 5)))


def test_identity_a_token_is_felt_by_its_neighbours_alone():
    x = normal(1, 20, 6)
    other = x.clone()
    other[0, 7] += 1  # row 1, column 2
    moved = (run(x, (4, 5)) - run(other, (4, 5))).abs().amax((0, 2)).reshape(4, 5) > 0
    wanted = torch.zeros(4, 5, dtype=torch.bool)
    wanted[0:3, 1:4] = True
    assert torch.equal(moved, wanted)


def test_identity_padding_is_a_border():
    """Columns that do not exist are as if the plane ended before them."""
    x = normal(2, 4, 5, 6)
    keys = torch.ones(2, 4, 5, dtype=torch.bool)
    keys[:, :, 3:] = False
    out = run(x.flatten(1, 2), (4, 5), mask=Mask(keys=keys.flatten(1))).unflatten(1, (4, 5))
    near(out[:, :, :3].flatten(1, 2), run(x[:, :, :3].flatten(1, 2), (4, 3)))


@pytest.mark.parametrize("subtract", [True, False])
def test_special_tokens_stay_alone(subtract):
    x = normal(2, 22, 6)
    out = run(x, (4, 5), prefix=2, subtract=subtract)
    near(out[:, :2], 0 * x[:, :2] if subtract else x[:, :2])
    near(out[:, 2:], run(x[:, 2:], (4, 5), subtract=subtract))


def test_narrow_numbers_stay_near():
    narrow(Pooling, [(2, 12, 12)], site=Site("hand", 12, 3, Layout((3, 4))))
