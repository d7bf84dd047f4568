"""Cascaded group attention: each head has channels of its own, and gets what the head before it found, too.

Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention", 2023, arXiv:2305.07027,
§3.1.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Layout, Mechanism, MultiGroup, OptionError, Paper, PositiveInt, Site
from attnzoo.core.multi_group import fold
from attnzoo.functional import masked_softmax, rearrange

TITLE = "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention"


class CascadedGroup(Mechanism):
    """P relu([o_1 ; ... ; o_h]), o_i = softmax(conv(q_i) k_iᵀ / √d + b_i) v_i; q_i, k_i, v_i = P_i (x_i + o_{i-1}).

    x_i is the i-th share of the channels. b_i is learned for how many rows and columns apart two tokens are. Every P is
    γ ⊙ (W x) + β.

    Args:
        site: Where the mechanism is put.
        qk: d, channels of a head's queries and keys.
        kernel: Side of the convolution of the queries, by channel, in tokens; odd.
        start: γ of P at first: `zero`, the authors', whose output is zero, or `one`.

    Raises:
        OptionError: AZ214, when the kernel has no middle.
    """

    card = Card(
        name="cascaded_group",
        family=Family.PROJECTION,
        summary="EfficientViT: each head has channels of its own, to which what the head before it found is added.",
        equation="P relu([o_1; …; o_h])\n"
        "o_i = softmax(conv(q_i) k_iᵀ / √d + b_i) v_i\n"
        "[q_i; k_i; v_i] = P_i (x_i + o_{i−1})",
        paper=Paper(TITLE, "Liu et al.", 2023, "arXiv:2305.07027", where="§3.1, eq. 2-4"),
        time="n m c + n c c",
        memory="n m + n c",
        params="h * ((2 * qk + d) * (d + 1 + qkv_bias) + qk * (kernel**2 + qkv_bias) + prod(sides)) "
        "+ (c + 1 + proj_bias) * c",
        flops="2 * n * (2 * qk + d + c) * c + 2 * n * h * qk * kernel**2 + 2 * n * m * (h * qk + c)",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        fidelity="adapted",
        notes="The authors' batch norms would let samples have a say in each other: in their place are γ and β, as in "
        "eval mode; `fold` makes one layer of each P, in place. Heads are one after the other, so no tap shows the "
        "weights of all at once, and `attn_drop` drops none. On another grid than it was built for, the table of b is "
        "resized. To and from special tokens b is zero; to the convolution each is a grid of its own. Tokens that do "
        "not exist are zeros to it. The authors attend within windows of 7 and have kernels of 7, 5, 3 and 3, head by "
        "head; here all heads have the same.",
    )

    def __init__(
        self,
        site: Site,
        *,
        qk: PositiveInt = 16,
        kernel: PositiveInt = 5,
        start: Literal["zero", "one"] = "zero",
    ):
        super().__init__(site)
        if kernel % 2 == 0:
            raise OptionError(f"`cascaded_group`: a kernel of {kernel} has no middle; choose an odd one")
        w, self.qk = site.head_dim, qk
        self.qkv = nn.ModuleList(MultiGroup(w, 2 * qk + w, 1, bias=site.qkv_bias) for _ in range(site.heads))
        self.convs = nn.ModuleList(
            nn.Conv2d(qk, qk, kernel, padding=kernel // 2, groups=qk, bias=site.qkv_bias)
            for _ in range(site.heads)
        )
        self.apart = nn.Parameter(torch.empty(site.heads, *site.layout.grid))  # b, by rows and columns
        self.proj: nn.Module = MultiGroup(site.dim, site.dim, 1, bias=site.proj_bias)
        self.zero = start == "zero"
        self.init_weights()

    def init_weights(self) -> None:
        """b is zero; γ of P."""
        nn.init.zeros_(self.apart)
        if isinstance(self.proj, MultiGroup):  # not folded
            nn.init.constant_(self.proj.scales[0], 0.0 if self.zero else 1.0)

    def no_weight_decay(self) -> set[str]:
        return {"apart"}

    def fold(self) -> "CascadedGroup":
        """Make one layer of each P, in place; what it gives stays the same."""
        fold(self)
        return self

    def mix(self, x, source, *, mask, layout):
        keys = None if mask.keys is None else mask.keys[:, None]
        found: list[torch.Tensor] = []
        tables, (down, right) = self._tables(layout), self._ways(layout, x.device)
        for i, own in enumerate(x.chunk(self.heads, dim=-1)):
            fed = own + found[-1] if found else own
            q, k, v = self.qkv[i](fed).split([self.qk, self.qk, own.shape[-1]], dim=-1)
            q = self._near(self.convs[i], q if keys is None else q.masked_fill(~keys.mT, 0.0), layout)
            bias = F.pad(tables[i][down, right], (layout.prefix, 0, layout.prefix, 0))  # (n n)
            found.append(masked_softmax(q * self.qk**-0.5 @ k.mT + bias, keys) @ v)
        return self.proj(torch.cat(found, dim=-1).relu())

    def _tables(self, layout):
        """b for the layout's grid, (h y x)."""
        if layout.grid == self.apart.shape[1:]:
            return self.apart
        return F.interpolate(self.apart[None], layout.grid, mode="bilinear", align_corners=True)[0]

    def _ways(self, layout: Layout, device: torch.device):
        """How many rows, and how many columns, grid tokens are apart, (n n) each."""
        at = layout.coords(device)
        return (at[:, None] - at).abs().unbind(-1)

    def _near(self, conv, q, layout):
        """Grid tokens and, each on its own, special tokens, convolved: (b n d)."""
        prefix, tokens = layout.split(q)
        grid = conv(layout.to_grid(tokens))
        if layout.prefix:
            alone = conv(rearrange(prefix, "b p d -> (b p) d 1 1"))
            prefix = rearrange(alone, "(b p) d 1 1 -> b p d", p=layout.prefix)
        return layout.from_grid(prefix, grid)
