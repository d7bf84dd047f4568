"""Components of the rarer forms, and a zoo that has them."""

import pytest
import torch
from torch import nn

from attnzoo import hookimpl
from attnzoo.core import Card, Family, Head, Law, Mechanism, Pool
from attnzoo.functional import masked_softmax
from attnzoo.zoo import Zoo, manager


class ScoredPool(Pool):
    """Σ wₙ xₙ, w = softmax of a score of each token.

    Args:
        site: Where the pool is put.
        bias: Whether scores have a bias.
    """

    card = Card("scored_pool", Family.LATENT, "A weighted mean of all tokens.", masks={"keys"},
                taps={"weights": "b n"}, laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT})  # fmt: skip

    def __init__(self, site, *, bias: bool = False):
        super().__init__(site)
        self.score = nn.Linear(site.dim, 1, bias=bias)

    def pool(self, x, *, mask, layout):
        weights = self.weights(masked_softmax(self.score(x)[..., 0], mask.keys))
        return (weights[..., None] * x).sum(1)


class RowPool(Pool):
    """The mean of the grid tokens, each weighted with the number of its row: it must know the grid."""

    card = Card("row_pool", Family.LATENT, "Later rows count more.", grid=2)

    def pool(self, x, *, mask, layout):
        _, tokens = layout.split(x)
        weights = layout.coords(x.device)[:, 0].to(x) + 1
        return (weights[:, None] * tokens).mean(1)


class LitPool(Pool):
    """The mean of the grid tokens, weighted with a map."""

    card = Card("lit_pool", Family.LATENT, "Where there is light.", grid="any", given={"light": "scores"})

    def pool(self, x, *, mask, layout, light):
        _, tokens = layout.split(x)
        return (light.flatten(1)[..., None].to(x) * tokens).mean(1)


class RegionMean(Head):
    """Each grid token receives the mean of the values of its region; special tokens receive their own."""

    card = Card(
        "region_mean", Family.LOCAL, "The mean of one's region.", grid="any", given={"regions": "labels"}
    )

    def attend(self, q, k, v, *, mask, layout, regions):
        labels, p = regions.flatten(1), layout.prefix
        same = (labels[:, :, None] == labels[:, None]).to(v)
        grid = (same / same.sum(-1, keepdim=True))[:, None] @ v[:, :, p:]
        return torch.cat([v[:, :, :p], grid], dim=2)


class Lit(Mechanism):
    """Grid tokens times a map; special tokens as they are."""

    card = Card("lit", Family.MIXING, "Light on tokens.", grid="any", given={"light": "scores"})

    def mix(self, x, source, *, mask, layout, light):
        prefix, tokens = layout.split(x)
        return torch.cat([prefix, light.flatten(1)[..., None].to(x) * tokens], dim=1)


class LitLabels(Mechanism):
    """As `Lit`, of a map of the same name and another kind."""

    card = Card("lit_labels", Family.MIXING, "Labels for light.", grid="any", given={"light": "labels"})

    def mix(self, x, source, *, mask, layout, light):
        return x


class LitNorm(Mechanism):
    """As `Lit`, of a map that is called like an argument of the models."""

    card = Card("lit_norm", Family.MIXING, "A bad name.", grid="any", given={"norm": "scores"})

    def mix(self, x, source, *, mask, layout, norm):
        return x


class LookedPool(Pool):
    """The sum of the grid tokens, each times how much the class token looked at it."""

    card = Card(
        "looked_pool", Family.LATENT, "Where the layers looked.", grid="any", given={"rollout": "scores"}
    )

    def pool(self, x, *, mask, layout, rollout):
        _, tokens = layout.split(x)
        return (rollout.flatten(1)[..., None].to(x) * tokens).sum(1)


class Looking(Head):
    """softmax(q kᵀ / √d + r) v, r how much the class token looked at a key: it asks, and has a map itself."""

    card = Card(
        "looking", Family.DOT_PRODUCT, "Where the layers looked, once more.", grid="any",
        given={"rollout": "scores"}, taps={"scores": "b h n m", "weights": "b h n m"}, laws={Law.STOCHASTIC},
    )  # fmt: skip

    def attend(self, q, k, v, *, mask, layout, rollout):
        extra = nn.functional.pad(rollout.flatten(1), (layout.prefix, 0))[:, None, None].to(q)
        return self.weights(self.scores(q @ k.mT / q.shape[-1] ** 0.5 + extra).softmax(-1)) @ v


class LookedLabels(Mechanism):
    """Labels under the name of scores that a ViT makes."""

    card = Card("looked_labels", Family.MIXING, "A bad kind.", grid="any", given={"rollout": "labels"})

    def mix(self, x, source, *, mask, layout, rollout):
        return x


class Plugin:
    """What a plugin's module offers."""

    @staticmethod
    @hookimpl
    def attnzoo_mechanisms():
        """All of the above."""
        lit = [RegionMean, Lit, LitLabels, LitNorm, LitPool]
        return [*lit, LookedPool, Looking, LookedLabels, ScoredPool, RowPool]


@pytest.fixture(autouse=True)
def own_zoo(monkeypatch):
    """The zoo of this process, with these components."""
    zoo = Zoo.of(plugins=[("own", Plugin)])
    assert not zoo.problems
    monkeypatch.setattr(manager, "_zoo", zoo)
    return zoo
