"""Agent attention: a few agent tokens, pooled from the queries, collect from all tokens and hand out to all.

Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", 2023, arXiv:2312.08874, §3.3.
"""

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Layout, Mechanism, Paper, PositiveInt, Site, Tap
from attnzoo.functional import masked_softmax, merge_heads, rearrange


class PositionBias(nn.Module):
    """What is added to the scores between agents and tokens: a coarse map, a row and a column each, special tokens.

    Args:
        site: Gives heads and layout.
        agents: r, how many agents.
    """

    coarse: nn.Parameter
    rows: nn.Parameter
    columns: nn.Parameter
    prefix: nn.Parameter | None

    def __init__(self, site: Site, agents: int):
        super().__init__()
        y, x = site.layout.grid
        sizes = {"coarse": (7, 7), "rows": (y, 1), "columns": (1, x), "prefix": (site.layout.prefix,)}
        for name, size in sizes.items():
            shape = (site.heads, agents, *size)
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if 0 not in shape else None)
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02²), cut at two of its deviations."""
        for bias in self.parameters():
            nn.init.trunc_normal_(bias, std=0.02, a=-0.04, b=0.04)

    def forward(self, layout: Layout):
        """(h r n), resized to the layout's grid."""
        y, x = layout.grid
        grid = F.interpolate(self.coarse, (y, x), mode="bilinear")
        grid = grid + F.interpolate(self.rows, (y, 1), mode="bilinear")
        grid = (grid + F.interpolate(self.columns, (1, x), mode="bilinear")).flatten(2)
        return grid if self.prefix is None else torch.cat([self.prefix, grid], dim=2)


class Agent(Mechanism):
    """softmax(q aᵀ / √d + B₂) softmax(a kᵀ / √d + B₁) v + DWC(v), a = the queries pooled to a small grid.

    Args:
        site: Where the mechanism is put.
        agents: Side of the grid of agents: r = agents².
    """

    card = Card(
        name="agent",
        family=Family.LINEAR,
        summary="A small grid of pooled queries collects from all tokens and hands out to all.",
        equation="W_o (softmax(q aᵀ / √d + B₂) softmax(a kᵀ / √d + B₁) v + DWC(v))\na = pool(q)",
        paper=Paper(
            "Agent Attention: On the Integration of Softmax and Linear Attention",
            "Han et al.",
            2023,
            "arXiv:2312.08874",
            where="§3.3, eq. 3-5",
        ),
        time="n r c + n c c",
        memory="h n r + n c",
        params="4 * c * c + (3 * qkv_bias + proj_bias + 10) * c + 2 * h * agents**2 * (49 + sum(sides) + p)",
        flops="8 * n * c * c + 8 * n * agents**2 * c + 18 * (n - p) * c",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={
            "scores_agents": "b h r m",
            "weights_agents": "b h r m",
            "scores": "b h n r",
            "weights": "b h n r",
        },
        laws={Law.STOCHASTIC},
        notes="Special tokens attend and are attended to, but are neither pooled nor convolved. On another grid than "
        "it was built for, the biases are resized.",
    )

    scores_agents: Tap
    weights_agents: Tap

    def __init__(self, site: Site, *, agents: PositiveInt = 7):
        super().__init__(site)
        self.agents = agents
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=site.qkv_bias)
        self.collect_bias, self.hand_out_bias = PositionBias(site, agents**2), PositionBias(site, agents**2)
        self.local = nn.Conv2d(site.dim, site.dim, 3, padding=1, groups=site.dim)  # DWC
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)

    def mix(self, x, source, *, mask, layout):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        exists = torch.ones_like(x[..., :1]) if mask.keys is None else mask.keys[..., None].to(x.dtype)
        pooled, share = (self._pool(t, layout) for t in (q * exists, exists))
        agents = pooled / torch.where(share > 0, share, 1.0)  # of those that exist; of nobody: zero
        local = self.local(layout.to_grid((v * exists)[:, layout.prefix :]))
        a, q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (agents, q, k, v))
        scale, allowed = q.shape[-1] ** -0.5, None if mask.keys is None else mask.keys[:, None, None]
        scores = self.scores_agents(a * scale @ k.mT + self.collect_bias(layout))
        collected = self.weights_agents(masked_softmax(scores, allowed)) @ v  # eq. 3
        scores = self.scores(q * scale @ a.mT + self.hand_out_bias(layout).mT)
        out = merge_heads(self.weights(scores.softmax(dim=-1)) @ collected)  # eq. 4
        return self.proj(out + layout.from_grid(torch.zeros_like(out[:, : layout.prefix]), local))  # eq. 5

    def _pool(self, tokens, layout):
        """Grid tokens as r tokens, (b r c)."""
        grid = F.adaptive_avg_pool2d(layout.to_grid(tokens[:, layout.prefix :]), self.agents)
        return rearrange(grid, "b c y x -> b (y x) c")
