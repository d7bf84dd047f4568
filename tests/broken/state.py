"""Components that remember, share, seed or change what they must leave alone."""

import random

import torch

from attnzoo.core import NonNegativeInt, Site
from broken.heads import Healthy, HealthyWindow
from broken.tokens import HealthyTokens


class SeedsForward(Healthy):
    def attend(self, q, k, v, *, mask, layout):
        torch.manual_seed(0)
        return super().attend(q, k, v, mask=mask, layout=layout) + 0 * torch.rand(())


class SeedsConstructor(Healthy):
    def __init__(self, site: Site):
        torch.manual_seed(0)
        super().__init__(site)


class SeedsPython(Healthy):
    def attend(self, q, k, v, *, mask, layout):
        random.seed(0)
        return super().attend(q, k, v, mask=mask, layout=layout)


class SetsPrecision(Healthy):
    def __init__(self, site: Site):
        super().__init__(site)
        now = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if now == "highest" else "highest")


class RemembersTokens(HealthyTokens):
    """The mean is that of the first call."""

    def __init__(self, site, *, gate="open"):
        super().__init__(site, gate=gate)
        self.first = {}

    def mean(self, x, mask, layout):
        return self.first.setdefault(x.shape, super().mean(x, mask, layout).detach())


class TracksMean(HealthyTokens):
    """A running mean, as in batch norm, moved in training."""

    def __init__(self, site, *, gate="open"):
        super().__init__(site, gate=gate)
        self.register_buffer("running", torch.zeros(site.dim))

    def mean(self, x, mask, layout):
        mean = super().mean(x, mask, layout)
        if self.training:
            self.running.mul_(0.9).add_(mean.detach().mean(dim=(0, 1)), alpha=0.1)
            return mean
        return mean + self.running


class KeepsLastMap(Healthy):
    """A plain tensor, for a curious user."""

    def normalise(self, scores, allowed):
        weights = super().normalise(scores, allowed)
        self.last = weights.detach()
        return weights


class KeepsPlainTensor(Healthy):
    def __init__(self, site: Site):
        super().__init__(site)
        self.slopes = 2.0 ** -torch.arange(1, site.heads + 1)

    def score(self, q, k):
        return super().score(q, k) * self.slopes.to(q)[:, None, None]


class StaysOnCpu(Healthy):
    def score(self, q, k):
        return super().score(q, k) * (1 + torch.arange(k.shape[2]) * 0)


class ChangesTokens(HealthyTokens):
    def mix(self, x, source, *, mask, layout):
        out = super().mix(x, source, mask=mask, layout=layout)
        x.mul_(2)
        return out


class ChangesTokensInTraining(HealthyTokens):
    def mean(self, x, mask, layout):
        mean = super().mean(x, mask, layout)
        if self.training and not torch.is_grad_enabled():
            x.zero_()
        return mean


class SharesCache(HealthyWindow):
    """What is near is looked up by the number of tokens, whatever their arrangement and the window."""

    found: dict = {}

    def near(self, layout):
        length = layout.length - layout.prefix
        if length not in self.found:
            self.found[length] = super().near(layout)
        return self.found[length]


class RemembersLayout(HealthyWindow):
    def __init__(self, site: Site, *, window: NonNegativeInt = 1):
        super().__init__(site, window=window)
        self.made = {}

    def near(self, layout):
        return self.made.setdefault(len(layout.coords()), super().near(layout).tolist()) and torch.tensor(
            self.made[len(layout.coords())], device=self.temperature.device
        )


class SwallowsOption(HealthyWindow):
    """An option that nobody reads.

    Args:
        site: Where it is put.
        window: How far a token sees, in grid steps.
        wrap: Whether the grid is a ring.
    """

    def __init__(self, site: Site, *, window: NonNegativeInt = 1, wrap: bool = False):
        super().__init__(site, window=window)


class ClampsOption(HealthyWindow):
    """A window above 2 is 2.

    Args:
        site: Where it is put.
        window: How far a token sees, in grid steps.
    """

    def __init__(self, site: Site, *, window: NonNegativeInt = 1):
        super().__init__(site, window=min(window, 2))


class FreezesParameter(Healthy):
    def __init__(self, site: Site):
        super().__init__(site)
        self.temperature.requires_grad_(False)
