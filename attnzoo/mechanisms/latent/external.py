"""External attention: tokens ask a small learned memory instead of each other.

Guo et al., "Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks", 2021,
arXiv:2105.02358, §3.2-3.4, eq. 5-12.
"""

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, Paper, PositiveInt, Site
from attnzoo.functional import merge_heads, rearrange


class External(Mechanism):
    """A M_v in each head, with scores z = F M_kᵀ, F = W x + b, and the double norm A_ij ∝ e^{z_ij} / Σ_t e^{z_tj}.

    M_k and M_v are r × d and serve all heads. The sum is over the tokens t; then each row of A is brought to a sum of 1
    over the slots j.

    Args:
        site: Where the mechanism is put.
        slots: r, how many entries each memory has.
        expand: Width of F, in widths of the tokens; the number of heads grows with it, not the channels of each.
        tie: Whether M_v is M_k.
    """

    card = Card(
        name="external",
        family=Family.LATENT,
        summary="Tokens read a learned memory of r slots; a norm over tokens, then over slots: linear in the tokens.",
        equation="W_o A M_v\nA_ij = softmax_j(z_ij − ln Σ_t exp(z_tj))\nz = F M_kᵀ,  F = W x + b",
        paper=Paper(
            "Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks",
            "Guo et al.",
            2021,
            "arXiv:2105.02358",
            where="§3.2-3.4, eq. 5-12",
        ),
        time="n r c + n c c",
        memory="h n r + n c",
        params="expand * (c + qkv_bias) * c + (1 if tie else 2) * slots * d + (expand * c + proj_bias) * c",
        flops="4 * n * expand * c * c + 4 * n * slots * expand * c",
        masks={"keys", "causal"},
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n r", "weights": "b h n r"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        notes="Tokens meet only in the sum of the norm: that is what masks are about, a causal one by a running sum. "
        "`expand: 4` is the authors' form for tokens (EAMLP), `expand: 1` that of eq. 10-12; in the taps h counts "
        "heads × expand. Both norms are taken in logarithms, so the authors' ε = 1e-9 is not needed. Their biases of "
        "the memories in EAMLP are left out, as in eq. 5-6 and EANet: the norm over tokens cancels that of M_k.",
    )

    def __init__(self, site: Site, *, slots: PositiveInt = 64, expand: PositiveInt = 4, tie: bool = False):
        super().__init__(site)
        self.all_heads = site.heads * expand
        self.widen = nn.Linear(site.dim, expand * site.dim, bias=site.qkv_bias)
        self.key_memory = nn.Parameter(torch.empty(slots, site.head_dim))  # M_k
        self.value_memory = None if tie else nn.Parameter(torch.empty(slots, site.head_dim))  # M_v
        self.proj = nn.Linear(expand * site.dim, site.dim, bias=site.proj_bias)
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 2 / width of what comes out), as the authors' EANet has it."""
        slots, d = self.key_memory.shape
        nn.init.normal_(self.key_memory, std=(2 / slots) ** 0.5)
        if self.value_memory is not None:
            nn.init.normal_(self.value_memory, std=(2 / d) ** 0.5)

    @property
    def tap_heads(self) -> int:
        return self.all_heads

    def mix(self, x, source, *, mask, layout):
        f = rearrange(self.widen(x), "b n (h d) -> b h n d", h=self.all_heads)
        scores = self.scores(f @ self.key_memory.mT)  # (b h n r)
        weights = self.weights(self._double_norm(scores, mask))
        values = self.key_memory if self.value_memory is None else self.value_memory
        return self.proj(merge_heads(weights @ values))

    def _double_norm(self, scores, mask):
        """softmax over the slots of log-softmax over the tokens, eq. 7-9: (b h n r)."""
        seen = scores
        if mask.keys is not None:
            seen = scores.masked_fill(~mask.keys[:, None, :, None], float("-inf"))
        totals = seen.logcumsumexp(dim=2) if mask.causal else seen.logsumexp(dim=2, keepdim=True)
        nobody = totals == float("-inf")
        weights = (scores - totals.masked_fill(nobody, 0.0)).softmax(dim=-1)
        return weights.masked_fill(nobody, 0.0)
