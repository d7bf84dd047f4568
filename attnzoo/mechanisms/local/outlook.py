"""Outlook attention, of VOLO: a token says itself how the tokens around it are to be mixed.

Yuan et al., "VOLO: Vision Outlooker for Visual Recognition", 2021, arXiv:2106.13112, §3.1. The layers are timm's
`OutlookAttention`.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from attnzoo.core import Card, Family, Law, Layout, Mask, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import masked_mean, masked_softmax, rearrange, windows
from attnzoo.functional.unfolding import at_places, folded, unfolded


class Outlook(Mechanism):
    """W_o fold(softmax(W_a x_c / √d) unfold(W_v x)): each token c has weights for all pairs of places of its window.

    The K × K window around c is mixed by these K² × K² weights per head; where windows overlap, they add.

    Args:
        site: Where the mechanism is put.
        window: K, the side of a window.
        stride: Steps between the tokens that have a window; x_c is the mean of the stride × stride tokens from c on.
        padding: Places beyond the border: `hidden`, or `zeros`, which take their share of the weights with a value of
            0, as the authors and timm have it.

    Raises:
        OptionError: AZ214, for a stride with which some tokens could lie in no window.
    """

    card = Card(
        name="outlook",
        family=Family.LOCAL,
        summary="VOLO: each token says by itself how the window around it is mixed; overlapping windows add.",
        equation="W_o fold(softmax(W_a x_c / √d) unfold(W_v x))",
        paper=Paper("VOLO: Vision Outlooker for Visual Recognition", "Yuan et al.", 2021, "arXiv:2106.13112", "§3.1"),
        time="n c h w w + n w w c + n c c",
        memory="h n w w + n w c",
        params="2 * c * c + (qkv_bias + proj_bias) * c + h * window**4 * (c + 1)",
        flops="4 * n * c * c + 2 * prod(ceil(s / stride) for s in sides) * window**4 * (h + 1) * c",
        masks={"keys", "causal"},
        grid=2,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h x w", "weights": "b h x w"},
        laws={Law.STOCHASTIC, Law.LOCAL},
        notes="No queries are compared with keys. A window whose own tokens do not exist is left out; under a causal "
        "mask also one that lies later than who receives, which needs a stride of 1. Special tokens, which are ours, "
        "lie in no window and receive their own value. Taps show, window by window, those places that lie on the grid, "
        "over all places of the window.",
    )  # fmt: skip

    @classmethod
    def claims(cls, *, stride: int, **options) -> Card:
        return cls.card if stride == 1 else replace(cls.card, masks=frozenset({"keys"}))

    def __init__(
        self, site: Site, *, window: PositiveInt = 3, stride: PositiveInt = 1,
        padding: Literal["hidden", "zeros"] = "hidden",
    ):  # fmt: skip
        super().__init__(site)
        from timm.models.volo import OutlookAttention  # here, so that a list does not wait for timm

        if stride > window // 2 + 1:
            raise OptionError(
                f"`outlook`: with a stride of {stride} some tokens lie in no window of {window}",
                help=f"choose a stride from 1 to {window // 2 + 1}",
            )
        self.window, self.stride, self.hidden = window, stride, padding == "hidden"
        self.layers = OutlookAttention(site.dim, site.heads, window, 0, stride, qkv_bias=site.qkv_bias)
        if not site.proj_bias:
            self.layers.proj = nn.Linear(site.dim, site.dim, bias=False)

    def reach(self) -> int:
        return max(self.window - 1, self.window // 2 + self.stride - 1)

    def mix(self, x, source, *, mask, layout):
        layers, p, side = self.layers, layout.prefix, self.window
        v, there = layers.v(x), None if mask.keys is None else mask.keys[:, p:]
        pieces = unfolded(layout.to_grid(v[:, p:]), side, self.stride)
        pieces = rearrange(pieces, "b (h d w) r -> b h r w d", h=self.heads, w=side**2)
        scores = layers.attn(centres(x[:, p:], there, layout.grid, self.stride))
        scores = rearrange(scores * layers.scale, "b r (h k w) -> b h r k w", h=self.heads, k=side**2)
        allowed = visible(x, layout, mask, side, self.stride, self.hidden)
        weights = masked_softmax(self._shown(self.scores, scores, layout), allowed)
        out = rearrange(self._shown(self.weights, weights, layout) @ pieces, "b h r w d -> b (h d w) r")
        return layers.proj(layout.from_grid(v[:, :p], folded(out, layout.grid, side, self.stride)))

    def _shown(self, tap, t, layout):
        """What a tap makes of those rows that belong to a token, (b h r k w)."""
        if not tap.watched:
            return tap(t)
        inside = at_places(t, layout.grid, self.window, self.stride).flatten().nonzero()[:, 0]
        rows = t.flatten(2, 3)
        return rows.index_copy(2, inside, tap(rows[:, :, inside])).unflatten(2, t.shape[2:4])


def centres(tokens: Tensor, there: Tensor | None, grid: tuple[int, ...], stride: int) -> Tensor:
    """The means of the squares of tokens that exist, (b r c)."""
    if stride == 1:
        return tokens
    there = torch.ones_like(tokens[..., :1], dtype=torch.bool) if there is None else there[..., None]
    squares, there = (windows(t, grid, (stride, stride)) for t in (tokens, there))
    return masked_mean(squares, there, dim=2)


def visible(x: Tensor, layout: Layout, mask: Mask, side: int, stride: int, hidden: bool) -> Tensor | None:
    """Which places of a window each place of it may read: broadcasts to (b h r k w); None for all."""
    if mask.free and not hidden:
        return None
    at, p = at_places(x, layout.grid, side, stride), layout.prefix
    beyond, token = at == 0, (at - 1).clamp(min=0)  # (r w)
    allowed = (~beyond if hidden else torch.ones_like(beyond))[None, None, :, None]
    if mask.keys is not None:
        there = mask.keys[:, p:]
        own = windows(there[..., None], layout.grid, (stride, stride)).any(dim=2)  # (b r 1)
        allowed = allowed & (there[:, token] | beyond)[:, None, :, None] & own[:, None, :, None]
    if mask.causal:  # the window of token r
        allowed = allowed & (beyond[:, None] | (token[:, None] <= token[..., None]))
        allowed = allowed & (torch.arange(len(at), device=x.device)[:, None] <= token)[..., None]
    return allowed


for _name in ("unfolded", "folded", "centres", "at_places", "visible"):
    fx.wrap(_name)  # symbolic tracing knows no lengths
