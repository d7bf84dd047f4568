"""Spatial gating of gMLP: one half of the channels gates the other, once it is mixed along the tokens.

Liu et al., "Pay Attention to MLPs", 2021, arXiv:2105.08050, §2-4.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, Paper, PositiveFloat, PositiveInt, Site, Tap
from attnzoo.errors import OptionError
from attnzoo.functional import masked_softmax, rearrange


class SpatialGating(Mechanism):
    """V (z₁ ⊙ (W norm(z₂) + b)), [z₁, z₂] = gelu(U x): W is n × n, along the tokens, and b has one number for each.

    aMLP adds what one small head of attention over x gives to the gate, before z₁ is multiplied with it.

    Args:
        site: Where the mechanism is put.
        ratio: Width of [z₁, z₂], in widths of the tokens, at least 4 in all: 6 in the paper's image models.
        attention: Whether there is aMLP's head.
        head_dim: Its width; 64 when None.
        bound: W starts uniform within this number by the number of tokens; the paper says near zero.

    Raises:
        OptionError: AZ214, for the width of a head that is not there.
    """

    card = Card(
        name="spatial_gating",
        family=Family.MIXING,
        summary="gMLP: one half of the channels is mixed along the tokens by learned weights and gates the other.",
        equation="V (z₁ ⊙ (W norm(z₂) + b))\n[z₁; z₂] = gelu(U x)",
        paper=Paper("Pay Attention to MLPs", "Liu et al.", 2021, "arXiv:2105.08050", where="§2, §3, §4.3"),
        time="n m c + n c c",
        memory="n m + n c",
        params="sum(2 * (c + qkv_bias) * half + 2 * half + n * n + n + (half + proj_bias) * c "
        "+ (3 * (c + qkv_bias) * width + (width + proj_bias) * half if attention else 0) "
        "for half in [max(2, round(c * ratio / 2))] for width in [head_dim or 64])",
        flops="sum(4 * n * c * half + 2 * n * n * half + 2 * n * half * c "
        "+ (6 * n * c * width + 4 * n * n * width + 2 * n * width * half if attention else 0) "
        "for half in [max(2, round(c * ratio / 2))] for width in [head_dim or 64])",
        masks={"keys", "causal", "pairs"},
        one_head=True,
        fixed_length="most",
        honours={"qkv_bias", "proj_bias"},
        taps={"gate": "b n d"},
        notes="The paper's block is this alone, with a residual and a norm before; the MLP that a host has beside it "
        "is not the paper's. Fewer tokens use the first rows and columns of W. Who may not attend has no part in the "
        "sum of W; b is always added. The d channels of the tap are those of z₁.",
    )

    scores_attention: Tap
    weights_attention: Tap

    @classmethod
    def claims(cls, *, attention: bool, **options) -> Card:
        if not attention:
            return cls.card
        more = {"scores_attention": "b n m", "weights_attention": "b n m"}
        return replace(cls.card, taps=dict(cls.card.taps) | more, laws=frozenset({Law.STOCHASTIC}))

    def __init__(
        self,
        site: Site,
        *,
        ratio: PositiveFloat = 6.0,
        attention: bool = False,
        head_dim: PositiveInt | None = None,
        bound: PositiveFloat = 1e-3,
    ):
        super().__init__(site)
        if head_dim is not None and not attention:
            raise OptionError(
                "`spatial_gating`: a `head_dim` without `attention` is the width of nothing",
                help="say `attention: true`, or leave it out",
            )
        c, half = site.dim, max(2, round(site.dim * ratio / 2))  # a norm of one number is constant
        self.bound = bound
        self.enter = nn.Linear(c, 2 * half, bias=site.qkv_bias)  # U
        self.norm = site.norm(half)
        self.weight = nn.Parameter(torch.empty(self.length, self.length))  # W
        self.bias = nn.Parameter(torch.empty(self.length))  # b
        width = head_dim or 64
        self.qkv = nn.Linear(c, 3 * width, bias=site.qkv_bias) if attention else None
        self.attended = nn.Linear(width, half, bias=site.proj_bias) if attention else None
        self.proj = nn.Linear(half, c, bias=site.proj_bias)  # V
        self.init_weights()

    def init_weights(self) -> None:
        """W near zero and b = 1: at first the gate is open, and tokens are on their own."""
        nn.init.uniform_(self.weight, -self.bound / len(self.weight), self.bound / len(self.weight))
        nn.init.ones_(self.bias)

    def no_weight_decay(self) -> set[str]:
        return {"bias"}

    def mix(self, x, source, *, mask, layout):
        n = x.shape[1]
        z, gated = F.gelu(self.enter(x)).chunk(2, dim=-1)
        gated, weight = self.norm(gated), self.weight[:n, :n]
        if mask.keys is not None:  # rows that are added to nothing, without a W for each sample
            gated = gated.masked_fill(~mask.keys[..., None], 0.0)
        allowed = replace(mask, keys=None).dense(n, n, x.device)
        if allowed is not None:
            weight = weight.masked_fill(~allowed[:, 0], 0.0)  # (1 n m) or (b n m)
        gate = weight @ gated + self.bias[:n, None]
        if self.qkv is not None and self.attended is not None:
            gate = gate + self.attended(self._head(x, mask))
        return self.proj(z * self.gate(gate))

    def _head(self, x, mask):
        """What one head of softmax attention gives, (b n d)."""
        q, k, v = rearrange(self.qkv(x), "b n (three d) -> three b n d", three=3)
        scores = self.scores_attention((q * q.shape[-1] ** -0.5) @ k.mT)
        allowed = mask.dense(x.shape[1], x.shape[1], x.device)
        return self.weights_attention(masked_softmax(scores, None if allowed is None else allowed[:, 0])) @ v
