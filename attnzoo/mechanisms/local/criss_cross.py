"""Criss-cross attention: each token reads its column and its row, and again, until it has read everything.

Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", 2019, arXiv:1811.11721, §3.2-3.3.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from attnzoo.core import Card, Family, Law, Mask, Mechanism, Paper, PositiveInt, Site
from attnzoo.functional import masked_softmax
from attnzoo.functional.groups import Groups, seen_in_groups, special_rows


class CrissCross(Mechanism):
    """x_R - x, where x_r = x_{r-1} + γ softmax(q kᵀ) v over the column and the row of a token; q, k, v of x_{r-1}.

    What is added to x is given, for the host adds x. All rounds share one projection each for q, k and v, and γ.

    Args:
        site: Where the mechanism is put.
        rounds: R. After two, every token has read every other.
        reduction: How many times fewer channels queries and keys have than x; one at least.
        scale: What scores are multiplied by: nothing, as the authors, or d^-½, d of queries.
        start: γ at first: `zero`, the authors', whose output is zero, or `one`.
    """

    card = Card(
        name="criss_cross",
        family=Family.LOCAL,
        summary="CCNet: each token attends to its column and its row, twice, so that it has read all.",
        equation="x_R − x\n"
        "x_r = x_{r−1} + γ softmax(q kᵀ) v over column and row\n"
        "q = W_q x_{r−1},  k = W_k x_{r−1},  v = W_v x_{r−1},  x_0 = x",
        paper=Paper(
            "CCNet: Criss-Cross Attention for Semantic Segmentation", "Huang et al.", 2019,
            "arXiv:1811.11721", where="§3.2-3.3",
        ),
        time="n m c + n c c",
        memory="n m + n c",
        params="(c + qkv_bias) * (2 * max(1, c // reduction) + c) + 1",
        flops="rounds * (2 * n * c * (2 * max(1, c // reduction) + c) "
        "+ 2 * ((n - p) * (p + sum(sides)) + p * n) * (max(1, c // reduction) + c))",
        masks={"keys", "causal"},
        one_head=True,
        grid=2,
        honours={"qkv_bias"},
        taps={"scores": "b h x w", "weights": "b h x w"},
        laws={Law.STOCHASTIC},
        notes="m is y + x - 1, the keys of a token, itself once: n^1.5 on a square grid. Nothing is projected after v. "
        "Special tokens, which are ours, lie on all crosses and read all. Pairs are honoured by one round alone, for "
        "in two a token reads through others. Taps show the rows of the grid, over special tokens, the column (0 at "
        "the token itself) and the row; those of the last round have no number.",
    )  # fmt: skip

    @classmethod
    def claims(cls, *, rounds: int, **options) -> Card:
        ends = [*(f"_{i}" for i in range(1, rounds)), ""]
        taps = {kind + end: "b h x w" for end in ends for kind in ("scores", "weights")}
        return replace(cls.card, taps=taps, masks=cls.card.masks | ({"pairs"} if rounds == 1 else set()))

    def __init__(
        self, site: Site, *, rounds: PositiveInt = 2, reduction: PositiveInt = 8,
        scale: Literal["none", "dim"] = "none", start: Literal["zero", "one"] = "zero",
    ):  # fmt: skip
        super().__init__(site)
        d = max(1, site.dim // reduction)
        self.rounds, self.factor, self.zero = rounds, d**-0.5 if scale == "dim" else 1.0, start == "zero"
        self.q, self.k = (nn.Linear(site.dim, d, bias=site.qkv_bias) for _ in range(2))
        self.v = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)
        self.gamma = nn.Parameter(torch.empty(1))
        self.init_weights()

    def init_weights(self) -> None:
        """γ."""
        nn.init.constant_(self.gamma, 0.0 if self.zero else 1.0)

    def mix(self, x, source, *, mask, layout):
        p, (rows, columns) = layout.prefix, layout.grid
        lines = Groups((rows, columns), (rows, 1)), Groups((rows, columns), (1, columns))
        allowed, added = on_cross(x, lines, mask, p), torch.zeros_like(x)
        for i in range(1, self.rounds + 1):
            added = added + self.gamma * self._read(x + added, lines, allowed, mask, p, f"_{i}")
        return added

    def _read(self, x, lines, allowed, mask, p, end):
        """What each token receives of its cross, (b n c)."""
        end = end if hasattr(self, f"weights{end}") else ""
        q, k, v = (self.q(x) * self.factor)[:, None], self.k(x)[:, None], self.v(x)[:, None]  # (b 1 n d)
        at_q, at_k, at_v = ([line.cut(t[:, :, p:]) for line in lines] for t in (q, k, v))  # (b 1 r w d)
        near = [line.join(i @ j.mT) for line, i, j in zip(lines, at_q, at_k, strict=True)]  # (b 1 x w)
        scores = self.get_submodule(f"scores{end}")(torch.cat([q[:, :, p:] @ k[:, :, :p].mT, *near], dim=-1))
        weights = self.get_submodule(f"weights{end}")(masked_softmax(scores, allowed))
        special, down, along = weights.split([p, *lines[0].grid], dim=-1)
        out = special @ v[:, :, :p]
        for line, share, value in zip(lines, (down, along), at_v, strict=True):
            out = out + line.join(line.cut(share) @ value)
        if p:
            drop = self.attn_drop if self.training else 0.0
            first = q[:, :, :p] * q.shape[-1] ** 0.5  # the kernel divides by √d
            out = torch.cat([special_rows(first, k, v, mask, drop), out], dim=2)
        return out[:, 0]


def on_cross(x: Tensor, lines: tuple[Groups, Groups], mask: Mask, p: int) -> Tensor:
    """Who may attend to whom of special tokens, column and row: broadcasts to (b 1 x p+y+x)."""
    (y, x_), n = lines[0].grid, x.shape[1]
    itself = torch.eye(y, dtype=torch.bool, device=x.device).repeat_interleave(x_, dim=0)  # in its column
    special = torch.ones(n - p, p, dtype=torch.bool, device=x.device)
    free = torch.cat([special, ~itself, special.new_ones(n - p, x_)], dim=1)[None, None]
    if mask.free:
        return free
    seen = []
    for line in lines:
        places = seen_in_groups(x[:, None], line, mask, p)
        assert places is not None  # the mask is of some kind
        r, w = (y * x_) // max(line.sides), max(line.sides)
        seen.append(line.join(places.expand(-1, -1, r, w, -1)))
    return free & torch.cat([seen[0], seen[1][..., p:]], dim=-1)


fx.wrap("on_cross")  # symbolic tracing cannot ask for a device
