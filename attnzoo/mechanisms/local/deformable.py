"""Deformable attention, of DAT: queries shift a coarse grid of points, and what lies there is attended to by all.

Xia et al., "Vision Transformer with Deformable Attention", 2022, arXiv:2201.00520, §3.2.
"""

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Layout, Mechanism, Paper, PositiveFloat, PositiveInt, Site
from attnzoo.errors import OptionError
from attnzoo.functional import merge_heads, rearrange, split_heads
from attnzoo.functional.groups import Groups, read_in_groups
from attnzoo.functional.sampling import sample_bias, sample_tokens


class Deformable(Mechanism):
    """W_o softmax(q k̃ᵀ / √d + B) ṽ, k̃ and ṽ of x̃, which is x between its tokens at points p + Δp of a coarse grid.

    Δp = (f / 2) tanh(w GELU(LN(DWC(q)))) steps of that grid, for each group of channels. B is a table by the way from
    point to query, read between its entries.

    Args:
        site: Where the mechanism is put.
        groups: In how many groups channels are sampled, each at its own points; must divide the heads.
        kernel: Side of the depthwise convolution DWC.
        stride: Its stride: there is a point for stride × stride tokens.
        factor: f; None for points that may lie anywhere, shifted by halves of the grid, without tanh.
        bias: Whether there is a table B.

    Raises:
        OptionError: AZ214, when the groups do not divide the heads.
    """

    card = Card(
        name="deformable",
        family=Family.LOCAL,
        summary="DAT: a coarse grid of points, shifted by the queries, is sampled for keys and values of all.",
        equation="W_o softmax(q k̃ᵀ / √d + B) ṽ\n"
        "k̃ = W_k x̃,  ṽ = W_v x̃,  x̃ = x(p + Δp)\n"
        "Δp = (f / 2) tanh(w GELU(LN(DWC(q))))",
        paper=Paper("Vision Transformer with Deformable Attention", "Xia et al.", 2022, "arXiv:2201.00520", "§3.2"),
        time="n m c + n c c",
        memory="h n m + n c",
        params="4 * c * c + (3 * qkv_bias + proj_bias) * c + (kernel**2 + 5) * c // groups "
        "+ (h * prod(2 * s - 1 for s in sides) if bias else 0)",
        flops="4 * n * c * c + 2 * (r := prod(ceil(s / stride) for s in sides)) * (kernel**2 + 2) * c "
        "+ 4 * (p + r) * (c + n) * c",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n r", "weights": "b h n r"},
        laws={Law.STOCHASTIC},
        notes="r counts special tokens and points, of which there are n / stride². Points start in the middle of their "
        "squares, where the authors' code stretches them beyond the border; they are held on the grid. At a point the "
        "tokens that exist are weighed among themselves; where none does there is no key. Special tokens, which are "
        "ours, ask and are asked without B, and shift nothing. On another grid than it was built for B is stretched.",
    )  # fmt: skip

    def __init__(
        self, site: Site, *, groups: PositiveInt = 1, kernel: PositiveInt = 5, stride: PositiveInt = 1,
        factor: PositiveFloat | None = 2.0, bias: bool = True,
    ):  # fmt: skip
        super().__init__(site)
        if site.heads % groups:
            raise OptionError(f"`deformable`: {groups} groups do not divide {site.heads} heads")
        self.groups, self.kernel, self.stride, self.factor = groups, kernel, stride, factor
        c, some = site.dim, site.dim // groups
        self.q, self.kv = nn.Linear(c, c, bias=site.qkv_bias), nn.Linear(c, 2 * c, bias=site.qkv_bias)
        self.around = nn.Conv2d(some, some, kernel, stride, groups=some)  # DWC
        self.norm, self.shift = nn.LayerNorm(some), nn.Linear(some, 2, bias=False)
        shape = [2 * side - 1 for side in site.layout.grid]
        self.bias = nn.Parameter(torch.empty(site.heads, *shape)) if bias else None
        self.proj = nn.Linear(c, c, bias=site.proj_bias)
        self.init_weights()

    def init_weights(self) -> None:
        """The table from N(0, 0.01²), the authors'."""
        if self.bias is not None:
            nn.init.trunc_normal_(self.bias, std=0.01, a=-0.02, b=0.02)

    def no_weight_decay(self) -> set[str]:
        return set() if self.bias is None else {"bias"}

    def mix(self, x, source, *, mask, layout):
        p, grid = layout.prefix, layout.grid
        exists = None if mask.keys is None else mask.keys[:, p:, None].to(x.dtype)
        q = self.q(x)
        asking, tokens = (t[:, p:] if exists is None else t[:, p:] * exists for t in (q, x))
        at = self._points(asking, grid)  # (b g m 2)
        read, allowed = sample_tokens(tokens, at, grid), None
        if exists is not None:
            share = sample_tokens(exists.expand(-1, -1, self.groups), at, grid)  # (b m g)
            allowed = torch.cat([mask.keys[:, :p], (share > 0).any(dim=-1)], dim=1)[:, None, None, None]
            share = torch.where(share > 0, share, 1.0)
            read = read / share.repeat_interleave(x.shape[-1] // self.groups, dim=-1)
        k, v = self.kv(torch.cat([x[:, :p], read], dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(t, self.heads)[:, :, None] for t in (q, k, v))  # all in one group
        bias = (
            None if self.bias is None else F.pad(sample_bias(self.bias, at, grid), (p, 0, p, 0))[:, :, None]
        )
        whole, taps = Groups((1, layout.length), (1, layout.length)), (self.scores, self.weights)
        out = read_in_groups(q, k, v, groups=whole, taps=taps, allowed=allowed, bias=bias)
        # a kernel may give another order of axes in memory than the one that ONNX is told of
        return self.proj(merge_heads(out.clone(memory_format=torch.contiguous_format)))

    def _points(self, q, grid):
        """Where each group samples, in tokens from the first, (b g m 2)."""
        before = (self.kernel - 1) // 2
        (y, x), (i, j) = grid, (-(-side // self.stride) for side in grid)
        below, beside = ((of - 1) * self.stride + self.kernel - before for of in (i, j))
        image = rearrange(q, "b (y x) (g c) -> b g c y x", y=y, g=self.groups).flatten(0, 1)
        image = F.pad(image, (before, beside - x, before, below - y))  # what is negative is cut off
        around = rearrange(self.around(image), "(b g) c i j -> b g (i j) c", g=self.groups)
        return points(self.shift(F.gelu(self.norm(around))), grid, (i, j), self.factor)


def points(shift: Tensor, grid: tuple[int, int], coarse: tuple[int, int], factor: float | None) -> Tensor:
    """The middles of the squares of a coarse grid, shifted (b g m 2) and held on the grid."""
    dtype = torch.promote_types(shift.dtype, torch.float32)
    sides, least = (torch.tensor(t, device=shift.device, dtype=dtype) for t in (grid, coarse))
    middles = (Layout(coarse).coords(shift.device) + 0.5) * sides / least - 0.5
    shift = shift.to(dtype)
    shift = shift * sides / 2 if factor is None else shift.tanh() * factor / 2 * sides / least
    return torch.minimum((middles + shift).clamp(min=0), sides - 1)


fx.wrap("points")  # symbolic tracing knows no lengths
