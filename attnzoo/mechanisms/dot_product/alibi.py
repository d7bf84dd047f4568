"""ALiBi: scores fall linearly with the distance of query and key, steeper in some heads than in others.

Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation", 2021,
arXiv:2108.12409, §3.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from attnzoo.core import Card, Family, Head, Law, Layout, Paper, Site
from attnzoo.functional import attention_from_scores


def slopes(heads: int) -> list[float]:
    """2^{-8/h}, 2^{-16/h}, ..., 2^{-8} for a power of two; else of the power below, then every other of the next."""
    power = 2 ** (heads.bit_length() - 1)
    first, more = ([2.0 ** (-8 * (i + 1) / p) for i in range(p)] for p in (power, 2 * power))
    return first + more[::2][: heads - power]


def distances(q: Tensor, k: Tensor, layout: Layout, distance: str) -> Tensor:
    """How far apart query and key are, (n m), in single precision at least; the last query is where the last key is."""
    n, m, exact = q.shape[2], k.shape[2], torch.promote_types(q.dtype, torch.float32)
    if distance == "sequence":
        at = torch.arange(max(n, m), device=q.device)
        return (at[-n:, None] - at[-m:]).abs().to(exact)
    coords = layout.coords(q.device)
    steps = (coords[:, None] - coords).abs().to(exact)
    apart = steps.sum(dim=-1) if distance == "l1" else steps.square().sum(dim=-1).sqrt()
    return F.pad(apart, (layout.prefix, 0, layout.prefix, 0))[-n:]


fx.wrap("distances")  # symbolic tracing knows no lengths


class Alibi(Head):
    """softmax(q kᵀ / √d - m_h |i - j|) v, with slopes m_h that are not learned: 1/2, 1/4, ..., 1/256 for 8 heads.

    Args:
        site: Where the head is put.
        distance: `sequence`, |i - j| of tokens in a line, or on the grid, with special tokens near to all: `l1`, rows
            and columns added, or `l2`, as the crow flies.
    """

    card = Card(
        name="alibi",
        family=Family.DOT_PRODUCT,
        summary="Softmax attention whose scores fall with the distance of query and key, by a slope for each head.",
        equation="softmax(q kᵀ / √d − m_h |i − j|) v",
        paper=Paper(
            "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
            "Press, Smith and Lewis",
            2021,
            "arXiv:2108.12409",
            where="§3",
        ),
        time="n m c",
        memory="h n m",
        params="0",
        flops="4 * n * m * c",
        masks={"keys", "causal", "pairs"},
        incremental=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.LINEAR_IN_VALUES, Law.BOUNDED, Law.HEADS_APART},
        notes="The paper's under a causal mask; without one it has no form, and this is symmetric. The bias is not "
        "divided by √d. The newest queries alone are where the last keys are. In a line special tokens are its "
        "first. A context, which is no continuation of the tokens, is not read. Recipes that use it need no "
        "position embeddings.",
    )

    @classmethod
    def claims(cls, *, distance: str, **options) -> Card:
        if distance == "sequence":
            return cls.card
        how = {"l1": "rows and columns added", "l2": "as the crow flies"}[distance]
        notes = f"Distances on a grid, {how}, are not the paper's. {cls.card.notes}"
        return replace(cls.card, grid="any", fidelity="adapted", notes=notes)

    def __init__(self, site: Site, *, distance: Literal["sequence", "l1", "l2"] = "sequence"):
        super().__init__(site)
        self.distance = distance
        self.register_buffer("slopes", torch.empty(site.heads))
        self.init_weights()

    def init_weights(self) -> None:
        """m_h, from steep to flat."""
        own = self.get_buffer("slopes")
        own.copy_(torch.tensor(slopes(len(own)), dtype=own.dtype))

    def attend(self, q, k, v, *, mask, layout):
        far = distances(q, k, layout, self.distance)
        bias = (-self.get_buffer("slopes")[:, None, None] * far)[None].to(q.dtype)  # (1 h n m)
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        if self.scores.watched or self.weights.watched:
            return attention_from_scores(self, (q * q.shape[-1] ** -0.5) @ k.mT + bias, v, allowed)
        dropout = self.attn_drop if self.training else 0.0
        if allowed is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        some = allowed.any(dim=-1, keepdim=True)
        bias = bias.masked_fill(
            ~allowed & some, float("-inf")
        )  # a row of nobody sees all, and is left out below
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return torch.where(some, out, 0.0)
