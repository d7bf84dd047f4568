"""Scaled cosine attention: queries and keys are compared by their angle, with a learned temperature.

Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution", 2021, arXiv:2111.09883, §3.2, eq. 2.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Head, Law, Paper, Site
from attnzoo.functional import dot_product_attention


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last axis, in single precision at least; zero stays zero."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class Cosine(Head):
    """softmax(cos(q, k) / τ) v, τ = exp(-min(s, ln 100)) with s learned for each head; s starts at ln 10.

    Args:
        site: Where the head is put.
    """

    card = Card(
        name="cosine",
        family=Family.DOT_PRODUCT,
        summary="Softmax of the cosine of query and key over a temperature that each head learns.",
        equation="softmax(cos(q, k) / τ) v\nτ = exp(−min(s, ln 100))",
        paper=Paper(
            "Swin Transformer V2: Scaling Up Capacity and Resolution",
            "Liu et al.",
            2021,
            "arXiv:2111.09883",
            where="§3.2, eq. 2",
        ),
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
        notes="The lengths of queries and keys have no say. τ is 0.01 at least; a head whose s has passed ln 100 no "
        "longer learns it. The relative position bias of eq. 2 belongs to windows and is left out. The fused kernel "
        "forms no (n, m) tensor; memory is that of the explicit form, which taps ask for.",
    )

    def __init__(self, site: Site):
        super().__init__(site)
        self.log_scale = nn.Parameter(torch.empty(site.heads))  # s
        self.init_weights()

    def init_weights(self) -> None:
        """τ = 0.1 in every head."""
        nn.init.constant_(self.log_scale, math.log(10.0))

    def no_weight_decay(self) -> set[str]:
        return {"log_scale"}

    def attend(self, q, k, v, *, mask, layout):
        scale = (
            self.log_scale.clamp(max=math.log(100.0)).exp() * q.shape[-1] ** 0.5
        )  # what follows divides by √d
        q, k = unit(q) * scale[:, None, None], unit(k)
        return dot_product_attention(self, q.to(v.dtype), k.to(v.dtype), v, mask)
