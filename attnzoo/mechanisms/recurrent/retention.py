"""Retention: a state that fades at a rate of its own in each head, with positions as rotations.

Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023, arXiv:2307.08621, §2.
"""

from typing import Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Paper, PositiveInt, Site
from attnzoo.functional import merge_heads, split_heads
from attnzoo.functional.recurrence import CARRIED, Recurrent, recurrence

BASE, EPS = 10_000.0, 1e-5


class Retention(Recurrent):
    """(silu(x W_G) ⊙ norm_h(Sᵢᵀ qᵢ)) W_O of the states Sᵢ = γ_h Sᵢ₋₁ + kᵢ vᵢᵀ (d e), γ_h = 1 - 2^(-5-h), h from 0.

    In one piece: ((Q Kᵀ) ⊙ D) V, Dᵢⱼ = γ^(i-j) for j ≤ i and 0 elsewhere. Queries and keys, k by 1 / √d, are turned by
    their positions, so that their product depends on i - j. Each head is normalised by its own mean and variance, token
    by token.

    Args:
        site: Where the mechanism is put.
        expand: e / d: how many times as wide as queries and keys the values are; 2 in the paper.
        turn: Whether positions turn queries and keys, as in the paper; without it the decay alone tells where they are.
        direction: `forward`, the paper's: from the first token to the last, whatever the mask; or `both`, which adds
            what is retained from the last token to the first, so that each meets itself twice, and honours no causal
            mask.
    """

    card = Card(
        name="retention",
        family=Family.RECURRENT,
        summary="RetNet: linear attention whose memory fades at a rate of its own in each head.",
        equation="W_O (silu(W_G x_i) ⊙ norm_h(S_iᵀ q_i))\n"
        "S_i = γ_h S_{i−1} + k_i v_iᵀ,  γ_h = 1 − 2^(−5−h)\n"
        "q_i = turn_i(W_q x_i),  k_i = turn_i(W_k x_i) / √d",
        paper=Paper(
            "Retentive Network: A Successor to Transformer for Large Language Models",
            "Sun et al.",
            2023,
            "arXiv:2307.08621",
            where="§2.1-2.3, eq. 1-8",
        ),
        time="n c d + n c c",
        memory="h n d + h d²",
        params="(2 + 3 * expand) * c**2",
        flops=f"(4 + 6 * expand) * n * c**2 + {CARRIED} * (2 * w * (1 + expand) * c + 4 * d * expand * c)",
        masks={"keys", "causal"},
        incremental=True,
        notes="No projection has a bias. What the paper divides scores by for precision cancels in the norm and is "
        "left out. Tokens that do not exist are not retained, and neither fade nor turn what is. It runs from"
        " the first token to the last with or without a causal mask; images want `direction: both`, for a "
        "class token comes first and would see itself alone.",
    )

    def __init__(
        self,
        site: Site,
        *,
        expand: PositiveInt = 2,
        turn: bool = True,
        direction: Literal["forward", "both"] = "forward",
    ):
        super().__init__(site)
        c, self.turn, self.direction = site.dim, turn, direction
        self.width = expand * site.head_dim  # e
        self.qk = nn.Linear(c, 2 * c, bias=False)
        self.v = nn.Linear(c, expand * c, bias=False)
        self.gate_by = nn.Linear(c, expand * c, bias=False)  # W_G
        self.proj = nn.Linear(expand * c, c, bias=False)

    def read(self, x):
        return *self.qk(x).chunk(2, dim=-1), self.v(x)

    def carry(self, read, there, past=()):
        q, k, v = (split_heads(t, self.heads) for t in read)
        count, *state = past or (None,)
        q, k, decay, count = placed(q, k, there, count, self.turn)
        v = v.to(torch.promote_types(v.dtype, torch.float32))  # products of three overflow in half precision
        heads, *state = recurrence(q, k, v, decay, None, there, *state)
        return heads, count, *state

    def write(self, x, heads):
        gate = F.silu(self.gate_by(x))
        heads = F.layer_norm(heads, (self.width,), eps=EPS).to(gate.dtype)
        return self.proj(gate * merge_heads(heads))


def placed(q, k, there, count, turn):
    """Queries and keys (b h n d) turned by their positions, k by 1 / √d; log γ (h 1 1); how many tokens there are (b).

    Args:
        q, k: (b h n d).
        there: Which tokens exist, (b n), the others having no position of their own; None when all do.
        count: How many tokens were before, (b); None for none.
        turn: Whether they are turned.
    """
    (b, h, n, d), exact = q.shape, torch.promote_types(q.dtype, torch.float32)  # angles lose digits
    rate = torch.log1p(-(2.0 ** (-5 - torch.arange(h, device=q.device, dtype=exact))))
    ones = torch.ones(b, n, dtype=torch.long, device=q.device) if there is None else there.long()
    upto = ones.cumsum(dim=1) if count is None else count[:, None] + ones.cumsum(dim=1)
    k = k * d**-0.5
    if turn and d > 1:
        theta = BASE ** (-torch.arange(0, d - 1, 2, device=q.device, dtype=exact) / (d // 2 * 2))
        angle = (upto - 1)[:, None, :, None] * theta
        q, k = (turned(t, angle.cos(), angle.sin()) for t in (q, k))
    return q, k, rate[:, None, None], upto[:, -1]


def turned(t, cos, sin):
    """Pairs of channels (2i, 2i + 1) turned; the last of an odd number stays."""
    even = t.shape[-1] // 2 * 2
    a, b = t[..., 0:even:2].to(cos.dtype), t[..., 1:even:2].to(cos.dtype)
    pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([pairs.to(t.dtype), t[..., even:]], dim=-1)


# symbolic tracing knows no lengths
fx.wrap("placed")
fx.wrap("recurrence")
