"""The mechanism `template`, for attnzoo."""

from pathlib import Path

import torch
from attnzoo import hookimpl
from attnzoo.core import NO_MASK, Card, Family, Head, Law, Layout, Mask, PositiveFloat, Site, Tap
from attnzoo.functional import attention_from_scores
from jaxtyping import Float
from torch import Tensor, nn

ATTNZOO_API = 1


class Template(Head):
    """softmax(τ q kᵀ / √d) v, with a learned temperature τ for each head.

    Args:
        site: Where the head is put.
        temperature: τ before training; multiplies the scores, no unit.
    """

    card = Card(
        name="template",
        family=Family.DOT_PRODUCT,
        summary="Scaled dot-product attention with a learned temperature for each head.",
        time="n m c",
        memory="h n m",
        masks={"keys", "causal", "pairs"},
        context=True,
        incremental=True,
        weights="b h n m",
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT, Law.LINEAR_IN_VALUES, Law.BOUNDED},
    )

    def __init__(self, site: Site, *, temperature: PositiveFloat = 1.0):
        super().__init__()
        self.start, self.attn_drop = temperature, site.attn_drop
        self.temperature = nn.Parameter(torch.empty(site.heads))
        self.scores, self.weights = Tap("b h n m"), Tap("b h n m")
        self.init_weights()

    def init_weights(self) -> None:
        """The temperature that was asked for, in every head."""
        nn.init.constant_(self.temperature, self.start)

    def no_weight_decay(self) -> set[str]:
        return {"temperature"}

    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m d"],
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
    ) -> Float[Tensor, "b h n d"]:
        scale = self.temperature[:, None, None] * q.shape[-1] ** -0.5
        scores = scale * q @ k.mT
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        dropout = self.attn_drop if self.training else 0.0
        return attention_from_scores(scores, v, allowed, self.scores, self.weights, dropout)


@hookimpl
def attnzoo_mechanisms():
    """The mechanisms of this plugin."""
    return [Template]


@hookimpl
def attnzoo_recipes():
    """The recipes of this plugin."""
    return [Path(__file__).parent / "recipes"]
