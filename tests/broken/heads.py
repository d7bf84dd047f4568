"""Heads that are broken on purpose, each in one way, beside healthy ones."""

from dataclasses import replace

import torch
from torch import nn

from attnzoo.core import Card, Family, Head, Law, Mask, NonNegativeInt, OptionError, PositiveInt, Site, Tap
from attnzoo.functional import masked_softmax


def claims(healthy, **changes):
    """The card of a healthy part with other claims."""
    return replace(healthy.card, **changes)


class Healthy(Head):
    """Softmax attention, explicit, with a learned temperature per head."""

    card = Card(
        name="healthy",
        family=Family.DOT_PRODUCT,
        summary="Softmax attention.",
        masks={"keys", "causal", "pairs"},
        context=True,
        incremental=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={
            Law.STOCHASTIC,
            Law.PERMUTATION_EQUIVARIANT,
            Law.LINEAR_IN_VALUES,
            Law.BOUNDED,
            Law.HEADS_APART,
        },
    )

    def __init__(self, site: Site):
        super().__init__(site)
        self.temperature = nn.Parameter(torch.ones(site.heads, 1, 1))

    def score(self, q, k):
        return self.scores(q @ k.mT / self.temperature.exp())

    def allowed(self, mask, n, m):
        return mask.dense(n, m, self.temperature.device)

    def normalise(self, scores, allowed):
        return masked_softmax(scores, allowed)

    def attend(self, q, k, v, *, mask, layout):
        weights = self.normalise(self.score(q, k), self.allowed(mask, q.shape[2], k.shape[2]))
        return self.weights(weights) @ v


class LeavesNaN(Healthy):
    def __init__(self, site: Site):
        super().__init__(site)
        nn.init.constant_(self.temperature, float("nan"))


class HidesOption(Healthy):
    """Its option is not described."""

    def __init__(self, site: Site, *, power: PositiveInt = 1):
        super().__init__(site)


class LeavesOptionUntyped(Healthy):
    """Its option has no annotation.

    Args:
        power: Described, at least.
    """

    def __init__(self, site: Site, *, power=1):
        super().__init__(site)


class CannotPickle(Healthy):
    def __init__(self, site: Site):
        super().__init__(site)
        self.activation = lambda x: x


class KeepsStateToItself(Healthy):
    def __init__(self, site: Site):
        super().__init__(site)
        self.directions = torch.randn(site.heads, 1, site.head_dim)

    def attend(self, q, k, v, *, mask, layout):
        return super().attend(q + self.directions.to(q.dtype), k, v, mask=mask, layout=layout)


class NamesNoParameter(Healthy):
    def no_weight_decay(self):
        return {"temprature"}


class Overflows(Healthy):
    def normalise(self, scores, allowed):
        weights = scores.exp() if allowed is None else scores.exp() * allowed
        return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-9)


class TakesUnclaimedMasks(Healthy):
    card = claims(Healthy, masks={"keys"}, incremental=False)

    def admit(self, x, source, mask):
        pass

    def allowed(self, mask, n, m):
        return Mask(keys=mask.keys).dense(n, m)


class LeaksPadding(Healthy):
    def allowed(self, mask, n, m):
        return replace(mask, keys=None).dense(n, m)


class CountsPaddingWrong(Healthy):
    def normalise(self, scores, allowed):
        weights = masked_softmax(scores, allowed)
        return weights if allowed is None else weights * 0.99


class ForgetsCausality(Healthy):
    def allowed(self, mask, n, m):
        return replace(mask, causal=False).dense(n, m)


class IgnoresPairs(Healthy):
    def allowed(self, mask, n, m):
        return replace(mask, pairs=None).dense(n, m)


class FillsEmptyRows(Healthy):
    def normalise(self, scores, allowed):
        return (
            scores.softmax(dim=-1) if allowed is None else scores.masked_fill(~allowed, -1e9).softmax(dim=-1)
        )


class NaNForEmptyRows(Healthy):
    def normalise(self, scores, allowed):
        return (scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))).softmax(dim=-1)


class HoldsDeadParameter(Healthy):
    def __init__(self, site: Site):
        super().__init__(site)
        self.unused = nn.Parameter(torch.ones(site.heads))


class FalsifiesGradient(Healthy):
    def attend(self, q, k, v, *, mask, layout):
        out = super().attend(q, k, v, mask=mask, layout=layout)
        return out.detach() + 0.5 * (out - out.detach())


class Counts(Healthy):
    def __init__(self, site: Site):
        super().__init__(site)
        self.calls = 0

    def attend(self, q, k, v, *, mask, layout):
        self.calls += 1
        return super().attend(q, k, v, mask=mask, layout=layout) * self.calls


class DiffersInTraining(Healthy):
    def attend(self, q, k, v, *, mask, layout):
        return super().attend(q, k, v, mask=mask, layout=layout) * (2 if self.training else 1)


