"""Mechanisms that are broken on purpose, each in one way, beside healthy ones."""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, Site
from broken.heads import claims


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
        time="n c c",
        memory="n c",
        masks={"keys"},
        taps={"gate": "b n c"},
        laws={Law.PERMUTATION_EQUIVARIANT},
    )

    def __init__(self, site: Site, *, gate: Literal["open", "shut"] = "open"):
        super().__init__(site)
        self.start = 1.0 if gate == "open" else -1.0
        self.gating = nn.Linear(site.dim, site.dim)
        self.init_weights()

    def init_weights(self):
        nn.init.constant_(self.gating.bias, self.start)

    def mean(self, x, mask, layout):
        keys = torch.ones_like(x[..., :1]) if mask.keys is None else mask.keys[..., None].to(x.dtype)
        return (x * keys).sum(dim=1, keepdim=True) / keys.sum(dim=1, keepdim=True).clamp(min=1)

    def mix(self, x, source, *, mask, layout):
        return x * self.gate(self.gating(x + self.mean(x, mask, layout)).sigmoid())


class HealthyRouter(HealthyTokens):
    """Wants gates that are small."""

    card = replace(HealthyTokens.card, name="healthy_router", auxiliary="mean of squared gates")

    def auxiliary(self, *, gate):
        return gate.square().mean()


class TeachesNobody(HealthyRouter):
    def auxiliary(self, *, gate):
        return gate.detach().square().mean()


class AddsBySample(HealthyRouter):
    def auxiliary(self, *, gate):
        return gate.square().mean(dim=(1, 2))


class AddsNothing(HealthyRouter):
    def auxiliary(self, *, gate):
        return None


class AddsOfNoTap(HealthyRouter):
    def auxiliary(self, *, gating):
        return gating.square().mean()


class HealthySilence(Mechanism):
    """Says nothing."""

    card = Card(
        name="healthy_silence",
        family=Family.MIXING,
        summary="Says nothing.",
        time="n c",
        memory="n c",
        masks={"keys"},
        laws={Law.PERMUTATION_EQUIVARIANT, Law.SILENT},
    )

    def mix(self, x, source, *, mask, layout):
        return x.masked_fill(x.new_ones((), dtype=torch.bool), 0.0)  # with a gradient, of zeros


class WhispersUnderMasks(HealthySilence):
    def mix(self, x, source, *, mask, layout):
        return super().mix(x, source, mask=mask, layout=layout) if mask.free else 1e-3 * x


class LosesDtype(HealthyTokens):
    def mix(self, x, source, *, mask, layout):
        return super().mix(x, source, mask=mask, layout=layout).float()


class LosesTokens(HealthyTokens):
    def mix(self, x, source, *, mask, layout):
        return super().mix(x, source, mask=mask, layout=layout)[:, layout.prefix :]


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


class TakesWrongLayout(HealthyGrid):
    def lies_on(self, grid, tokens, layout):
        pass


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
    def source(self, x, context):
        return x


class HealthyReader(Mechanism):
    """Adds the mean of the context, projected."""

    card = Card(
        name="healthy_reader",
        family=Family.LATENT,
        summary="Reads a mean.",
        time="n c + m c c",
        memory="n c + m c",
        masks={"keys"},
        context=True,
    )

    def __init__(self, site: Site):
        super().__init__(site)
        self.read = nn.Linear(site.context_dim or site.dim, site.dim)

    def mix(self, x, source, *, mask, layout):
        keys = torch.ones_like(source[..., :1]) if mask.keys is None else mask.keys[..., None].to(x.dtype)
        mean = (source * keys).sum(dim=1, keepdim=True) / keys.sum(dim=1, keepdim=True).clamp(min=1)
        return x + self.read(mean)


class IgnoresContext(HealthyReader):
    def mix(self, x, source, *, mask, layout):
        return super().mix(x, source if source is x else 0 * source, mask=mask, layout=layout)


class LeaksContextPadding(HealthyReader):
    def mix(self, x, source, *, mask, layout):
        mask = mask if source is x else replace(mask, keys=None)
        return super().mix(x, source, mask=mask, layout=layout)
