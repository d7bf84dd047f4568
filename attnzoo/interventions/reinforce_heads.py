"""Heads that are listened to more.

He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", 2025, arXiv:2412.13949, §4.
"""

from dataclasses import dataclass

from torch import Tensor

from attnzoo.core import Here, InstrumentCard, Intervention, Paper, PositiveFloat


@dataclass(kw_only=True, eq=False)
class ReinforceHeads(Intervention):
    """o_h ← α o_h for what chosen heads give before the output projection, (b h n d) (VHR).

    The paper chooses, layer by layer, the heads whose output changes most when the image is taken away, and keeps the
    choice while a text is written: `attnzoo.lab.calibration.reinforced_heads` does so, and gives one of these for each
    layer, whose `at` and `heads` are plain options.

    Args:
        strength: α; 2 in the paper.
    """

    card = InstrumentCard(
        "reinforce_heads",
        "Multiply what chosen heads give (VHR).",
        equation="o_h ← α o_h",
        paper=Paper(
            "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
            "He et al.",
            2025,
            "arXiv:2412.13949",
            "§4",
        ),
        notes="Which heads is an option; `attnzoo.lab.calibration.reinforced_heads` chooses them as the paper does.",
    )
    neutral = {"strength": 1.0}
    strength: PositiveFloat = 2.0

    def edit_heads(self, out: Tensor, here: Here) -> Tensor:
        return self.strength * out
