"""Large kernel attention: each token is scaled by what convolutions find in a wide neighbourhood.

Guo et al., "Visual Attention Network", 2022, arXiv:2202.09741, §3, eq. 1-2.
"""

import math
from dataclasses import replace

from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site


class LargeKernel(Mechanism):
    """u ⊙ (W DWD(DW(u))): a K × K convolution taken apart into a small and a dilated one, by channel, and a 1 × 1.

    DW has 2 δ - 1 taps along a side, DWD has ⌈K / δ⌉, δ apart. VAN's attention unit puts u = gelu(W₁ x) and gives
    x + W₂ (...); the gate alone has u = x.

    Args:
        site: Where the mechanism is put.
        kernel: K, side of the convolution that is taken apart; ⌈K / δ⌉ must be odd. None takes the paper's 21, with a
            DWD no wider than the grid it is built for.
        dilation: δ, step between the taps of DWD.
        unit: Whether it is VAN's attention unit, with projections and a residual of its own, or the gate alone.

    Raises:
        OptionError: AZ214, when ⌈K / δ⌉ is even.
    """

    card = Card(
        name="large_kernel",
        family=Family.MIXING,
        summary="VAN's gate: small, dilated and 1 × 1 convolutions see a wide neighbourhood and scale each token.",
        equation="x + W₂ (u ⊙ W DWD(DW(u)))\nu = gelu(W₁ x)",
        paper=Paper("Visual Attention Network", "Guo et al.", 2022, "arXiv:2202.09741", where="§3, eq. 1-2"),
        time="n c c",
        memory="n c",
        params="sum((near**2 + far**2 + c + 3) * c + ((2 * c + qkv_bias + proj_bias) * c if unit else 0) "
        "for near in [2 * dilation - 1] for far in [ceil(kernel / dilation) if kernel else "
        "min(ceil(21 / dilation) | 1, (max(sides) - 1) // dilation * 2 + 1)])",
        flops="sum(2 * (n - p) * (near**2 + far**2 + (3 * c if unit else c)) * c "
        "for near in [2 * dilation - 1] for far in [ceil(kernel / dilation) if kernel else "
        "min(ceil(21 / dilation) | 1, (max(sides) - 1) // dilation * 2 + 1)])",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"gate": "b c y x"},
        laws={Law.LOCAL},
        notes="A kernel of 21 sees 23 tokens along a side. Special tokens have no place on the grid: they come out as "
        "they went in, so where nothing else mixes, pool the mean. Tokens that do not exist are like the zeros beyond "
        "the borders. On a grid with sides below 10 the outer taps of the paper's kernel meet nobody: by default they "
        "are not made. Say `kernel: 21` where larger grids may come, or none is known.",
    )

    @classmethod
    def claims(cls, *, unit: bool, **options) -> Card:
        return cls.card if unit else replace(cls.card, honours=frozenset())

    def __init__(
        self, site: Site, *, kernel: PositiveInt | None = None, dilation: PositiveInt = 3, unit: bool = True
    ):
        super().__init__(site)
        near, far = 2 * dilation - 1, math.ceil((kernel or 21) / dilation)
        if kernel is not None and far % 2 == 0:
            raise OptionError(
                f"`large_kernel`: a kernel of {kernel} with a dilation of {dilation} has {far} taps, and no middle",
                help=f"choose a kernel from {(far - 2) * dilation + 1} to {(far - 1) * dilation}",
            )
        self.unit, self.widest = unit, near // 2 + dilation * (far // 2)
        if kernel is None:
            far = min(far | 1, 2 * ((max(site.layout.grid) - 1) // dilation) + 1)
        c, padding = site.dim, dilation * (far // 2)
        self.near_conv = nn.Conv2d(c, c, near, padding=near // 2, groups=c)  # DW
        self.far_conv = nn.Conv2d(c, c, far, padding=padding, dilation=dilation, groups=c)  # DWD
        self.mix_conv = nn.Conv2d(c, c, 1)  # W
        self.proj_in = nn.Conv2d(c, c, 1, bias=site.qkv_bias) if unit else nn.Identity()  # W₁
        self.proj_out = nn.Conv2d(c, c, 1, bias=site.proj_bias) if unit else nn.Identity()  # W₂
        self.act = nn.GELU() if unit else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 2 groups / (taps · outputs)), as the authors' code; biases 0."""
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                taps = math.prod(conv.kernel_size)
                nn.init.normal_(conv.weight, std=math.sqrt(2 * conv.groups / (taps * conv.out_channels)))
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)

    def reach(self) -> int:
        return self.widest

    def mix(self, x, source, *, mask, layout):
        p = layout.prefix
        image, there = layout.to_grid(x[:, p:]), None  # (b c y x)
        if mask.keys is not None:
            there = layout.to_grid(mask.keys[:, p:, None])

        def seen(t):
            return t if there is None else t.masked_fill(~there, 0.0)

        u = self.act(self.proj_in(image))
        gate = self.mix_conv(self.far_conv(seen(self.near_conv(seen(u)))))  # eq. 1
        out = self.proj_out(u * self.gate(gate))  # eq. 2
        return layout.from_grid(x[:, :p], image + out if self.unit else out)
