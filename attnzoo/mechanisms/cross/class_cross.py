"""Class token cross-attention of CrossViT: the class token of one branch reads the patches of the other.

Chen et al., "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification", 2021,
arXiv:2103.14899, §3.3. The layers are timm's `CrossAttentionBlock`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, Site, Tap
from attnzoo.errors import LayoutMismatch
from attnzoo.functional import existing, masked_softmax, merge_heads, rearrange


class ClassCross(Mechanism):
    """[g(y), x_1, x_2, ...], y = f(x_0) + W softmax(q kᵀ / √d) v: q is of f(x_0), k and v of u = [f(x_0), s_p, ...].

    x_0 is the class token, and s are the tokens of the context behind its p special ones. f and g bring the class
    token to the context's width and back, each a norm, gelu and a linear layer; what attends is normalised.

    Args:
        site: Where the mechanism is put.

    Raises:
        OptionError: AZ214, at a site without a context or without a class token, and for a context whose width the
            heads do not divide.
        LayoutMismatch: AZ401, when there is no class token.
    """

    card = Card(
        name="class_cross",
        family=Family.CROSS,
        summary="CrossViT: the class token reads the other stream's patches, at their width, and comes back.",
        equation="[g(y); x_1; x_2; …]\n"
        "y = f(x_0) + W softmax(q kᵀ / √d) v\n"
        "q = W_q norm(f(x_0)),  k = W_k u,  v = W_v u\n"
        "u = norm([f(x_0); s_p; s_{p+1}; …])",
        paper=Paper(
            "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification",
            "Chen et al.",
            2021,
            "arXiv:2103.14899",
            where="§3.3, eq. 3-5",
        ),
        time="n c + m c c",
        memory="h m + n c + m c",
        params="2 * c + (c + 1) * e + 2 * e + (4 * e + 2 * qkv_bias + proj_bias) * e + 2 * e + (e + 1) * c",
        flops="2 * c * e + 8 * e * e + 4 * m * e * e + 4 * (1 + m) * e + 2 * e * c",
        masks={"keys"},
        context=True,
        grid="any",
        context_grid="any",
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h r m", "weights": "b h r m", "scores_own": "b h r k", "weights_own": "b h r k"},
        laws={Law.SUBSTOCHASTIC},
        fidelity="adapted",
        notes="As in the paper the other tokens come out as they went in, and the class token as g(y) alone; a host "
        "with a residual adds what went in. The first special token is the class token. Special tokens of the context "
        "are not read: their weights are zero. `weights_own` shows the share of the class token itself, which with "
        "`weights` sums to 1. Keys have no bias, which a softmax would not see.",
    )

    scores_own: Tap
    weights_own: Tap

    def __init__(self, site: Site):
        super().__init__(site)
        # here, so that a list of mechanisms does not wait for timm
        from timm.models.crossvit import CrossAttentionBlock

        c, e = site.dim, site.context_dim
        if e is None or e % site.heads or not site.layout.prefix:
            lacks = (
                "a second stream to read"
                if e is None
                else "a class token"
                if not site.layout.prefix
                else None
            )
            raise OptionError(
                f"`class_cross` at `{site.name}` "
                + (
                    f"needs {lacks}" if lacks else f"has {site.heads} heads, which do not divide {e} channels"
                ),
                help="a class token of one stream reads the patches of the other, at their width",
            )
        self.enter = nn.Sequential(site.norm(c), nn.GELU(), nn.Linear(c, e))  # f
        self.block = CrossAttentionBlock(
            e,
            num_heads=site.heads,
            qkv_bias=site.qkv_bias,
            norm_layer=site.norm,  # type: ignore[arg-type]
        )
        self.block.attn.wk = nn.Linear(e, e, bias=False)
        if not site.proj_bias:
            self.block.attn.proj = nn.Linear(e, e, bias=False)
        self.leave = nn.Sequential(site.norm(e), nn.GELU(), nn.Linear(e, c))  # g

    def mix(self, x, source, *, mask, layout, context_layout=None):
        if not layout.prefix:
            raise LayoutMismatch("AZ401", f"`class_cross` needs a class token; the layout {layout} has none")
        attn, token = self.block.attn, self.enter(x[:, :1])
        there = existing(source, mask)[:, context_layout.prefix :]
        allowed = F.pad(there, (context_layout.prefix, 0), value=False)[:, None, None]
        own, patches = self.block.norm1(token), self.block.norm1(source)
        q, own_k, own_v, k, v = (
            rearrange(t, "b n (h d) -> b h n d", h=self.heads)
            for t in (attn.wq(own), attn.wk(own), attn.wv(own), attn.wk(patches), attn.wv(patches))
        )
        q = q * attn.scale
        scores = torch.cat([self.scores_own(q @ own_k.mT), self.scores(q @ k.mT)], dim=-1)
        weights = masked_softmax(scores, F.pad(allowed, (1, 0), value=True))
        read = self.weights_own(weights[..., :1]) @ own_v + self.weights(weights[..., 1:]) @ v
        token = token + attn.proj(merge_heads(read))
        return torch.cat([self.leave(token), x[:, 1:]], dim=1)
