"""A selective state space, the dual of a masked linear attention: no queries, keys or values, and no attention.

Dao, Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
2024, arXiv:2405.21060, §3, §6, §7.
"""

from typing import Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, NonNegativeInt, Paper, PositiveInt, Site, Tap
from attnzoo.functional import merge_heads
from attnzoo.functional.recurrence import CARRIED, Recurrent, init_fading, recurrence, short_conv


class StateSpace(Recurrent):
    """norm(y ⊙ silu(W_z x)) W_O, yᵢ = Hᵢᵀ Cᵢ + D uᵢ of the states Hᵢ = exp(-A Δᵢ) Hᵢ₋₁ + Δᵢ Bᵢ uᵢᵀ (r e) of each head.

    In one piece: (L ⊙ C Bᵀ) (Δ u), Lᵢⱼ = exp(-A Σ Δ from j + 1 to i) for j ≤ i. u (the paper's x, one for each head), B
    and C (one for all heads) are silu(conv(W x) + b), the convolution over the last few tokens, a channel each;
    Δ = softplus(W_Δ x + a), a number for each head. The norm divides by the root of the mean square of all heads.

    Args:
        site: Where the mechanism is put.
        expand: How many times as wide as the tokens all u are; 2 in the paper.
        state: r, the channels of B and C; 128 in the authors' code.
        conv: Over how many tokens, with the token itself; 4 in the authors' code, 0 for none.
        direction: `forward`, the paper's: from the first token to the last, whatever the mask; or `both`, which adds
            what is carried from the last token to the first, so that each meets itself twice, and honours no causal
            mask.
    """

    card = Card(
        name="state_space",
        family=Family.RECURRENT,
        summary="Mamba-2's state space (SSD): a state that fades as the token says. Not attention.",
        equation="W_O norm(y_i ⊙ silu(W_z x_i))\n"
        "y_i = H_iᵀ C_i + D u_i,  H_i = exp(−A Δ_i) H_{i−1} + Δ_i B_i u_iᵀ\n"
        "[u; B; C] = silu(conv(W x) + b),  Δ = softplus(W_Δ x + a)",
        paper=Paper(
            "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
            "Dao, Gu",
            2024,
            "arXiv:2405.21060",
            where="§3, §6, §7",
        ),
        time="n c r + n c c",
        memory="h n r + n c + c r",
        params="(expand * c + 2 * state) * (c + conv + (conv > 0)) + (c + 3) * h + (2 * c + 1) * expand * c",
        flops=f"2 * n * c * (3 * expand * c + 2 * state + h) "
        f"+ (1 + (direction == 'both')) * 2 * conv * n * (expand * c + 2 * state) "
        f"+ {CARRIED} * (2 * w * state + 2 * w * expand * c + 4 * state * expand * c)",
        masks={"keys", "causal"},
        incremental=True,
        taps={"gate_fade": "b n h", "gate_write": "b n h"},
        notes="Not attention: nothing is compared or normalised over tokens, though it equals a masked linear "
        "attention with C, B and x as queries, keys and values. The taps show -A Δ and Δ. Heads are as many "
        "as the site's; the authors' are 64 wide. Tokens that do not exist are not written, nothing fades for"
        " them, and no convolution counts them. It runs from the first token to the last with or without a "
        "causal mask; images want `direction: both`, for a class token comes first and would see itself "
        "alone.",
    )

    gate_fade: Tap
    gate_write: Tap

    def __init__(
        self,
        site: Site,
        *,
        expand: PositiveInt = 2,
        state: PositiveInt = 128,
        conv: NonNegativeInt = 4,
        direction: Literal["forward", "both"] = "forward",
    ):
        super().__init__(site)
        c, h, self.direction, self.sizes = site.dim, site.heads, direction, (expand * site.dim, state, state)
        self.xbc = nn.Linear(c, sum(self.sizes), bias=False)
        self.conv = nn.Parameter(torch.empty(sum(self.sizes), conv)) if conv else None
        self.conv_bias = nn.Parameter(torch.empty(sum(self.sizes))) if conv else None  # b
        self.steps = nn.Linear(c, h, bias=False)  # W_Δ
        self.log_a, self.shift = nn.Parameter(torch.empty(h)), nn.Parameter(torch.empty(h))  # log A, a
        self.through = nn.Parameter(torch.empty(h))  # D
        self.gate_by = nn.Linear(c, expand * c, bias=False)  # W_z
        self.norm = nn.RMSNorm(expand * c, eps=1e-5)
        self.proj = nn.Linear(expand * c, c, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """A from 1 to 16, softplus(a) from 0.001 to 0.1, D = 1; the convolution as PyTorch's own."""
        init_fading(self.log_a, self.shift, 1.0)
        nn.init.ones_(self.through)
        if self.conv is not None and self.conv_bias is not None:
            bound = self.conv.shape[1] ** -0.5
            nn.init.uniform_(self.conv, -bound, bound)
            nn.init.uniform_(self.conv_bias, -bound, bound)

    def read(self, x):
        step = self.gate_write(F.softplus(self.steps(x) + self.shift))
        return self.xbc(x), self.gate_fade(-self.log_a.exp() * step), step

    def carry(self, read, there, past=()):
        xbc, fade, step = read
        kept, *state = past or (None,)
        if self.conv is None or self.conv_bias is None:
            kept = xbc[:, :0]
        else:
            xbc, kept = short_conv(xbc, self.conv, there, kept)
            xbc = xbc + self.conv_bias
        exact = torch.promote_types(xbc.dtype, torch.float32)  # products of three overflow in half precision
        x, b, c = F.silu(xbc).to(exact).split(self.sizes, dim=-1)
        x = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        fade, step = fade.mT[..., None], step.mT[..., None]
        heads, last = recurrence(c[:, None], b[:, None], step * x, fade, None, there, *state)
        return heads + self.through[:, None, None] * x, kept, last

    def write(self, x, heads):
        gated, weight = merge_heads(heads) * F.silu(self.gate_by(x)), self.norm.weight
        normed = F.rms_norm(gated, weight.shape, weight.to(gated.dtype), self.norm.eps)
        return self.proj(normed.to(weight.dtype))


# symbolic tracing knows no lengths
fx.wrap("short_conv")
fx.wrap("recurrence")
