"""Mixture of heads: a router chooses heads for each token and weighs what they give.

Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024, arXiv:2410.11842, §3.2.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, NonNegativeInt, OptionError, Paper, Site, Tap
from attnzoo.functional import balance_loss, gated_attention, greatest, merge_heads, rearrange, split_heads
from attnzoo.functional.projections import Projected

TITLE = "MoH: Multi-Head Attention as Mixture-of-Head Attention"


class MixtureOfHeads(Projected):
    """Σ_h g_h(x) softmax(q_h k_hᵀ / √d) v_h W_h: g = α₁ s softmax(W_s x) of s shared heads, α₂ a p_e / Σ p of a routed.

    The a routed heads with the greatest p = softmax(W_r x) are active, the sum is over these, the others have a gate of
    0. (α₁, α₂) = 2 softmax(W₀ x) where there are heads of both kinds, otherwise 1. The shared heads come first. With
    `router: query_norm` the a longest queries ‖q_e‖₂, before norms, are active: g is 1 or 0, without a gradient.

    Args:
        site: Where the mechanism is put.
        shared: s, how many heads are always active; all: one soft weighting. None: a quarter, half for `query_norm`.
        active: a, how many of the other heads are active for a token. None takes what makes three quarters with the
            shared ones, at least 2, with `router: query_norm` 1. With `scaling: code` one alone has a gate that no
            router changes: only a balance loss would teach it.
        scaling: `code` has the gates above, the authors', which start at about 1; `paper` has α₁ softmax(W_s x) and
            α₂ p_e with α = softmax(W₀ x). Of the linear routers.
        router: `linear` has W_r, W_s and W₀; `query_norm` has no parameters.

    Raises:
        OptionError: AZ214, when there are not so many heads, some could never be active, or nothing is to be scaled.
    """

    card = Card(
        name="mixture_of_heads",
        family=Family.ROUTING,
        summary="MoH: shared heads, and routed ones of which each token has the best few, weighed by their routers.",
        equation="Σ_h g_h W_h softmax(q_h k_hᵀ / √d) v_h\ng = α₁ s softmax(W_s x) of shared heads\n"
        "g_e = α₂ a p_e / (Σ_l p_l) of routed heads e, l ∈ top_a(p)\np = softmax(W_r x),  [α₁; α₂] = 2 softmax(W₀ x)",
        paper=Paper(TITLE, "Jin et al.", 2024, "arXiv:2410.11842", "§3.2"),
        time="n m c + n c c",
        memory="h n m",
        params="(2 * c + 2 * e + 3 * qkv_bias + proj_bias) * c + 4 * qk_norm * d "
        "+ sum(c * (h + 2 * (s > 0) - (s == 1) - (s == h - 1)) "
        "for s in [(h // 4 * (active != 0) if shared is None else shared) % h] if router == 'linear')",
        flops="4 * (n * c + m * e + n * m) * c + 2 * n * sum(c * (h + 2 * (s > 0) - (s == 1) - (s == h - 1)) "
        "for s in [(h // 4 * (active != 0) if shared is None else shared) % h] if router == 'linear')",
        masks={"keys", "causal", "pairs"},
        context=True,
        honours={"qkv_bias", "proj_bias", "qk_norm"},
        taps={"shares": "b n k", "gate": "b h n", "scores": "b h n m", "weights": "b h n m"},
        laws={Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        auxiliary="E Σ_e P_e f_e over the E routed heads: P_e the mean of p_e over tokens, f_e how many have e active",
        notes="The authors weigh the balance loss with 0.01; that of the paper has no factor E. The tap `weights` "
        "shows the softmax times the gate. All heads are computed: no operation is saved. Ties are broken as PyTorch's "
        "topk does. `query_norm` is the router of MoH-LLaMA3 as released, for inference; the paper trains it by "
        "straight-through gradients.",
    )

    shares: Tap

    @classmethod
    def claims(cls, *, router: str, **options) -> Card:
        if router == "linear":
            return cls.card
        taps = {name: cls.card.taps[name] for name in ("gate", "scores", "weights")}
        return replace(cls.card, taps=taps, auxiliary="")

    def __init__(
        self, site: Site, *, shared: NonNegativeInt | None = None, active: NonNegativeInt | None = None,
        scaling: Literal["code", "paper"] = "code", router: Literal["linear", "query_norm"] = "linear",
    ):  # fmt: skip
        super().__init__(site)
        heads, linear = site.heads, router == "linear"
        if scaling == "paper" and not linear:
            what, why = "`scaling: paper` with `router: query_norm`", "its gates are 0 or 1"
            raise OptionError(f"`mixture_of_heads`: {what}", why=why, help="choose one of the two")
        if shared is None:
            shared = heads if active == 0 else heads // (4 if linear else 2)
        if active is None:
            least = max(2 if linear else 1, 3 * heads // 4 - shared)
            active = min(heads - shared, least) if shared < heads else 0
        many = shared + active > heads
        if many or (active == 0 and shared < heads):
            raise OptionError(
                f"`mixture_of_heads`: {shared} shared and {active} active of {heads} heads",
                why="there are not so many" if many else "the others could never be active",
                help=f"choose at most {heads} together, with at least one active, or {heads} shared",
            )
        if active == 0:  # one soft weighting of all heads: all are routed, and all active
            shared, active = 0, heads
        self.shared, self.active, self.scaling, self.router = shared, active, scaling, router
        routed = heads - shared if linear else 0
        self.route = nn.Linear(site.dim, routed, bias=False) if routed > 1 else None  # W_r
        self.weigh = nn.Linear(site.dim, shared, bias=False) if linear and shared > 1 else None  # W_s
        self.divide = nn.Linear(site.dim, 2, bias=False) if linear and shared else None  # W₀
        self.add_projections(site)
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)

    def auxiliary(self, *, shares):
        return None if self.route is None else balance_loss(shares, self.active)

    def longest(self, q):
        """g of `router: query_norm`, (b n h), from queries (b h n d)."""
        length = rearrange(q[:, self.shared :].norm(dim=-1), "b h n -> b n h")
        return F.pad(greatest(length, self.active), (self.shared, 0), value=1.0)

    def gates(self, x):
        """g of the linear routers, (b n h)."""
        code, one = self.scaling == "code", x[..., :1].softmax(dim=-1)  # 1, whatever the score
        shares = self.shares(one if self.route is None else self.route(x).softmax(dim=-1))  # p, (b n k)
        routed = greatest(shares, self.active) * shares
        if code and self.route is not None:
            routed = self.active * routed / routed.sum(dim=-1, keepdim=True)
        if self.divide is None:
            return routed
        first, second = (self.divide(x).softmax(dim=-1) * (2 if code else 1)).chunk(2, dim=-1)  # α₁, α₂
        always = one if self.weigh is None else self.weigh(x).softmax(dim=-1) * (self.shared if code else 1)
        return torch.cat([first * always, second * routed], dim=-1)

    def mix(self, x, source, *, mask, layout):
        q, k, v = (split_heads(t, self.heads) for t in self.projected(x, source))
        gates = self.gates(x) if self.router == "linear" else self.longest(q)
        gate = self.gate(rearrange(gates, "b n h -> b h n"))
        q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(merge_heads(gated_attention(self, q, k, v, gate, mask)))
