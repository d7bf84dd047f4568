"""Global context: one attention map for all queries pools the tokens, and a bottleneck hands the result to each.

Cao et al., "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond", 2019, arXiv:1904.11492, §4.3. The
layers are timm's `GlobalContext`.
"""

from typing import Literal

from torch import nn

from attnzoo.core import Card, Family, Fraction, Law, Mechanism, Paper, Site
from attnzoo.functional import einsum, masked_softmax


class GlobalContext(Mechanism):
    """δ = W₂ relu(norm(W₁ Σ_j α_j x_j)) for every token, α = softmax_j(w x_j); the residual connection is the host's.

    `add` gives δ, `scale` x_i ⊙ σ(δ), `both` x_i ⊙ σ(δ') + δ with a bottleneck each.

    Args:
        site: Where the mechanism is put.
        fuse: How the context meets the tokens: `add` is the paper's block, `scale` timm's default.
        ratio: Width of the bottleneck as a share of the channels; at least 8 channels.
    """

    card = Card(
        name="global_context",
        family=Family.CHANNEL,
        summary="One attention map for all queries, and a bottleneck that adds what it pools to each; timm's layers.",
        equation="W₂ relu(norm(W₁ Σ_j α_j x_j))\nα_j = softmax_j(w x_j)",
        paper=Paper(
            "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond",
            "Cao et al.",
            2019,
            "arXiv:1904.11492",
            where="§4.3",
        ),
        time="n c + c c",
        memory="n c",
        params="c + (1 + (fuse == 'both')) * ((2 * c + 3) * max(8, c * ratio // 1) + c)",
        flops="4 * n * c + (1 + (fuse == 'both')) * 4 * c * max(8, c * ratio // 1)",
        masks={"keys"},
        taps={"scores": "b m", "weights": "b m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        notes="w has no bias, which the softmax would cancel. The last layer of a bottleneck starts at zero, weight "
        "and bias, as the authors' does: at first `add` gives zeros and `scale` halves. Special tokens are read and "
        "written like all others.",
    )

    def __init__(
        self, site: Site, *, fuse: Literal["add", "scale", "both"] = "add", ratio: Fraction = 1 / 16
    ):
        super().__init__(site)
        # here, so that a list of mechanisms does not wait for timm
        from timm.layers import GlobalContext as Layers

        width = max(8, int(site.dim * ratio))
        self.layers = Layers(site.dim, fuse_add=fuse != "scale", fuse_scale=fuse != "add", rd_channels=width)
        self.layers.conv_attn.bias = None  # type: ignore[union-attr]
        self.init_weights()

    def init_weights(self) -> None:
        """timm's for the map; zeros for the last layer of each bottleneck, and for the bias of its first."""
        self.layers.reset_parameters()
        for name, parameter in self.layers.named_parameters():
            if name.endswith(("fc1.bias", "fc2.weight", "fc2.bias")):
                nn.init.zeros_(parameter)

    def mix(self, x, source, *, mask, layout):
        layers = self.layers
        scores = self.scores(layers.conv_attn(x.mT[..., None])[:, 0, :, 0])  # (b m)
        weights = self.weights(masked_softmax(scores, mask.keys))
        context = einsum(weights, x, "b m, b m c -> b c")[..., None, None]
        add, scale = (
            None if mlp is None else mlp(context)[:, None, :, 0, 0]  # (b 1 c)
            for mlp in (layers.mlp_add, layers.mlp_scale)
        )
        if scale is None:
            return add.expand_as(x)
        gated = x * layers.gate(scale)
        return gated if add is None else gated + add
