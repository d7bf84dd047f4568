"""Cross-covariance attention: the channels of a head attend to each other, by what they hold along the tokens.

El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", 2021, arXiv:2106.09681, §3.2. The layers are timm's `XCA`.
"""

from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, Paper, Site
from attnzoo.functional import rearrange


class CrossCovariance(Mechanism):
    """out_i = A v_i, A = softmax(τ q̂ᵀ k̂) of d × d in each head: every channel of q̂ and k̂ has length 1 along the tokens.

    Args:
        site: Where the mechanism is put.
    """

    card = Card(
        name="cross_covariance",
        family=Family.CHANNEL,
        summary="XCiT: softmax attention among the channels of a head instead of tokens, with a learned temperature.",
        equation="W_o A v_i\nA = softmax(τ q̂ᵀ k̂)",
        paper=Paper(
            "XCiT: Cross-Covariance Image Transformers",
            "El-Nouby et al.",
            2021,
            "arXiv:2106.09681",
            where="§3.2, eq. 2",
        ),
        time="n c d + n c c",
        memory="n c + c d",
        params="4 * c**2 + (3 * qkv_bias + 1) * c + h",
        flops="8 * n * c**2 + 4 * n * c * d",
        masks={"keys"},
        honours={"qkv_bias"},
        taps={"scores": "b h d r", "weights": "b h d r"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        notes="The r of the taps are channels, too: those that are read. The authors' τ multiplies in their code and "
        "divides in the paper; here it multiplies, one for each head, and starts at 1. The output projection has a "
        "bias. Tokens that do not exist are zeros in q and k. The local convolutions of XCiT are layers of their own.",
    )

    def __init__(self, site: Site):
        super().__init__(site)
        from timm.models.xcit import XCA  # here, so that a list of mechanisms does not wait for timm

        self.head_dim = site.head_dim
        self.layers = XCA(site.dim, site.heads, site.qkv_bias)

    def no_weight_decay(self) -> set[str]:
        return {"layers.temperature"}

    def mix(self, x, source, *, mask, layout):
        layers = self.layers
        q, k, v = rearrange(layers.qkv(x), "b n (t h d) -> t b h d n", t=3, d=self.head_dim)
        if mask.keys is not None:
            q, k = (t.masked_fill(~mask.keys[:, None, None], 0.0) for t in (q, k))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = self.weights(self.scores(q @ k.mT * layers.temperature).softmax(dim=-1))  # (b h d d)
        return layers.proj(rearrange(weights @ v, "b h d n -> b n (h d)"))
