"""Heads that look for what followed the same token before.

Olsson et al., "In-context Learning and Induction Heads", 2022, arXiv:2209.11895, definition of induction heads and
"prefix matching score"; the scores `mul` and `abs` as in TransformerLens' head detector.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import InstrumentCard, NonNegativeInt, Paper
from attnzoo.lab.token_pattern import TokenPattern

if TYPE_CHECKING:
    from attnzoo.lab.subject import Subject

IGNORE = -100


@dataclass(kw_only=True, eq=False)
class InductionScore(TokenPattern):
    """P_ij = [0 < j ≤ i, t_{j−1} = t_i]: how much attention goes to what came after earlier occurrences of the token.

    On a sequence of L different words that stands there twice it is the attention at offset −(L − 1) of the queries
    i ≥ L, the standard prefix matching. The figure `in_context_score` is the loss at a late position minus that at an
    early one, in nats: below 0 for a model that learns from the sequence it reads. It is there where the model says
    a word at each position, and where the words to come are known.

    Args:
        early: Position whose loss is subtracted, from 0 (the paper has 50); the mean over the first half when None.
        late: Position of the other loss (the paper has 500); the mean over the second half when None.
    """

    card = InstrumentCard(
        "induction_score",
        "How much each head attends to what followed earlier occurrences of the token.",
        equation="s = mean_i Σ_{j≤i} A_ij [t_{j−1} = t_i], over queries whose token stood there before",
        paper=Paper(
            "In-context Learning and Induction Heads",
            "Olsson et al.",
            2022,
            "arXiv:2209.11895",
            "prefix matching score",
        ),
        needs={"weights", "words"},
        fidelity="adapted",
        notes="The paper repeats 25 words four times, which may be asked for; here they fill the length of the data,"
        " twice, and all differ where they can. Of maps that may be negative the positive part counts, rescaled to 1.",
    )
    early: NonNegativeInt | None = None
    late: NonNegativeInt | None = None

    def pattern(self, ids: Tensor) -> Tensor:
        """Pairs of a token and what came after the same one, boolean (b n n), for tokens (b n)."""
        same = (ids[:, :, None] == ids[:, None, :]).tril(-1)  # (i, j)
        return F.pad(same[:, :, :-1], (1, 0))  # (i, j + 1), which is at most i

    @torch.no_grad()
    def figures(self, shown: "Subject") -> dict[str, float]:
        """`in_context_score`, where there is one."""
        sums = {"early": 0.0, "late": 0.0}
        counts = {"early": 0.0, "late": 0.0}
        for batch in shown.batches:
            output, targets = shown.call(batch), batch.targets
            if targets is None or targets.is_floating_point() or output.shape[:-1] != targets.shape:
                return {}
            if int(targets.max()) >= output.shape[-1]:
                return {}
            each = F.cross_entropy(output.double().flatten(0, 1), targets.flatten(), reduction="none")
            half, n = targets.shape[1] // 2, targets.shape[1]
            parts = {
                "early": slice(half) if self.early is None else slice(self.early, self.early + 1),
                "late": slice(half, n) if self.late is None else slice(self.late, self.late + 1),
            }
            for name, part in parts.items():
                sums[name] += float(each.view_as(targets)[:, part].sum())
                counts[name] += float((targets[:, part] != IGNORE).sum())
        if not all(counts.values()):
            return {}
        return {"in_context_score": sums["late"] / counts["late"] - sums["early"] / counts["early"]}
