"""Heads that look at earlier occurrences of the same token.

Wang et al., "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 Small", 2022,
arXiv:2211.00593, §3.1; scores as in TransformerLens' head detector.
"""

from dataclasses import dataclass

from torch import Tensor

from attnzoo.core import InstrumentCard, Paper
from attnzoo.lab.token_pattern import TokenPattern


@dataclass(kw_only=True, eq=False)
class DuplicateTokenScore(TokenPattern):
    """P_ij = [j < i, t_j = t_i]: how much of its attention a head gives to earlier occurrences of the same token."""

    card = InstrumentCard(
        "duplicate_token_score",
        "How much each head attends to earlier occurrences of the same token.",
        equation="s = mean_i Σ_{j<i} A_ij [t_j = t_i], over queries whose token stood there before",
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
        """Pairs of a token and the same one before it, boolean (b n n), for tokens (b n)."""
        return (ids[:, :, None] == ids[:, None, :]).tril(-1)
