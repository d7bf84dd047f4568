"""Components that hear a site's wishes wrongly."""

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, Site, rotate
from attnzoo.functional import masked_softmax
from broken.heads import Healthy, claims
from broken.tokens import HealthyTokens


class HealthyProjected(Mechanism):
    """Softmax attention of one head with projections of its own, which honours what a site may wish of them."""

    card = Card(
        name="healthy_projected",
        family=Family.DOT_PRODUCT,
        summary="Softmax attention of one head.",
        time="n m c + n c c",
        memory="n m + n c",
        masks={"keys"},
        one_head=True,
        honours={"qkv_bias", "proj_bias", "qk_norm"},
        taps={"weights": "b n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
    )

    def __init__(self, site: Site):
        super().__init__(site)
        self.q, self.k, self.v = (nn.Linear(site.dim, site.dim, bias=site.qkv_bias) for _ in range(3))
        self.q_norm = self.norm(site)
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)

    def norm(self, site):
        return nn.LayerNorm(site.dim) if site.qk_norm else nn.Identity()

    def drop(self, weights):
        return self.weights(weights)

    def mix(self, x, source, *, mask, layout):
        scores = self.q_norm(self.q(x)) @ self.k(x).mT
        weights = masked_softmax(scores, None if mask.keys is None else mask.keys[:, None])
        return self.proj(self.drop(weights) @ self.v(x))


class DropsInEval(HealthyProjected):
    def drop(self, weights):
        return F.dropout(self.weights(weights), self.attn_drop)


class DropsNothing(HealthyProjected):
    def __init__(self, site):
        super().__init__(site)
        self.weights.dropout = 0.0


class DropsTheSameForAll(HealthyProjected):
    def __init__(self, site):
        super().__init__(site)
        self.weights.dropout = 0.0

    def drop(self, weights):
        kept = torch.ones_like(weights[:1])
        return self.weights(weights) * (F.dropout(kept, self.attn_drop) if self.training else kept)


class DropsTheSameAlways(HealthyProjected):
    """Its random numbers are its own, from one seed."""

    def __init__(self, site):
        super().__init__(site)
        self.weights.dropout = 0.0

    def drop(self, weights):
        if not self.training or not self.attn_drop:
            return self.weights(weights)
        random = torch.Generator().manual_seed(3)
        kept = torch.rand(weights.shape, generator=random).to(weights) >= self.attn_drop
        return self.weights(weights) * kept / (1 - self.attn_drop)


class DropsWithOwnSeed(HealthyProjected):
    def drop(self, weights):
        if self.training:
            torch.manual_seed(0)
        return super().drop(weights)


class TapsAfterDropout(HealthyProjected):
    def __init__(self, site):
        super().__init__(site)
        self.weights.dropout = 0.0

    def drop(self, weights):
        return self.weights(F.dropout(weights, self.attn_drop, self.training))


class DropsTwice(Healthy):
    def normalise(self, scores, allowed):
        return F.dropout(super().normalise(scores, allowed), self.attn_drop, self.training)


class DropsWithoutScaling(Healthy):
    def __init__(self, site):
        super().__init__(site)
        self.weights.dropout = 0.0

    def attend(self, q, k, v, *, mask, layout):
        weights = self.weights(self.normalise(self.score(q, k), self.allowed(mask, q.shape[2], k.shape[2])))
        if self.training and self.attn_drop:
            weights = weights * (torch.rand_like(weights) >= self.attn_drop)
        return weights @ v


class DropsOutputTwice(HealthyProjected):
    def mix(self, x, source, *, mask, layout):
        return self.proj_drop(super().mix(x, source, mask=mask, layout=layout))


class NeverDropsOutput(HealthyProjected):
    def __init__(self, site):
        super().__init__(site)
        self.proj_drop = nn.Identity()


class IgnoresQkvBias(HealthyProjected):
    def __init__(self, site):
        super().__init__(site)
        self.q, self.k, self.v = (nn.Linear(site.dim, site.dim) for _ in range(3))


class SwapsBiases(HealthyProjected):
    def __init__(self, site):
        super().__init__(site)
        self.q, self.k, self.v = (nn.Linear(site.dim, site.dim, bias=site.proj_bias) for _ in range(3))
        self.proj = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)


class HearsUnclaimedBias(HealthyTokens):
    def __init__(self, site, *, gate="open"):
        super().__init__(site, gate=gate)
        self.gating = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)

    def init_weights(self):
        pass


class IgnoresQkNorm(HealthyProjected):
    def norm(self, site):
        return nn.Identity()


class BuildsQkNormUnused(HealthyProjected):
    def __init__(self, site):
        super().__init__(site)
        self.spare, self.q_norm = self.q_norm, nn.Identity()


class TakesEveryWish(HealthyProjected):
    card = claims(HealthyProjected, honours={"qkv_bias", "proj_bias", "qk_norm", "rotary", "scale_norm"})


class HealthyTurned(HealthyProjected):
    card = claims(HealthyProjected, honours={*HealthyProjected.card.honours, "rotary"})

    def __init__(self, site):
        super().__init__(site)
        self.rotary, self.head_dim = site.rotary, site.head_dim

    def turn(self, heads, layout):
        return layout.turn(heads)

    def turned(self, x, layout):
        heads = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return self.turn(heads, layout).transpose(1, 2).flatten(2) if self.rotary else x

    def mix(self, x, source, *, mask, layout):
        q, k = (self.turned(t, layout) for t in (self.q_norm(self.q(x)), self.k(x)))
        weights = masked_softmax(q @ k.mT, None if mask.keys is None else mask.keys[:, None])
        return self.proj(self.drop(weights) @ self.v(x))


class TurnsAsALine(HealthyTurned):
    def turn(self, heads, layout):
        return rotate(heads)