class UsesGlobalRandomness(Healthy):
    def attend(self, q, k, v, *, mask, layout):
        return super().attend(q, k, v, mask=mask, layout=layout) + 0 * torch.rand(())


class FiresTwice(Healthy):
    def score(self, q, k):
        return self.scores(super().score(q, k))


class TapsUnderOtherAxes(Healthy):
    def __init__(self, site: Site):
        super().__init__(site)
        self.weights = Tap("b n m")


class CountsOtherHeads(Healthy):
    @property
    def tap_heads(self) -> int:
        return 2 * self.heads


class CallsTapOtherwise(Healthy):
    def __init__(self, site: Site):
        super().__init__(site)
        self.maps = Tap("b h n m")

    def normalise(self, scores, allowed):
        return self.maps(super().normalise(scores, allowed))


class ShowsOtherWeights(Healthy):
    def attend(self, q, k, v, *, mask, layout):
        weights = self.normalise(self.score(q, k), self.allowed(mask, q.shape[2], k.shape[2]))
        self.weights(weights)
        return weights @ v


class DiffersWhenWatched(Healthy):
    def score(self, q, k):
        return super().score(q, k) * (1.01 if self.weights.watched else 1)


class AlignsFirstQuery(Healthy):
    def allowed(self, mask, n, m):
        if mask.causal:
            first = torch.ones(n, m, dtype=torch.bool, device=self.temperature.device).tril()[None, None]
            mask = Mask(mask.keys, first if mask.pairs is None else mask.pairs & first)
        return mask.dense(n, m)


class ClaimsLinearCost(Healthy):
    card = claims(Healthy, time="n c d")


class HealthyWithClassToken(Healthy):
    """It reads a second stream on a grid, of which only tokens with a special one may ask."""

    card = claims(Healthy, grid="any", context_grid="any", incremental=False)

    def __init__(self, site: Site):
        super().__init__(site)
        if site.context_dim is not None and not site.layout.prefix:
            raise OptionError("there is no class token", help="give the site one")


class ClaimsLinearCostWithClassToken(HealthyWithClassToken):
    card = claims(HealthyWithClassToken, time="n c d", memory="n c")


class SigmoidWeights(Healthy):
    def normalise(self, scores, allowed):
        return scores.sigmoid() if allowed is None else scores.sigmoid() * allowed


class WrongAxis(Healthy):
    def normalise(self, scores, allowed):
        return masked_softmax(scores.mT, None if allowed is None else allowed.mT).mT


class HealthySubstochastic(Healthy):
    card = claims(Healthy, laws={Law.SUBSTOCHASTIC})

    def normalise(self, scores, allowed):
        return 0.9 * super().normalise(scores, allowed)


class TooMuchWeight(HealthySubstochastic):
    def normalise(self, scores, allowed):
        return 1.2 * super().normalise(scores, allowed)


class KnowsPositions(Healthy):
    def attend(self, q, k, v, *, mask, layout):
        places = torch.arange(k.shape[2], dtype=k.dtype)[:, None]
        return super().attend(q, k * (1 + places), v, mask=mask, layout=layout)


class BendsValues(Healthy):
    def attend(self, q, k, v, *, mask, layout):
        return super().attend(q, k, v.tanh(), mask=mask, layout=layout)


class LeavesHull(Healthy):
    def attend(self, q, k, v, *, mask, layout):
        return super().attend(q, k, v, mask=mask, layout=layout) * 1.5


class TalksAmongHeads(Healthy):
    """The mean of the heads' scores is subtracted, which a row's softmax feels."""

    def score(self, q, k):
        scores = super().score(q, k)
        return scores - scores.mean(dim=1, keepdim=True)


class TalksUnderPairs(Healthy):
    """What no head may see has no say in any, and what one may see has in all."""

    def allowed(self, mask, n, m):
        seen = super().allowed(mask, n, m)
        return seen if mask.pairs is None else seen.any(dim=1, keepdim=True)


class CountsHeads(Healthy):
    """Keeps for itself how many heads there are."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.many = site.heads

    def attend(self, q, k, v, *, mask, layout):
        q = q.flatten(0, 1).unflatten(0, (-1, self.many))
        return super().attend(q, k, v, mask=mask, layout=layout)


class SharesInSecret(Healthy):
    """Its heads share a matrix, and `shared` does not say so."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.turn = nn.Parameter(torch.eye(site.head_dim))

    def attend(self, q, k, v, *, mask, layout):
        return super().attend(q @ self.turn, k, v, mask=mask, layout=layout)


class HealthySharing(SharesInSecret):
    """Its heads share a matrix, and `shared` says so."""

    def shared(self):
        return {"turn"}


