"""Parts that are broken on purpose, each in one way, beside healthy ones. Every check must catch one of them."""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from attnzoo.core import (
    NO_MASK,
    Card,
    Family,
    Fusion,
    FusionCard,
    Head,
    Law,
    Mask,
    Mechanism,
    NonNegativeInt,
    PositiveInt,
    Site,
    Start,
    Tap,
)  # fmt: skip
from attnzoo.errors import UnsupportedContext
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
        weights="b h n m",
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT, Law.LINEAR_IN_VALUES, Law.BOUNDED},
    )

    def __init__(self, site: Site):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(site.heads, 1, 1))
        self.scores, self.weights = Tap("b h n m"), Tap("b h n m")

    def score(self, q, k):
        return self.scores(q @ k.mT / self.temperature.exp())

    def allowed(self, mask, n, m):
        return mask.dense(n, m)

    def normalise(self, scores, allowed):
        return masked_softmax(scores, allowed)

    def attend(self, q, k, v, *, mask=NO_MASK, layout):
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

    def attend(self, q, k, v, *, mask=NO_MASK, layout):
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
    def attend(self, q, k, v, *, mask=NO_MASK, layout):
        out = super().attend(q, k, v, mask=mask, layout=layout)
        return out.detach() + 0.5 * (out - out.detach())


class Counts(Healthy):
    def __init__(self, site: Site):
        super().__init__(site)
        self.calls = 0

    def attend(self, q, k, v, *, mask=NO_MASK, layout):
        self.calls += 1
        return super().attend(q, k, v, mask=mask, layout=layout) * self.calls


class DiffersInTraining(Healthy):
    def attend(self, q, k, v, *, mask=NO_MASK, layout):
        return super().attend(q, k, v, mask=mask, layout=layout) * (2 if self.training else 1)


class UsesGlobalRandomness(Healthy):
    def attend(self, q, k, v, *, mask=NO_MASK, layout):
        return super().attend(q, k, v, mask=mask, layout=layout) + 0 * torch.rand(())


class HealthyTokens(Mechanism):
    """Gates every token by a small network of itself and of the mean of what exists.

    Args:
        site: Where it is put.
        gate: How the gate starts.
    """

    card = Card(
        name="healthy_tokens",
        family=Family.CHANNEL,
        summary="Gates by the mean.",
        time="n c",
        masks={"keys"},
        laws={Law.PERMUTATION_EQUIVARIANT},
    )

    def __init__(self, site: Site, *, gate: Literal["open", "shut"] = "open"):
        super().__init__()
        self.start = 1.0 if gate == "open" else -1.0
        self.gating, self.gate = nn.Linear(site.dim, site.dim), Tap("b n c")
        self.init_weights()

    def init_weights(self):
        nn.init.constant_(self.gating.bias, self.start)

    def refuse(self, context):
        if context is not None:
            raise UnsupportedContext("AZ404", "no context")

    def mean(self, x, mask, layout):
        keys = torch.ones_like(x[..., :1]) if mask.keys is None else mask.keys[..., None].to(x.dtype)
        return (x * keys).sum(dim=1, keepdim=True) / keys.sum(dim=1, keepdim=True).clamp(min=1)

    def forward(self, x, context=None, *, mask=NO_MASK, layout):
        mask.only("keys")
        self.refuse(context)
        return x * self.gate(self.gating(x + self.mean(x, mask, layout)).sigmoid())


class LosesDtype(HealthyTokens):
    def forward(self, x, context=None, *, mask=NO_MASK, layout):
        return super().forward(x, context, mask=mask, layout=layout).float()


class LosesTokens(HealthyTokens):
    def forward(self, x, context=None, *, mask=NO_MASK, layout):
        return super().forward(x, context, mask=mask, layout=layout)[:, layout.prefix :]


class ForgetsInitWeights(HealthyTokens):
    def init_weights(self):
        pass

    def __init__(self, site: Site, *, gate: Literal["open", "shut"] = "open"):
        super().__init__(site, gate=gate)
        nn.init.constant_(self.gating.bias, self.start)


class ForgetsScale(HealthyTokens):
    def __init__(self, site: Site, *, gate: Literal["open", "shut"] = "open"):
        super().__init__(site, gate=gate)
        nn.init.normal_(self.gating.weight, std=5.0)


