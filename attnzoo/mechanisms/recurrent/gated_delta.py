"""The gated delta rule: the state fades as the token says, then what its key recalls is corrected.

Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024, arXiv:2412.06464, §3.
"""

from typing import Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, NonNegativeInt, Paper, PositiveInt, Site, Tap
from attnzoo.functional import merge_heads
from attnzoo.functional.recurrence import CARRIED, Recurrent, init_fading, recurrence, short_conv, unit


class GatedDelta(Recurrent):
    """(silu(W_G x) ⊙ norm_h(Sᵢᵀ qᵢ)) W_O of the states Sᵢ = αᵢ Sᵢ₋₁ + βᵢ kᵢ (vᵢ - αᵢ Sᵢ₋₁ᵀ kᵢ)ᵀ (d e) of each head.

    αᵢ = exp(-A softplus(W_α x + a)) and βᵢ = σ(W_β x) are numbers. Queries, keys and values are silu(conv(W x)), the
    convolution over the last few tokens, a channel each; queries and keys have length 1, and q is multiplied by 1 / √d.
    The norm divides by the root of the mean square.

    Args:
        site: Where the mechanism is put.
        expand: e / d: how many times as wide as queries and keys the values are; 2 in the authors' code.
        conv: Over how many tokens, with the token itself; 4 in the authors' code, 0 for none.
        negative: Whether β reaches to 2, so that the state may change its sign along a key.
        direction: `forward`, the paper's: from the first token to the last, whatever the mask; or `both`, which adds
            what is carried from the last token to the first, so that each meets itself twice, and honours no causal
            mask.
    """

    card = Card(
        name="gated_delta",
        family=Family.RECURRENT,
        summary="Gated DeltaNet: an associative memory that fades, and corrects what a key recalls.",
        equation="W_O (silu(W_G x_i) ⊙ norm_h(S_iᵀ q_i))\n"
        "S_i = α_i S_{i−1} + β_i k_i (v_i − α_i S_{i−1}ᵀ k_i)ᵀ\n"
        "α_i = exp(−A softplus(W_α x_i + a)),  β_i = σ(W_β x_i)\n"
        "[q; k; v] = silu(conv(W x)),  ‖q_i‖ = 1/√d,  ‖k_i‖ = 1",
        paper=Paper(
            "Gated Delta Networks: Improving Mamba2 with Delta Rule",
            "Yang et al.",
            2024,
            "arXiv:2412.06464",
            where="§3.1-3.4, eq. 10",
        ),
        time="n c d + n c c",
        memory="h n d + h d²",
        params="(2 + expand) * (c + conv) * c + 2 * c * h + 2 * h + expand * (d + 2 * c**2)",
        flops="(4 + 6 * expand) * n * c**2 + 4 * n * c * h "
        "+ (1 + (direction == 'both')) * 2 * (2 + expand) * conv * n * c "
        f"+ {CARRIED} * ((6 + 4 * expand) * w * c + 6 * d * expand * c + 2 * (w**2 - 1) // 3 * h)",
        masks={"keys", "causal"},
        incremental=True,
        taps={"gate_fade": "b n h", "gate_write": "b n h"},
        notes="The taps show log α and β. Heads are as many and as wide as the site's; the authors' keys are three "
        "quarters as wide as the tokens. Lengths are 1 up to 10⁻⁶ under the root. Tokens that do not exist "
        "are not written, nothing fades for them, and no convolution counts them. It runs from the first "
        "token to the last with or without a causal mask; images want `direction: both`, for a class token "
        "comes first and would see itself alone.",
    )

    gate_fade: Tap
    gate_write: Tap

    def __init__(
        self,
        site: Site,
        *,
        expand: PositiveInt = 2,
        conv: NonNegativeInt = 4,
        negative: bool = False,
        direction: Literal["forward", "both"] = "forward",
    ):
        super().__init__(site)
        c, h, self.direction = site.dim, site.heads, direction
        self.most, self.scale, self.sizes = 2.0 if negative else 1.0, site.head_dim**-0.5, (c, c, expand * c)
        self.qkv = nn.Linear(c, sum(self.sizes), bias=False)
        self.conv = nn.Parameter(torch.empty(sum(self.sizes), conv)) if conv else None
        self.rate = nn.Linear(c, 2 * h, bias=False)  # W_α, W_β
        self.log_a, self.shift = nn.Parameter(torch.empty(h)), nn.Parameter(torch.empty(h))  # log A, a
        self.norm = nn.RMSNorm(expand * site.head_dim, eps=1e-5)
        self.gate_by = nn.Linear(c, expand * c, bias=False)  # W_G
        self.proj = nn.Linear(expand * c, c, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """A from 0 to 16, softplus(a) from 0.001 to 0.1; the convolution as PyTorch's own."""
        init_fading(self.log_a, self.shift, 0.0)
        if self.conv is not None:
            nn.init.uniform_(self.conv, -(self.conv.shape[1] ** -0.5), self.conv.shape[1] ** -0.5)

    def read(self, x):
        alpha, beta = self.rate(x).chunk(2, dim=-1)
        fade = -self.log_a.exp() * F.softplus(alpha + self.shift)
        return self.qkv(x), self.gate_fade(fade), self.gate_write(self.most * beta.sigmoid())

    def carry(self, read, there, past=()):
        qkv, fade, rate = read
        kept, *state = past or (None,)
        if self.conv is None:
            kept = qkv[:, :0]
        else:
            qkv, kept = short_conv(qkv, self.conv, there, kept)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in F.silu(qkv).split(self.sizes, dim=-1)
        )
        fade, rate = fade.mT[..., None], rate.mT[..., None]
        heads, last = recurrence(unit(q) * self.scale, unit(k), v, fade, rate, there, *state)
        return heads, kept, last

    def write(self, x, heads):
        return self.proj(F.silu(self.gate_by(x)) * merge_heads(self.norm(heads.to(self.norm.weight.dtype))))


# symbolic tracing knows no lengths
fx.wrap("short_conv")
fx.wrap("recurrence")
