"""L-SFAN: filters over time and joints, a mean over time, and attention between the joints that are left.

Ortigoso-Narro et al., "L-SFAN: Lightweight Spatially-focused Attention Network for Pain Behavior Detection", 2024,
arXiv:2406.16913.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mask, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import dot_product_attention, existing, masked_group_norm, masked_mean, rearrange

TITLE = "L-SFAN: Lightweight Spatially-focused Attention Network for Pain Behavior Detection"


class SpatiallyFocused(Mechanism):
    """u_j + MHSA(u)_j for every token (t, j), u_j = mean over the times t of what the trunk makes of the tokens.

    Rows of the grid are times, columns are joints. The trunk is a few times ReLU(norm(W ⋆ x)), W over times and joints.

    Args:
        site: Where the mechanism is put.
        orientation: What the mean is over: `time` leaves joints as tokens; `space`, over joints, leaves times; `both`
            leaves one token, whose attention to itself is W_O W_V alone.
        layers: How many convolutions the trunk has.
        kernel_time: Side of the filters in times, odd.
        kernel_joints: Side of the filters in joints, odd; 1 keeps joints apart.
        circular: Whether the last time is followed by the first; otherwise by zeros, as the last joint is.

    Raises:
        OptionError: AZ214, when filters have no middle.
    """

    card = Card(
        name="spatially_focused",
        family=Family.PROJECTION,
        summary="L-SFAN: 2-D filters over time and joints, a mean over time, and attention between the joints.",
        equation="u_j + MHSA(u)_j\nu_j = mean_t(trunk(x)_tj)",
        paper=Paper(TITLE, "Ortigoso-Narro et al.", 2024, "arXiv:2406.16913"),
        time="n c c + x x c",
        memory="n c + h n m",
        params="layers * (kernel_time * kernel_joints * c + 3) * c "
        "+ (1 if orientation == 'both' else 3) * (c + qkv_bias) * c + (c + proj_bias) * c",
        flops="2 * layers * kernel_time * kernel_joints * (n - p) * c**2 + 8 * sides[1] * c**2 "
        "+ 4 * sides[1] ** 2 * c",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h r w", "weights": "b h r w"},
        laws={Law.STOCHASTIC},
        fidelity="inspired",
        notes="Made from the abstract and summaries: sizes and order are our reading. The paper's network is a "
        "classifier, whose last norm, mean and head are the host's; here what a joint receives is given to all its "
        "tokens. Its channels widen; here they stay. Its batch norms would let samples have a say in each other: here "
        "each sample is normalised by itself, all its channels together. Tokens that do not exist are zeros to the "
        "filters and are not counted, and a joint without any is no key. Special tokens come out as they went in, so "
        "pool the mean. n m is a bound: scores are of joints × joints, however many times there are.",
    )

    @classmethod
    def claims(cls, *, orientation: str, **options) -> Card:
        if orientation == "both":
            flops = "2 * layers * kernel_time * kernel_joints * (n - p) * c**2 + 4 * c**2"
            return replace(cls.card, time="n c c", memory="n c", flops=flops, taps={}, laws=frozenset())
        if orientation == "space":
            flops = cls.card.flops.replace("sides[1]", "sides[0]")
            return replace(cls.card, time="n c c + y y c", flops=flops)
        return cls.card

    def __init__(
        self,
        site: Site,
        *,
        orientation: Literal["time", "space", "both"] = "time",
        layers: PositiveInt = 3,
        kernel_time: PositiveInt = 5,
        kernel_joints: PositiveInt = 3,
        circular: bool = False,
    ):
        super().__init__(site)
        if kernel_time % 2 == 0 or kernel_joints % 2 == 0:
            raise OptionError(
                f"`spatially_focused`: filters of {kernel_time} times and {kernel_joints} joints have no middle",
                help="choose odd numbers",
            )
        self.orientation, self.circular, self.around, c = orientation, circular, kernel_time // 2, site.dim
        kernel, padding = (kernel_time, kernel_joints), (0 if circular else self.around, kernel_joints // 2)
        self.filters = nn.ModuleList(nn.Conv2d(c, c, kernel, padding=padding) for _ in range(layers))
        self.norms = nn.ModuleList(nn.GroupNorm(1, c) for _ in range(layers))
        self.parts = 1 if orientation == "both" else 3  # one token needs no queries and keys
        self.qkv = nn.Linear(c, self.parts * c, bias=site.qkv_bias)
        self.proj = nn.Linear(c, c, bias=site.proj_bias)

    def mix(self, x, source, *, mask, layout):
        p = layout.prefix
        there = layout.to_grid(existing(x, mask)[:, p:, None])  # (b 1 y x)
        image = self._trunk(layout.to_grid(x[:, p:]), there)  # (b c y x)
        over = {"time": (2,), "space": (3,), "both": (2, 3)}[self.orientation]
        number = there.sum(over, keepdim=True)
        mean = masked_mean(image, there, over, keepdim=True)
        u = mean.flatten(2).mT  # (b r c)
        out = self.qkv(u)
        if self.parts == 3:
            q, k, v = rearrange(out, "b r (three h d) -> three b h r d", three=3, h=self.heads)
            out = dot_product_attention(self, q, k, v, Mask(keys=(number > 0).flatten(1)))
            out = rearrange(out, "b h r d -> b r (h d)")
        out = (u + self.proj(out)).mT.reshape(mean.shape)
        return layout.from_grid(x[:, :p], out.expand(image.shape))

    def _trunk(self, image, there):
        """ReLU(norm(W ⋆ x)), some times: (b c y x)."""
        for conv, norm in zip(self.filters, self.norms, strict=True):
            image = conv(self._wrapped(image.masked_fill(~there, 0.0)))
            assert isinstance(norm, nn.GroupNorm)
            normed = masked_group_norm(norm, image.flatten(2).mT, there.flatten(1))
            image = normed.relu().mT.reshape(image.shape)
        return image

    def _wrapped(self, image):
        """The map with the last times before the first and the first after the last, where time goes round."""
        if not (self.circular and self.around):
            return image
        times = image.shape[2]
        return image[:, :, torch.arange(-self.around, times + self.around, device=image.device) % times]
