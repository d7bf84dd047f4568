"""Perceiver: a few learned latents read all tokens, attend to each other, and their mean is the pooled token.

Jaegle et al., "Perceiver: General Perception with Iterative Attention", 2021, arXiv:2103.03206, §3.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, NonNegativeInt, Paper, Pool, PositiveInt, Site
from attnzoo.functional import existing, masked_softmax, merge_heads, rearrange, repeat

TITLE = "Perceiver: General Perception with Iterative Attention"
TAPS = {"scores": "b h r m", "weights": "b h r m"}


class Perceiver(Pool):
    """mean_r(Z): Z + W softmax(q kᵀ / √d) v, Z + MLP(norm(Z)), then `depth` layers of self-attention of Z, repeated.

    q is made of norm(Z), k and v of norm'(x): r learned latents Z read the tokens x.

    Args:
        site: Where the pool is put.
        latents: r, how many there are. The paper's, for 50 176 pixels, has 512.
        depth: How many layers of self-attention, with an MLP each, follow each reading; the paper has 6.
        repeats: How often the tokens are read; the paper has 8.
        share: Whether the readings after the first, with what follows them, have the same weights, as in the paper.
        cross_heads: Of the readings; self-attention has the site's.
    """

    card = Card(
        name="perceiver",
        family=Family.LATENT,
        summary="A few learned latents read all tokens and attend to each other; their mean is the pooled token.",
        equation="mean_r(Z)\n"
        "Z ← Z + W softmax(q kᵀ / √d) v,  Z ← Z + MLP(norm(Z))\n"
        "Z ← Z + attention(norm(Z)),  Z ← Z + MLP(norm(Z))\n"
        "q = W_q norm(Z),  k = W_k norm'(x),  v = W_v norm'(x)",
        paper=Paper(TITLE, "Jaegle et al.", 2021, "arXiv:2103.03206", where="§3"),
        time="n r c + n c c + r r c + r c c",
        memory="h n r + n c",
        params="latents * c + (min(repeats, 2) if share else repeats) * c"
        " * (6 * c + 3 * qkv_bias + proj_bias + 8 + depth * (6 * c + 3 * qkv_bias + 3 * proj_bias + 4))",
        flops="(min(repeats, 2) if share else repeats) * 4 * n * c * c + repeats * latents"
        " * (8 * c * c + 4 * n * c + depth * (12 * c * c + 4 * latents * c))",
        masks={"keys"},
        honours={"qkv_bias", "proj_bias"},
        taps={f"{name}_1": axes for name, axes in TAPS.items()},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="A pool, so there is a host before it that makes tokens and knows positions; the paper reads pixels "
        "beside Fourier features of their positions, in far more and wider latents, which here are as wide as the "
        "tokens. Special tokens are read like all others. Taps are numbered by reading. Where no token exists the "
        "latents are left to themselves. Causal masks are of Perceiver AR, another model.",
    )

    @classmethod
    def claims(cls, *, repeats: int, **options) -> Card:
        readings = range(1, repeats + 1)
        return replace(cls.card, taps={f"{name}_{i}": axes for i in readings for name, axes in TAPS.items()})

    def __init__(
        self,
        site: Site,
        *,
        latents: PositiveInt = 16,
        depth: NonNegativeInt = 1,
        repeats: PositiveInt = 1,
        share: bool = True,
        cross_heads: PositiveInt = 1,
    ):
        super().__init__(site)
        # heads that do not divide c are refused
        self.cross_heads, self.scale = cross_heads, replace(site, heads=cross_heads).head_dim ** -0.5
        self.latents = nn.Parameter(torch.empty(latents, site.dim))
        made = min(repeats, 2) if share else repeats
        self.stages: Any = nn.ModuleList(Stage(site, depth) for _ in range(made))
        self.turns = [min(i, made - 1) for i in range(repeats)]
        self.init_weights()

    def init_weights(self) -> None:
        """The latents from N(0, 0.02²), cut at ± 2."""
        nn.init.trunc_normal_(self.latents, std=0.02)

    @property
    def tap_heads(self) -> int:
        return self.cross_heads

    def pool(self, x, *, mask, layout):
        keys = existing(x, mask)[:, None, None]
        z = repeat(self.latents, "r c -> b r c", b=x.shape[0])
        for i, turn in enumerate(self.turns, start=1):
            stage = self.stages[turn]
            if i <= len(self.stages):  # the last one's keys and values serve all readings that follow
                kv = stage.kv(stage.norm_tokens(x))
                k, v = rearrange(kv, "b m (two h d) -> two b h m d", two=2, h=self.cross_heads)
            q = rearrange(stage.q(stage.norm_latents(z)), "b r (h d) -> b h r d", h=self.cross_heads)
            scores = getattr(self, f"scores_{i}")((q * self.scale) @ k.mT)
            read = getattr(self, f"weights_{i}")(masked_softmax(scores, keys)) @ v
            z = z + stage.proj(merge_heads(read))
            z = stage.tower(z + stage.mlp(stage.norm(z)))
        return z.mean(dim=1)


class Stage(nn.Module):
    """What belongs to one reading of the tokens, and the self-attention of the latents that follows it.

    Args:
        site: Where the pool is put.
        depth: How many layers of self-attention there are.
    """

    def __init__(self, site: Site, depth: int):
        super().__init__()
        # here, so that a list of mechanisms does not wait for timm
        from timm.layers import Mlp
        from timm.models.vision_transformer import Block

        c = site.dim
        self.norm_latents, self.norm_tokens, self.norm = site.norm(c), site.norm(c), site.norm(c)
        self.q = nn.Linear(c, c, bias=site.qkv_bias)
        self.kv = nn.Linear(c, 2 * c, bias=site.qkv_bias)
        self.proj = nn.Linear(c, c, bias=site.proj_bias)
        self.mlp = Mlp(c, c)
        wishes: Any = {"qkv_bias": site.qkv_bias, "proj_bias": site.proj_bias, "norm_layer": site.norm}
        layers = (
            Block(c, site.heads, mlp_ratio=1.0, attn_drop=site.attn_drop, **wishes) for _ in range(depth)
        )
        self.tower = nn.Sequential(*layers)
