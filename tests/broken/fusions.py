"""Fusions that are broken on purpose, each in one way, beside healthy ones."""

from dataclasses import replace

import torch
from torch import nn

from attnzoo.core import NO_MASK, Fusion, FusionCard, Law, Site, Start, Tap
from attnzoo.functional import mean_token
from broken.heads import claims


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


class OvershootsFirst(HealthyFusion):
    """a + γ (r + a)."""

    def merge_from_first(self, branches, x):
        return branches[0] + self.gamma * (self.merge(branches, x) + branches[0])


class SquaresGamma(HealthyFusion):
    """Right at 0 and at 1, and the gradient is not."""

    def merge_from_first(self, branches, x):
        gamma = self.gamma * (1 + self.gamma) / 2
        return branches[0] + gamma * (self.merge(branches, x) - branches[0])


class StopsGamma(HealthyFusion):
    """Nothing is learned through the first branch's share."""

    def merge_from_first(self, branches, x):
        part = self.gamma * (self.merge(branches, x) - branches[0])
        return branches[0] + part.detach() + 0.5 * (part - part.detach())


class FirstGammaForAll(HealthyFusion):
    def merge_from_first(self, branches, x):
        return branches[0] + self.gamma[0] * (self.merge(branches, x) - branches[0])


class ChangesBranches(HealthySum):
    def merge(self, branches, x):
        total = branches[0]
        if not torch.is_grad_enabled():
            for branch in branches[1:]:
                total += branch
            return total
        return sum(branches)


class OverflowsInHalf(HealthyFusion):
    """The shares are made with a large number, which float16 has not."""

    def merge(self, branches, x):
        return super().merge([branch * 1e5 for branch in branches], x) / 1e5


class MixesSamples(HealthySum):
    def merge(self, branches, x):
        return sum(branches) + 0.1 * sum(branches).mean(dim=0, keepdim=True)


class LosesMiddleBranch(HealthySum):
    """Of four it merges three."""

    def merge(self, branches, x):
        return sum(b for i, b in enumerate(branches) if i != 2)


class SeesTheLastToken(HealthyFusion):
    """Fine on all tokens at once, and another thing step by step."""

    card = claims(HealthyFusion, laws={Law.TOKEN_LOCAL})

    def merge(self, branches, x):
        return super().merge(branches, x) * (1 + 0.1 * (x.shape[-2] > 1))


class HealthyPooled(Fusion):
    """The mean, with a gate for each channel from the mean of the tokens that exist."""

    card = FusionCard(name="healthy_pooled", summary="A pooled gate.", masks={"keys"})

    def merge(self, branches, x, mask=NO_MASK):
        total = sum(branches) / self.arity
        return total * mean_token(total, self.known(mask)).sigmoid()

    def known(self, mask):
        """The mask that it reads."""
        return mask


class CountsPadding(HealthyPooled):
    def known(self, mask):
        return NO_MASK


class LooksAhead(HealthyPooled):
    card = claims(HealthyPooled, masks={"keys", "causal"})


class ClaimsTokens(HealthyFusion):
    """Each token sees the one after it, and the card says that it sees itself alone."""

    def merge(self, branches, x):
        return super().merge([branch.roll(-1, dims=-2) for branch in branches], x)


class HealthySeries(Fusion):
    """One branch after the other."""

    card = FusionCard(
        name="healthy_series",
        summary="One after the other.",
        laws={Law.SINGLE, Law.TOKEN_LOCAL},
        masks={"keys", "causal"},
        inside_heads=False,
    )

    def feed(self, part, done):
        return done[-1] if done else part

    def merge(self, branches, x):
        return branches[-1]


class HandsOnPairs(HealthySeries):
    card = claims(HealthySeries, masks={"keys", "causal", "pairs"})


class FeedsTwice(HealthySeries):
    def feed(self, part, done):
        return done[-1] if done else 2 * part


class HealthyRouter(Fusion):
    """A mixture with shares for each token, which shall be large for no branch."""

    card = FusionCard(
        name="healthy_router", summary="A mixture.", laws={Law.SINGLE, Law.TOKEN_LOCAL}, auxiliary="mean p²"
    )

    def __init__(self, site: Site, arity: int, *, start: Start = "free"):
        super().__init__(site, arity, start=start)
        self.route, self.shares = nn.Linear(site.dim, arity), Tap("b n k")

    def auxiliary(self, *, shares):
        return shares.square().mean()

    def merge(self, branches, x):
        shares = self.shares(self.route(x).softmax(dim=-1))
        return sum(shares[..., i : i + 1] * branch for i, branch in enumerate(branches))


class ForgetsLoss(HealthyRouter):
    def auxiliary(self, *, shares):
        return None
