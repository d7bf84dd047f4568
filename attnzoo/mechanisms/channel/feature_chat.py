"""Feature chat: attention between features that were projected first, added to them and projected again.

An et al., "ReJSHand: Efficient Real-Time Hand Pose Estimation and Mesh Reconstruction Using Refined Joint and Skeleton
Features", 2025, arXiv:2503.05995: the feature interaction block of the authors' code.
"""

from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, Paper, Site
from attnzoo.functional import multi_head_attention


class FeatureChat(Mechanism):
    """W (W_o softmax(q kᵀ / √d) v + x) + b: q, k and v are of a = W_a x + b_a.

    Args:
        site: Where the mechanism is put.
    """

    card = Card(
        name="feature_chat",
        family=Family.CHANNEL,
        summary="ReJSHand's feature interaction: a projection, attention, a sum with what came in, and a projection.",
        equation="W (W_o softmax(q kᵀ / √d) v + x) + b\nq = W_q a,  k = W_k a,  v = W_v a,  a = W_a x + b_a",
        paper=Paper(
            "ReJSHand: Efficient Real-Time Hand Pose Estimation and Mesh Reconstruction Using Refined Joint and "
            "Skeleton Features",
            "An et al.",
            2025,
            "arXiv:2503.05995",
            where="feature interaction block",
        ),
        time="n m c + n c c",
        memory="h n m",
        params="6 * c**2 + (3 * qkv_bias + proj_bias + 2) * c",
        flops="12 * n * c**2 + 4 * n * m * c",
        masks={"keys", "causal", "pairs"},
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="As in the authors' code, which is not all of the paper. Their block is relu(c + x), c being this: the "
        "skip is the host's, and the ReLU after it is left out. Their W_a is called a graph convolution, and knows no "
        "graph. They have 8 heads. W_a and W always have biases.",
    )

    def __init__(self, site: Site):
        super().__init__(site)
        c = site.dim
        self.first = nn.Linear(c, c)  # W_a
        self.qkv = nn.Linear(c, 3 * c, bias=site.qkv_bias)
        self.proj = nn.Linear(c, c, bias=site.proj_bias)  # W_o
        self.last = nn.Linear(c, c)  # W

    def mix(self, x, source, *, mask, layout):
        q, k, v = self.qkv(self.first(x)).chunk(3, dim=-1)
        return self.last(self.proj(multi_head_attention(self, q, k, v, mask)) + x)
