"""Pools, maps that are handed over, contexts on a grid, fixed lengths: broken, and healthy."""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, Pool, Site
from attnzoo.functional import masked_softmax
from broken.heads import Healthy, HealthyWindow, claims
from broken.tokens import HealthyReader, HealthyTokens


class HealthyPool(Pool):
    """A learned query reads the tokens, by heads."""

    card = Card(
        name="healthy_pool",
        family=Family.LATENT,
        summary="One query reads all.",
        time="n c",
        memory="n c",
        masks={"keys"},
        taps={"weights": "b h m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
    )

    def __init__(self, site: Site):
        super().__init__(site)
        self.query = nn.Parameter(torch.randn(site.heads, site.head_dim))

    def pool(self, x, *, mask, layout):
        heads = x.unflatten(-1, self.query.shape)  # (b n h d)
        scores = torch.einsum("bnhd,hd->bhn", heads, self.query)
        weights = self.weights(masked_softmax(scores, self.exists(mask)))
        return torch.einsum("bhn,bnhd->bhd", weights, heads).flatten(1)

    def exists(self, mask):
        return None if mask.keys is None else mask.keys[:, None]


class PoolsPadding(HealthyPool):
    def exists(self, mask):
        return None


class PoolsToMany(HealthyPool):
    def pool(self, x, *, mask, layout):
        return super().pool(x, mask=mask, layout=layout)[:, None]


class PoolsByPlace(HealthyPool):
    def pool(self, x, *, mask, layout):
        places = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]
        return super().pool(x * (1 + places), mask=mask, layout=layout)


class PoolsNothingToNaN(HealthyPool):
    def pool(self, x, *, mask, layout):
        exists = self.exists(mask)
        pooled = super().pool(x, mask=mask, layout=layout)
        return pooled if exists is None else pooled / exists.any(dim=-1)


class PoolsFirstTokens(HealthyPool):
    """Of more than 64 it reads 64."""

    def pool(self, x, *, mask, layout):
        keys = None if mask.keys is None else mask.keys[:, :64]
        return super().pool(x[:, :64], mask=replace(mask, keys=keys), layout=layout)


class HealthyRegion(Healthy):
    """Softmax attention among tokens of one label; special tokens see all and are seen by all."""

    card = claims(
        Healthy, grid="any", context=False, incremental=False, given={"regions": "labels"},
        laws={Law.STOCHASTIC, Law.LINEAR_IN_VALUES, Law.BOUNDED},
    )  # fmt: skip

    def among(self, regions):
        labels = regions.flatten(1)
        return labels[:, :, None] == labels[:, None]

    def attend(self, q, k, v, *, mask, layout, regions=None):
        p = layout.prefix
        pairs = nn.functional.pad(self.among(regions), (p, 0, p, 0), value=True)[:, None]
        mask = replace(mask, pairs=pairs if mask.pairs is None else pairs & mask.pairs)
        return super().attend(q, k, v, mask=mask, layout=layout)


class IgnoresRegions(HealthyRegion):
    def among(self, regions):
        return torch.ones_like(super().among(regions))


class RegionsOfFirstSample(HealthyRegion):
    def among(self, regions):
        return super().among(regions[:1].expand(regions.shape))


class CountsLabels(HealthyRegion):
    """Neighbouring numbers are taken for neighbouring regions."""

    def among(self, regions):
        labels = regions.flatten(1)
        return (labels[:, :, None] - labels[:, None]).abs() <= 1


class TakesAnyMap(HealthyRegion):
    def given_maps(self, given, batch, layout):
        grid = (batch, *layout.grid)
        return {"regions": next(iter(given.values()), torch.zeros(grid)).new_zeros(grid)} | {
            name: m for name, m in given.items() if tuple(m.shape) == grid and name == "regions"
        }


class HealthySaliency(HealthyTokens):
    """The mean is weighted by a map of scores."""

    card = claims(HealthyTokens, grid="any", given={"saliency": "scores"}, laws=set(), masks=set())

    def mix(self, x, source, *, mask, layout, saliency=None):
        shares = saliency.flatten(1)
        grid = (x[:, layout.prefix :] * shares[..., None]).mean(dim=1, keepdim=True)
        return x * self.gate(self.gating(x + grid).sigmoid())


class SaliencyOverBatch(HealthySaliency):
    def mix(self, x, source, *, mask, layout, saliency=None):
        return super().mix(x, source, mask=mask, layout=layout, saliency=saliency + saliency.mean(0) / 2)


