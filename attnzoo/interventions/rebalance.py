"""Scores of chosen keys, raised.

Arif et al., "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model", 2025,
arXiv:2501.12206, §3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.core import Here, InstrumentCard, Intervention, Layout, Paper
from attnzoo.errors import ZooError
from attnzoo.functional.tokens import Tokens, chosen_tokens

Keys = Tokens | Tensor
"""Keys of every sample, or boolean, (b m), by sample."""


@dataclass(kw_only=True, eq=False)
class Rebalance(Intervention):
    """s_j ← s_j + α |s_j| for keys j of `top`, + β |s_j| for those of `bottom`, before the softmax, (b h n m).

    A raised score never falls, whatever its sign. Which keys depends on the images in the paper: those that the first
    layer looks at, and those that stand out in the last layer but one; `attnzoo.lab.calibration.salient_tokens` finds
    them in a forward before. A key of both counts as `bottom`.

    Args:
        top: Keys raised by α.
        bottom: Keys raised by β.
        alpha: α; at least 0.
        beta: β; at least 0.
        queries: Whose scores are changed: in the paper the last query of a decoder, as it writes. `answer` is the class
            token; without one all, since of a sequence that is read at once every query is the last in its turn.
    """

    card = InstrumentCard(
        "rebalance",
        "Raise the scores of chosen tokens, by a part of their size.",
        equation="s_j ← s_j + α |s_j| (top), s_j + β |s_j| (bottom)",
        paper=Paper(
            "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
            "Arif et al.",
            2025,
            "arXiv:2501.12206",
            "§3",
        ),
        notes="One α and one β for all heads, as in the authors' code; the paper speaks of each head's own "
        "sensitivity, for which `heads` stands.",
        fidelity="adapted",
    )
    neutral = {"alpha": 0.0, "beta": 0.0}
    top: Keys = "grid"
    bottom: Keys = ()
    alpha: float = 0.7
    beta: float = 0.3
    queries: Tokens = "answer"

    def __post_init__(self):
        super().__post_init__()
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 <= value < float("inf"):
                raise ZooError(
                    "AZ921",
                    f"`{self.card.name}`: `{name}` cannot be {value!r}",
                    why="scores are raised, by a part of their size: at least 0",
                )

    def edit_scores(self, scores: Tensor, here: Here) -> Tensor:
        n, m = scores.shape[-2:]
        asked = here.layout if here.context is None else Layout((n,))
        rows = chosen_tokens(self.queries, asked, n, scores.device)[:, None]  # (n 1)
        bottom, top = (_keys(one, here, len(scores), m, scores.device) for one in (self.bottom, self.top))
        gain = torch.where(bottom, self.beta, torch.where(top, self.alpha, 0.0)).to(scores.dtype)
        return torch.where(rows & (gain != 0), scores + gain * scores.abs(), scores)


def _keys(keys: Keys, here: Here, b: int, m: int, device: torch.device) -> Tensor:
    """Which keys are meant, (b or 1, 1, 1, m)."""
    if not isinstance(keys, Tensor):
        return chosen_tokens(keys, here.layout, m, device)[None, None, None]
    if keys.dtype != torch.bool or keys.shape != (b, m):
        raise ZooError(
            "AZ921",
            f"`rebalance`: keys by sample are boolean, ({b}, {m}) at `{here.site}`; these are {keys.dtype}, "
            f"{tuple(keys.shape)}",
            help="find them for the very images: attnzoo.lab.calibration.salient_tokens(model, images)",
        )
    return keys.to(device)[:, None, None]
