"""Prior cross-attention: degraded features ask a prior, a dictionary or a map of what good features look like.

Wang et al., "RestoreFormer++", 2023, TPAMI, arXiv:2308.07228; the block of multi-head cross-attention.
"""

import math
from dataclasses import replace
from typing import Literal

from torch import nn

from attnzoo.core import NO_MASK, Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.errors import LayoutMismatch
from attnzoo.functional import masked_group_norm, multi_head_attention

TITLE = "RestoreFormer++: Towards Real-World Blind Face Restoration from Undegraded Key-Value Pairs"


class MapNorm(nn.GroupNorm):
    """Tokens x (b n c), normalised by groups of channels; statistics are over all that exist, as `exists` (b n) says.

    A single channel is only scaled and shifted: of one token its normalised value would be 0, whatever it holds.
    """

    def forward(self, x, exists=None):
        if self.num_channels == 1:
            return x * self.weight + self.bias
        return masked_group_norm(self, x, exists)


class PriorCross(Mechanism):
    """W softmax(q kᵀ / √d) v with q = W_q GN(z), k = W_k GN'(p), v = W_v GN'(p): z is degraded, p is the prior.

    The groups of GN and GN' span all tokens. Without a context the prior asks itself: z = p, and one norm.

    Args:
        site: Where the mechanism is put.
        queries: Who is z: `tokens`, then the context is p, of any length; or `context`, as in the paper's decoder,
            whose running features are p, so that the host's residual is the prior's. Then there is a context, on the
            same grid, and each token receives what was asked at its place.
        groups: Groups of channels of a norm, of two or more channels. The paper has 32; null takes 32, or the largest
            of 16, 8, 4, 2 and 1 that will do.

    Raises:
        OptionError: AZ214, when the groups do not divide a width, or no context that could ask lies on the same grid.
        LayoutMismatch: AZ401, when a context that asks lies on another grid.
    """

    card = Card(
        name="prior_cross",
        family=Family.CROSS,
        summary="Degraded features ask a prior, such as a dictionary; both are group-normalised over all tokens.",
        equation="W softmax(q kᵀ / √d) v\nq = W_q GN(z),  k = W_k GN'(p),  v = W_v GN'(p),  z = x,  p = s",
        paper=Paper(TITLE, "Wang et al.", 2023, "arXiv:2308.07228", where="MHCA"),
        time="n m c + n c c + m c c",
        memory="h n m",
        params="2 * (e + c * context) + (2 * c + e + (e if queries == 'tokens' else c) + 3 * qkv_bias + proj_bias) * c",
        flops="4 * n * c * c + 4 * m * e * c + 4 * n * m * c",
        masks={"keys"},
        context=True,
        grid="any",  # statistics are over all of it, so a place where tokens are to come is none for this
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="In the paper the residual lies on the prior: that is `queries: context`; by default it is the host's, "
        "on the tokens that ask. What is hidden counts in no statistics of the prior; those of tokens that ask are "
        "over all, special ones too, so pairs, causal masks and decoders are refused. The dictionary itself and its "
        "quantisation are `attnzoo.methods.PriorDictionary`. The paper has 4 heads, its first version 8.",
    )

    @classmethod
    def claims(cls, *, queries: str, **options) -> Card:
        if queries == "tokens":
            return cls.card
        return replace(
            cls.card,
            flops="2 * (n - p) * e * c + 4 * n * c * c + 4 * (n - p) * n * c + 2 * (n - p) * c * c",
            masks=frozenset(),
            context_grid="any",
            laws={Law.STOCHASTIC},
            fidelity="exact",
            notes="The context asks, so no mask hides it. Special tokens are read, and receive nothing; those of the "
            "context lie at no place and ask nothing. The dictionary itself is no part of it.",
        )

    def __init__(
        self, site: Site, *, queries: Literal["tokens", "context"] = "tokens",
        groups: PositiveInt | None = None,
    ):  # fmt: skip
        super().__init__(site)
        asking, prior = site.dim, site.context_dim or site.dim
        if queries == "context":
            asking, prior = prior, asking
            if site.context_dim is None or (site.context_layout or site.layout).grid != site.layout.grid:
                raise OptionError(
                    f"`prior_cross` at `{site.name}` has no context on the grid of the tokens that could ask",
                    help="put it where a second stream on the same grid is read, or say `queries: tokens`",
                )
        self.kv_norm = _norm(prior, groups)
        self.q_norm = None if site.context_dim is None else _norm(asking, groups)
        self.q = nn.Linear(asking, site.dim, bias=site.qkv_bias)
        self.kv = nn.Linear(prior, 2 * site.dim, bias=site.qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)

    def mix(self, x, source, *, mask, layout, context_layout=None):
        if context_layout is None:
            return self._ask(x, source, mask)
        if context_layout.grid != layout.grid:
            raise LayoutMismatch(
                "AZ401",
                f"a context on {context_layout.grid} cannot ask for tokens on {layout.grid}",
                help="`prior_cross` with `queries: context` needs two streams on one grid",
            )
        received = self._ask(context_layout.split(source)[1], x, NO_MASK)
        return nn.functional.pad(received, (0, 0, layout.prefix, 0))

    def _ask(self, z, p, mask):
        p = self.kv_norm(p, mask.keys)
        z = p if self.q_norm is None else self.q_norm(z)
        k, v = self.kv(p).chunk(2, dim=-1)
        return self.proj(multi_head_attention(self, self.q(z), k, v, mask))


def _norm(width: int, groups: int | None) -> MapNorm:
    """The norm of a stream of this width."""
    if groups is not None and (width % groups or groups == width > 1):
        fault = f"{groups} groups do not divide {width} channels into two or more each"
        raise OptionError(f"`prior_cross`: {fault}")
    return MapNorm(groups or max(1, min(math.gcd(32, width), width // 2)), width, eps=1e-6)