class HealthyLearnedPlaces(HealthyTokens):
    """A weight for each position."""

    card = claims(HealthyTokens, fixed_length=True, laws=set())

    def __init__(self, site: Site, *, gate: Literal["open", "shut"] = "open"):
        super().__init__(site, gate=gate)
        self.places = nn.Parameter(torch.randn(site.layout.length, 1))

    def mean(self, x, mask, layout):
        exists = 1 if mask.keys is None else mask.keys[..., None]
        return (x * self.places[: x.shape[1]] * exists).sum(dim=1, keepdim=True)


class TakesFewerTokens(HealthyLearnedPlaces):
    def admit(self, x, source, mask):
        if source.shape[1] > self.length or not mask.free:
            super().admit(x, source, mask)


class HealthySecondStream(Mechanism):
    """Adds to each token of the grid the mean of the context's grid, weighted by what is learned of its corner."""

    card = Card(
        name="healthy_second_stream",
        family=Family.CROSS,
        summary="Reads a second stream on a grid.",
        time="n c + m c c",
        memory="n c + m c",
        context=True,
        context_grid=2,
        grid=2,
    )

    def __init__(self, site: Site):
        super().__init__(site)
        self.read = nn.Linear(site.context_dim or site.dim, site.dim)

    def mix(self, x, source, *, mask, layout, context_layout=None):
        _, grid = (context_layout or layout).split(source)
        return x + self.read(grid).mean(dim=1, keepdim=True)


class ReadsOwnGrid(HealthySecondStream):
    def mix(self, x, source, *, mask, layout, context_layout=None):
        return super().mix(x, 0 * source, mask=mask, layout=layout, context_layout=context_layout) + x


class TakesTokensForContext(HealthyReader):
    """A context of the tokens' shape is taken for the tokens."""

    def mix(self, x, source, *, mask, layout):
        return super().mix(x, x if source.shape == x.shape else source, mask=mask, layout=layout)


class TakesItselfForNone(HealthyReader):
    def mix(self, x, source, *, mask, layout):
        return super().mix(x, 0 * source if source is x else source, mask=mask, layout=layout)


class NeedsNoContext(HealthyReader):
    def source(self, x, context):
        return x.new_zeros(x.shape[0], 1, self.context_dim) if context is None and self.context_dim else (
            x if context is None else context)  # fmt: skip


class TakesContextAnywhere(HealthyReader):
    def source(self, x, context):
        return super().source(x, context if self.context_dim else None)


class ReadsFirstHalf(HealthyReader):
    """Of a longer context it reads as many tokens as it has itself."""

    def mix(self, x, source, *, mask, layout):
        n = x.shape[1]
        keys = None if mask.keys is None else mask.keys[:, :n]
        return super().mix(x, source[:, :n], mask=replace(mask, keys=keys), layout=layout)


class FlattensGrid(HealthyWindow):
    """A plane is taken for a line."""

    def near(self, layout):
        at = torch.arange(layout.length - layout.prefix, device=self.temperature.device)
        return (at[:, None] - at).abs() <= self.window


class HealthyJoiner(Mechanism):
    """The mean of the own tokens and the context's, projected, added to each token."""

    card = Card(
        name="healthy_joiner",
        family=Family.CROSS,
        summary="The context's tokens join the own ones.",
        time="n c + m c + n c c",
        memory="n c + m c",
        context="beside",
    )

    def __init__(self, site: Site):
        super().__init__(site)
        self.read = nn.Linear(site.dim, site.dim)

    def joined(self, x, source):
        return x if self.context_dim is None else torch.cat([x, source], dim=1)

    def mix(self, x, source, *, mask, layout):
        return x + self.read(self.joined(x, source)).mean(dim=1, keepdim=True)


class CountsAnEmptyContext(HealthyJoiner):
    """There is always one more token than there is."""

    def joined(self, x, source):
        more = x.new_zeros(x.shape[0], 0 if self.context_dim is None else 1, x.shape[2])
        return torch.cat([super().joined(x, source), more], dim=1)


class ProjectsTheContextApart(HealthyJoiner):
    """It has a projection more where there is a context."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.other = nn.Identity() if site.context_dim is None else nn.Linear(site.dim, site.dim)

    def mix(self, x, source, *, mask, layout):
        return super().mix(x, self.other(source), mask=mask, layout=layout)