class HealthyWindow(Healthy):
    """Softmax attention to the neighbours on the grid.

    Args:
        site: Where it is put.
        window: How far a token sees, in grid steps.
    """

    card = claims(
        Healthy, grid="any", context=False, incremental=False, laws={Law.LOCAL, Law.SHIFT_EQUIVARIANT}
    )

    def __init__(self, site: Site, *, window: NonNegativeInt = 1):
        super().__init__(site)
        self.window = window

    def reach(self):
        return self.window

    def near(self, layout):
        coords = layout.coords(self.temperature.device)
        return (coords[:, None] - coords).abs().amax(dim=-1) <= self.window

    def attend(self, q, k, v, *, mask, layout):
        pairs = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        pairs[..., layout.prefix :, layout.prefix :] = self.near(layout)
        mask = replace(mask, pairs=pairs if mask.pairs is None else mask.pairs & pairs)
        return super().attend(q, k, v, mask=mask, layout=layout)


class SeesTooFar(HealthyWindow):
    def near(self, layout):
        coords = layout.coords(self.temperature.device)
        return (coords[:, None] - coords).abs().amax(dim=-1) <= self.window + 1


class WrapsAround(HealthyWindow):
    def near(self, layout):
        near = super().near(layout)
        near[:, -1] = True  # sees its neighbours, and the last token of all
        return near


class CountsFromTheLeft(HealthyWindow):
    def score(self, q, k):
        return super().score(q, k) * (torch.arange(q.shape[2], dtype=q.dtype)[:, None] % 2)


class UsesFirstHeadOnly(Healthy):
    """Its other weights are shown, and those of the first head are used."""

    def attend(self, q, k, v, *, mask, layout):
        weights = self.weights(self.normalise(self.score(q, k), self.allowed(mask, q.shape[2], k.shape[2])))
        return weights[:, :1] @ v


class UsesUnseenRow(Healthy):
    """The first query's weights are not those that are shown."""

    def attend(self, q, k, v, *, mask, layout):
        made = self.normalise(self.score(q, k), self.allowed(mask, q.shape[2], k.shape[2]))
        shown = self.weights(made)
        return torch.cat([made[:, :, :1], shown[:, :, 1:]], dim=2) @ v


class NormalisesWhatIsShown(Healthy):
    """What replaces the weights is made to sum to 1, squared first."""

    def attend(self, q, k, v, *, mask, layout):
        made = self.normalise(self.score(q, k), self.allowed(mask, q.shape[2], k.shape[2]))
        shown = self.weights(made)
        other = shown if shown is made else shown**2
        return other @ v


class AddsBehindTheMap(Healthy):
    """A part of what a token receives does not come by the weights, under another name for the mean."""

    def attend(self, q, k, v, *, mask, layout):
        n, m = q.shape[2], k.shape[2]
        made = self.normalise(self.score(q, k), self.allowed(mask, n, m))
        return (0.7 * self.weights(made) + 0.3 * made) @ v


class WatchedUnderMasks(Healthy):
    """Differs when it is watched, under padding only."""

    def allowed(self, mask, n, m):
        seen = super().allowed(mask, n, m)
        if self.weights.watched and mask.kinds == ("keys",):
            return None
        return seen


class ClaimsLittleWidth(Healthy):
    card = claims(Healthy, time="n m")


class ClaimsFewHeads(Healthy):
    card = claims(Healthy, memory="n m")


class ClaimsLittleMemory(Healthy):
    card = claims(Healthy, memory="n c")


class HealthyCounted(Healthy):
    card = claims(Healthy, params="h", flops="4 * n * m * c")


class ForgetsOtherHeads(Healthy):
    card = claims(Healthy, params="1")


class NamesWhatIsNotThere(Healthy):
    card = claims(Healthy, params="heads")


class CountsTheScoresAlone(Healthy):
    card = claims(Healthy, flops="2 * n * m * c")


class TakesContextsForTokens(Healthy):
    card = claims(Healthy, flops="4 * n * n * c")


class HoldsEveryChunk(Healthy):
    """No tensor is large, but all chunks of the weights are there at once."""

    card = claims(Healthy, memory="n c", masks=set(), incremental=False, laws=set(), taps={})

    def attend(self, q, k, v, *, mask, layout):
        chunks = [(part @ k.mT / self.temperature.exp()).softmax(-1) for part in q.split(16, dim=2)]
        return torch.cat([weights @ v for weights in chunks], dim=2)


class StochasticWhenSmall(Healthy):
    """Scores are cut, so that large ones no longer count for themselves."""

    def normalise(self, scores, allowed):
        weights = scores.clamp(-300, 300).exp()
        weights = weights if allowed is None else weights * allowed
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-30)


class PermutesWhenSmall(Healthy):
    """Beyond 32 tokens the last ones have a bias."""

    def score(self, q, k):
        scores = super().score(q, k)
        return scores if k.shape[2] <= 32 else scores + (torch.arange(k.shape[2], device=k.device) >= 32)


class DetachesReplacements(Healthy):
    """What replaces the weights is used, and gets no gradient."""

    def attend(self, q, k, v, *, mask, layout):
        made = self.normalise(self.score(q, k), self.allowed(mask, q.shape[2], k.shape[2]))
        shown = self.weights(made)
        return (shown if shown is made else shown.detach()) @ v
