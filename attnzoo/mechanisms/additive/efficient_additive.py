"""Efficient additive attention: one query vector for all, a weighted sum of queries, scales the keys; no values.

Shaker et al., "SwiftFormer", 2023, arXiv:2303.15446, §3.1. The layers are timm's `EfficientAdditiveAttention`.
"""

from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, Paper, Site


class EfficientAdditive(Mechanism):
    """W (T (g ⊙ k̂_i) + q̂_i), g = Σ_j α_j q̂_j: q̂ and k̂ are of length 1, and so is α, (q̂ · w) / √c, along the tokens.

    Args:
        site: Where the mechanism is put.
    """

    card = Card(
        name="efficient_additive",
        family=Family.ADDITIVE,
        summary="SwiftFormer: a global query, the weighted sum of all queries, scales the keys; cost linear in tokens.",
        equation="W (T (g ⊙ k̂_i) + q̂_i)\ng = Σ_j α_j q̂_j,  α_j ∝ q̂_j·w,  ‖α‖ = 1\nq̂ = q / ‖q‖,  k̂ = k / ‖k‖",
        paper=Paper(
            "SwiftFormer: Efficient Additive Attention for Transformer-based Real-time Mobile Vision Applications",
            "Shaker et al.",
            2023,
            "arXiv:2303.15446",
            where="§3.1, eq. 4-6",
        ),
        time="n c c",
        memory="n c",
        params="4 * (c + 1) * c + c",
        flops="8 * n * c * c + 4 * n * c",
        masks={"keys"},
        one_head=True,
        taps={"scores": "b m", "weights": "b m"},
        laws={Law.PERMUTATION_EQUIVARIANT},
        notes="As in the authors' code, α is divided by its length, not by its sum, and may be negative, and a last "
        "projection W follows. There is one head, and all four layers have biases. w starts at N(0, 1); its length has "
        "no say. Where no token exists g is zero.",
    )

    def __init__(self, site: Site):
        super().__init__(site)
        # here, so that a list of mechanisms does not wait for timm
        from timm.models.swiftformer import EfficientAdditiveAttention

        self.layers = EfficientAdditiveAttention(site.dim, site.dim, num_heads=1)

    def no_weight_decay(self) -> set[str]:
        return {"layers.w_g"}

    def mix(self, x, source, *, mask, layout):
        layers = self.layers
        q, k = F.normalize(layers.to_query(x), dim=-1), F.normalize(layers.to_key(x), dim=-1)  # (b n c)
        scores = self.scores((q @ layers.w_g * layers.scale_factor)[..., 0])  # (b m)
        if mask.keys is not None:
            scores = scores.masked_fill(~mask.keys, 0.0)
        g = self.weights(F.normalize(scores, dim=-1))[:, None] @ q
        return layers.final(layers.proj(g * k) + q)
