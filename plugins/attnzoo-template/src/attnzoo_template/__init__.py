"""The mechanism `template`, for attnzoo."""

from pathlib import Path

import torch
from attnzoo import hookimpl
from attnzoo.core import Card, Family, Head, Law, PositiveFloat, Site
from attnzoo.functional import attention_from_scores
from torch import nn

ATTNZOO_API = 2


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
        equation="softmax(τ q kᵀ / √d) v",
        time="n m c",
        memory="h n m",
        params="h",
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
    )

    def __init__(self, site: Site, *, temperature: PositiveFloat = 1.0):
        super().__init__(site)
        self.start = temperature
        self.temperature = nn.Parameter(torch.empty(site.heads))
        self.init_weights()

    def init_weights(self) -> None:
        """The temperature that was asked for, in every head."""
        nn.init.constant_(self.temperature, self.start)

    def no_weight_decay(self) -> set[str]:
        return {"temperature"}

    def attend(self, q, k, v, *, mask, layout):
        scale = self.temperature[:, None, None] * q.shape[-1] ** -0.5
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        return attention_from_scores(self, scale * q @ k.mT, v, allowed)


@hookimpl
def attnzoo_mechanisms():
    """The mechanisms of this plugin."""
    return [Template]


@hookimpl
def attnzoo_recipes():
    """The recipes of this plugin."""
    return [Path(__file__).parent / "recipes"]
