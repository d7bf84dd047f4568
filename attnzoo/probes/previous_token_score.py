"""Heads that look at the token before.

Wang et al., "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 Small", 2022,
arXiv:2211.00593, §3.1; scores as in TransformerLens' head detector.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.core import InstrumentCard, Paper
from attnzoo.lab.token_pattern import TokenPattern


@dataclass(kw_only=True, eq=False)
class PreviousTokenScore(TokenPattern):
    """P_ij = [j = i − 1]: how much of its attention a head gives to the token before the query.

    An induction head needs such a head in a layer below it.
    """

    card = InstrumentCard(
        "previous_token_score",
        "How much each head attends to the token before.",
        equation="s = mean_i A_{i, i−1}",
        paper=Paper(
            "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 Small",
            "Wang et al.",
            2022,
            "arXiv:2211.00593",
            "§3.1",
        ),
        needs={"weights", "words"},
        notes="Of maps that may be negative the positive part counts, rescaled to 1.",
    )

    def pattern(self, ids: Tensor) -> Tensor:
        """The diagonal below the main one, boolean (b n n), for tokens (b n)."""
        n = ids.shape[1]
        return torch.ones(n, n, dtype=torch.bool, device=ids.device).tril(-1).triu(-1).expand(len(ids), n, n)
