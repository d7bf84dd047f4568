"""The delta rule: before a token is written, what its key recalls is taken back.

Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024, arXiv:2406.06484;
Schlag et al., "Linear Transformers Are Secretly Fast Weight Programmers", 2021, arXiv:2102.11174, §4.2.
"""

from typing import Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, NonNegativeInt, Paper, Site
from attnzoo.functional import merge_heads
from attnzoo.functional.recurrence import CARRIED, Recurrent, recurrence, short_conv, unit


class Delta(Recurrent):
    """norm_h(Sᵢᵀ qᵢ) W_O of the states Sᵢ = Sᵢ₋₁ + βᵢ kᵢ (vᵢ - Sᵢ₋₁ᵀ kᵢ)ᵀ (d d) of each head, βᵢ = σ(W_β x).

    Queries, keys and values are silu(conv(W x)), the convolution over the last few tokens, a channel each; queries and
    keys have length 1, and q is multiplied by 1 / √d. The norm divides by the root of the mean square.

    Args:
        site: Where the mechanism is put.
        conv: Over how many tokens, with the token itself; 4 in the authors' code, 0 for none.
        negative: Whether β reaches to 2, so that Sᵢ₋₁ may change its sign along a key.
        direction: `forward`, the paper's: from the first token to the last, whatever the mask; or `both`, which adds
            what is carried from the last token to the first, so that each meets itself twice, and honours no causal
            mask.
    """

    card = Card(
        name="delta",
        family=Family.RECURRENT,
        summary="DeltaNet: an associative memory that corrects what a key recalls in the place of adding to it.",
        equation="W_O norm_h(S_iᵀ q_i)\n"
        "S_i = S_{i−1} + β_i k_i (v_i − S_{i−1}ᵀ k_i)ᵀ,  β_i = σ(W_β x_i)\n"
        "[q; k; v] = silu(conv(W x)),  ‖q_i‖ = 1/√d,  ‖k_i‖ = 1",
        paper=Paper(
            "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
            "Yang et al.",
            2024,
            "arXiv:2406.06484",
            where="§2.2, §3",
        ),
        time="n c d + n c c",
        memory="h n d + h d²",
        params="4 * c**2 + 3 * c * conv + c * h + d",
        flops=f"8 * n * c**2 + 2 * n * c * h + (1 + (direction == 'both')) * 6 * conv * n * c "
        f"+ {CARRIED} * (10 * w * c + 6 * d * c + 2 * (w**2 - 1) // 3 * h)",
        masks={"keys", "causal"},
        incremental=True,
        taps={"gate": "b n h"},
        notes="The tap `gate` shows β. Lengths are 1 up to 10⁻⁶ under the root. Tokens that do not exist are not "
        "written, and no convolution counts them. It runs from the first token to the last with or without a "
        "causal mask; images want `direction: both`, for a class token comes first and would see itself "
        "alone.",
    )

    def __init__(
        self,
        site: Site,
        *,
        conv: NonNegativeInt = 4,
        negative: bool = False,
        direction: Literal["forward", "both"] = "forward",
    ):
        super().__init__(site)
        c, self.direction = site.dim, direction
        self.most, self.scale = 2.0 if negative else 1.0, site.head_dim**-0.5
        self.qkv = nn.Linear(c, 3 * c, bias=False)
        self.conv = nn.Parameter(torch.empty(3 * c, conv)) if conv else None
        self.rate = nn.Linear(c, site.heads, bias=False)  # W_β
        self.norm = nn.RMSNorm(site.head_dim, eps=1e-5)
        self.proj = nn.Linear(c, c, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """The convolution as PyTorch's own."""
        if self.conv is not None:
            nn.init.uniform_(self.conv, -(self.conv.shape[1] ** -0.5), self.conv.shape[1] ** -0.5)

    def read(self, x):
        return self.qkv(x), self.gate(self.most * self.rate(x).sigmoid())

    def carry(self, read, there, past=()):
        qkv, rate = read
        kept, *state = past or (None,)
        if self.conv is None:
            kept = qkv[:, :0]
        else:
            qkv, kept = short_conv(qkv, self.conv, there, kept)
        q, k, v = F.silu(qkv).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        rate = rate.mT[..., None]
        heads, last = recurrence(
            unit(q) * self.scale, unit(k), v, torch.zeros_like(rate), rate, there, *state
        )
        return heads, kept, last

    def write(self, x, heads):
        return self.proj(merge_heads(self.norm(heads.to(self.norm.weight.dtype))))


# symbolic tracing knows no lengths
fx.wrap("short_conv")
fx.wrap("recurrence")
