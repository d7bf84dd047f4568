"""A mixture of the branches whose shares depend on the layer.

Patro et al., "SpectFormer: Frequency and Attention is what you need in a Vision Transformer", 2023,
arXiv:2304.06446, §3: the first α layers one mechanism, the rest the other.
"""

from typing import Literal

import torch
from torch import nn

from attnzoo.core import Fusion, FusionCard, Law, OptionError, Paper, PositiveInt, Site, Start

LEAST = 0.01


class ByDepth(Fusion):
    """Σ_i w_i a_i with w_i = max(0, 1 − |t − i|), i from 0: a layer has its place t among the k branches.

    At t = 0 the first branch comes out alone, at t = k − 1 the last, and in between two neighbours share.

    Args:
        site: Where it is; it asks for `site.layer`, l from 0, and `site.depth`, L.
        arity: Number of branches.
        shape: `linear` has t = (k − 1) l / (L − 1); `step` has t = ⌊l / α⌋, at most k − 1: of two branches the first in
            the first α layers, then the second; `learned` a softmax of a parameter per branch, which starts at `linear`
            with no share below 1/100.
        alpha: α, for `step` alone; None takes L / k, rounded up.
        start: `free` merges at once; `identity` equals the first branch bit for bit before training.

    Raises:
        OptionError: AZ214, for an α with another shape.
    """

    card = FusionCard(
        name="by_depth",
        summary="A convex mixture whose shares depend on the layer: Σ wᵢ(l) aᵢ.",
        equation="Σ_i w_i a_i\nw_i = max(0, 1 − |t − i|),  t = (k − 1) l / (L − 1)",
        paper=Paper(
            "SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
            "Patro et al.",
            2023,
            "arXiv:2304.06446",
            where="§3",
        ),
        laws={Law.SINGLE, Law.AGREE, Law.CONVEX, Law.ADDITIVE, Law.IDENTITY_START, Law.TOKEN_LOCAL},
        hard_routing=True,
        fidelity="adapted",
        notes="`step` is the paper's. A branch without a share in a layer is computed, and learns nothing there: "
        "`overrides` in a recipe put another mechanism into some layers at no such cost.",
    )

    def __init__(
        self,
        site: Site,
        arity: int,
        *,
        shape: Literal["linear", "learned", "step"] = "linear",
        alpha: PositiveInt | None = None,
        start: Start = "free",
    ):
        if alpha is not None and shape != "step":
            raise OptionError(
                f"`by_depth`: `alpha` has no say in `shape: {shape}`", help="write `shape: step`"
            )
        last, deepest = arity - 1, max(1, site.depth - 1)
        if shape == "step":
            t = float(min(last, site.layer // (alpha or -(-site.depth // arity))))
        else:
            t = last * min(1.0, site.layer / deepest)
        # where the first branch comes out alone there is nothing to reach from it
        super().__init__(site, arity, start=start if t > 0 or shape == "learned" else "free")
        self.layer, self.depth = site.layer, site.depth
        self.start_shares = [max(0.0, 1.0 - abs(t - i)) for i in range(arity)]
        self.logits = nn.Parameter(torch.empty(arity)) if shape == "learned" else None
        self.init_weights()

    def init_weights(self) -> None:
        """The shares of the linear shape."""
        if self.logits is not None:
            with torch.no_grad():
                self.logits.copy_(torch.tensor(self.start_shares).clamp(min=LEAST).log())

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | ({"logits"} if self.logits is not None else set())

    def merge(self, branches, x):
        if self.logits is None:
            parts = zip(self.start_shares, branches, strict=True)
            first, *rest = [branch * share for share, branch in parts if share > 0]
        else:
            shares = self.logits.softmax(dim=0)
            first, *rest = [branch * shares[i] for i, branch in enumerate(branches)]
        for part in rest:
            first = first + part
        return first
