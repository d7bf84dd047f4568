"""SwitchHead: few heads, each with several experts for its values and its output, of which a token has the best few.

Csordás et al., "SwitchHead: Accelerating Transformers with Mixture-of-Experts Attention", 2023, arXiv:2312.07987, §2.2.
"""

from dataclasses import replace

from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site, Tap
from attnzoo.functional import dot_product_attention, einsum, greatest, masked_softmax, rearrange, split_heads


class SwitchHead(Mechanism):
    """yᵢ = Σ_h Σ_e r_he(xᵢ) (Σⱼ aᵢⱼ vⱼ) W_O^he, vⱼ = Σ_e u_he(sⱼ) sⱼ W_V^he, a = softmax(q_h k_hᵀ / √d).

    u_h = σ(W_S^h s) of the `active` greatest of E experts of a head and 0 of the others, by the token that is read; r_h
    likewise, of W_D x, by the token that asks. A σ does not sum to 1: experts do not compete.

    Args:
        site: Where the mechanism is put.
        experts: E of each head. One alone makes multi-head attention whose heads have a gate σ(W_D x).
        active: How many experts of a head a token has; 2 in the paper, at most E.

    Raises:
        OptionError: AZ214, when there are not so many experts; one alone is always active.
    """

    card = Card(
        name="switch_head",
        family=Family.ROUTING,
        summary="SwitchHead: experts for the values and the output of each head, chosen token by token.",
        equation="Σ_h Σ_e r_he(x_i) W_O^he Σ_j a_hij v_hj\n"
        "v_hj = Σ_e u_he(s_j) W_V^he s_j,  a_h = softmax(q_h k_hᵀ / √d)\n"
        "u_h = best(σ(W_S s)),  r_h = best(σ(W_D x))",
        paper=Paper(
            "SwitchHead: Accelerating Transformers with Mixture-of-Experts Attention",
            "Csordás et al.",
            2023,
            "arXiv:2312.07987",
            where="§2.2, eq. 7-10",
        ),
        time="n m c + n c c",
        memory="h n m + n c",
        params="c**2 + e * c + experts * (e * c + (experts > 1) * e * h + c * h + c**2)",
        flops="2 * n * c**2 + 2 * m * e * c + 2 * m * experts * e * c "
        "+ (experts > 1) * 2 * m * experts * (e * h + c) + 4 * n * m * c + 2 * n * experts * (c * h + c**2)",
        masks={"keys", "causal", "pairs"},
        context=True,
        taps={
            "shares_source": "b m h k",
            "shares": "b n h k",
            "scores": "b h n m",
            "weights": "b h n m",
        },
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        notes="No projection has a bias, as in the authors' code, and nothing is added to the loss. The taps of shares "
        "show all σ, before the best are chosen. All experts are computed: no operation is saved. Ties are broken as "
        "PyTorch's topk does. The authors' positions are those of Transformer-XL, or rotary; here they are the host's.",
    )

    shares_source: Tap
    shares: Tap

    @classmethod
    def claims(cls, *, experts: int, **options) -> Card:
        if experts > 1:
            return cls.card
        return replace(
            cls.card, taps={name: t for name, t in cls.card.taps.items() if name != "shares_source"}
        )

    def __init__(self, site: Site, *, experts: PositiveInt = 4, active: PositiveInt = 2):
        super().__init__(site)
        if active > experts > 1:
            raise OptionError(
                f"`switch_head`: {active} of {experts} experts cannot be active",
                help=f"choose at most {experts}, or more experts",
            )
        c, e, h, d = site.dim, site.context_dim or site.dim, site.heads, site.head_dim
        self.experts, self.active = experts, min(active, experts)
        self.q, self.k = nn.Linear(c, c, bias=False), nn.Linear(e, c, bias=False)
        self.v = nn.Linear(e, h * experts * d, bias=False)  # W_V
        self.choose_source = nn.Linear(e, h * experts, bias=False) if experts > 1 else None  # W_S
        self.choose = nn.Linear(c, h * experts, bias=False)  # W_D
        self.proj = nn.Linear(h * experts * d, c, bias=False)  # W_O
        self.init_weights()

    def init_weights(self) -> None:
        """Normal numbers, of each expert as if it were alone: 1 / √c into a head and out of all; of routers too."""
        c = self.proj.out_features
        for layer in (self.v, self.choose, self.choose_source):
            if layer is not None:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(self.proj.weight, std=c**-0.5)

    def best(self, shares):
        """σ of the best experts of each head, and 0 of the others, (b n h k)."""
        if self.active == self.experts:
            return shares
        return greatest(shares, self.active) * shares

    def mix(self, x, source, *, mask, layout):
        sizes = {"h": self.heads, "k": self.experts}
        q, k = split_heads(self.q(x), self.heads), split_heads(self.k(source), self.heads)
        v = rearrange(self.v(source), "b m (h k d) -> b m h k d", **sizes)
        if self.choose_source is None:
            v = rearrange(v, "b m h 1 d -> b h m d")
        else:
            by = rearrange(self.choose_source(source).sigmoid(), "b m (h k) -> b m h k", **sizes)
            v = einsum(self.best(self.shares_source(by)), v, "b m h k, b m h k d -> b h m d")
        if self.scores.watched or self.weights.watched:
            scores = self.scores((q * q.shape[-1] ** -0.5) @ k.mT)
            heads = self.weights(masked_softmax(scores, mask.dense(q.shape[2], k.shape[2], q.device))) @ v
        else:
            heads = dot_product_attention(self, q, k, v, mask)
        by = self.shares(rearrange(self.choose(x).sigmoid(), "b n (h k) -> b n h k", **sizes))
        heads = einsum(self.best(by), heads, "b n h k, b h n d -> b n h k d")
        return self.proj(rearrange(heads, "b n h k d -> b n (h k d)"))
