"""Subjects that do not see each other.

He et al., "Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition
Attention", 2024, arXiv:2411.19261.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from attnzoo.core import Here, InstrumentCard, Intervention, Paper
from attnzoo.errors import ZooError
from attnzoo.functional.tokens import on_tokens


@dataclass(kw_only=True, eq=False)
class Isolate(Intervention):
    """s_ij ← −∞ where tokens i and j belong to different subjects, before the softmax, (b h n m).

    A token of a subject sees that subject and the background alone, so neither weights nor gradients go from one
    subject to another within a layer; the background, the class token among it, sees everything. With references in
    the same batch `multi_reference` does this by its `regions`.

    Args:
        regions: Which subject each token belongs to, 0 for the background: a map (y x) at any size for all samples,
            or (b y x). None leaves everything as it is.
        background: Whether the background sees `all`, or the `background` alone; a summary of the paper, which is all
            that was at hand, says only what subjects see.
    """

    card = InstrumentCard(
        "isolate",
        "Hide the subjects of an image from each other (isolation attention).",
        equation="s_ij ← −∞ where i and j belong to different subjects",
        paper=Paper(
            "Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition "
            "Attention",
            "He et al.",
            2024,
            "arXiv:2411.19261",
            "isolation attention",
        ),
        fidelity="adapted",
        notes="What the background may see is not known from the paper; it is an option.",
    )
    neutral = {"regions": None}
    own_keys = True
    regions: Tensor | Sequence[Any] | None = None
    background: Literal["all", "background"] = "all"

    def edit_scores(self, scores: Tensor, here: Here) -> Tensor:
        if self.regions is None:
            return scores
        return scores.masked_fill(self._hidden(scores, here), float("-inf"))

    def edit_weights(self, weights: Tensor, here: Here) -> Tensor:
        chosen = weights if self.heads is None else weights[:, list(self.heads)]
        if self.regions is not None and bool(chosen.masked_fill(~self._hidden(weights, here), 0.0).any()):
            raise ZooError(
                "AZ924",
                f"`{self.card.name}` cannot hide tokens from `{here.mechanism}` at `{here.site}`",
                why="it gives weight to a key whose score is −∞",
                help="take a mechanism with a softmax over its scores",
            )
        return weights

    def _hidden(self, pairs: Tensor, here: Here) -> Tensor:
        """Which keys are hidden from which queries, (b or 1, 1, n, m); n queries are the last of m tokens."""
        assert self.regions is not None  # asked before
        keys = on_tokens(self.regions, here.layout, len(pairs), pairs.device)[
            :, None, None
        ]  # (b or 1, 1, 1, m)
        queries = keys.mT[:, :, -pairs.shape[2] :]
        hidden = (queries != keys) & (keys > 0)
        return hidden & (queries > 0) if self.background == "all" else hidden
