"""Region attention, MICCAI 2024, R-MSA."""

import math

import pytest
import torch
from by_hand import caught, narrow, near, normal, place, row, wrong

from attnzoo.core import Layout, Mask, MultiHead, Site
from attnzoo.errors import LayoutMismatch, MissingMap
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.local.region import Region
from attnzoo.testing import against


@against(Region)
def test_oracle(options, q, k, v, layout, allowed, regions):
    """Token i sees token j when both lie in one region, or when one of them is special; s is d^-½ or h^-½."""
    (b, heads, n, d), p = q.shape, layout.prefix
    scale = {"dim": d, "heads": heads}[options["scale"]] ** -0.5
    out = torch.zeros_like(q)
    for s in range(b):
        labels = regions[s].flatten().tolist()
        for h in range(heads):
            for i in range(n):
                near = [j for j in range(n) if i < p or j < p or labels[i - p] == labels[j - p]]
                near = [j for j in near if allowed[s, h, i, j]]
                if near:
                    weights = (scale * (k[s, h, near] @ q[s, h, i])).softmax(0)
                    out[s, h, i] = weights @ v[s, h, near]
    return out


def labelled(change):
    """Region attention by other labels, layouts or masks."""

    def attend(self, q, k, v, *, mask, layout, regions=None):
        q, mask, layout, regions = change(q, mask, layout, regions)
        return Region.attend(self, q, k, v, mask=mask, layout=layout, regions=regions)

    return wrong(Region, attend=attend)


def without_special(self, q, k, v, *, mask, layout, regions=None):
    """Special tokens see only themselves."""
    labels = torch.cat([-1 - torch.zeros(q.shape[0], layout.prefix), regions.flatten(1)], 1)
    same = (labels[:, :, None] == labels[:, None])[:, None]
    pairs = same if mask.pairs is None else same & mask.pairs
    inner = Mask(keys=mask.keys, pairs=pairs, causal=mask.causal)
    return Softmax.attend(self, q * self.factor, k, v, mask=inner, layout=layout)


