"""Non-local block: each place receives a weighted mean of all places, in fewer channels; at first it gives zero.

Wang et al., "Non-local Neural Networks", 2018, arXiv:1711.07971, §3, embedded Gaussian. The layers are timm's
`NonLocalAttn`.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Fraction, Law, Mechanism, Paper, Site
from attnzoo.functional import attention_from_scores, rearrange


class NonLocal(Mechanism):
    """W_z softmax(θ(x) φ(x)ᵀ) g(x): θ, φ and g bring the tokens to fewer channels, W_z brings them back.

    Args:
        site: Where the mechanism is put.
        ratio: Of the channels, those of θ, φ and g: c times `ratio` of them, rounded, at least one. timm has 1/8,
            rounded to a multiple of 8.
        scaled: Whether scores are divided by √c, as in timm.
        subsample: Whether φ and g are max-pooled, 2 × 2, before they are read.
    """

    card = Card(
        name="non_local",
        family=Family.MIXING,
        summary="Non-local block: unscaled softmax attention in half of the channels, zero at first.",
        equation="W_z softmax(θ(x) φ(x)ᵀ) g(x)",
        paper=Paper(
            "Non-local Neural Networks",
            "Wang et al.",
            2018,
            "arXiv:1711.07971",
            where="§3.2-3.3, embedded Gaussian",
        ),
        time="n m c + n c c",
        memory="n m + n c",
        params="(3 * c + 2 * qkv_bias) * max(1, round(c * ratio)) + (max(1, round(c * ratio)) + proj_bias) * c",
        flops="4 * n * (2 * c + (p + prod(ceil(s / 2) for s in sides) if subsample else n)) * max(1, round(c * ratio))",
        masks={"keys", "causal", "pairs"},
        one_head=True,
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="The paper's block is x + W_z (...), with a norm over the batch after W_z whose scale starts at zero. "
        "Here the residual is the host's, there is no such norm, by which samples would have a say in each other, and "
        "it is W_z that starts at zero, as in the paper's eq. 6. φ has no bias, which a softmax would not see. Special "
        "tokens are read and written like all others.",
    )

    @classmethod
    def claims(cls, *, subsample: bool, **options) -> Card:
        if not subsample:
            return replace(cls.card, grid=None)
        more = "They are not pooled. A window exists when any of its tokens does; r counts windows and special tokens."
        return replace(
            cls.card,
            masks=frozenset({"keys"}),
            taps={"scores": "b h n r", "weights": "b h n r"},
            laws=frozenset({Law.STOCHASTIC}),
            notes=f"{cls.card.notes} {more}",
        )

    def __init__(self, site: Site, *, ratio: Fraction = 0.5, scaled: bool = False, subsample: bool = False):
        super().__init__(site)
        # here, so that a list of mechanisms does not wait for timm
        from timm.layers.non_local_attn import NonLocalAttn

        self.subsample, width = subsample, max(1, round(site.dim * ratio))
        self.layers = layers = NonLocalAttn(site.dim, use_scale=scaled, rd_channels=width)
        layers.t = nn.Conv2d(site.dim, width, 1, bias=site.qkv_bias)
        layers.p = nn.Conv2d(site.dim, width, 1, bias=False)
        layers.g = nn.Conv2d(site.dim, width, 1, bias=site.qkv_bias)
        layers.z = nn.Conv2d(width, site.dim, 1, bias=site.proj_bias)
        del layers.norm
        self.init_weights()

    def init_weights(self) -> None:
        """θ, φ and g from N(0, 0.01²), so that unscaled scores start small; W_z and biases zero."""
        for name, parameter in self.layers.named_parameters():
            if name in ("t.weight", "p.weight", "g.weight"):
                nn.init.normal_(parameter, std=0.01)
            else:
                nn.init.zeros_(parameter)

    def mix(self, x, source, *, mask, layout):
        layers, image, n = self.layers, x.mT[..., None], x.shape[1]
        theta, phi, g = layers.t(image), layers.p(image), layers.g(image)  # (b d n 1)
        if self.subsample:
            phi, g, allowed = self._pooled(phi[..., 0], g[..., 0], mask.keys, layout)
        else:
            allowed = mask.dense(n, n, x.device)
        q, k, v = (rearrange(t.flatten(2), "b d m -> b 1 m d") for t in (theta, phi, g))
        read = attention_from_scores(self, (q * layers.scale) @ k.mT, v, allowed)
        return layers.z(read[:, 0].mT[..., None])[..., 0].mT

    def _pooled(self, phi, g, keys, layout):
        """φ and g of special tokens and of the largest in each window, (b d r), and which of them exist."""
        p, there = layout.prefix, None
        if keys is not None:
            phi, g = (t.masked_fill(~keys[:, None], -torch.inf) for t in (phi, g))

        def largest(t):  # an odd side leaves a window of half the size
            grid = F.max_pool2d(t[..., p:].unflatten(2, layout.grid), 2, ceil_mode=True)
            return torch.cat([t[..., :p], grid.flatten(2)], dim=2)

        phi, g = largest(phi), largest(g)
        if keys is not None:
            gone = phi[:, :1] == -torch.inf
            phi, g, there = phi.masked_fill(gone, 0.0), g.masked_fill(gone, 0.0), ~gone[:, None]
        return phi, g, there
