"""Slot attention: a few slots compete for the tokens, round by round, and their mean is the pooled token.

Locatello et al., "Object-Centric Learning with Slot Attention", 2020, arXiv:2006.15055, §2.1, alg. 1.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Paper, Pool, PositiveInt, Site
from attnzoo.functional import existing, repeat

TAPS = {"scores": "b r m", "weights": "b r m"}


class Slot(Pool):
    """mean_r(S): S = GRU(u, S), then S + W₂ relu(W₁ norm(S)), in each round; u is for each slot a mean of values.

    A = softmax(q kᵀ / √c) over the slots, q of norm(S), k and v of norm'(x); u = W v, W = (A + ε) / Σ_tokens, ε = 1e-8.

    Args:
        site: Where the pool is put.
        slots: r, how many there are.
        rounds: How often slots compete.
        hidden: Width of the MLP.
        start: S before the first round: `noise`, μ + e^{log σ} ε with one learned μ and σ for all slots, as in the
            paper, or `learned`, a vector of its own for each.
    """

    card = Card(
        name="slot",
        family=Family.LATENT,
        summary="A few slots compete for the tokens, round by round; their mean is the pooled token.",
        equation="mean_r(S)\n"
        "S ← GRU(u, S),  S ← S + W₂ relu(W₁ norm(S))\n"
        "u = W v,  W_rj = (A_rj + ε) / (Σ_j (A_rj + ε))\n"
        "A = softmax_r(q kᵀ / √c)\n"
        "q = W_q norm(S),  k = W_k norm'(x),  v = W_v norm'(x)",
        paper=Paper(
            "Object-Centric Learning with Slot Attention",
            "Locatello et al.",
            2020,
            "arXiv:2006.15055",
            where="§2.1, alg. 1",
        ),
        time="n r c + n c c + r c c",
        memory="n r + n c + r c",
        params="(9 * c + 13) * c + (2 * c + 1) * hidden + (2 if start == 'noise' else slots) * c",
        flops="4 * n * c * c + rounds * slots * (4 * n * c + 14 * c * c + 4 * c * hidden)",
        masks={"keys"},
        taps={f"{name}_{i}": axes for i in (1, 2, 3) for name, axes in TAPS.items()},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="The paper draws ε anew in every forward and keeps the slots apart, for a decoder; here ε is drawn when "
        "weights are initialised, and kept, so that an image always gives the same, and the slots' mean is pooled, "
        "since a host asks for one token. Special tokens are read like all others. Taps are numbered by round. The "
        "norms are the host's; the authors' have an ε of 1e-3. Where no token exists u is zero.",
    )

    noise: Tensor | None  # ε

    @classmethod
    def claims(cls, *, rounds: int, **options) -> Card:
        some = range(1, rounds + 1)
        return replace(cls.card, taps={f"{name}_{i}": axes for i in some for name, axes in TAPS.items()})

    def __init__(
        self,
        site: Site,
        *,
        slots: PositiveInt = 7,
        rounds: PositiveInt = 3,
        hidden: PositiveInt = 128,
        start: Literal["noise", "learned"] = "noise",
    ):
        super().__init__(site)
        c, self.slots, self.rounds = site.dim, slots, rounds
        self.norm_tokens, self.norm_slots, self.norm = site.norm(c), site.norm(c), site.norm(c)
        self.q, self.k, self.v = (nn.Linear(c, c, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, hidden), nn.ReLU(), nn.Linear(hidden, c))
        drawn = start == "noise"
        self.mean = nn.Parameter(torch.empty(1 if drawn else slots, c))  # μ
        self.log_std = nn.Parameter(torch.empty(1, c)) if drawn else None  # log σ
        self.register_buffer("noise", torch.empty(slots, c) if drawn else None)
        self.init_weights()

    def init_weights(self) -> None:
        """μ and log σ uniform within √(6 / (1 + c)), as the authors'; ε, or slots of their own, from N(0, 1)."""
        if self.noise is None or self.log_std is None:
            nn.init.normal_(self.mean)
            return
        for vector in (self.mean, self.log_std):
            nn.init.xavier_uniform_(vector)
        nn.init.normal_(self.noise)

    def pool(self, x, *, mask, layout):
        keys, tokens = existing(x, mask)[:, None], self.norm_tokens(x)
        k, v = self.k(tokens), self.v(tokens)
        start = (
            self.mean
            if self.log_std is None or self.noise is None
            else self.mean + self.log_std.exp() * self.noise
        )
        s = repeat(start, "r c -> b r c", b=x.shape[0])
        for i in range(1, self.rounds + 1):
            q = self.q(self.norm_slots(s))
            scores = getattr(self, f"scores_{i}")((q * q.shape[-1] ** -0.5) @ k.mT)
            shares = (scores.softmax(dim=1) + 1e-8).masked_fill(~keys, 0.0)
            total = shares.sum(dim=2, keepdim=True)
            weights = getattr(self, f"weights_{i}")(shares / torch.where(total > 0, total, 1.0))
            s = self._updated(weights @ v, s)
            s = s + self.mlp(self.norm(s))
        return s.mean(dim=1)

    def _updated(self, u, s):
        """`self.gru`, whose own forward torch.fx cannot follow, of slots (b r c)."""
        reset, update, new = F.linear(u, self.gru.weight_ih, self.gru.bias_ih).chunk(3, dim=-1)
        old_reset, old_update, old = F.linear(s, self.gru.weight_hh, self.gru.bias_hh).chunk(3, dim=-1)
        new = (new + (reset + old_reset).sigmoid() * old).tanh()
        update = (update + old_update).sigmoid()
        return (1 - update) * new + update * s
