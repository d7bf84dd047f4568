"""Longformer: a window that slides along the sequence, and a few tokens that see all and are seen by all.

Beltagy et al., "Longformer: The Long-Document Transformer", 2020, arXiv:2004.05150, §3.1.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Head, Law, Mask, NonNegativeInt, Paper, PositiveInt, Site
from attnzoo.functional import masked_softmax
from attnzoo.functional.chunks import around_chunks, in_a_line, in_chunks


class Longformer(Head):
    """softmax(q kᵀ / √d) v: token i sees i + r δ for |r| ≤ w and the special tokens, each once; those see all.

    Args:
        site: Where the head is put.
        window: w, how many tokens are seen to each side.
        dilation: δ, the step between the tokens of a window.
        special: Queries, keys and values of the special tokens' rows: `own`, the local ones times a d × d matrix each
            per head, which start as identities, or `shared`, the local ones.
    """

    card = Card(
        name="longformer",
        family=Family.LOCAL,
        summary="Each token attends to a window along the sequence and to special tokens, which attend to all.",
        equation="softmax(q_i k_{ρ(i)}ᵀ / √d) v_{ρ(i)}\nρ(i) = {i + r δ : |r| ≤ w} ∪ special tokens",
        paper=Paper(
            "Longformer: The Long-Document Transformer", "Beltagy et al.", 2020, "arXiv:2004.05150", "§3.1"
        ),
        time="n w c + n c d",
        memory="h n w + n c",
        params="3 * h * d**2 if special == 'own' and p else 0",
        flops="sum(4 * dilation * ceil(line / chunk) * chunk * (chunk + 2 * min(window, line)) * c "
        "for line in [ceil((n - p) / dilation)] for chunk in [min(line, max(window, 16))]) "
        "+ 4 * (n - p) * p * c + 4 * p * n * c + (2 * (p + 2 * n) * c * d if special == 'own' and p else 0)",
        masks={"keys", "causal", "pairs"},
        incremental=True,
        taps={"scores": "b h x w", "weights": "b h x w"},
        laws={Law.STOCHASTIC, Law.LOCAL, Law.SHIFT_EQUIVARIANT, Law.LINEAR_IN_VALUES, Law.HEADS_APART},
        fidelity="adapted",
        notes="The paper's global tokens are the special tokens here, and a grid is read row by row. Their own "
        "projections are matrices after the local ones, per head; a site without special tokens has none. One dilation "
        "serves all heads. Taps show the rows of the grid, over special tokens and the keys around a chunk of queries.",
    )

    @classmethod
    def claims(cls, *, special: str, **options) -> Card:
        return replace(cls.card, laws=cls.card.laws | {Law.BOUNDED}) if special == "shared" else cls.card

    def __init__(
        self, site: Site, *, window: NonNegativeInt = 256, dilation: PositiveInt = 1,
        special: Literal["own", "shared"] = "own",
    ):  # fmt: skip
        super().__init__(site)
        self.window, self.dilation = window, dilation
        own, d = special == "own" and site.layout.prefix > 0, site.head_dim
        self.special = nn.Parameter(torch.empty(site.heads, 3, d, d)) if own else None  # of q, k, v
        self.init_weights()

    def init_weights(self) -> None:
        """Special tokens start with the local projections."""
        if self.special is not None:
            nn.init.zeros_(self.special).diagonal(dim1=-2, dim2=-1).data.fill_(1.0)

    def reach(self) -> int:
        return self.window * self.dilation

    def attend(self, q, k, v, *, mask, layout):
        p = layout.prefix
        first, q = apart(q, k, p)
        special = self._special_rows(first, k, v, mask, p) if p else first
        at, seen = around_chunks(q, k[:, :, p:], self.window, self.dilation)
        allowed = visible(at, seen, q, k, p, self.reach(), mask)
        near_k, near_v = (t[:, :, p:][:, :, seen.clamp(min=0)] for t in (k, v))  # (b h g t s d)
        q = q * q.shape[-1] ** -0.5
        scores = torch.cat([q @ k[:, :, :p].mT, in_a_line(in_chunks(q, at) @ near_k.mT, q)], dim=-1)
        weights = self.weights(masked_softmax(self.scores(scores), allowed))
        near = in_a_line(in_chunks(weights[..., p:], at) @ near_v, q)
        return torch.cat([special, weights[..., :p] @ v[:, :, :p] + near], dim=2)

    def _special_rows(self, first, k, v, mask, p):
        """What the special tokens that ask receive of all tokens, or causally of themselves, (b h p d)."""
        if self.special is not None:
            first, k, v = (t @ self.special[:, i] for i, t in enumerate((first, k, v)))
        k, v = (t[:, :, :p] if mask.causal else t for t in (k, v))
        keys = None if mask.keys is None else mask.keys[:, : k.shape[2]]
        pairs = None if mask.pairs is None else mask.pairs[:, :, : first.shape[2], : k.shape[2]]
        allowed = Mask(keys, pairs, mask.causal).dense(first.shape[2], k.shape[2], k.device)
        drop = self.attn_drop if self.training else 0.0
        rows = F.scaled_dot_product_attention(first, k, v, attn_mask=allowed, dropout_p=drop)
        return rows if allowed is None else torch.where(allowed.any(dim=-1, keepdim=True), rows, 0.0)


def apart(q: Tensor, k: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """The queries of special tokens and those of grid tokens, of which the last is the last key's."""
    first = max(0, q.shape[2] - k.shape[2] + p)
    return q[:, :, :first], q[:, :, first:]


def visible(at: Tensor, seen: Tensor, q: Tensor, k: Tensor, p: int, reach: int, mask: Mask) -> Tensor:
    """Who sees whom of the special tokens and of the keys around its chunk: broadcasts to (b h x p+s)."""
    n, m = q.shape[2], k.shape[2] - p
    rows, columns = at[..., None], seen[:, :, None]
    near = ((columns >= 0) & ((rows - columns).abs() <= reach))[None, None]
    special = torch.ones(1, 1, n, p, dtype=torch.bool, device=q.device)
    rows, columns = (rows - m + n).clamp(min=0), columns.clamp(min=0)
    if mask.causal:
        near = near & (columns <= at[..., None])
    if mask.keys is not None:
        near = near & mask.keys[:, None, p:][..., columns]
        special = special & mask.keys[:, None, None, :p]
    if mask.pairs is not None:
        pairs = mask.pairs[:, :, mask.pairs.shape[2] - n :]
        near, special = near & pairs[..., p:][:, :, rows, columns], special & pairs[..., :p]
    return torch.cat([special, in_a_line(near, q)], dim=-1)


for _name in ("apart", "around_chunks", "visible"):
    fx.wrap(_name)  # symbolic tracing knows no lengths
