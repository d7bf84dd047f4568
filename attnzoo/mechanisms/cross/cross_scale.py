"""Cross-scale token attention (CSTA): tokens of one patch size ask those of another, of the same image.

Yoo et al., "Enriched CNN-Transformer Feature Aggregation Networks for Super-Resolution", 2023, WACV, arXiv:2203.07682.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Layout, Mask, Mechanism, OptionError, Paper, Site
from attnzoo.errors import LayoutMismatch
from attnzoo.functional import multi_head_attention

TITLE = "Enriched CNN-Transformer Feature Aggregation Networks for Super-Resolution"


class CrossScale(Mechanism):
    """a(x, s) = W softmax(q kᵀ / √d) v, q = W_q LN(x), k = W_k LN'(s), v = W_v LN'(s): s has the other scale.

    Large tokens are made of small ones, as J(t) = MLP(LN(t joined in all overlapping 2 × 2 neighbourhoods)).

    Args:
        site: Where the mechanism is put.
        large: Which tokens are the large ones. `given`: the streams already differ, a(x, context). `context`: small
            tokens ask large ones, a(x, J(context)). `tokens`: large ones ask, and hand what they hold back to their
            four small ones, where overlaps add: fold(MLP(LN(u + a(u, context)))) with u = J(x).

    Raises:
        OptionError: AZ214, at a site without a context, and where large tokens are to be made of too small a grid.
        LayoutMismatch: AZ401, when a context whose large tokens are asked has a side of 1.
    """

    card = Card(
        name="cross_scale",
        family=Family.CROSS,
        summary="Tokens of one patch size ask those of another; large tokens are overlapping 2 × 2 neighbourhoods.",
        equation="W softmax(q kᵀ / √d) v\nq = W_q LN(x),  k = W_k LN'(s),  v = W_v LN'(s)",
        paper=Paper(TITLE, "Yoo et al.", 2023, "arXiv:2203.07682", where="CSTA"),
        time="n m c + n c c + m c c",
        memory="h n m",
        params="2 * c + 2 * e + (c + qkv_bias) * c + 2 * (e + qkv_bias) * c + (c + proj_bias) * c "
        "+ {'given': 0, 'context': (5 * e + 10) * e, 'tokens': (10 * c + 17) * c}[large]",
        flops="sum(4 * asking * c * c + 4 * asked * e * c + 4 * asking * asked * c "
        "+ {'given': 0, 'context': 10 * asked * e * e, 'tokens': 20 * asking * c * c}[large] "
        "for asking in [prod(s - 1 for s in sides) if large == 'tokens' else n] "
        "for asked in [prod(s - 1 for s in context_sides) if large == 'context' else m])",
        masks={"keys", "causal", "pairs"},
        context=True,
        grid=2,
        context_grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="The paper halves the channels of one stream and makes one half large; here the halves are two streams. "
        "It has no biases in q, k and v. With `large: context`, special tokens of the context lie in no "
        "neighbourhood and are not read; a neighbourhood exists when any of it does. With `large: tokens`, special "
        "tokens, and those of a grid with a side of 1, lie in none: they give and receive nothing; in the paper what "
        "comes out takes the place of the tokens, here a host adds it to them. r counts large tokens.",
    )

    @classmethod
    def claims(cls, *, large: str, **options) -> Card:
        if large == "given":
            return cls.card
        taps = dict.fromkeys(cls.card.taps, "b h n r" if large == "context" else "b h r m")
        return replace(cls.card, masks={"keys"}, taps=taps, laws={Law.STOCHASTIC})

    def __init__(self, site: Site, *, large: Literal["given", "context", "tokens"] = "given"):
        super().__init__(site)
        made_of, least = (site.layout, 1) if large == "tokens" else (site.context_layout, 2)
        few = large != "given" and made_of is not None and _neighbourhoods(made_of) < least
        if few or site.context_dim is None:
            raise OptionError(
                f"`cross_scale` at `{site.name}` "
                + (f"can make too few large tokens of {made_of}" if few else "has no second stream to read"),
                help="large tokens are overlapping 2 × 2 neighbourhoods; where they are asked, it takes two to choose",
            )
        self.large, c, e = large, site.dim, site.context_dim

        def mlp(width: int, inner: int, out: int) -> nn.Module:
            return nn.Sequential(site.norm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, out))

        width = c if large == "tokens" else e
        self.enlarge = None if large == "given" else mlp(4 * width, width, width)
        self.shrink = mlp(c, c, 4 * c) if large == "tokens" else None
        self.q_norm, self.kv_norm = site.norm(c), site.norm(e)
        self.q = nn.Linear(c, c, bias=site.qkv_bias)
        self.kv = nn.Linear(e, 2 * c, bias=site.qkv_bias)
        self.proj = nn.Linear(c, c, bias=site.proj_bias)

    def mix(self, x, source, *, mask, layout, context_layout=None):
        if self.large == "context":
            if not _neighbourhoods(context_layout):
                raise LayoutMismatch(
                    "AZ401",
                    f"a context of {context_layout} has no 2 × 2 neighbourhoods to ask",
                    help="large tokens are made of a grid with sides of 2 or more",
                )
            source, mask = self._joined(source, mask, context_layout)
        if self.large != "tokens":
            return self._ask(x, source, mask)
        if not _neighbourhoods(layout):
            return torch.zeros_like(x)
        u, _ = self._joined(x, Mask(), layout)
        pieces = self.shrink(u + self._ask(u, source, mask))  # (b r 4c)
        small = F.fold(pieces.mT, layout.grid, 2).flatten(2).mT
        return F.pad(small, (0, 0, layout.prefix, 0))

    def _joined(self, tokens, mask, layout):
        """The large tokens (b r e) of a grid, and which of them exist."""
        image = layout.to_grid(tokens[:, layout.prefix :])
        if mask.keys is not None:
            there = layout.to_grid(mask.keys[:, layout.prefix :, None])
            image = image.masked_fill(~there, 0.0)
            mask = Mask(keys=F.max_pool2d(there.to(image.dtype), 2, 1).flatten(1) > 0)
        return self.enlarge(F.unfold(image, 2).mT), mask

    def _ask(self, x, source, mask):
        k, v = self.kv(self.kv_norm(source)).chunk(2, dim=-1)
        return self.proj(multi_head_attention(self, self.q(self.q_norm(x)), k, v, mask))


def _neighbourhoods(layout: Layout) -> int:
    """How many overlapping 2 × 2 neighbourhoods a grid has."""
    return math.prod([side - 1 for side in layout.grid])
