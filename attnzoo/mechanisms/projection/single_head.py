"""Single-head attention of some of the channels, of SHViT.

Yun, Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", 2024, arXiv:2401.16456, §3.2.
"""

from typing import Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Fraction, Law, Mechanism, MultiGroup, Paper, PositiveInt, Site
from attnzoo.core.multi_group import fold
from attnzoo.functional import dot_product_attention, masked_group_norm


class SingleHead(Mechanism):
    """P_o relu([softmax(P_q u (P_k u)ᵀ / √d) P_v u ; x₂]), u = norm(x₁), x₁ a share of the channels and x₂ the others.

    norm is over all channels of x₁, of all tokens of a sample; every P is γ ⊙ (W x) + β.

    Args:
        site: Where the mechanism is put.
        share: Of the channels, those that attend: the first ones, c times `share` of them, rounded, at least one.
        qk: d, channels of queries and keys.
        start: γ of P_o at first: `zero`, the authors', whose output is zero, or `one`.
    """

    card = Card(
        name="single_head",
        family=Family.PROJECTION,
        summary="SHViT: one head attends with a share of the channels; a projection mixes them with the others.",
        equation="P_o relu([softmax(P_q u (P_k u)ᵀ / √d) P_v u; x₂])\nu = norm(x₁),  x = [x₁; x₂]",
        paper=Paper(
            "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
            "Yun, Ro",
            2024,
            "arXiv:2401.16456",
            "§3.2",
        ),
        time="n m c + n c c",
        memory="n m + n c",
        params="(s := max(1, round(c * share))) * (2 * qk + s + 3 + qkv_bias) + (2 + qkv_bias) * qk "
        "+ (c + 1 + proj_bias) * c",
        flops="2 * n * (s := max(1, round(c * share))) * (2 * qk + s) + 2 * n * m * (qk + s) + 2 * n * c**2",
        masks={"keys"},
        one_head=True,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="The authors' batch norms would let samples have a say in each other: in their place are γ and β, as in "
        "eval mode; `fold` makes one layer of each P, in place. P_k has no β, which a softmax would not see. Tokens "
        "that do not exist have no part in the norm. Special tokens are read and written like all others. A quarter of "
        "the channels is the default of the authors' code; their models take 48 of 224, and the like.",
    )

    def __init__(
        self,
        site: Site,
        *,
        share: Fraction = 0.25,
        qk: PositiveInt = 16,
        start: Literal["zero", "one"] = "zero",
    ):
        super().__init__(site)
        c, some = site.dim, max(1, round(site.dim * share))
        self.norm = nn.GroupNorm(1, some)
        self.q: nn.Module = MultiGroup(some, qk, 1, bias=site.qkv_bias)
        self.k: nn.Module = MultiGroup(some, qk, 1, bias=False)
        self.v: nn.Module = MultiGroup(some, some, 1, bias=site.qkv_bias)
        self.proj: nn.Module = MultiGroup(c, c, 1, bias=site.proj_bias)
        self.zero = start == "zero"
        self.init_weights()

    def init_weights(self) -> None:
        """γ of P_o."""
        if isinstance(self.proj, MultiGroup):  # not folded
            nn.init.constant_(self.proj.scales[0], 0.0 if self.zero else 1.0)

    def fold(self) -> "SingleHead":
        """Make one layer of each P, in place; what it gives stays the same."""
        fold(self)
        return self

    def mix(self, x, source, *, mask, layout):
        some = self.norm.num_channels
        u = masked_group_norm(self.norm, x[..., :some], mask.keys)
        q, k, v = (project(u)[:, None] for project in (self.q, self.k, self.v))  # (b 1 n d)
        attended = dot_product_attention(self, q, k, v, mask)[:, 0]
        return self.proj(torch.cat([attended, x[..., some:]], dim=-1).relu())
