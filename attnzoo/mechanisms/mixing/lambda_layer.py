"""Lambda layer: what the tokens hold is made into linear functions, which are applied to queries; nobody attends.

Bello, "LambdaNetworks: Modeling Long-Range Interactions Without Attention", 2021, arXiv:2102.08602, §3. The layers are
timm's `LambdaLayer`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import masked_softmax, merge_heads, rearrange


class LambdaLayer(Mechanism):
    """λ_nᵀ q_n for each head, λ_n = Σ_m (σ(k)_m + E_{m-n}) v_mᵀ: heads share k and v, σ is a softmax over tokens.

    E holds a vector for each way from n to m, and nothing beyond scope // 2 rows or columns: Σ_m E_{m-n} v_mᵀ is a
    convolution.

    Args:
        site: Where the mechanism is put.
        depth: Channels of keys and of a head's queries.
        scope: Side of the convolution, odd; 23 in the paper's image models, on larger grids.

    Raises:
        OptionError: AZ214, for an even scope.
    """

    card = Card(
        name="lambda_layer",
        family=Family.MIXING,
        summary="LambdaNetworks: linear functions made of all tokens, and of those around, are applied to each query.",
        equation="λ_nᵀ q_n\nλ_n = Σ_m (softmax(k)_m + E_{m−n}) v_mᵀ",
        paper=Paper(
            "LambdaNetworks: Modeling Long-Range Interactions Without Attention",
            "Bello",
            2021,
            "arXiv:2102.08602",
            where="§3, lambda convolution",
        ),
        time="n c c",
        memory="n c",
        params="(c + qkv_bias) * (h * depth + depth + d) + depth * (scope**2 + 1)",
        flops="2 * n * c * (h * depth + depth + d) + 2 * n * depth * d + 2 * n * depth * c "
        "+ 2 * (n - p) * scope**2 * depth * d + 2 * (n - p) * depth * c",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias"},
        taps={"scores": "b d m", "weights": "b d m"},
        laws={Law.STOCHASTIC},
        fidelity="adapted",
        notes="The paper normalises q and v over the batch, by which samples would have a say in each other: here they "
        "are as projected; those of a trained model fold into the projection. The intra-depth u is 1, as in timm, and "
        "nothing is projected after the heads. Special tokens, which are ours, have a part in Σ σ(k) vᵀ and receive "
        "that alone. The taps show σ(k); d counts `depth`.",
    )

    def __init__(self, site: Site, *, depth: PositiveInt = 16, scope: PositiveInt = 9):
        super().__init__(site)
        # here, so that a list of mechanisms does not wait for timm
        from timm.layers.lambda_layer import LambdaLayer as Layers

        if scope % 2 == 0:
            raise OptionError(
                f"`lambda_layer`: a scope of {scope} has no middle", help=f"choose {scope - 1} or {scope + 1}"
            )
        self.widths = [site.heads * depth, depth, site.head_dim]
        self.layers = Layers(site.dim, num_heads=site.heads, dim_head=depth, r=scope, qkv_bias=site.qkv_bias)
        for norm in ("norm_q", "norm_v"):
            setattr(self.layers, norm, nn.Identity())

    def init_weights(self) -> None:
        """timm's: deviations of c^-½ for the projection, of depth^-½ for E."""
        self.layers.reset_parameters()

    def mix(self, x, source, *, mask, layout):
        q, k, v = self.layers.qkv(x.mT[..., None])[..., 0].mT.split(self.widths, dim=-1)
        q = rearrange(q, "b n (h d) -> b h n d", h=self.heads)
        scores, allowed = self.scores(k.mT), None
        if mask.keys is not None:
            allowed, v = mask.keys[:, None], v.masked_fill(~mask.keys[..., None], 0.0)
        content = self.weights(masked_softmax(scores, allowed)) @ v  # (b d e)
        out, p = q @ content[:, None], layout.prefix
        y, e, conv = layout.grid[0], self.widths[2], self.layers.conv_lambda
        maps = rearrange(v[:, p:], "b (y x) e -> (b e) 1 y x", y=y)
        # timm's convolution has no extent along e; in two dimensions, because in three the gradient of PyTorch's in
        # bfloat16 on a CPU reads memory that nobody wrote
        position = F.conv2d(maps, conv.weight[..., 0], conv.bias, padding=conv.padding[0])
        position = rearrange(position, "(b e) d y x -> b d (y x) e", e=e)
        near = (q[:, :, p:].transpose(1, 2) @ position.transpose(1, 2)).transpose(1, 2)
        return merge_heads(torch.cat([out[:, :, :p], out[:, :, p:] + near], dim=2))
