"""Dynamic mask attention: values score their own keys, and only the keys that score best are attended to.

Shi et al., "Trainable Dynamic Mask Sparse Attention", 2025, arXiv:2508.02124.
"""

from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import attention_from_scores, merge_heads, split_heads


def best(rank: Tensor, allowed: Tensor | None, window: int) -> Tensor:
    """Which keys are kept, (b h n m), or (b h 1 m) where all queries may see the same.

    Args:
        rank: (b h 1 m).
        allowed: Boolean that broadcasts to (b h n m); None allows all.
        window: How many keys a query keeps, of those it may see.
    """
    seen = torch.ones_like(rank, dtype=torch.bool)
    seen = seen if allowed is None else seen & allowed
    keys = torch.where(seen, rank, float("-inf")).topk(min(window, rank.shape[-1]), dim=-1).indices
    return torch.zeros_like(seen).scatter(-1, keys, True) & seen  # short rows are filled up with hidden keys


def few(k: Tensor, v: Tensor, bias: Tensor, kept: Tensor, window: int) -> list[Tensor]:
    """The w keys that all queries keep: of k and v (b h m d) -> (b h w d), of bias and kept (b h 1 m) -> (b h 1 w)."""
    if window >= kept.shape[-1]:
        return [k, v, bias, kept]
    keys = kept.to(k.dtype).topk(window, dim=-1).indices.sort(dim=-1).values.mT  # (b h w 1)
    k, v = (t.gather(2, keys.expand(-1, -1, -1, t.shape[-1])) for t in (k, v))
    return [k, v, bias.mT.gather(2, keys).mT, kept.mT.gather(2, keys).mT]


fx.wrap("best")  # symbolic tracing knows no lengths
fx.wrap("few")


class DynamicMask(Mechanism):
    """softmax(q kᵀ / √d + δ) v over the w keys of largest δ that a query may see; δ = A softplus(W_Δ v), of each group.

    Args:
        site: Where the mechanism is put.
        window: w, how many keys a query keeps.
        group: Neighbouring query heads that share keys, values and δ; must divide the heads.
        exponential: Whether δ = exp(A softplus(W_Δ v)), as in the paper. The authors' code has left the exp out, since
            it overflows; here its argument is at most 80.

    Raises:
        OptionError: AZ214, when the group does not divide the heads.
    """

    card = Card(
        name="dynamic_mask",
        family=Family.SPARSE,
        summary="Grouped-query attention to the few keys that a learned score of their values puts first.",
        equation="W_o softmax(q kᵀ / √d + δ) v over top_w(δ)\nδ = A softplus(W_Δ v)",
        paper=Paper("Trainable Dynamic Mask Sparse Attention", "Shi et al.", 2025, "arXiv:2508.02124"),
        time="n m c + n c c",
        memory="h n m",
        params="(c + qkv_bias) * c + 2 * (e + qkv_bias) * c // group "
        "+ (c // group + qkv_bias + 1) * h // group + 4 * qk_norm * d + (c + proj_bias) * c",
        flops="4 * n * c**2 + 4 * m * e * c // group + 2 * m * c // group * h // group "
        "+ 4 * n * min(window, m) * c",
        masks={"keys", "causal", "pairs"},
        context=True,
        honours={"qkv_bias", "proj_bias", "qk_norm", "rotary"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="δ has no exp unless asked for, as in the authors' code; the same keys are kept. Which are kept has no "
        "gradient: A and W_Δ learn by δ in the scores. n w c, without an (n, m) tensor, while all queries may see the "
        "same keys and nobody watches; otherwise as dense as softmax. Left out of the authors' code: to keep δ > 0, "
        "all or nothing by the sign of A; and blocks kept by majority, which may open hidden keys or leave none.",
    )

    @classmethod
    def claims(cls, *, exponential: bool, **options) -> Card:
        return replace(cls.card, fidelity="exact") if exponential else cls.card

    def __init__(
        self, site: Site, *, window: PositiveInt = 2048, group: PositiveInt = 1, exponential: bool = False
    ):
        super().__init__(site)
        if site.heads % group:
            raise OptionError(f"`dynamic_mask`: groups of {group} heads do not divide {site.heads}")
        self.window, self.group, self.exponential = window, group, exponential
        self.rotary = site.rotary and site.context_dim is None
        groups, width = site.key_heads(site.heads // group), site.head_dim * site.heads // group
        self.q = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)
        self.kv = nn.Linear(site.context_dim or site.dim, 2 * width, bias=site.qkv_bias)
        self.q_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.k_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.delta = nn.Linear(width, groups, bias=site.qkv_bias)  # W_Δ
        self.strength = nn.Parameter(torch.empty(groups))  # A
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)
        self.init_weights()

    def init_weights(self) -> None:
        """A from N(0, 0.02²): at zero W_Δ would get no gradient."""
        nn.init.normal_(self.strength, std=0.02)

    def mix(self, x, source, *, mask, layout):
        k, v = self.kv(source).chunk(2, dim=-1)
        rank = (self.strength * F.softplus(self.delta(v))).mT[:, :, None]
        groups = self.heads // self.group
        q, k, v = split_heads(self.q(x), self.heads), split_heads(k, groups), split_heads(v, groups)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = layout.turn(q), layout.turn(k)
        k, v, rank = (t.repeat_interleave(self.group, dim=1) for t in (k, v, rank))  # rank: (b h 1 m)
        bias = rank.clamp(max=80).exp() if self.exponential else rank  # e⁸⁰ is finite in float32
        allowed = mask.dense(x.shape[1], source.shape[1], x.device)
        kept = best(rank.detach(), allowed, self.window)
        alike = mask.pairs is None and not mask.causal
        if alike and not (self.scores.watched or self.weights.watched):
            k, v, bias, kept = few(k, v, bias, kept, self.window)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT + bias
        return self.proj(merge_heads(attention_from_scores(self, scores, v, kept)))
