"""Performer: softmax attention estimated by positive orthogonal random features (FAVOR+).

Choromanski et al., "Rethinking Attention with Performers", 2020, arXiv:2009.14794, §2.
"""

import math
from typing import Literal

import torch
from torch import Tensor, fx

from attnzoo.core import Card, Family, Head, Law, Paper, PositiveFloat, PositiveInt, Site
from attnzoo.functional.causal import stabilised_sums


class Performer(Head):
    """φ(q) (φ(k)ᵀ v) over the row sums of φ(q) φ(k)ᵀ, φ(x) = exp(W x - ‖x‖² / 2 - s) + ε, q and k first times d^-¼.

    Rows of W (r d) are orthogonal in blocks of d and shared by all heads. s is the greatest exponent, of a query or of
    all keys that a query sees, and keeps the exponentials from overflowing.

    Args:
        site: Where the head is put.
        features: r, the number of random features; None for ⌊d ln d⌋.
        kernel: `softmax` for the φ above, `relu` for φ(x) = relu(W x) + ε.
        norms: Of the rows of W: `random`, those of Gaussian vectors, or `fixed`, √d, with which the estimate is biased.
        eps: ε; None for 1e-6, with `kernel: relu` 1e-3.
    """

    card = Card(
        name="performer",
        family=Family.LINEAR,
        summary="Softmax attention by positive orthogonal random features; cost linear in the number of tokens.",
        equation="(φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ) / (φ(q_i)ᵀ Σ_j φ(k_j))\n"
        "φ(x) = exp(W x̂ − ‖x̂‖² / 2 − s) + ε,  x̂ = x / d^(1/4)",
        paper=Paper(
            "Rethinking Attention with Performers", "Choromanski et al.", 2020, "arXiv:2009.14794", where="§2"
        ),
        time="n c d² + m c d²",
        memory="h n d²",
        params="0",
        flops="2 * (n + m) * (features or max(1, d * log(d) // 1)) * (2 * c + h)",
        masks={"keys", "causal"},
        context=True,
        incremental=True,
        laws={Law.PERMUTATION_EQUIVARIANT, Law.LINEAR_IN_VALUES, Law.BOUNDED, Law.HEADS_APART},
        fidelity="adapted",
        notes="The costs are for ⌊d ln d⌋ features, at most d². W is a buffer that no forward redraws: who trains as "
        "the authors do calls `init_weights` every 1000 steps. Their stabiliser of a causal pass is that of all keys, "
        "so that later keys are felt through ε; here it is that of the keys a query sees.",
    )

    projection: Tensor  # W

    def __init__(
        self,
        site: Site,
        *,
        features: PositiveInt | None = None,
        kernel: Literal["softmax", "relu"] = "softmax",
        norms: Literal["random", "fixed"] = "random",
        eps: PositiveFloat | None = None,
    ):
        super().__init__(site)
        d = site.head_dim
        self.kernel, self.norms, self.chunk = kernel, norms, max(d, 16)
        self.eps = {"softmax": 1e-6, "relu": 1e-3}[kernel] if eps is None else eps
        self.register_buffer("projection", torch.empty(features or max(1, int(d * math.log(d))), d))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws W: in blocks of d rows that are orthogonal, with every direction as likely as any other."""
        r, d = self.projection.shape
        dtype = torch.promote_types(self.projection.dtype, torch.float32)
        blocks = torch.randn(-(-r // d), d, d, device=self.projection.device, dtype=dtype)
        q, upper = torch.linalg.qr(blocks)
        q = q * upper.diagonal(dim1=-2, dim2=-1).sgn()[:, None]  # the signs that QR leaves are no chance
        norms = torch.randn(r, d, device=blocks.device, dtype=dtype).norm(dim=-1, keepdim=True)
        self.projection.copy_(q.mT.flatten(0, 1)[:r] * (norms if self.norms == "random" else d**0.5))

    def shared(self) -> set[str]:
        return {"projection"}

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """φ(x) - ε in two factors: (b h n r), at most 1 for softmax, and the logarithm of the other, (b h n 1)."""
        x = x * x.shape[-1] ** -0.25
        dots = x @ self.projection.to(x.dtype).T
        if self.kernel == "relu":
            return dots.relu(), torch.zeros_like(x[..., :1])
        most = dots.max(dim=-1, keepdim=True).values  # amax would keep all dots for backward
        return dots.sub_(most).exp_(), most - x.square().sum(dim=-1, keepdim=True) / 2

    def attend(self, q, k, v, *, mask, layout):
        dtype = v.dtype
        if dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()  # sums over all keys lose digits in half precision
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the last column sums the weights
        if mask.keys is not None:
            absent = ~mask.keys[:, None, :, None]
            k, v = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
        q, (k, log) = self.features(q)[0], self.features(k)
        if mask.keys is not None:
            log = log.masked_fill(absent, torch.finfo(log.dtype).min)
        if mask.causal and q.shape[2] != 1:  # the newest query alone sees all keys
            out = stabilised_sums(q + self.eps, k, log, v, self.eps, self.chunk)
        else:  # ε and the second factor go with v and the sums, which are smaller than the features
            scaled = v * (log - log.amax(dim=2, keepdim=True)).exp()
            sums = k.mT @ scaled + self.eps * v.sum(dim=2, keepdim=True)  # (b h r d+1)
            out = q @ sums + self.eps * sums.sum(dim=2, keepdim=True)
        top, norm = out[..., :-1], out[..., -1:]
        return (top / torch.where(norm > 0, norm, 1.0)).to(dtype)


fx.wrap("stabilised_sums")  # symbolic tracing knows no lengths
