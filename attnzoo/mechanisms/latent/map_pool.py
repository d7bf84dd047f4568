"""Attention pooling: a learned query reads all tokens, and an MLP follows.

Zhai et al., "Scaling Vision Transformers", 2021, arXiv:2106.04560, §3.2 (MAP). The layers are timm's.
"""

from attnzoo.core import Card, Family, Law, Paper, Pool, PositiveFloat, Site
from attnzoo.functional import dot_product_attention, merge_heads, rearrange, repeat


class MapPool(Pool):
    """y + MLP(norm(y)), y = W softmax(q kᵀ / √d) v with one learned q: timm's `AttentionPoolLatent`.

    Args:
        site: Where the pool is put.
        mlp_ratio: Width of the MLP, in widths of the tokens.
    """

    card = Card(
        name="map_pool",
        family=Family.LATENT,
        summary="Multi-head attention pooling: one learned query reads all tokens, and an MLP follows.",
        equation="y + MLP(norm(y))\ny = W softmax(q kᵀ / √d) v",
        paper=Paper("Scaling Vision Transformers", "Zhai et al.", 2021, "arXiv:2106.04560", where="§3.2"),
        time="n c c",
        memory="n c",
        params="(4 * c + 3 * qkv_bias + 5) * c + 4 * qk_norm * d + (2 * c + 1) * (mlp_ratio * c // 1)",
        flops="4 * (n + 1) * c * c + 4 * n * c + 4 * c * (mlp_ratio * c // 1)",
        masks={"keys"},
        honours={"qkv_bias", "qk_norm"},
        taps={"scores": "b h r m", "weights": "b h r m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        notes="Special tokens are read like all others. Where no token exists the pooled token is zero before the "
        "output projection.",
    )

    def __init__(self, site: Site, *, mlp_ratio: PositiveFloat = 4.0):
        super().__init__(site)
        # here, so that a list of mechanisms does not wait for timm
        from timm.layers import AttentionPoolLatent

        self.layers = AttentionPoolLatent(
            site.dim,
            num_heads=site.heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=site.qkv_bias,
            qk_norm=site.qk_norm,
            norm_layer=site.norm,  # type: ignore[arg-type]
        )

    def init_weights(self) -> None:
        """timm's, for the learned query."""
        self.layers.init_weights()

    def pool(self, x, *, mask, layout):
        layers = self.layers
        q = layers.q(repeat(layers.latent, "1 r c -> b r c", b=x.shape[0]))  # timm's bits, too
        q = rearrange(q, "b r (h d) -> b h r d", h=self.heads)
        k, v = rearrange(layers.kv(x), "b m (two h d) -> two b h m d", two=2, h=self.heads)
        read = dot_product_attention(self, layers.q_norm(q), layers.k_norm(k), v, mask)
        y = layers.proj(merge_heads(read))
        return (y + layers.mlp(layers.norm(y)))[:, 0]
