"""Mechanisms with a `step` of their own that goes wrong in one way each."""

import torch
from torch import nn

from attnzoo.core import NO_MASK, Card, Family, Mechanism, Site
from broken.tokens import HealthyReader


class HealthyRetention(Mechanism):
    """A state that decays and adds k vᵀ of each token; `step` carries it on. A context is read whole."""

    card = Card(
        name="healthy_retention",
        family=Family.RECURRENT,
        summary="A decaying state.",
        time="n m c + n c c",
        memory="n m + n c + m c",
        masks={"causal", "keys"},
        one_head=True,
        context=True,
        honours={"qkv_bias"},
    )
    decay = 0.9

    def __init__(self, site: Site):
        super().__init__(site)
        self.q = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)
        self.kv = nn.Linear(site.context_dim or site.dim, 2 * site.dim, bias=site.qkv_bias)

    def mix(self, x, source, *, mask, layout):
        n, m = x.shape[1], source.shape[1]
        q, (k, v) = self.q(x), self.kv(source).chunk(2, dim=-1)
        if mask.keys is not None:
            k = k * mask.keys[..., None]
        distance = torch.arange(m - n, m, device=x.device)[:, None] - torch.arange(m, device=x.device)
        share = self.decay ** distance.abs().to(x.dtype)
        if mask.causal:
            share = share * (distance >= 0)
        return (q @ k.mT * share) @ v

    def step(self, x, cache, context=None, *, mask, layout, context_layout=None):
        if context is not None or not mask.causal:
            return super().step(x, cache, context, mask=mask, layout=layout, context_layout=context_layout)
        rows = [
            self.one(x[:, i : i + 1], cache, mask, layout.length - x.shape[1] + i) for i in range(x.shape[1])
        ]
        return torch.cat(rows, dim=1)

    def one(self, x, cache, mask, at):
        """One token: the state is kept as the newest rows of the cache, (b c c)."""
        q, (k, v) = self.q(x), self.kv(x).chunk(2, dim=-1)
        if mask.keys is not None:
            k = k * mask.keys[:, at : at + 1, None]
        state = self.decay * self.before(cache, x) + k.mT @ v
        self.keep(cache, state)
        return q @ state

    def before(self, cache, x):
        if not cache.length:
            return x.new_zeros(x.shape[0], x.shape[2], x.shape[2])
        (rows,) = cache.extend(x.new_empty(x.shape[0], 0, x.shape[2]))
        return rows[:, -x.shape[2] :]

    def keep(self, cache, state):
        cache.extend(state)


class ForgetsState(HealthyRetention):
    def before(self, cache, x):
        return x.new_zeros(x.shape[0], x.shape[2], x.shape[2])


class StepsInZeros(HealthyRetention):
    def one(self, x, cache, mask, at):
        return 0 * super().one(x, cache, mask, at)


class KeepsStateOnItself(HealthyRetention):
    def before(self, cache, x):
        if not cache.length:
            self.state = [x.new_zeros(x.shape[0], x.shape[2], x.shape[2])]
        return self.state[0]

    def keep(self, cache, state):
        cache.extend(state)
        self.state = [state]


class IgnoresSelect(HealthyRetention):
    """The state is an attribute of the cache that `select` does not know."""

    def before(self, cache, x):
        return getattr(cache, "mine", x.new_zeros(x.shape[0], x.shape[2], x.shape[2]))[
            torch.arange(x.shape[0]) % len(getattr(cache, "mine", x))
        ]

    def keep(self, cache, state):
        cache.extend(state)
        cache.mine = state


class StepsOneOfMany(HealthyRetention):
    """Of a piece of several tokens all are read as the last."""

    def step(self, x, cache, context=None, *, mask, layout, context_layout=None):
        if context is not None or not mask.causal:
            return super().step(x, cache, context, mask=mask, layout=layout)
        last = self.one(x[:, -1:], cache, mask, layout.length - 1)
        return last.expand(x.shape)


class ForgetsAfterForty(HealthyRetention):
    """A cache of 40 tokens that starts again."""

    def before(self, cache, x):
        state = super().before(cache, x)
        return state * (cache.length // x.shape[2] != 40)


class StepsWithoutPadding(HealthyRetention):
    def step(self, x, cache, context=None, *, mask, layout, context_layout=None):
        if context is None:
            mask = type(mask)(causal=mask.causal)
        return super().step(x, cache, context, mask=mask, layout=layout, context_layout=context_layout)


class StepsBlindToContext(HealthyReader):
    """Every step reads the context of the first, whatever became of the samples."""

    def step(self, x, cache, context=None, *, mask, layout, context_layout=None):
        kept = cache.__dict__.setdefault("first", (context, mask))
        source, kept_mask = (x, mask) if context is None else kept
        return self.proj_drop(self.mix(x, source, mask=kept_mask, layout=layout))


class StepsWithoutMask(HealthyReader):
    def step(self, x, cache, context=None, *, mask, layout, context_layout=None):
        return super().step(x, cache, context, mask=NO_MASK, layout=layout, context_layout=context_layout)
