"""Heads that give nothing, or always the same.

Michel et al., "Are Sixteen Heads Really Better than One?", 2019, arXiv:1905.10650, §2.3.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.core import Here, InstrumentCard, Intervention, Paper


@dataclass(kw_only=True, eq=False)
class AblateHeads(Intervention):
    """o_h ← 0, or the mean of o_h over the tokens of the sample.

    Args:
        by: `zero`, or `mean` over the tokens of each sample.
    """

    card = InstrumentCard(
        "ablate_heads",
        "Take heads away: what they give is zero, or their mean over the tokens.",
        equation="o_h ← 0",
        paper=Paper(
            "Are Sixteen Heads Really Better than One?", "Michel et al.", 2019, "arXiv:1905.10650", "§2.3"
        ),
    )
    by: Literal["zero", "mean"] = "zero"

    def edit_heads(self, out: Tensor, here: Here) -> Tensor:
        if self.by == "zero":
            return torch.zeros_like(out)
        return out.mean(dim=2, keepdim=True).expand_as(out)