class HealthyGrid(HealthyTokens):
    card = claims(HealthyTokens, grid="any", laws=set())

    def mean(self, x, mask, layout):
        layout.check(x)
        return super().mean(x, mask, layout)


class TakesWrongLayout(HealthyGrid):
    def mean(self, x, mask, layout):
        return HealthyTokens.mean(self, x, mask, layout)


class LooksAtGeometry(HealthyTokens):
    def mean(self, x, mask, layout):
        return super().mean(x, mask, layout) * len(layout.grid)


class MixesBatch(HealthyTokens):
    def mean(self, x, mask, layout):
        return super().mean(x, mask, layout).mean(dim=0, keepdim=True)


class MixesBatchInTraining(HealthyTokens):
    def mean(self, x, mask, layout):
        mean = super().mean(x, mask, layout)
        return mean.mean(dim=0, keepdim=True) if self.training else mean


class TakesContext(HealthyTokens):
    def refuse(self, context):
        pass


class HealthyReader(Mechanism):
    """Adds the mean of the context, projected."""

    card = Card(
        name="healthy_reader", family=Family.LATENT, summary="Reads a mean.", masks={"keys"}, context=True
    )

    def __init__(self, site: Site):
        super().__init__()
        self.read = nn.Linear(site.context_dim or site.dim, site.dim)

    def forward(self, x, context=None, *, mask=NO_MASK, layout):
        mask.only("keys")
        source = x if context is None else context
        keys = torch.ones_like(source[..., :1]) if mask.keys is None else mask.keys[..., None].to(x.dtype)
        return x + self.read(
            (source * keys).sum(dim=1, keepdim=True) / keys.sum(dim=1, keepdim=True).clamp(min=1)
        )


class IgnoresContext(HealthyReader):
    def forward(self, x, context=None, *, mask=NO_MASK, layout):
        return super().forward(x, None if context is None else 0 * context, mask=mask, layout=layout)


class LeaksContextPadding(HealthyReader):
    def forward(self, x, context=None, *, mask=NO_MASK, layout):
        mask = mask if context is None else replace(mask, keys=None)
        return super().forward(x, context, mask=mask, layout=layout)


class FiresTwice(Healthy):
    def score(self, q, k):
        return self.scores(super().score(q, k))


class TapsUnderOtherAxes(Healthy):
    def __init__(self, site: Site):
        super().__init__(site)
        self.weights = Tap("b n m")


class CallsTapOtherwise(Healthy):
    def __init__(self, site: Site):
        super().__init__(site)
        self.maps = Tap("b h n m")

    def normalise(self, scores, allowed):
        return self.maps(super().normalise(scores, allowed))


class ShowsOtherWeights(Healthy):
    def attend(self, q, k, v, *, mask=NO_MASK, layout):
        weights = self.normalise(self.score(q, k), self.allowed(mask, q.shape[2], k.shape[2]))
        self.weights(weights)
        return weights @ v


class DiffersWhenWatched(Healthy):
    def score(self, q, k):
        return super().score(q, k) * (1.01 if self.weights.watched else 1)


class AlignsFirstQuery(Healthy):
    def allowed(self, mask, n, m):
        if mask.causal:
            first = torch.ones(n, m, dtype=torch.bool).tril()[None, None]
            mask = Mask(mask.keys, first if mask.pairs is None else mask.pairs & first)
        return mask.dense(n, m)


class ClaimsLinearCost(Healthy):
    card = claims(Healthy, time="n c d")


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
    def attend(self, q, k, v, *, mask=NO_MASK, layout):
        places = torch.arange(k.shape[2], dtype=k.dtype)[:, None]
        return super().attend(q, k * (1 + places), v, mask=mask, layout=layout)


class BendsValues(Healthy):
    def attend(self, q, k, v, *, mask=NO_MASK, layout):
        return super().attend(q, k, v.tanh(), mask=mask, layout=layout)


