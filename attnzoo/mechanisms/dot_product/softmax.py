"""Scaled dot-product attention.

Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, §3.2.1, eq. 1.
"""

from attnzoo.core import Card, Family, Head, Law, Paper
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
        equation="softmax(q kᵀ / √d) v",
        paper=Paper(
            "Attention Is All You Need", "Vaswani et al.", 2017, "arXiv:1706.03762", where="§3.2.1, eq. 1"
        ),
        time="n m c",
        memory="h n m",
        params="0",
        flops="4 * n * m * c",
        masks={"keys", "causal", "pairs"},
        context=True,
        incremental=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={
            Law.STOCHASTIC,
            Law.PERMUTATION_EQUIVARIANT,
            Law.LINEAR_IN_VALUES,
            Law.BOUNDED,
            Law.HEADS_APART,
        },
        notes="The fused kernel forms no (n, m) tensor; memory is that of the explicit form, which taps ask for.",
    )

    def attend(self, q, k, v, *, mask, layout):
        return dot_product_attention(self, q, k, v, mask)
