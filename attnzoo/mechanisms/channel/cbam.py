"""CBAM: gate the channels by what the tokens hold, then the places by what the channels hold.

Woo et al., "CBAM: Convolutional Block Attention Module", 2018, arXiv:1807.06521, §3, eq. 1-3. The layers are timm's
`ChannelAttn` and `SpatialAttn`.
"""

import torch
from torch import nn

from attnzoo.core import Card, Family, Fraction, Mechanism, OptionError, Paper, PositiveInt, Site, Tap
from attnzoo.functional import masked_max, masked_mean


class Cbam(Mechanism):
    """u ⊙ σ(conv([mean_c u; max_c u])), where u = x ⊙ σ(MLP(mean x) + MLP(max x)).

    mean x and max x are over the grid tokens, mean_c u and max_c u over the channels; the convolution is on the grid.

    Args:
        site: Where the mechanism is put.
        ratio: Width of the MLP's hidden layer as a share of the channels.
        kernel: Side of the convolution, in tokens; odd.
        mlp_bias: Whether the MLP has biases, as the authors' code has; eq. 2 and timm have none.

    Raises:
        OptionError: AZ214, when the kernel has no middle.
    """

    card = Card(
        name="cbam",
        family=Family.CHANNEL,
        summary="Channel gates from mean and largest tokens, then gates of places by a convolution; timm's layers.",
        equation="u ⊙ σ(conv([mean_c(u); max_c(u)]))\nu = x ⊙ σ(MLP(mean(x)) + MLP(max(x)))",
        paper=Paper(
            "CBAM: Convolutional Block Attention Module",
            "Woo et al.",
            2018,
            "arXiv:1807.06521",
            where="§3, eq. 1-3",
        ),
        time="n c + c c",
        memory="n c",
        params="(2 * c + mlp_bias) * max(1, (c * ratio + 0.5) // 1) + mlp_bias * c + 2 * kernel**2",
        flops="8 * c * max(1, (c * ratio + 0.5) // 1) + 4 * kernel**2 * (n - p)",
        masks={"keys"},
        grid=2,
        taps={"gate_channels": "b c", "gate_places": "b y x"},
        notes="The batch norm that published code puts after the convolution is not in eq. 3; it mixes samples and is "
        "left out. Special tokens enter neither gate; they are gated by channel, and lie at no place. Tokens that do "
        "not exist are zero for the convolution, as what lies beyond the grid.",
    )

    gate_channels: Tap
    gate_places: Tap

    def __init__(
        self, site: Site, *, ratio: Fraction = 1 / 16, kernel: PositiveInt = 7, mlp_bias: bool = False
    ):
        super().__init__(site)
        from timm.layers.cbam import ChannelAttn, SpatialAttn  # here, so that a list does not wait for timm

        if kernel % 2 == 0:
            raise OptionError(f"a kernel of {kernel} has no middle", help="choose an odd `kernel`")
        self.channel = ChannelAttn(site.dim, rd_ratio=ratio, mlp_bias=mlp_bias)
        self.spatial = SpatialAttn(kernel)
        self.spatial.conv.bn = nn.Identity()

    def mix(self, x, source, *, mask, layout):
        channel, spatial = self.channel, self.spatial
        _, tokens = layout.split(x)
        exists = None if mask.keys is None else mask.keys[:, layout.prefix :, None]  # (b n 1)
        mean, most = masked_mean(tokens, exists, dim=1), masked_max(tokens, exists, dim=1)
        logits = sum(channel.fc2(channel.act(channel.fc1(t[..., None, None]))) for t in (mean, most))
        x = x * self.gate_channels(channel.gate(logits)[..., 0, 0])[:, None]  # eq. 2
        prefix, tokens = layout.split(x)
        grid = layout.to_grid(tokens if exists is None else tokens.masked_fill(~exists, 0.0))
        held = torch.cat([grid.mean(dim=1, keepdim=True), grid.amax(dim=1, keepdim=True)], dim=1)
        gate = self.gate_places(spatial.gate(spatial.conv(held))[:, 0])  # eq. 3
        return torch.cat([prefix, tokens * gate.flatten(1)[..., None]], dim=1)
