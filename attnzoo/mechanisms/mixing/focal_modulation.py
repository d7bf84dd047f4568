"""Focal modulation: each token is scaled by what it gathers of contexts around it, from near to all.

Yang et al., "Focal Modulation Networks", 2022, arXiv:2203.11926, §3. The layers are timm's `FocalModulation`.
"""

from typing import Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Mechanism, Paper, PositiveInt, Site, Tap
from attnzoo.functional import masked_mean


class FocalModulation(Mechanism):
    """P (q ⊙ h(m)), m = Σ_l g_l ⊙ z_l + g_L ⊙ gelu(mean(z_L)); z_l = gelu(DW_l z_{l-1}), and [q, z_0, g] = F x.

    DW_l is a convolution by channel with a side of window + 2 (l - 1), and g has one number a token and level.

    Args:
        site: Where the mechanism is put.
        window: Side of the first convolution.
        levels: L, how many convolutions there are.
        normalise: Whether m is divided by L + 1.
        post_norm: Whether q ⊙ h(m) is normalised before P.
    """

    card = Card(
        name="focal_modulation",
        family=Family.MIXING,
        summary="FocalNet: contexts of growing size, gated and summed by token, scale the token.",
        equation="P (q ⊙ h(m))\n"
        "m = Σ_l g_l ⊙ z_l + g_L ⊙ gelu(mean(z_L))\n"
        "z_l = gelu(DW_l(z_{l−1})),  [q; z_0; g] = F x",
        paper=Paper(
            "Focal Modulation Networks", "Yang et al.", 2022, "arXiv:2203.11926", where="§3, eq. 4-6"
        ),
        time="n c c",
        memory="n c",
        params="(c + qkv_bias) * (3 * c + levels + 1) + (c + proj_bias) * c "
        "+ sum((window + 2 * i)**2 for i in range(levels)) * c + (2 * c if post_norm else 0)",
        flops="2 * n * c * (4 * c + levels + 1) + 2 * (n - p) * sum((window + 2 * i)**2 for i in range(levels)) * c",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"gate": "b n c", "gate_levels": "b n k"},
        notes="Special tokens, which are ours, have no place on the grid: they are no context of others, and of the "
        "contexts they gather the mean alone. Tokens that do not exist are like the zeros beyond the borders, at every "
        "level. `gate` shows h(m), `gate_levels` g.",
    )

    gate_levels: Tap

    def __init__(
        self,
        site: Site,
        *,
        window: Literal[3, 5, 7, 9] = 3,
        levels: PositiveInt = 2,
        normalise: bool = False,
        post_norm: bool = False,
    ):
        super().__init__(site)
        # here, so that a list of mechanisms does not wait for timm
        from timm.models.focalnet import FocalModulation as Layers

        self.layers = Layers(
            site.dim,
            focal_window=window,
            focal_level=levels,
            bias=site.qkv_bias,
            normalize_modulator=normalise,
            use_post_norm=post_norm,
        )
        if not site.proj_bias:
            self.layers.proj = nn.Conv2d(site.dim, site.dim, 1, bias=False)

    def mix(self, x, source, *, mask, layout):
        layers, p = self.layers, layout.prefix
        there = None if mask.keys is None else mask.keys[:, p:, None]
        q, z, g = by_token(layers.f, x).split(layers.input_split, dim=-1)
        g, z = self.gate_levels(g), hidden(z[:, p:], there)
        near = torch.zeros_like(z)
        for level, layer in enumerate(layers.focal_layers):
            z = hidden(layer(layout.to_grid(z)).flatten(2).mT, there)
            near = near + g[:, p:, level : level + 1] * z
        everything = layers.act(masked_mean(z, there, dim=1, keepdim=True))
        m = torch.cat([torch.zeros_like(q[:, :p]), near], dim=1) + g[..., layers.focal_level :] * everything
        if layers.normalize_modulator:
            m = m / (layers.focal_level + 1)
        out = q * self.gate(by_token(layers.h, m))
        return by_token(layers.proj, by_token(layers.norm, out))


def by_token(layer, tokens):
    """A layer of 1 × 1, or a norm by place, of images, applied to tokens (b n c)."""
    return layer(tokens.mT[..., None])[..., 0].mT


def hidden(tokens, there):
    """Tokens (b n c), zero where they do not exist."""
    return tokens if there is None else tokens.masked_fill(~there, 0.0)
