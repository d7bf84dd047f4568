"""Attention at another temperature.

Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, §2, eq. 1, put into attention.
"""

from dataclasses import dataclass

from torch import Tensor

from attnzoo.core import Here, InstrumentCard, Intervention, Paper, PositiveFloat


@dataclass(kw_only=True, eq=False)
class Temperature(Intervention):
    """A = softmax(s / T), by heads that form scores s, (b h n m).

    Above 1 heads look at more tokens, below 1 at fewer; towards 0 at one alone. What a mechanism adds to its scores
    before the softmax (distances, biases) is divided too, as far as its tap `scores` shows it.

    Args:
        value: T.
    """

    card = InstrumentCard(
        "temperature",
        "Attend more widely or more narrowly: scores are divided by a temperature.",
        equation="A = softmax(s / T)",
        paper=Paper(
            "Distilling the Knowledge in a Neural Network",
            "Hinton et al.",
            2015,
            "arXiv:1503.02531",
            "§2, eq. 1",
        ),
        fidelity="adapted",
        notes="The paper divides the logits of classes; here it is the scores of attention.",
    )
    neutral = {"value": 1.0}
    value: PositiveFloat = 2.0

    def edit_scores(self, scores: Tensor, here: Here) -> Tensor:
        return scores / self.value
