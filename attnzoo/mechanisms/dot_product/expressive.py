"""Expressive attention: keys count when they are parallel or antiparallel to the query, not when they are orthogonal.

Gros, "Reorganizing attention-space geometry with expressive attention", 2024, arXiv:2407.18601; without a normalisation
in "Small transformer architectures for task switching", 2025, arXiv:2508.04461.
"""

from dataclasses import replace
from typing import Literal

from attnzoo.core import Card, Family, Head, Law, OptionError, Paper, PositiveFloat, Site
from attnzoo.functional.expressive import expressive_weights


class Expressive(Head):
    """Σ_j e_ij v_j / Σ_j e_ij, e = z² / (1 + z²), z = q kᵀ: (b h n m), without 1 / √d.

    Args:
        site: Where the head is put.
        norm: `row` divides by Σ_j e_ij; `none` does not (extensive attention, as we read it); `mean` divides by the
            number of keys that may be attended to.
        eps: What is added to Σ_j e_ij, so that a query that is orthogonal to all keys gets zeros. None adds nothing,
            and such a query gets the mean of the values.

    Raises:
        OptionError: AZ214, when `eps` is given where nothing is divided by the sum.
    """

    card = Card(
        name="expressive",
        family=Family.DOT_PRODUCT,
        summary="Attention by squared dot products: z² / (1 + z²), normalised by the row, in the place of a softmax.",
        equation="(Σ_j e_ij v_j) / (Σ_j e_ij)\ne_ij = z_ij² / (1 + z_ij²),  z = q kᵀ",
        paper=Paper(
            "Reorganizing attention-space geometry with expressive attention",
            "Gros",
            2024,
            "arXiv:2407.18601",
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
        notes="The tap `scores` shows z. Near z = 0 for all keys the weights depend on the direction of z alone, and "
        "their gradients are as large as 1 / |z|. We have not seen a definition of extensive attention "
        "(arXiv:2508.04461); `norm: none` takes the word as physics does, growing with the number of keys.",
    )

    @classmethod
    def claims(cls, *, norm: str, eps: float | None, **options) -> Card:
        if norm == "row" and eps is None:
            return cls.card
        card = replace(cls.card, laws=cls.card.laws - {Law.STOCHASTIC, Law.BOUNDED})
        if norm != "none":
            card = replace(card, laws=card.laws | {Law.SUBSTOCHASTIC})
        return card if norm == "row" else replace(card, fidelity="inspired")

    def __init__(
        self,
        site: Site,
        *,
        norm: Literal["row", "none", "mean"] = "row",
        eps: PositiveFloat | None = None,
    ):
        super().__init__(site)
        if eps is not None and norm != "row":
            raise OptionError(
                f"`expressive`: with `norm: {norm}` there is no sum to add `eps` to",
                help="leave `eps` out, or choose `norm: row`",
            )
        self.norm: Literal["row", "none", "mean"] = norm
        self.eps = eps

    def attend(self, q, k, v, *, mask, layout):
        z, allowed = self.scores(q @ k.mT), mask.dense(q.shape[2], k.shape[2], q.device)
        return self.weights(expressive_weights(z, allowed, self.norm, self.eps)) @ v
