"""Class attention: a class token reads all tokens in a few layers of its own, and the tokens stay as they are.

Touvron et al., "Going deeper with Image Transformers", 2021, arXiv:2103.17239, §3, eq. 4-8. The layers are timm's
`LayerScaleBlockClassAttn`.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Paper, Pool, PositiveFloat, PositiveInt, Site
from attnzoo.functional import existing, masked_softmax, merge_heads, rearrange, repeat

TAPS = {"scores": "b h r m", "weights": "b h r m", "scores_own": "b h r k", "weights_own": "b h r k"}


class ClassAttention(Pool):
    """Layer by layer t + γ₁ ⊙ W softmax(q kᵀ / √d) v, then t + γ₂ ⊙ MLP(norm(t)), of a class token t.

    q is made of norm(t), k and v of norm([t, x]). t is learned; x are the tokens, which no layer changes.

    Args:
        site: Where the pool is put.
        depth: How many layers the class token has.
        mlp_ratio: Width of the MLPs, in widths of the tokens.
        layer_scale: γ₁ and γ₂ before training. The paper has 0.1 behind up to 18 layers of self-attention, 1e-5 behind
            24 and 1e-6 behind more; timm's layers have 1e-4.
    """

    card = Card(
        name="class_attention",
        family=Family.LATENT,
        summary="CaiT: a class token reads all tokens and itself in a few layers of its own.",
        equation="norm(t)\n"
        "t ← t + γ₁ ⊙ W softmax(q kᵀ / √d) v\n"
        "t ← t + γ₂ ⊙ MLP(norm(t))\n"
        "q = W_q norm(t),  k = W_k norm([t; x]),  v = W_v norm([t; x])",
        paper=Paper(
            "Going deeper with Image Transformers",
            "Touvron et al.",
            2021,
            "arXiv:2103.17239",
            where="§3, eq. 4-8",
        ),
        time="n c c",
        memory="h n + n c",
        params="3 * c + depth * ((4 * c + 2 * qkv_bias + 8) * c + (2 * c + 1) * (mlp_ratio * c // 1))",
        flops="depth * (4 * (n + 2) * c * c + 4 * (n + 1) * c + 4 * c * (mlp_ratio * c // 1))",
        masks={"keys"},
        honours={"qkv_bias"},
        taps={f"{name}_{i}": axes for i in (1, 2) for name, axes in TAPS.items()},
        laws={Law.SUBSTOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        notes="Special tokens are read like all others. Taps are numbered by layer: `weights_1` shows what the class "
        "token reads of the tokens, `weights_own_1` its own share; together they sum to 1, and where no token exists "
        "it reads itself. As in CaiT the last norm is that of the class token; a host may have another before. Keys "
        "have no bias, which a softmax would not see.",
    )

    @classmethod
    def claims(cls, *, depth: int, **options) -> Card:
        layers = range(1, depth + 1)
        return replace(cls.card, taps={f"{name}_{i}": axes for i in layers for name, axes in TAPS.items()})

    def __init__(
        self,
        site: Site,
        *,
        depth: PositiveInt = 2,
        mlp_ratio: PositiveFloat = 4.0,
        layer_scale: PositiveFloat = 1e-4,
    ):
        super().__init__(site)
        # here, so that a list of mechanisms does not wait for timm
        from timm.models.cait import LayerScaleBlockClassAttn

        self.layer_scale = layer_scale
        self.token = nn.Parameter(torch.empty(site.dim))
        layers = [
            LayerScaleBlockClassAttn(
                site.dim,
                num_heads=site.heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=site.qkv_bias,
                norm_layer=site.norm,  # type: ignore[arg-type]
            )
            for _ in range(depth)
        ]
        for layer in layers:
            layer.attn.k = nn.Linear(site.dim, site.dim, bias=False)
        self.layers: Any = nn.ModuleList(layers)
        self.norm = site.norm(site.dim)
        self.init_weights()

    def init_weights(self) -> None:
        """The class token from N(0, 0.02²), cut at two of its deviations; γ₁ and γ₂."""
        nn.init.trunc_normal_(self.token, std=0.02, a=-0.04, b=0.04)
        for layer in self.layers:
            nn.init.constant_(layer.gamma_1, self.layer_scale)
            nn.init.constant_(layer.gamma_2, self.layer_scale)

    def pool(self, x, *, mask, layout):
        allowed = F.pad(existing(x, mask)[:, None, None], (1, 0), value=True)  # the class token first
        token = repeat(self.token, "c -> b 1 c", b=x.shape[0])
        for i, layer in enumerate(self.layers, start=1):
            token = token + layer.gamma_1 * self._read(
                i, layer.attn, layer.norm1(token), layer.norm1(x), allowed
            )
            token = token + layer.gamma_2 * layer.mlp(layer.norm2(token))  # eq. 8
        return self.norm(token)[:, 0]

    def _read(self, i, attn, token, x, allowed):
        """What the class token reads in layer i, (b 1 c): eq. 4-7, of normalised tokens."""
        q, own_k, own_v, k, v = (
            rearrange(t, "b n (h d) -> b h n d", h=self.heads)
            for t in (attn.q(token), attn.k(token), attn.v(token), attn.k(x), attn.v(x))
        )
        q = q * q.shape[-1] ** -0.5
        own = getattr(self, f"scores_own_{i}")(q @ own_k.mT)
        scores = getattr(self, f"scores_{i}")(q @ k.mT)
        weights = masked_softmax(torch.cat([own, scores], dim=-1), allowed)
        read = getattr(self, f"weights_own_{i}")(weights[..., :1]) @ own_v
        read = read + getattr(self, f"weights_{i}")(weights[..., 1:]) @ v
        return attn.proj(merge_heads(read))
