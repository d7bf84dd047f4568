"""Window cross-attention: a small second map asks each window of the first.

Wasi et al., "ARBEx: Attentive Feature Extraction with Reliability Balancing for Robust Facial Expression Learning",
2023, arXiv:2305.01486, §3.2.
"""

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, Site
from attnzoo.errors import LayoutMismatch
from attnzoo.functional import attention_from_scores, rearrange, relative_bias, unwindows, windows


class WindowCross(Mechanism):
    """softmax(q kᵀ / √d + B) v in each w × w window of the tokens: q is the context, w × w tokens, as it comes.

    Keys and values are projected from the window; B is a table by relative position. Token (i, j) of a window receives
    what token (i, j) of the context asked for there.

    Args:
        site: Where the mechanism is put; its context has the tokens' width.

    Raises:
        OptionError: AZ214, at a site without a context on a grid, or with one of another width.
        LayoutMismatch: AZ401, when windows of the context's size do not tile the grid.
    """

    card = Card(
        name="window_cross",
        family=Family.CROSS,
        summary="A small second map asks each window of the first: queries from the context, keys from the window.",
        equation="W_o softmax(q kᵀ / √d + B) v within windows\nq = s,  k = W_k x,  v = W_v x",
        paper=Paper(
            "ARBEx: Attentive Feature Extraction with Reliability Balancing for Robust Facial Expression Learning",
            "Wasi et al.",
            2023,
            "arXiv:2305.01486",
            where="§3.2",
        ),
        time="n m c + n c c",
        memory="h n m",
        params="2 * (c + qkv_bias) * c + (c + proj_bias) * c + h * prod(2 * s - 1 for s in context_sides)",
        flops="6 * (n - p) * c * c + 4 * (n - p) * prod(context_sides) * c",
        context=True,
        grid=2,
        context_grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b r h w m", "weights": "b r h w m"},
        laws={Law.STOCHASTIC},
        fidelity="adapted",
        notes="Special tokens lie in no window: they give and receive nothing. The paper's windows are as large as the "
        "whole map; here any size that tiles it. In its taps r counts windows, w and m the tokens of one.",
    )

    def __init__(self, site: Site):
        super().__init__(site)
        if site.context_dim is None or site.context_layout is None:
            raise OptionError(
                f"`window_cross` at `{site.name}` needs a context that lies on a grid",
                help="put it where a second stream is read: Site(context_dim=..., context_layout=Layout(...))",
            )
        if site.context_dim != site.dim:
            raise OptionError(
                f"`window_cross` takes its context as queries: {site.context_dim} channels are not {site.dim}",
                help="bring the context to the width of the tokens first",
            )
        rows, columns = self.window = site.context_layout.grid
        self.kv = nn.Linear(site.dim, 2 * site.dim, bias=site.qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)
        self.bias = nn.Parameter(torch.empty(site.heads, 2 * rows - 1, 2 * columns - 1))
        self.init_weights()

    def init_weights(self) -> None:
        """The table from N(0, 0.02²), cut at two of its deviations."""
        nn.init.trunc_normal_(self.bias, std=0.02, a=-0.04, b=0.04)

    def mix(self, x, source, *, mask, layout, context_layout=None):
        (rows, columns), (i, j) = layout.grid, self.window
        if context_layout.grid != self.window or rows % i or columns % j:
            raise LayoutMismatch(
                "AZ401",
                f"windows of {context_layout.grid} do not tile a grid of {layout.grid} at a site for {self.window}",
                help="the context must have the grid that the site was built for, and divide that of the tokens",
            )
        prefix, tokens = layout.split(x)
        tokens = windows(tokens, layout.grid, self.window)
        k, v = rearrange(self.kv(tokens), "b r m (two h d) -> two b r h m d", two=2, h=self.heads)
        q = rearrange(context_layout.split(source)[1], "b w (h d) -> b 1 h w d", h=self.heads)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT + relative_bias(self.bias, self.window)
        out = attention_from_scores(self, scores, v, None)
        out = unwindows(rearrange(out, "b r h w d -> b r w (h d)"), layout.grid, self.window)
        return torch.cat([torch.zeros_like(prefix), self.proj(out)], dim=1)