class LeavesHull(Healthy):
    def attend(self, q, k, v, *, mask=NO_MASK, layout):
        return super().attend(q, k, v, mask=mask, layout=layout) * 1.5


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
        coords = layout.coords()
        return (coords[:, None] - coords).abs().amax(dim=-1) <= self.window

    def attend(self, q, k, v, *, mask=NO_MASK, layout):
        layout.check(k[:, 0])
        pairs = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
        pairs[..., layout.prefix :, layout.prefix :] = self.near(layout)
        mask = replace(mask, pairs=pairs if mask.pairs is None else mask.pairs & pairs)
        return super().attend(q, k, v, mask=mask, layout=layout)


class SeesTooFar(HealthyWindow):
    def near(self, layout):
        coords = layout.coords()
        return (coords[:, None] - coords).abs().amax(dim=-1) <= self.window + 1


class WrapsAround(HealthyWindow):
    def near(self, layout):
        near = super().near(layout)
        near[:, -1] = True  # sees its neighbours, and the last token of all
        return near


class CountsFromTheLeft(HealthyWindow):
    def score(self, q, k):
        return super().score(q, k) * (torch.arange(q.shape[2], dtype=q.dtype)[:, None] % 2)


class HealthyFusion(Fusion):
    """A convex mixture with learned shares, the same for all tokens."""

    card = FusionCard(
        name="healthy_fusion",
        summary="A convex mixture.",
        laws={
            Law.SINGLE,
            Law.AGREE,
            Law.CONVEX,
            Law.ADDITIVE,
            Law.FAIR_START,
            Law.IDENTITY_START,
            Law.TOKEN_LOCAL,
        },
    )

    def __init__(self, site: Site, arity: int, *, start: Start = "free"):
        super().__init__(site, arity, start=start)
        self.share, self.shares = nn.Parameter(torch.empty(arity)), Tap("k")
        self.init_weights()

    def init_weights(self):
        nn.init.zeros_(self.share)

    def merge(self, branches, x):
        shares = self.shares(self.share.softmax(dim=0))
        return sum(share * branch for share, branch in zip(shares, branches, strict=True))


class HealthySum(Fusion):
    """The sum."""

    card = FusionCard(
        name="healthy_sum", summary="The sum.", laws={Law.SYMMETRIC, Law.NEUTRAL_ZERO, Law.ADDITIVE}
    )

    def merge(self, branches, x):
        return sum(branches)