MUTANTS = {
    "no scale": labelled(lambda q, mask, layout, r: (q * q.shape[-1] ** 0.5, mask, layout, r)),
    "one region": labelled(lambda q, mask, layout, r: (q, mask, layout, torch.zeros_like(r))),
    "the first sample's regions": labelled(lambda q, mask, layout, r: (q, mask, layout, r[:1].expand_as(r))),
    "column by column": labelled(lambda q, mask, layout, r: (q, mask, layout, r.mT.reshape(r.shape))),
    "pairs ignored": labelled(lambda q, mask, layout, r: (q, Mask(keys=mask.keys, causal=mask.causal), layout, r)),
    "special tokens apart": wrong(Region, attend=without_special),
    "the other scale": wrong(
        Region,
        __init__=lambda self, site, *, scale="dim": Region.__init__(self, site, scale={"dim": "heads"}.get(scale, "dim")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants(mutant):
    caught(test_oracle, mutant)


LAYOUT = Layout((2, 3), 1)
LABELS = torch.tensor([[[0, 0, 1], [0, 2, 1]]])


def region(**options) -> Region:
    """Two heads of three channels on 1 + 2 × 3 tokens."""
    return Region(Site("hand", 6, 2, LAYOUT), **options)


def attend(part, q, k, v, labels, mask=None):
    """Its output for these labels."""
    return part(q, k, v, layout=LAYOUT, given={"regions": labels}, mask=mask or Mask())


# By hand


def test_hand_two_regions_of_two():
    """Scores (0, ln 3) inside each region: weights (1/4, 3/4)."""
    labels, k = torch.tensor([[5, 9, 5, 9]]), row(0, 0, math.log(3), math.log(3))
    out = Region(place(1, tokens=4))(
        row(1, 1, 1, 1), k, row(0, 4, 8, 16), layout=Layout((4,)), given={"regions": labels}
    )
    near(out, [6, 13, 6, 13])


@pytest.mark.parametrize("scale,factor", [("dim", 1.0), ("heads", (4 / 9) ** 0.5)])
def test_hand_the_scale_is_of_the_width_or_of_the_heads(scale, factor):
    """Nine heads of four channels: d^-½ = 1/2, h^-½ = 1/3, as in the authors' code."""
    part = Region(place(36, 9), scale=scale)
    q, k, v = normal(3, 1, 9, 2, 4)
    near(
        part(q, k, v, layout=Layout((2,)), given={"regions": torch.zeros(1, 2).long()}),
        Softmax(place(36, 9))(q * factor, k, v, layout=Layout((2,))),
    )


# Identities


def test_identity_one_region_is_softmax():
    q, k, v = normal(3, 1, 2, 7, 3)
    near(attend(region(), q, k, v, torch.full((1, 2, 3), 3)), Softmax(place(6, 2, 7))(q, k, v, layout=LAYOUT))


def test_identity_each_token_its_own_region_gives_the_values():
    layout = Layout((2, 3))
    site = Site("hand", 6, 2, layout)
    q, k, v = normal(3, 2, 2, 6, 3)
    own = torch.arange(6).reshape(1, 2, 3).expand(2, 2, 3)
    near(Region(site)(q, k, v, layout=layout, given={"regions": own}), v)
    part = MultiHead(site, Region(site)).double()
    x = normal(2, 6, 6)
    near(part(x, layout=layout, given={"regions": own}), part.proj(part.qkv(x)[..., 12:]))


def test_other_names_of_the_regions_change_nothing():
    q, k, v = normal(3, 1, 2, 7, 3)
    renamed = torch.tensor([70, -2, 5])[LABELS]
    assert torch.equal(attend(region(), q, k, v, LABELS), attend(region(), q, k, v, renamed))


def test_a_change_in_one_region_leaves_another_bit_for_bit():
    layout = Layout((2, 3))
    part = Region(Site("hand", 6, 2, layout))
    tensors = normal(3, 1, 2, 6, 3)
    edited = tensors.clone()
    inside = LABELS.flatten() == 0
    edited[..., inside, :] *= 30
    before, after = (part(*t, layout=layout, given={"regions": LABELS}) for t in (tensors, edited))
    assert torch.equal(before[:, :, ~inside], after[:, :, ~inside])
    assert (before - after)[:, :, inside].abs().max() > 0.1


def test_identity_tokens_in_another_order_with_their_labels():
    q, k, v = normal(3, 1, 2, 7, 3)
    order = torch.tensor([0, 4, 2, 6, 1, 3, 5])
    turned = LABELS.flatten(1)[:, order[1:] - 1].reshape(1, 2, 3)
    found = attend(region(), q[:, :, order], k[:, :, order], v[:, :, order], turned)
    near(found, attend(region(), q, k, v, LABELS)[:, :, order])


def test_region_by_region_gives_the_same():
    layout = Layout((2, 3))
    part = Region(Site("hand", 6, 2, layout))
    q, k, v = normal(3, 1, 2, 6, 3)
    found = part(q, k, v, layout=layout, given={"regions": LABELS})
    for label in LABELS.unique():
        at = (LABELS.flatten() == label).nonzero().flatten()
        alone = Softmax(place(6, 2, len(at)))(
            q[:, :, at], k[:, :, at], v[:, :, at], layout=Layout((len(at),))
        )
        near(found[:, :, at], alone)


def test_a_missing_map_or_one_of_another_grid_is_refused():
    q, k, v = normal(3, 1, 2, 7, 3)
    with pytest.raises(MissingMap, match="AZ409.*`region` needs the map `regions`"):
        region()(q, k, v, layout=LAYOUT)
    with pytest.raises(MissingMap, match="AZ409.*shape"):
        attend(region(), q, k, v, torch.zeros(1, 3, 2))
    with pytest.raises(MissingMap, match="AZ409.*whole numbers; this one is of torch.float64"):
        attend(region(), q, k, v, LABELS.double())
    with pytest.raises(LayoutMismatch, match="AZ401"):
        region()(q, k, v, layout=Layout((2, 3)), given={"regions": LABELS})


def test_narrow_numbers_stay_near():
    labels = (torch.arange(7) // 4)[None].expand(2, 7)
    narrow(Region, [(2, 3, 7, 4)] * 3, site=place(12, 3, 7), given={"regions": labels})
