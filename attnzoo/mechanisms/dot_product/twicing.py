"""Twicing attention: what the first smoothing leaves over is smoothed too, and added.

Abdullaev and Nguyen, "Transformer Meets Twicing: Harnessing Unattended Residual Information", ICLR 2025,
arXiv:2503.00687.
"""

from dataclasses import replace

import torch
from torch.nn import functional as F

from attnzoo.core import Card, Family, Head, Law, Paper, Site
from attnzoo.functional import dot_product_attention, masked_softmax


class Twicing(Head):
    """(2A - A²) v = A v + A (v - A v), A = softmax(q kᵀ / √d), (b h n n).

    Args:
        site: Where the head is put.
        form_matrix: Whether 2A - A² is what taps show and dropout meets, as in the authors' language code; while nobody
            looks and nothing is dropped it is not formed either. Otherwise that is A, which loses the same entries both
            times that it is applied, as in their vision code.
    """

    card = Card(
        name="twicing",
        family=Family.DOT_PRODUCT,
        summary="Softmax attention applied a second time, to what the first leaves over: (2A - A²) v.",
        equation="(2A − A²) v\nA = softmax(q kᵀ / √d)",
        paper=Paper(
            "Transformer Meets Twicing: Harnessing Unattended Residual Information",
            "Abdullaev and Nguyen",
            2025,
            "arXiv:2503.00687",
        ),
        time="n m c",
        memory="h n m",
        params="0",
        flops="8 * n * m * c",
        masks={"keys", "causal"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT, Law.LINEAR_IN_VALUES, Law.HEADS_APART},
        notes="Rows of 2A - A² sum to 1, but entries may be negative. The tap `weights` shows A as it is applied to "
        "2v - A v; with `form_matrix` it shows 2A - A². Pairs are not claimed: A² reads through a key what the query "
        "itself may not see. The authors use it in all layers for images, in the last 2 of 16 for text.",
    )

    @classmethod
    def claims(cls, *, form_matrix: bool, **options) -> Card:
        if not form_matrix:
            return cls.card
        return replace(cls.card, time="n m c + h n n m", laws=cls.card.laws - {Law.STOCHASTIC})

    def __init__(self, site: Site, *, form_matrix: bool = False):
        super().__init__(site)
        self.form_matrix = form_matrix
        if not form_matrix:
            self.weights.dropout = 0.0  # both applications lose the same entries, see below

    def attend(self, q, k, v, *, mask, layout):
        dropping = self.training and self.attn_drop > 0
        if not (dropping or self.scores.watched or self.weights.watched):
            smooth = dot_product_attention(self, q, k, v, mask).reshape(v.shape)  # as many queries as keys
            return 2 * smooth - dot_product_attention(self, q, k, smooth, mask)
        scores = self.scores((q * q.shape[-1] ** -0.5) @ k.mT)
        a = masked_softmax(scores, mask.dense(q.shape[2], k.shape[2], q.device))
        if self.form_matrix:
            return self.weights(2 * a - a @ a) @ v
        shown = self.weights(a)
        if dropping:
            kept = F.dropout(torch.ones_like(a), self.attn_drop)
            a, shown = a * kept, shown * kept
        return 2 * (shown @ v) - shown @ (a @ v)
