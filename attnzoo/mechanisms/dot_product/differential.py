"""Differential attention: a second map, of what all tokens look at, is taken off the first.

Ye et al., "Differential Transformer", 2024, arXiv:2410.05258, §2.1, eq. 1-3.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Fraction, Law, Mechanism, OptionError, Paper, Site
from attnzoo.functional import (
    dot_product_attention,
    einsum,
    masked_softmax,
    merge_heads,
    rearrange,
    split_heads,
)


class Differential(Mechanism):
    """W_o (1 - λ₀) rms((A₁ - λ A₂) v) by head, A_i = softmax(q_i k_iᵀ / √D), q_i and k_i of D = ⌈d / 2⌉ channels.

    λ = exp(λ_q1·λ_k1) - exp(λ_q2·λ_k2) + λ₀, of four vectors (D) for all heads, which start from N(0, 0.1²).

    Args:
        site: Where the mechanism is put.
        start: λ₀; None for 0.8 - 0.6 exp(-0.3 l) in layer l, from 0: 0.2, 0.356, 0.471, ...

    Raises:
        OptionError: AZ214, for a start of 1, which leaves nothing.
    """

    card = Card(
        name="differential",
        family=Family.DOT_PRODUCT,
        summary="The difference of two softmax maps cancels what both look at; each head is normalised.",
        equation="W_o (1 − λ₀) rms((A₁ − λ A₂) v)\n"
        "A_i = softmax(q_i k_iᵀ / √D)\n"
        "λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + λ₀",
        paper=Paper("Differential Transformer", "Ye et al.", 2024, "arXiv:2410.05258", where="§2.1, eq. 1-3"),
        time="n m c + n c c",
        memory="h n m + n c",
        params="2 * ceil(d / 2) * h * (c + e + 2 * qkv_bias) + (e + qkv_bias + c + proj_bias) * c"
        " + 4 * ceil(d / 2) * (1 + qk_norm) + d + 2 * scale_norm * c",
        flops="4 * ceil(d / 2) * h * (n * c + m * e) + 2 * m * e * c"
        " + 4 * n * m * h * (2 * ceil(d / 2) + d) + 2 * n * c * c",
        masks={"keys", "causal", "pairs"},
        context=True,
        honours={"qkv_bias", "proj_bias", "qk_norm", "scale_norm"},
        taps={"scores": "b k h n m", "weights": "b h n m"},
        laws={Law.PERMUTATION_EQUIVARIANT},
        notes="The tap `weights` shows A₁ - λ A₂, whose rows sum to 1 - λ and may be negative. A head has d channels "
        "of values, as at any site; the paper compares with twice as many heads of half as many channels. State-dict "
        "keys are those of timm's `DiffAttention`. Dropout of weights, which the paper has not, meets the difference. "
        "Reading from a context is ours. The authors' rotary positions, of D channels, are not to be had here.",
    )

    def __init__(self, site: Site, *, start: Fraction | None = None):
        super().__init__(site)
        if start == 1:
            raise OptionError(
                "`differential`: a `start` of 1 leaves nothing: what comes out is scaled by 1 - λ₀"
            )
        self.start = 0.8 - 0.6 * math.exp(-0.3 * site.layer) if start is None else start  # λ₀
        d = -(-site.head_dim // 2)
        self.wide = 2 * d * site.heads
        if site.context_dim is None:
            self.qkv = nn.Linear(site.dim, 2 * self.wide + site.dim, bias=site.qkv_bias)
        else:
            self.q = nn.Linear(site.dim, self.wide, bias=site.qkv_bias)
            self.kv = nn.Linear(site.context_dim, self.wide + site.dim, bias=site.qkv_bias)
        self.q_norm = site.norm(d) if site.qk_norm else nn.Identity()
        self.k_norm = site.norm(d) if site.qk_norm else nn.Identity()
        self.lambda_q1, self.lambda_k1 = nn.Parameter(torch.empty(d)), nn.Parameter(torch.empty(d))
        self.lambda_q2, self.lambda_k2 = nn.Parameter(torch.empty(d)), nn.Parameter(torch.empty(d))
        self.sub_norm = nn.RMSNorm(site.head_dim, eps=1e-5)  # rms, one weight for all heads
        self.norm = site.norm(site.dim) if site.scale_norm else nn.Identity()
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)
        self.init_weights()

    def init_weights(self) -> None:
        """The four vectors of λ."""
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)

    def mix(self, x, source, *, mask, layout):
        if self.context_dim is None:
            q, kv = self.qkv(x).tensor_split((self.wide,), dim=-1)
        else:
            q, kv = self.q(x), self.kv(source)
        k, v = kv.tensor_split((self.wide,), dim=-1)
        # neighbouring heads of D channels are a pair, (b k h n d) with k = 2
        q, k = (rearrange(t, "b n (h k d) -> b k h n d", h=self.heads, k=2) for t in (q, k))
        out = self._read(self.q_norm(q), self.k_norm(k), split_heads(v, self.heads), mask)
        out = self.sub_norm(out.to(self.sub_norm.weight.dtype)) * (1 - self.start)
        return self.proj(self.norm(merge_heads(out)))

    def _lambda(self):
        """λ, in single precision at least."""
        one, two = (self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2)
        exact = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        first, second = ((q.to(exact) * k.to(exact)).sum().exp() for q, k in (one, two))
        return first - second + self.start

    def _read(self, q, k, v, mask):
        """(A₁ - λ A₂) v, (b h n d)."""
        scale = self._lambda().to(v.dtype)
        dropping = self.training and self.attn_drop > 0
        if not (dropping or self.scores.watched or self.weights.watched):
            return self._fused(q, k, v, scale, mask)
        scores = self.scores(einsum(q * q.shape[-1] ** -0.5, k, "b k h n d, b k h m d -> b k h n m"))
        allowed = mask.dense(q.shape[3], k.shape[3], q.device)
        first, second = masked_softmax(scores, None if allowed is None else allowed[:, None]).unbind(1)
        return self.weights(first - scale * second) @ v

    def _fused(self, q, k, v, scale, mask):
        """By kernels that want queries, keys and values equally wide: zeros in the place of the other half."""
        d = q.shape[-1]
        q, k = q * 2**0.5, rearrange(k, "b k h m d -> b h m (k d)")  # what follows divides by √2D
        first, second = F.pad(q[:, 0], (0, d)), F.pad(q[:, 1], (d, 0))
        first, second = (dot_product_attention(self, t, k, v, mask) for t in (first, second))
        return first - scale * second
