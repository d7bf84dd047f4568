"""Heads that get masks wrong in one way each, and mechanisms that leave refusing to luck."""

from dataclasses import replace

import torch

from attnzoo.core import Mask
from broken.heads import Healthy, claims
from broken.tokens import HealthyTokens


class TrustsEveryMask(Healthy):
    """It takes masks that do not fit, and stretches them."""

    def admit(self, x, source, mask):
        pass


class StretchesKeys(HealthyTokens):
    def admit(self, x, source, mask):
        pass


class DropsKeysWhenCausal(Healthy):
    def allowed(self, mask, n, m):
        return super().allowed(replace(mask, keys=None) if mask.causal else mask, n, m)


class DropsPairsWhenCausal(Healthy):
    def allowed(self, mask, n, m):
        return super().allowed(replace(mask, pairs=None) if mask.causal else mask, n, m)


class DropsPairsBesideKeys(Healthy):
    def allowed(self, mask, n, m):
        return super().allowed(replace(mask, pairs=None) if mask.keys is not None else mask, n, m)


class DropsCausalBesidePairs(Healthy):
    def allowed(self, mask, n, m):
        return super().allowed(replace(mask, causal=mask.causal and mask.pairs is None), n, m)


class DropsKeysWhenAllAreThere(Healthy):
    def allowed(self, mask, n, m):
        whole = mask.pairs is not None and mask.causal
        return super().allowed(replace(mask, keys=None) if whole else mask, n, m)


class AnyKindWillDo(Healthy):
    """Joins masks of several kinds by or."""

    def allowed(self, mask, n, m):
        parts = [Mask(keys=mask.keys), Mask(pairs=mask.pairs), Mask(causal=mask.causal)]
        seen = [super(AnyKindWillDo, self).allowed(part, n, m) for part in parts if not part.free]
        if not seen:
            return None
        joined = seen[0]
        for part in seen[1:]:
            joined = joined | part
        return joined


class PairsOfFirstHead(Healthy):
    def allowed(self, mask, n, m):
        return super().allowed(mask if mask.pairs is None else replace(mask, pairs=mask.pairs[:, :1]), n, m)


class PairsOfAnyHead(Healthy):
    def allowed(self, mask, n, m):
        if mask.pairs is not None:
            mask = replace(mask, pairs=mask.pairs.any(dim=1, keepdim=True))
        return super().allowed(mask, n, m)


class PairsOfFirstSample(Healthy):
    def allowed(self, mask, n, m):
        return super().allowed(mask if mask.pairs is None else replace(mask, pairs=mask.pairs[:1]), n, m)


class PairsOfFirstQuery(Healthy):
    def allowed(self, mask, n, m):
        return super().allowed(
            mask if mask.pairs is None else replace(mask, pairs=mask.pairs[:, :, :1]), n, m
        )


class PairsTransposed(Healthy):
    def allowed(self, mask, n, m):
        if mask.pairs is not None and n == m:
            mask = replace(mask, pairs=mask.pairs.mT)
        return super().allowed(mask, n, m)


class KeysOfFirstSample(Healthy):
    def allowed(self, mask, n, m):
        return super().allowed(mask if mask.keys is None else replace(mask, keys=mask.keys[:1]), n, m)


class KeysOfSomeSample(HealthyTokens):
    def mean(self, x, mask, layout):
        if mask.keys is not None:
            mask = replace(mask, keys=mask.keys.any(dim=0).expand(mask.keys.shape))
        return super().mean(x, mask, layout)


class HidesTheLastKey(Healthy):
    """Whatever the mask allows."""

    def allowed(self, mask, n, m):
        seen = super().allowed(mask, n, m)
        if seen is None or m < 3:
            return seen
        return seen & (torch.arange(m) < m - 1)


class StrictlyCausal(Healthy):
    """A query does not see itself."""

    def allowed(self, mask, n, m):
        seen = super().allowed(mask, n, m)
        if mask.causal and n == m:
            seen = seen & ~torch.eye(n, dtype=torch.bool)
        return seen


class CausalOverFirstTokens(Healthy):
    """A chunk of 32 that forgets causality in the next one."""

    def allowed(self, mask, n, m):
        if mask.causal and n == m and n > 32:
            later = torch.ones(n, m, dtype=torch.bool).tril()
            later[32:, 32:] = True
            pairs = later[None, None]
            mask = Mask(mask.keys, pairs if mask.pairs is None else pairs & mask.pairs)
        return super().allowed(mask, n, m)


class PaddingOfFirstChunk(Healthy):
    """Keys beyond 64 always exist."""

    def allowed(self, mask, n, m):
        if mask.keys is not None and m > 64:
            mask = replace(mask, keys=mask.keys.clone())
            mask.keys[:, 64:] = True
        return super().allowed(mask, n, m)


class LeaksALittle(Healthy):
    """Adds a large negative number, which is not infinite."""

    def normalise(self, scores, allowed):
        return scores.softmax(dim=-1) if allowed is None else (scores - 12.0 * ~allowed).softmax(dim=-1)


class SaturatesInstead(Healthy):
    """-1e4 hides nothing from scores of a million."""

    def normalise(self, scores, allowed):
        if allowed is None:
            return scores.softmax(dim=-1)
        return (scores - 1e4 * ~allowed).softmax(dim=-1) * allowed.any(dim=-1, keepdim=True)


class CachesMaskByShape(Healthy):
    def __init__(self, site):
        super().__init__(site)
        self.seen = {}

    def key(self, mask):
        return tuple(None if part is None else part.shape for part in (mask.keys, mask.pairs)), mask.causal

    def allowed(self, mask, n, m):
        key = (self.key(mask), n, m)
        if key not in self.seen:
            self.seen[key] = super().allowed(mask, n, m)
        return self.seen[key]


class CachesMaskByIdentity(CachesMaskByShape):
    def key(self, mask):
        return id(mask.keys), id(mask.pairs), mask.causal

    def allowed(self, mask, n, m):
        seen = super().allowed(mask, n, m)
        self.alive = [*getattr(self, "alive", []), mask]
        return seen if seen is None else seen.clone()


class KeepsFirstMask(Healthy):
    def allowed(self, mask, n, m):
        if not hasattr(self, "first"):
            self.first = mask
        fits = self.first.kinds == mask.kinds
        return super().allowed(self.first if fits and not mask.free else mask, n, m)


class ChangesMask(Healthy):
    def allowed(self, mask, n, m):
        if mask.keys is not None:
            mask.keys[:, -1] = True
        return super().allowed(mask, n, m)


class ReadsMaskMemory(Healthy):
    """Takes a mask for contiguous, as a kernel might."""

    def allowed(self, mask, n, m):
        if mask.keys is not None and not mask.keys.is_contiguous():
            lying = torch.as_strided(mask.keys, mask.keys.shape, (m, 1)) if mask.keys.untyped_storage().nbytes() >= (
                mask.keys.shape[0] * m) else mask.keys.flip(1)  # fmt: skip
            mask = replace(mask, keys=lying)
        return super().allowed(mask, n, m)


class FullKeysAreSlow(Healthy):
    card = claims(Healthy)

    def normalise(self, scores, allowed):
        weights = super().normalise(scores, allowed)
        return weights if allowed is None or not allowed.all() else weights.roll(1, dims=-1)


class GradientThroughPadding(HealthyTokens):
    """The value is that of the mean of what exists, the gradient that of the mean of all."""

    def mean(self, x, mask, layout):
        every = x.mean(dim=1, keepdim=True)
        return every + (super().mean(x, mask, layout) - every).detach()
