"""Gated linear attention: a state each channel of which fades as the token says.

Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023, arXiv:2312.06635, §4.
"""

from typing import Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Fraction, Paper, PositiveFloat, PositiveInt, Site
from attnzoo.functional import merge_heads
from attnzoo.functional.recurrence import CARRIED, Recurrent, recurrence


class GatedLinear(Recurrent):
    """(silu(x W_r + b_r) ⊙ LN_h(Sᵢᵀ qᵢ)) W_O of the states Sᵢ = diag(αᵢ) Sᵢ₋₁ + kᵢ vᵢᵀ (d_k d) of each head.

    αᵢ = σ(x W₁ W₂ + b)^(1/τ), one for each channel of the keys. In one piece: with the running product bᵢ of the α,
    ((Q ⊙ b) (K / b)ᵀ ⊙ M) V, M the causal mask; q by 1 / √d_k.

    Args:
        site: Where the mechanism is put.
        keys: d_k / d: how wide queries and keys are beside the values; a half in the paper, at least one channel.
        rank: Columns of W₁: 16 in the paper.
        temperature: τ: the greater, the less fades; 16 in the paper.
        direction: `forward`, the paper's: from the first token to the last, whatever the mask; or `both`, which adds
            what is carried from the last token to the first, so that each meets itself twice, and honours no causal
            mask.
    """

    card = Card(
        name="gated_linear",
        family=Family.RECURRENT,
        summary="GLA: linear attention whose state fades, channel by channel, as each token says.",
        equation="W_O (silu(W_r x_i + b_r) ⊙ LN_h(S_iᵀ q_i))\n"
        "S_i = diag(α_i) S_{i−1} + k_i v_iᵀ\n"
        "α_i = σ(W₂ W₁ x_i + b)^(1/τ),  q = W_q x / √d_k",
        paper=Paper(
            "Gated Linear Attention Transformers with Hardware-Efficient Training",
            "Yang et al.",
            2023,
            "arXiv:2312.06635",
            where="§4.1, §4.4, eq. 3-5",
        ),
        time="n c d + n c c",
        memory="h n d + h d²",
        params="(k := max(1, round(keys * d))) * h * (2 * c + rank + 1) + c * rank + 3 * c**2 + c + 2 * d",
        flops="2 * n * (k := max(1, round(keys * d))) * h * (2 * c + rank) + 2 * n * c * rank + 6 * n * c**2 "
        f"+ {CARRIED} * ((w - 1 if k > 1 else 2 * w) * k * h + 2 * w * c + 4 * k * c)",
        masks={"keys", "causal"},
        incremental=True,
        taps={"gate": "b n h d"},
        notes="The tap `gate` shows log α. Tokens that do not exist are not written, and nothing fades for them. It"
        " runs from the first token to the last with or without a causal mask; images want `direction: both`,"
        " for a class token comes first and would see itself alone.",
    )

    def __init__(
        self,
        site: Site,
        *,
        keys: Fraction = 0.5,
        rank: PositiveInt = 16,
        temperature: PositiveFloat = 16.0,
        direction: Literal["forward", "both"] = "forward",
    ):
        super().__init__(site)
        c, narrow = site.dim, max(1, round(keys * site.head_dim))  # d_k
        self.temperature, self.direction, self.scale = temperature, direction, narrow**-0.5
        self.qk = nn.Linear(c, 2 * site.heads * narrow, bias=False)
        self.v = nn.Linear(c, c, bias=False)
        self.fade = nn.Sequential(
            nn.Linear(c, rank, bias=False), nn.Linear(rank, site.heads * narrow)
        )  # W₁, W₂
        self.norm = nn.LayerNorm(site.head_dim)
        self.gate_by = nn.Linear(c, c)  # W_r
        self.proj = nn.Linear(c, c, bias=False)

    def read(self, x):
        fade = F.logsigmoid(self.fade(x)) / self.temperature
        q, k, v, fade = (
            t.unflatten(-1, (self.heads, -1)) for t in (*self.qk(x).chunk(2, -1), self.v(x), fade)
        )
        return q * self.scale, k, v, self.gate(fade)

    def carry(self, read, there, past=()):
        q, k, v, fade = (t.transpose(1, 2) for t in read)
        v = v.to(torch.promote_types(v.dtype, torch.float32))  # products of three overflow in half precision
        return recurrence(q, k, v, fade, None, there, *past)

    def write(self, x, heads):
        gate, norm = F.silu(self.gate_by(x)), self.norm
        weight, bias = norm.weight.to(heads.dtype), norm.bias.to(heads.dtype)
        heads = F.layer_norm(heads, norm.normalized_shape, weight, bias, norm.eps).to(gate.dtype)
        return self.proj(gate * merge_heads(heads))


fx.wrap("recurrence")  # symbolic tracing knows no lengths
