"""Reduced attention: query and key matrices collapsed or symmetric, value and output matrices collapsed or left out.

Bermeitinger et al., "Reducing the Transformer Architecture to a Minimum", 2024, arXiv:2410.13732.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, Site
from attnzoo.functional import dot_product_attention, merge_heads, split_heads

ONE_HEAD = ("collapsed", "cholesky", "mirrored")


class Triangle(nn.Module):
    """x T, T a lower triangle; or x S, S symmetric with that triangle: c (c + 1) / 2 numbers.

    Args:
        dim: c.
        mirrored: Whether it is S.
    """

    def __init__(self, dim: int, mirrored: bool):
        super().__init__()
        self.dim, self.mirrored = dim, mirrored
        # row by row; two axes, so that optimisers decay it as they do matrices
        self.weight = nn.Parameter(torch.empty(1, dim * (dim + 1) // 2))
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02²), as timm draws its matrices."""
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x):
        i = torch.arange(self.dim, device=self.weight.device)
        row, column = torch.maximum(i[:, None], i), torch.minimum(i[:, None], i)
        matrix = self.weight[0, row * (row + 1) // 2 + column]
        return x @ (matrix if self.mirrored else matrix.tril())


class Reduced(Mechanism):
    """softmax(x W_QK sᵀ / √c) s W_VO, s = x or the context; W_QK and W_VO from two matrices, one, half of one, or none.

    Args:
        site: Where the mechanism is put.
        qk: `full`, W_Q and W_K in heads of d channels; `shared`, in heads, W_K = W_Q. In one head: `collapsed`, one
            matrix W_QK; `cholesky`, W_QK = T Tᵀ, T a lower triangle; `mirrored`, W_QK symmetric with any triangle.
        vo: `full`, W_V and W_O; `collapsed`, one matrix W_VO, for one head; `identity`, neither.
        scaled: Whether scores are divided by √d, or √c in one head; the paper does not say.

    Raises:
        OptionError: AZ214, when W_V and W_O of several heads are to be collapsed.
    """

    card = Card(
        name="reduced",
        family=Family.PROJECTION,
        summary="Softmax attention whose four matrices are collapsed, symmetric, or left out.",
        equation="softmax(x W_QK sᵀ / √c) s",
        paper=Paper(
            "Reducing the Transformer Architecture to a Minimum",
            "Bermeitinger et al.",
            2024,
            "arXiv:2410.13732",
        ),
        time="n m c + n c c",
        memory="n m",
        params="{'full': (c + qkv_bias + e) * c, 'shared': (c + qkv_bias) * c, 'collapsed': (c + qkv_bias) * e}"
        ".get(qk, (c + 1) * c // 2) + (vo != 'identity') * (e + proj_bias + (vo == 'full') * (c + qkv_bias)) * c",
        flops="2 * n * c * (w := e if qk == 'collapsed' else c) + 2 * n * m * (w + (c if vo == 'full' else e)) "
        "+ 2 * ((qk == 'full') * m * e + {'full': m * e + n * c, 'collapsed': n * e}.get(vo, 0)) * c",
        masks={"keys", "causal", "pairs"},
        one_head=True,
        honours={"qkv_bias"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        notes="Keys with a matrix of their own have no bias: a softmax would not see it. Triangles have none. The "
        "paper's models without MLPs leave those out of the host, where skips and norms are too.",
    )

    @classmethod
    def claims(cls, *, qk: str, vo: str, **options) -> Card:
        wishes = {"qkv_bias"} if vo == "full" or qk not in ("cholesky", "mirrored") else set()
        if vo != "identity":
            wishes.add("proj_bias")
        return replace(
            cls.card,
            memory="n m" if qk in ONE_HEAD else "h n m",
            one_head=qk in ONE_HEAD,
            context=qk in ("full", "collapsed") and vo != "identity",
            honours=wishes,
        )

    def __init__(
        self,
        site: Site,
        *,
        qk: Literal["full", "shared", "collapsed", "cholesky", "mirrored"] = "collapsed",
        vo: Literal["full", "collapsed", "identity"] = "identity",
        scaled: bool = True,
    ):
        super().__init__(site)
        one, dim, wide = qk in ONE_HEAD, site.dim, site.context_dim or site.dim
        if vo == "collapsed" and not one and site.heads > 1:
            raise OptionError(
                f"`reduced`: W_V and W_O of {site.heads} heads are not one matrix of {dim} × {dim}",
                help=f"choose one head, or `qk` among {', '.join(ONE_HEAD)}",
            )
        self.parts = 1 if one else site.heads
        self.same = qk in ("shared", "cholesky")  # what makes queries makes keys
        self.q: nn.Module
        if qk in ("cholesky", "mirrored"):
            self.q = Triangle(dim, mirrored=qk == "mirrored")
        else:
            self.q = nn.Linear(dim, wide if qk == "collapsed" else dim, bias=site.qkv_bias)
        self.k = nn.Linear(wide, dim, bias=False) if qk == "full" else nn.Identity()
        self.v = nn.Linear(wide, dim, bias=site.qkv_bias) if vo == "full" else nn.Identity()
        merged = dim if vo == "full" else wide
        self.proj = nn.Identity() if vo == "identity" else nn.Linear(merged, dim, bias=site.proj_bias)
        # scores will be divided by the root of the channels of q, of which a collapsed q has those of the context
        each = dim // self.parts
        self.factor = ((wide if qk == "collapsed" else each) / (each if scaled else 1)) ** 0.5

    def mix(self, x, source, *, mask, layout):
        q = self.q(x)
        k = q if self.same else self.k(source)
        q, k, v = (split_heads(t, self.parts) for t in (q * self.factor, k, self.v(source)))
        return self.proj(merge_heads(dot_product_attention(self, q, k, v, mask)))
