"""Efficient channel attention: gate each channel by the means of a few neighbouring channels.

Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", 2020, arXiv:1910.03151,
§3.2, eq. 5-10. The layers are timm's `EcaModule` and `CecaModule`.
"""

import torch

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveFloat, Site
from attnzoo.functional import masked_mean


class EfficientChannel(Mechanism):
    """x ⊙ σ(conv_k(mean(x))): a convolution along the channels, without a bias, of the mean over grid tokens.

    k is the whole part of (log₂ c + β) / γ, one more where that is even, and at least 3.

    Args:
        site: Where the mechanism is put.
        gamma: γ; a larger one makes a narrower kernel.
        beta: β; a larger one makes a wider kernel.
        circular: Whether the last channel is a neighbour of the first; otherwise zeros lie beyond both.

    Raises:
        OptionError: AZ214, when γ and β make a kernel that reaches beyond all channels from each of them.
    """

    card = Card(
        name="efficient_channel",
        family=Family.CHANNEL,
        summary="Channel gates from a short convolution along the channels of the mean token, by timm's layers.",
        equation="x ⊙ σ(conv_k(mean(x)))",
        paper=Paper(
            "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
            "Wang et al.",
            2020,
            "arXiv:1910.03151",
            where="§3.2, eq. 5-10",
        ),
        time="n c",
        memory="n c",
        params="max(3, sum(c * 2 ** (beta - gamma * i) >= 1 for i in range(1, 2 * c)) // 2 * 2 + 1)",
        flops="2 * c * max(3, sum(c * 2 ** (beta - gamma * i) >= 1 for i in range(1, 2 * c)) // 2 * 2 + 1)",
        masks={"keys"},
        taps={"gate": "b c"},
        laws={Law.PERMUTATION_EQUIVARIANT},
        notes="A kernel of at least 3 and the circular form are timm's. Special tokens do not enter the mean, and are "
        "gated like all others. Where no token exists the mean is zero, and every gate 1/2.",
    )

    def __init__(
        self, site: Site, *, gamma: PositiveFloat = 2.0, beta: PositiveFloat = 1.0, circular: bool = False
    ):
        super().__init__(site)
        # here, so that a list of mechanisms does not wait for timm
        from timm.layers import CecaModule, EcaModule

        self.eca = (CecaModule if circular else EcaModule)(site.dim, gamma=gamma, beta=beta)
        kernel = self.eca.conv.kernel_size[0]
        self.wrap = kernel // 2 if circular else 0
        if kernel > max(3, 2 * site.dim - 1):
            raise OptionError(
                f"γ = {gamma} and β = {beta} make a kernel of {kernel}; {site.dim} channels have a use for "
                f"{2 * site.dim - 1} at most",
                help="raise `gamma` or lower `beta`",
            )

    def mix(self, x, source, *, mask, layout):
        _, grid = layout.split(x)
        keys = None if mask.keys is None else mask.keys[:, layout.prefix :, None]
        line = masked_mean(grid, keys, dim=1, keepdim=True)  # (b 1 c)
        if self.wrap:
            line = torch.cat([line[..., -self.wrap :], line, line[..., : self.wrap]], dim=-1)
        gate = self.gate(self.eca.gate(self.eca.conv(line))[:, 0])  # (b c)
        return x * gate[:, None]
