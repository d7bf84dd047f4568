"""Gaussian adaptive attention: numbers are weighted by how near they are to the mean of their line, in deviations.

Ioannides et al., "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple
Modalities", 2024, arXiv:2401.11143.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import masked_mean, masked_softmax

EPS = 1e-8  # the authors', of the variance and of the clamp


class GaussianAdaptive(Mechanism):
    """x ⊙ w, w = g / Σ g along a line of L numbers, g = Π_k N(y_k; 0, c_k²), y_k = (x − μ − δ_k) / s.

    μ and s² + 1e-8 are mean and unbiased variance of the line: one channel along all tokens, or one token along all
    channels. A line may be cut into chunks of ⌊L / H⌋, the last of which takes the rest; each has δ and c of its own.

    Args:
        site: Where the mechanism is put.
        axis: Along what a line lies: the `tokens`, or the `channels`, where each token sees itself alone.
        chunks: H, the heads of the paper.
        gaussians: K, how many Gaussians.
        combine: Whether g is their product, or Σ_k π_k exp(−y_k² / 2c_k²) with learned shares π, as at first published.
        clamp: Whether Σ g is at least 1e-8, as in the authors' code, where a product of many vanishes.

    Raises:
        OptionError: AZ214, for chunks of less than two tokens or channels, whose weights are always 1.
    """

    card = Card(
        name="gaussian_adaptive",
        family=Family.CHANNEL,
        summary="Each channel's numbers are weighted along the tokens by learned Gaussians around their mean.",
        equation="x ⊙ w\nw = g / (Σ g),  g = Π_k N(y_k; 0, c_k²),  y_k = (x − μ − δ_k) / s",
        paper=Paper(
            "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities",
            "Ioannides et al.",
            2024,
            "arXiv:2401.11143",
        ),
        time="n c",
        memory="n c",
        params="chunks * gaussians * (3 if combine == 'sum' and gaussians > 1 else 2)",
        flops="0",
        masks={"keys"},
        taps={"weights": "b n c"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="Computed in logarithms. Scales are learned as log c, which starts at N(0, 1) as the authors' does, so "
        "that none becomes zero; for `sum` c starts at 2. The authors find padding by its value and count it as "
        "zeros; here the mask says what exists, and nothing else is counted. A line of one number has a variance of "
        "zero. Special tokens count like all others. The residual connection is the host's.",
    )

    @classmethod
    def claims(cls, *, axis, chunks, clamp, **options) -> Card:
        if axis == "channels":
            laws = {Law.PERMUTATION_EQUIVARIANT, Law.LOCAL}
            return replace(cls.card, masks={"keys", "causal"}, taps={"gate": "b n c"}, laws=laws)
        if chunks > 1:  # rows sum to their number, and which chunk a token is in depends on its place
            return replace(cls.card, laws=frozenset())
        return replace(cls.card, laws={Law.SUBSTOCHASTIC, Law.PERMUTATION_EQUIVARIANT}) if clamp else cls.card

    def __init__(
        self, site: Site, *, axis: Literal["tokens", "channels"] = "tokens", chunks: PositiveInt = 1,
        gaussians: PositiveInt = 5, combine: Literal["prod", "sum"] = "prod", clamp: bool = False,
    ):  # fmt: skip
        super().__init__(site)
        length = site.layout.length if axis == "tokens" else site.dim
        if chunks > 1 and length < 2 * chunks:
            fault = f"{length} {axis} make no {chunks} chunks of two or more"
            raise OptionError(fault, help=f"choose at most {length // 2}")
        self.axis, self.clamp, self.combine = axis, clamp, combine
        self.offset = nn.Parameter(torch.empty(chunks, gaussians))  # δ
        self.log_scale = nn.Parameter(torch.empty(chunks, gaussians))
        mixed = combine == "sum" and gaussians > 1
        self.share = nn.Parameter(torch.empty(chunks, gaussians)) if mixed else None
        self.init_weights()

    def init_weights(self) -> None:
        """δ = 0; log c from N(0, 1), or c = 2; equal shares."""
        nn.init.zeros_(self.offset)
        nn.init.constant_(self.log_scale, math.log(2))
        if self.combine == "prod":
            nn.init.normal_(self.log_scale)
        if self.share is not None:
            nn.init.zeros_(self.share)

    def reach(self) -> int:
        return 0

    def mix(self, x, source, *, mask, layout):
        along = self.axis == "tokens"
        # float32 at least; a line is the last axis, (b c n) or (b n c)
        lines = (x.mT if along else x).to(torch.promote_types(self.offset.dtype, torch.float32))
        exists = mask.keys[:, None] if along and mask.keys is not None else torch.ones_like(lines[:1, :1]) > 0
        chunks, size = len(self.offset), lines.shape[-1] // len(self.offset)
        parts = [slice(h * size, (h + 1) * size if h < chunks - 1 else None) for h in range(chunks)]
        weights = [self._weights(lines[..., part], exists[..., part], h) for h, part in enumerate(parts)]
        w = torch.cat(weights, dim=-1)
        return x * (self.weights(w.mT) if along else self.gate(w)).to(x.dtype)

    def _weights(self, lines, exists, h):
        """w of one chunk of all lines, (... l)."""
        number = exists.sum(dim=-1, keepdim=True)
        centred = (lines - masked_mean(lines, exists, dim=-1, keepdim=True)).masked_fill(~exists, 0.0)
        variance = centred.square().sum(dim=-1, keepdim=True) / (number - 1).clamp(min=1) + EPS
        y = (centred[..., None, :] - self.offset[h, :, None]) * variance.rsqrt()[..., None, :]  # (... k l)
        log_scale = self.log_scale[h, :, None]
        logs = -0.5 * (y * torch.exp(-log_scale)).square()
        if self.combine == "prod":
            logs = (logs - log_scale - 0.5 * math.log(2 * math.pi)).sum(dim=-2)
        else:
            shares = 0.0 if self.share is None else self.share[h, :, None].log_softmax(dim=0)
            logs = (logs + shares).logsumexp(dim=-2)
        if not self.clamp:
            return masked_softmax(logs, exists)
        logs = logs.masked_fill(~exists, float("-inf"))
        return (logs - logs.logsumexp(dim=-1, keepdim=True).clamp(min=math.log(EPS))).exp()
