"""Class-semantics-based attention: what classes are where says which channels and places of the features matter.

Sridhar et al., "Class Semantics-based Attention for Action Detection", 2021, ICCV, arXiv:2109.02613.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Mechanism, OptionError, Paper, PositiveInt, Site, Tap
from attnzoo.functional import existing, masked_max, masked_mean

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
RESIZE = {1: "linear", 2: "bilinear", 3: "trilinear"}


class ClassSemantics(Mechanism):
    """(x ⊙ c + x ⊙ t) / 2, c = σ(W₂ relu(W₁ pool(conv(R)))) by channel, t = σ(conv(relu(conv(R)))) by place.

    R, the context, holds the semantics of classes along a line, or on a plane or in space; all convolutions of R give
    max(8, channels / reduction) channels, the last of t one. Where R lies on another grid t is resized linearly.

    Args:
        site: Where the mechanism is put.
        axes: Which gates there are. With `channels` the tokens may lie on a grid of other dimensions than R.
        fuse: How x ⊙ c and x ⊙ t become one: their mean, sum, larger entry, or a product with both side by side.
        pool: Over the places of R: their mean, or the largest entry.
        kernel: Places that a convolution sees along a side; odd.
        reduction: Channels of the tokens per channel of the convolutions.

    Raises:
        OptionError: AZ214, at a site without a context, for an even kernel, and for a `fuse` or `pool` of what is not.
        LayoutMismatch: AZ401, where the two streams have grids of other numbers of dimensions.
    """

    card = Card(
        name="class_semantics",
        family=Family.CROSS,
        summary="Gates of channels and of places from the semantics of classes, a second stream.",
        equation="(x ⊙ c + x ⊙ t) / 2\nc = σ(W₂ relu(W₁ pool(conv(R)))),  t = σ(conv(relu(conv(R)))),  R = s",
        paper=Paper(
            "Class Semantics-based Attention for Action Detection", "Sridhar et al.", 2021, "arXiv:2109.02613"
        ),
        time="n c + m c c",
        memory="n c + m c",
        params="(axes != 'places') * (((w := kernel ** len(context_sides)) * e + 1) * (r := max(8, c // reduction)) "
        "+ (r + 1) * (r + c)) + (axes != 'channels') * ((w * (e + 1) + 1) * r + 1) + (fuse == 'concat') * 2 * c * c",
        flops="2 * (r := max(8, c // reduction)) * ((axes != 'places') * (r + c + e * (s := prod(context_sides) "
        "* kernel ** len(context_sides))) + (axes != 'channels') * s * (e + 1)) + (fuse == 'concat') * 4 * n * c * c",
        masks={"keys"},
        context=True,
        grid="any",
        context_grid="any",
        taps={"gate_channels": "b c", "gate_places": "b n"},
        fidelity="inspired",
        notes="The paper's layers are not public: these are ours. It is about time; here any grid will do. Special "
        "tokens lie at no place: their t is the mean of all places that exist; those of the context are not read. "
        "Places that do not exist are like the zeros beyond the ends, and their t is 0.",
    )

    gate_channels: Tap
    gate_places: Tap

    @classmethod
    def claims(cls, *, axes: str, fuse: str, **options) -> Card:
        if axes == "channels":
            return replace(cls.card, grid=None, taps={"gate_channels": "b c"})
        if axes == "places":
            return replace(cls.card, taps={"gate_places": "b n"})
        return replace(cls.card, time="n c c + m c c") if fuse == "concat" else cls.card

    def __init__(
        self, site: Site, *, axes: Literal["both", "channels", "places"] = "both",
        fuse: Literal["mean", "sum", "max", "concat"] = "mean", pool: Literal["mean", "max"] = "mean",
        kernel: PositiveInt = 3, reduction: PositiveInt = 16,
    ):  # fmt: skip
        super().__init__(site)
        self.dims = len((site.context_layout or site.layout).grid)
        faults = {
            "no second stream to read": site.context_dim is None,
            f"a grid of {self.dims} dimensions, and no convolution for it": self.dims not in CONV,
            f"a kernel of {kernel}, which has no middle": kernel % 2 == 0,
            f"`fuse: {fuse}` and one gate": axes != "both" and fuse != "mean",
            f"`pool: {pool}` and no gate of the channels": axes == "places" and pool != "mean",
        }
        if any(faults.values()) or site.context_dim is None:
            found = "; ".join(fault for fault, there in faults.items() if there)
            raise OptionError(f"`class_semantics` at `{site.name}` finds {found}")
        self.fuse, self.pool = fuse, pool
        c, e, r, conv = site.dim, site.context_dim, max(8, site.dim // reduction), CONV[self.dims]
        self.channels, self.places = axes != "places", axes != "channels"
        if self.channels:
            self.channel_conv = conv(e, r, kernel, padding=kernel // 2)
            self.channel_mlp = nn.Sequential(nn.Linear(r, r), nn.ReLU(), nn.Linear(r, c))
        if self.places:
            self.place_conv = conv(e, r, kernel, padding=kernel // 2)
            self.place_gate = conv(r, 1, kernel, padding=kernel // 2)
        self.join = nn.Linear(2 * c, c, bias=False) if fuse == "concat" else None

    def mix(self, x, source, *, mask, layout, context_layout=None):
        self.lies_on(self.dims, source, context_layout)
        if self.places:
            self.lies_on(self.dims, x, layout)
        p = context_layout.prefix
        there = context_layout.to_grid(existing(source, mask)[:, p:, None])  # (b 1 *grid)
        r = context_layout.to_grid(source[:, p:]).masked_fill(~there, 0.0)
        parts = []
        if self.channels:
            gate = self.gate_channels(self.channel_mlp(self._pooled(r, there)).sigmoid())
            parts.append(x * gate[:, None])
        if self.places:
            parts.append(x * self.gate_places(self._place_gates(r, there, layout))[..., None])
        if len(parts) == 1:
            return parts[0]
        if self.join is not None:
            return self.join(torch.cat(parts, dim=-1))
        if self.fuse == "max":
            return torch.maximum(*parts)
        return sum(parts) / (2 if self.fuse == "mean" else 1)

    def _pooled(self, r, there):
        """What the places hold, (b hidden); of nothing: zero."""
        held, there = self.channel_conv(r).flatten(2), there.flatten(2)
        return (masked_mean if self.pool == "mean" else masked_max)(held, there, dim=2)

    def _place_gates(self, r, there, layout):
        """t for special tokens and places, (b n)."""
        held = self.place_conv(r).relu().masked_fill(~there, 0.0)
        t = self.place_gate(held).sigmoid().masked_fill(~there, 0.0)  # (b 1 *grid)
        mean = masked_mean(t.flatten(1), there.flatten(1), dim=1, keepdim=True)
        t = F.interpolate(t, layout.grid, mode=RESIZE[self.dims]).flatten(1)
        return torch.cat([mean.expand(-1, layout.prefix), t], dim=1)
