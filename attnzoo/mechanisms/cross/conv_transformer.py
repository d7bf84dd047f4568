"""Window attention over convolutional features and tokens, joined on their channels.

Ye et al., "CSformer: Bridging Convolution and Transformer for Compressive Sensing", 2023, TIP, arXiv:2112.15299; the
window attention of its transformer stem.
"""

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Layout, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.errors import LayoutMismatch
from attnzoo.functional import attention_from_scores, existing, rearrange, relative_bias, unwindows, windows


class ConvTransformer(Mechanism):
    """softmax(q kᵀ / √d + B) v in each w × w window, where q, k and v are projected from u = [context ; x].

    B is a table by relative position. u is as wide as both streams, and so is the attention; of its output projection
    the rows that belong to x are made.

    Args:
        site: Where the mechanism is put; its context lies on the same grid.
        window: w, side of a window in tokens; the paper's has 8. It divides the sides of the grid; a side that is
            shorter is one window.

    Raises:
        OptionError: AZ214, at a site without a context on the grid of its tokens, when windows do not tile that grid,
            and when the heads do not divide the width of both streams together.
        LayoutMismatch: AZ401, when the context lies on another grid, or windows do not tile it.
    """

    card = Card(
        name="conv_transformer",
        family=Family.CROSS,
        summary="Window attention over convolutional features and tokens, joined on their channels.",
        equation="W_o softmax(q kᵀ / √d + B) v within windows\n"
        "q = W_q u,  k = W_k u,  v = W_v u,  u = [s; x]",
        paper=Paper(
            "CSformer: Bridging Convolution and Transformer for Compressive Sensing",
            "Ye et al.",
            2023,
            "arXiv:2112.15299",
        ),
        time="n w c + n c c",
        memory="h n w + n c",
        params="3 * (e + c + qkv_bias) * (e + c) + (e + c + proj_bias) * c + h * (2 * window - 1)**2",
        flops="6 * (n - p) * (e + c)**2 + 4 * (n - p) * prod(min(window, s) for s in sides) * (e + c) "
        "+ 2 * (n - p) * (e + c) * c",
        masks={"keys"},
        context=True,
        grid=2,
        context_grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b r h n w", "weights": "b r h n w"},
        laws={Law.STOCHASTIC},
        fidelity="adapted",
        notes="In the paper both streams go on together; here the context's share of the output is not made. It has no "
        "biases in q, k and v, and adds positions to u. A place whose context is hidden is asked by nobody, and asks "
        "with zeros in its place. Special tokens of either stream lie in no window: they give and receive nothing. In "
        "its taps r counts windows, n and w the tokens of one.",
    )

    def __init__(self, site: Site, *, window: PositiveInt = 8):
        super().__init__(site)
        if site.context_dim is None or (site.context_layout or site.layout).grid != site.layout.grid:
            raise OptionError(
                f"`conv_transformer` at `{site.name}` has no context on the grid of its tokens",
                help="put it where a second stream of as many places is read",
            )
        if not _tile(window, site.layout):
            fit = [str(w) for w in range(2, 33) if _tile(w, site.layout)]
            raise OptionError(
                f"`conv_transformer` at `{site.name}`: windows of {window} × {window} do not tile {site.layout.grid}",
                help=f"choose a `window` of {' or '.join(fit)}" if fit else "there is a `window` of 1 only",
            )
        width = site.context_dim + site.dim
        if width % site.heads:
            raise OptionError(
                f"`conv_transformer`: {site.heads} heads do not divide {site.context_dim} + {site.dim} channels",
                help="choose another width of the second stream, or other heads",
            )
        self.window = window
        self.qkv = nn.Linear(width, 3 * width, bias=site.qkv_bias)
        self.proj = nn.Linear(width, site.dim, bias=site.proj_bias)
        self.bias = nn.Parameter(torch.empty(site.heads, 2 * window - 1, 2 * window - 1))
        self.init_weights()

    def init_weights(self) -> None:
        """The table from N(0, 0.02²), cut at two of its deviations."""
        nn.init.trunc_normal_(self.bias, std=0.02, a=-0.04, b=0.04)

    def mix(self, x, source, *, mask, layout, context_layout=None):
        if context_layout.grid != layout.grid or not _tile(self.window, layout):
            raise LayoutMismatch(
                "AZ401",
                f"windows of {self.window} do not tile tokens on {layout.grid} with a context on {context_layout.grid}",
                help="both streams lie on one grid, whose sides the window divides",
            )
        grid, p = layout.grid, context_layout.prefix
        sides = [min(self.window, side) for side in grid]
        exists = existing(source, mask)[:, p:, None]
        u = torch.cat([source[:, p:].masked_fill(~exists, 0.0), x[:, layout.prefix :]], dim=-1)
        u, allowed = (windows(t, grid, sides) for t in (self.qkv(u), exists))
        q, k, v = rearrange(u, "b r w (three h d) -> three b r h w d", three=3, h=self.heads)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT + relative_bias(self.bias, sides)
        out = attention_from_scores(self, scores, v, rearrange(allowed, "b r w 1 -> b r 1 1 w"))
        out = unwindows(rearrange(out, "b r h w d -> b r w (h d)"), grid, sides)
        return F.pad(self.proj(out), (0, 0, layout.prefix, 0))


def _tile(window: int, layout: Layout) -> bool:
    """Whether windows of this side tile a grid; a shorter side is one window."""
    return not any(side % min(window, side) for side in layout.grid)
