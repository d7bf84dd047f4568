"""Mixture of attention heads: a router chooses, for each token, among experts that share keys and values.

Zhang et al., "Mixture of Attention Heads: Selecting Attention Heads Per Token", 2022, arXiv:2210.05144, §3.
"""

from dataclasses import replace

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site, Tap
from attnzoo.functional import balance_loss, gated_attention, merge_heads, split_heads


class MixtureOfAttention(Mechanism):
    """yᵢ = Σ_e p_e(xᵢ) softmax(xᵢ W_Q^e Kᵀ / √d) V W_O^e: e runs over the a greatest of p = softmax(W_g x).

    All E experts read one head of keys and values, K and V (m d).

    Args:
        site: Where the mechanism is put.
        experts: E. None takes twice the site's heads.
        active: a, how many experts a token has. None takes as many as the site has heads, and no more than there are.

    Raises:
        OptionError: AZ214, when there are not so many experts.
    """

    card = Card(
        name="mixture_of_attention",
        family=Family.ROUTING,
        summary="MoA: each token has the best few of many query and output projections, over shared keys and values.",
        equation="Σ_{e ∈ top_a(p)} p_e W_O^e softmax(W_Q^e x Kᵀ / √d) V\n"
        "p = softmax(W_g x),  K = W_k s,  V = W_v s",
        paper=Paper(
            "Mixture of Attention Heads: Selecting Attention Heads Per Token",
            "Zhang et al.",
            2022,
            "arXiv:2210.05144",
            where="§3.2-3.3",
        ),
        time="n m c + n c c",
        memory="h n m",
        params="(experts != 1) * c * (experts or 2 * h) + 2 * (c * (experts or 2 * h) + e) * d",
        flops="2 * n * c * (experts or 2 * h) * ((experts != 1) + 2 * d) + 4 * m * e * d "
        "+ 4 * n * m * (experts or 2 * h) * d",
        masks={"keys", "causal", "pairs"},
        one_head=True,
        context=True,
        taps={"scores_experts": "b n k", "shares": "b n k", "scores": "b h n m", "weights": "b h n m"},
        laws={Law.SUBSTOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        auxiliary="E Σ_e P_e f_e / a + 0.1 mean(log² Σ_e exp(W_g x)_e): P_e the mean of p_e over tokens, f_e how many "
        "have e active",
        notes="The authors weigh the first part of the loss with 0.01, the second with 0.001. The paper divides p by "
        "its sum over the active experts, without that sum's gradient; the authors' code, which is followed, does not. "
        "No projection has a bias. The tap `weights` shows the softmax times p; its heads are the experts. All experts "
        "are computed: no operation is saved. Of ties, as at the start, the first have it.",
    )

    scores_experts: Tap
    shares: Tap

    @classmethod
    def claims(cls, *, experts: int | None, **options) -> Card:
        if experts != 1:
            return cls.card
        taps = {name: cls.card.taps[name] for name in ("scores", "weights")}
        return replace(cls.card, taps=taps, auxiliary="")

    def __init__(self, site: Site, *, experts: PositiveInt | None = None, active: PositiveInt | None = None):
        super().__init__(site)
        c, e, d = site.dim, site.context_dim or site.dim, site.head_dim
        self.experts = 2 * site.heads if experts is None else experts
        self.active = min(site.heads, self.experts) if active is None else active
        if self.active > self.experts:
            raise OptionError(
                f"`mixture_of_attention`: {active} of {self.experts} experts cannot be active",
                help=f"choose at most {self.experts}, or more experts",
            )
        self.route = nn.Linear(c, self.experts, bias=False) if self.experts > 1 else None  # W_g
        self.q = nn.Linear(c, self.experts * d, bias=False)
        self.k, self.v = nn.Linear(e, d, bias=False), nn.Linear(e, d, bias=False)
        self.proj = nn.Linear(self.experts * d, c, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """W_g = 0; keys and values by Glorot's uniform numbers over √2."""
        if self.route is not None:
            nn.init.zeros_(self.route.weight)
        for layer in (self.k, self.v):
            nn.init.xavier_uniform_(layer.weight, gain=2**-0.5)

    @property
    def tap_heads(self) -> int:
        return self.experts

    def auxiliary(self, *, scores_experts, shares):
        return (
            balance_loss(shares, self.active) / self.active
            + 0.1 * scores_experts.logsumexp(-1).square().mean()
        )

    def gates(self, x):
        """p of the best experts, and 0 of the others, (b n k)."""
        if self.route is None:
            return torch.ones_like(x[..., :1])
        shares = self.shares(self.scores_experts(self.route(x)).softmax(dim=-1))
        if self.active == self.experts:
            return shares
        # by comparison: at the start all are alike, and of ties topk takes others on every machine
        place = torch.ones_like(shares).cumsum(dim=-1)
        own, other = shares[..., None], shares[..., None, :]
        ahead = (other > own) | ((other == own) & (place[..., None, :] < place[..., None]))
        return shares * (ahead.sum(dim=-1) < self.active)

    def mix(self, x, source, *, mask, layout):
        q = split_heads(self.q(x), self.experts)
        k, v = (t[:, None].expand(-1, self.experts, -1, -1) for t in (self.k(source), self.v(source)))
        return self.proj(merge_heads(gated_attention(self, q, k, v, self.gates(x).mT, mask)))
