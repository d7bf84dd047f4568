"""MSA-Conv: a convolution whose taps are weighed by attention, with a cyclic shift of heads and pooled keys.

Zhang et al., "TiC: Exploring Vision Transformer in Convolution", 2023, arXiv:2310.04134.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import existing, masked_mean, masked_softmax, rearrange
from attnzoo.functional.windows import surroundings, unwindows, windows


class MsaConv(Mechanism):
    """relu(Conv(o + x)), o at place p = Σ_t softmax_t(q_p · k_{p+δt} / √d) v_{p+δt}, t the taps of a square kernel.

    Args:
        site: Where the mechanism is put.
        kernel: Side of the kernel, in taps; odd. Conv has as many, next to each other.
        dilation: δ, step between the taps that are attended to.
        padding: Taps beyond the border: `masked`, none; `zeros`, keys and values of zero, which take their share of the
            weights, as in the authors' code; `circular`, the tokens of the opposite border.
        single: Whether one head is as wide as the tokens, as in the authors' code, instead of the site's heads.
        shift: How far heads 0, 1, 2, 3, 0, ... move the map around before and back after, not at all, down, to the
            right, and both: `half` of its sides, `kernel`, as many tokens as a kernel has to one side; `none`.
        pool: Side of the squares of tokens whose mean keys and values stand for them; p is the square of the query.
        tail: `conv`; `depthwise`, Conv by channel; `none`, o alone: neither x, Conv nor relu.

    Raises:
        OptionError: AZ214, when the kernel is even, or is widened twice.
    """

    card = Card(
        name="msa_conv",
        family=Family.LOCAL,
        summary="Attention over the taps of a kernel around each token, then the token added, a convolution, a relu.",
        equation="relu(Conv(o + x))\no_p = Σ_t softmax_t(q_p·k_{p+δt} / √d) v_{p+δt}",
        paper=Paper(
            "TiC: Exploring Vision Transformer in Convolution", "Zhang et al.", 2023, "arXiv:2310.04134"
        ),
        time="n w c + n c c",
        memory="n w c",
        params="3 * (c + qkv_bias) * c "
        "+ ((kernel**2 * (c if tail == 'conv' else 1) + proj_bias) * c if tail != 'none' else 0)",
        flops="6 * (n - p) * c * c + 4 * prod(ceil(s / pool) * pool for s in sides) * kernel**2 * c "
        "+ 2 * (n - p) * kernel**2 * c * {'conv': c, 'depthwise': 1, 'none': 0}[tail]",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h y x w", "weights": "b h y x w"},
        laws={Law.STOCHASTIC, Law.LOCAL},
        fidelity="adapted",
        notes="Exact to the authors' code with `padding: zeros` and `single`; strides, which change the number of "
        "tokens, belong to the host. There is no code for `shift` and `pool`: they are our reading, of which pooling "
        "between blocks is another, and so inspired. Special tokens have no place on the grid: they come out as they "
        "went in, so where nothing else mixes, pool the mean. Tokens that do not exist are like those beyond the "
        "borders, but for a circle: there they are nobody.",
    )

    @classmethod
    def claims(cls, *, padding: str, shift: str, pool: int, tail: str, **options) -> Card:
        card = cls.card if shift == "none" and pool == 1 else replace(cls.card, fidelity="inspired")
        if shift != "none" or padding == "circular":
            card = replace(card, laws={Law.STOCHASTIC})
        return replace(card, honours={"qkv_bias"}) if tail == "none" else card

    def __init__(
        self, site: Site, *, kernel: PositiveInt = 3, dilation: PositiveInt = 1,
        padding: Literal["masked", "zeros", "circular"] = "masked", single: bool = False,
        shift: Literal["none", "half", "kernel"] = "none", pool: PositiveInt = 1,
        tail: Literal["conv", "depthwise", "none"] = "conv",
    ):  # fmt: skip
        super().__init__(site)
        if kernel % 2 == 0:
            raise OptionError(f"`msa_conv`: a kernel of {kernel} has no middle; choose an odd number of taps")
        if pool > 1 and dilation > 1:
            raise OptionError("`msa_conv`: `pool` and `dilation` both widen the kernel; choose one of them")
        c, self.parts = site.dim, 1 if single else site.heads
        self.side, self.dilation, self.padding = kernel // 2, dilation, padding
        self.shift, self.pool = shift, pool
        self.qkv = nn.Conv2d(c, 3 * c, 1, bias=site.qkv_bias)
        self.conv = None
        if tail != "none":
            groups = c if tail == "depthwise" else 1
            self.conv = nn.Conv2d(c, c, kernel, padding=self.side, groups=groups, bias=site.proj_bias)

    def reach(self) -> int:
        return self.side * self.dilation * self.pool + self.pool - 1 + (self.side if self.conv else 0)

    @property
    def tap_heads(self) -> int:
        return self.parts

    def mix(self, x, source, *, mask, layout):
        p, grid = layout.prefix, layout.grid
        tokens = layout.to_grid(x[:, p:])  # (b c y x)
        there = layout.to_grid(existing(x, mask)[:, p:, None])
        q, k, v = self.qkv(tokens).chunk(3, dim=1)
        q, k, v = (rearrange(t, "b (h d) y x -> b h y x d", h=self.parts) for t in (q, k, v))
        seen = there.expand(-1, self.parts, -1, -1)[..., None]
        q, k, v, seen = (self._moved(t, grid, 1) for t in (q, k, v, seen))
        out = self._moved(self._around(q, k, v, seen, grid), grid, -1)
        image = rearrange(out, "b h y x d -> b (h d) y x")
        if self.conv is not None:
            image = self.conv((image + tokens).masked_fill(~there, 0.0)).relu()
        return layout.from_grid(x[:, :p], image)

    def _around(self, q, k, v, seen, grid):
        """What each token receives of the taps around it, (b h y x d)."""
        cut = grid, (self.pool, self.pool)
        q, k, v, seen = (windows(t.flatten(2, 3), *cut) for t in (q, k, v, seen))  # (b h r p² e)
        k, v, seen = masked_mean(k, seen, dim=3), masked_mean(v, seen, dim=3), seen.any(dim=3)
        squares = [-(-side // self.pool) for side in grid]
        taps = squares, self.side, self.dilation, self.padding == "circular"
        k, v, seen = (surroundings(t, *taps) for t in (k, v, seen))  # (b h r e w)
        scores = unwindows(q * q.shape[-1] ** -0.5 @ k, *cut).unflatten(2, grid)  # (b h y x w)
        seen = unwindows(seen.expand(-1, -1, -1, self.pool**2, -1), *cut).unflatten(2, grid)
        weights = masked_softmax(self.scores(scores), None if self.padding == "zeros" else seen)
        weights = windows(self.weights(weights).flatten(2, 3), *cut)
        return unwindows(weights @ v.mT, *cut).unflatten(2, grid)

    def _moved(self, t, grid, sign):
        """(b h y x e), every head in its direction."""
        if self.shift == "none":
            return t
        y, x = (sign * (side // 2 if self.shift == "half" else self.side) for side in grid)
        heads = [t[:, h].roll((h % 2 * y, h // 2 % 2 * x), dims=(1, 2)) for h in range(self.parts)]
        return torch.stack(heads, dim=1)
