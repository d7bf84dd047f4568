"""Global query attention of GC-ViT: a pooled second map asks every window of the tokens the same.

Hatamizadeh et al., "Global Context Vision Transformers", 2023, arXiv:2206.09959, §3. The layers are timm's
`FeatureBlock` and `WindowAttentionGlobal`.
"""

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, NonNegativeInt, OptionError, Paper, Site
from attnzoo.errors import LayoutMismatch
from attnzoo.functional import attention_from_scores, rearrange, unwindows, windows


class GlobalQuery(Mechanism):
    """W softmax(q kᵀ / √d + B) v in each window of the tokens; k and v are of the window, q is the same in all.

    q = F(context): convolutions with a gate of the channels, each followed by a max-pooling that halves the sides;
    what is left of the context is as large as a window. B is a table by relative position.

    Args:
        site: Where the mechanism is put; its context has the tokens' width.
        levels: How often F halves the context. With 0, as in the paper's last stage, it has one convolution.

    Raises:
        OptionError: AZ214, at a site without a context on a grid, with one of another width, and where the windows
            that are left do not tile the grid, or have one token.
        LayoutMismatch: AZ401, when the windows do not tile the grid.
    """

    card = Card(
        name="global_query",
        family=Family.CROSS,
        summary="GC-ViT: one global query map, pooled from a second map, asks each window of the tokens.",
        equation="W softmax(q kᵀ / √d + B) v within windows\nq = F(s),  k = W_k x,  v = W_v x",
        paper=Paper(
            "Global Context Vision Transformers",
            "Hatamizadeh et al.",
            2023,
            "arXiv:2206.09959",
            where="§3, global query generator and attention",
        ),
        time="n m c + n c c",
        memory="h n m",
        params="max(1, levels) * (9 + 2 * max(8, (c // 4 + 4) // 8 * 8) + c) * c + 2 * (c + qkv_bias) * c "
        "+ (c + proj_bias) * c + h * prod(2 * ceil(s / 2**levels) - 1 for s in context_sides)",
        flops="sum(2 * prod(ceil(s / 2**i) for s in context_sides) * (9 + c) * c "
        "+ 4 * max(8, (c // 4 + 4) // 8 * 8) * c for i in range(max(1, levels))) "
        "+ 6 * (n - p) * c * c + 4 * (n - p) * prod(ceil(s / 2**levels) for s in context_sides) * c",
        context=True,
        grid=2,
        context_grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b r h w m", "weights": "b r h w m"},
        laws={Law.STOCHASTIC},
        fidelity="adapted",
        notes="The paper makes its queries once for each stage, of what enters the stage; here the context is a second "
        "stream, and each site has an F of its own. Special tokens lie in no window: they give and receive nothing, "
        "and those of the context are not read. In the taps r counts windows, w and m the tokens of one.",
    )

    def __init__(self, site: Site, *, levels: NonNegativeInt = 0):
        super().__init__(site)
        # here, so that a list of mechanisms does not wait for timm
        from timm.models.gcvit import FeatureBlock, WindowAttentionGlobal

        if site.context_layout is None or site.context_dim != site.dim:
            raise OptionError(
                f"`global_query` at `{site.name}` needs a context on a grid, of {site.dim} channels",
                help="put it where a second stream is read: Site(context_dim=..., context_layout=Layout(...))",
            )
        rows, columns = self.context = site.context_layout.grid
        for _ in range(min(levels, 16)):
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        self.window = rows, columns
        untiled = any(side % w for side, w in zip(site.layout.grid, self.window, strict=False))
        if levels and (untiled or rows * columns == 1):
            raise OptionError(
                f"`global_query`: {levels} levels leave windows of {rows} × {columns} for a grid of {site.layout.grid}",
                help="windows tile the grid and have more than one token: choose fewer levels",
            )
        self.features = FeatureBlock(site.dim, levels=levels)  # F
        self.attn = WindowAttentionGlobal(
            site.dim, num_heads=site.heads, window_size=self.window, qkv_bias=site.qkv_bias
        )
        if not site.proj_bias:
            self.attn.proj = nn.Linear(site.dim, site.dim, bias=False)

    def mix(self, x, source, *, mask, layout, context_layout=None):
        (rows, columns), (i, j) = layout.grid, self.window
        if context_layout.grid != self.context or rows % i or columns % j:
            raise LayoutMismatch(
                "AZ401",
                f"a context of {context_layout.grid} does not give windows that tile a grid of {layout.grid}",
                help=f"the site was built for a context of {self.context}, which leaves windows of {i} × {j}",
            )
        image = context_layout.to_grid(context_layout.split(source)[1])
        q = rearrange(self.features(image), "b (h d) i j -> b 1 h (i j) d", h=self.heads)
        prefix, tokens = layout.split(x)
        kv = self.attn.qkv(windows(tokens, layout.grid, self.window))
        k, v = rearrange(kv, "b r m (two h d) -> two b r h m d", two=2, h=self.heads)
        scores = (q * self.attn.scale) @ k.mT + self.attn.rel_pos.get_bias()
        out = rearrange(attention_from_scores(self, scores, v, None), "b r h w d -> b r w (h d)")
        out = unwindows(self.attn.proj(out), layout.grid, self.window)
        return torch.cat([torch.zeros_like(prefix), out], dim=1)