class HealthySplit(Fusion):
    """Channels dealt out."""

    card = FusionCard(name="healthy_split", summary="Channels dealt out.")

    def __init__(self, site: Site, arity: int):
        super().__init__(site, arity)

    @classmethod
    def sites(cls, site, arity):
        cls._check_arity(arity)
        return [replace(site, dim=site.dim // arity, heads=site.heads // arity)] * arity

    def split(self, x, axis):
        return list(x.chunk(self.arity, dim=axis))

    def merge(self, branches, x):
        return torch.cat(list(branches), dim=self.head_axis)


class DealsNothing(HealthySplit):
    def split(self, x, axis):
        return [x] * self.arity


class ScalesMerge(HealthyFusion):
    def merge(self, branches, x):
        return 1.01 * super().merge(branches, x)


class ShiftsMerge(HealthyFusion):
    def merge(self, branches, x):
        return super().merge(branches, x) + 0.1


class LooksAtOrder(HealthySum):
    def merge(self, branches, x):
        return sum((i + 1) * branch for i, branch in enumerate(branches))


class Averages(HealthySum):
    def merge(self, branches, x):
        return sum(branches) / self.arity


class FavoursFirst(HealthyFusion):
    def init_weights(self):
        nn.init.zeros_(self.share)
        with torch.no_grad():
            self.share[0] = 1


class AlmostIdentity(HealthyFusion):
    def merge_from_first(self, branches, x):
        return branches[0] + (self.gamma + 1e-7) * (self.merge(branches, x) - branches[0])


class NeverLearnsOthers(HealthyFusion):
    def merge_from_first(self, branches, x):
        return branches[0] + self.gamma**2 * (self.merge(branches, x) - branches[0])


class MixesTokens(HealthyFusion):
    def merge(self, branches, x):
        return super().merge(branches, x) + x.mean(dim=-2, keepdim=True)


class TakesAnyArity(HealthyFusion):
    card = claims(HealthyFusion, arity=(2, 2))

    @classmethod
    def _check_arity(cls, arity):
        pass


class DeadBranch(HealthySum):
    def merge(self, branches, x):
        return branches[0]


BROKEN = [
    ("check_builds", LeavesNaN, Healthy),
    ("check_options", HidesOption, HealthyTokens),
    ("check_options", LeavesOptionUntyped, HealthyTokens),
    ("check_pickles", CannotPickle, Healthy),
    ("check_pickles", KeepsStateToItself, Healthy),
    ("check_no_weight_decay", NamesNoParameter, Healthy),
    ("check_output", LosesDtype, HealthyTokens),
    ("check_output", LosesTokens, HealthyTokens),
    ("check_large_inputs", Overflows, Healthy),
    ("check_unclaimed_masks_refused", TakesUnclaimedMasks, HealthyTokens),
    ("check_padding_invisible", LeaksPadding, Healthy),
    ("check_full_keys_change_nothing", CountsPaddingWrong, Healthy),
    ("check_causality", ForgetsCausality, Healthy),
    ("check_forbidden_pairs", IgnoresPairs, Healthy),
    ("check_empty_rows_are_zero", FillsEmptyRows, Healthy),
    ("check_empty_rows_are_finite", NaNForEmptyRows, Healthy),
    ("check_gradients", HoldsDeadParameter, Healthy),
    ("check_gradients", DeadBranch, HealthySum),
    ("check_gradcheck", FalsifiesGradient, Healthy),
    ("check_eval_deterministic", Counts, Healthy),
    ("check_train_equals_eval", DiffersInTraining, Healthy),
    ("check_no_global_randomness", UsesGlobalRandomness, Healthy),
    ("check_init_survives_host", ForgetsInitWeights, HealthyTokens),
    ("check_init_survives_host", ForgetsScale, HealthyTokens),
    ("check_wrong_layout_refused", TakesWrongLayout, HealthyGrid),
    ("check_geometry_ignored", LooksAtGeometry, HealthyTokens),
    ("check_batch_independent", MixesBatch, HealthyTokens),
    ("check_batch_independent", MixesBatchInTraining, HealthyTokens),
    ("check_context", IgnoresContext, HealthyReader),
    ("check_context_padding_invisible", LeaksContextPadding, HealthyReader),
    ("check_context_refused", TakesContext, HealthyTokens),
    ("check_taps", FiresTwice, Healthy),
    ("check_taps", TapsUnderOtherAxes, Healthy),
    ("check_taps", CallsTapOtherwise, Healthy),
    ("check_taps_live", ShowsOtherWeights, Healthy),
    ("check_watching_changes_nothing", DiffersWhenWatched, Healthy),
    ("check_incremental", AlignsFirstQuery, Healthy),
    ("check_cost", ClaimsLinearCost, Healthy),
    ("check_stochastic", SigmoidWeights, Healthy),
    ("check_stochastic", WrongAxis, Healthy),
    ("check_substochastic", TooMuchWeight, HealthySubstochastic),
    ("check_permutation_equivariant", KnowsPositions, Healthy),
    ("check_shift_equivariant", CountsFromTheLeft, HealthyWindow),
    ("check_linear_in_values", BendsValues, Healthy),
    ("check_local", SeesTooFar, HealthyWindow),
    ("check_local", WrapsAround, HealthyWindow),
    ("check_bounded", LeavesHull, Healthy),
    ("check_single", ScalesMerge, HealthyFusion),
    ("check_agree", ShiftsMerge, HealthyFusion),
    ("check_convex", ShiftsMerge, HealthyFusion),
    ("check_additive", ShiftsMerge, HealthyFusion),
    ("check_symmetric", LooksAtOrder, HealthySum),
    ("check_neutral_zero", Averages, HealthySum),
    ("check_fair_start", FavoursFirst, HealthyFusion),
    ("check_identity_start", AlmostIdentity, HealthyFusion),
    ("check_identity_start", NeverLearnsOthers, HealthyFusion),
    ("check_token_local", MixesTokens, HealthyFusion),
    ("check_split", DealsNothing, HealthySplit),
    ("check_arity_refused", TakesAnyArity, HealthyFusion),
]
"""The check that must catch it, the broken part, and a healthy part that passes the same check."""
