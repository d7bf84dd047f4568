"""Scaled dot-product attention.

Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, §3.2.1, eq. 1.
"""

from jaxtyping import Float
from torch import Tensor

from attnzoo.core import NO_MASK, Card, Family, Head, Law, Layout, Mask, Paper, Site, Tap
from attnzoo.functional import dot_product_attention


class Softmax(Head):
    """softmax(q kᵀ / √d) v, by PyTorch's fused kernel unless a tap is watched.

    Args:
        site: Where the head is put.
    """

    card = Card(
        name="softmax",
        family=Family.DOT_PRODUCT,
        summary="Self- or cross-attention as everybody knows it: softmax(q kᵀ / √d) v.",
        paper=Paper(
            "Attention Is All You Need", "Vaswani et al.", 2017, "arXiv:1706.03762", where="§3.2.1, eq. 1"
        ),
        time="n m c",
        memory="h n m",
        masks={"keys", "causal", "pairs"},
        context=True,
        incremental=True,
        weights="b h n m",
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT, Law.LINEAR_IN_VALUES, Law.BOUNDED},
        notes="The fused kernel forms no (n, m) tensor; memory is that of the explicit form, which taps ask for.",
    )

    def __init__(self, site: Site):
        super().__init__()
        self.attn_drop = site.attn_drop
        self.scores, self.weights = Tap("b h n m"), Tap("b h n m")

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m d"],
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
    ) -> Float[Tensor, "b h n d"]:
        dropout = self.attn_drop if self.training else 0.0
        return dot_product_attention(q, k, v, mask, self.scores, self.weights, dropout)
