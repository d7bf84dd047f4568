"""Channel group attention: the channels of a group attend to each other; a group is what elsewhere is a head.

Ding et al., "DaViT: Dual Attention Vision Transformers", 2022, arXiv:2204.03645, §3.3. The layers are timm's
`ChannelAttention` and `ChannelAttentionV2`.
"""

from typing import Literal

from attnzoo.core import Card, Family, Law, Mechanism, Paper, Site
from attnzoo.functional import rearrange


class ChannelGroup(Mechanism):
    """out_i = A v_i, A = softmax(s qᵀ k) of d × d in each group, where qᵀ k sums over the tokens.

    Args:
        site: Where the mechanism is put.
        scale: s: `channels`, 1 / √d, the paper's; `tokens`, 1 / √n, of n tokens that exist, of the models after it.
    """

    card = Card(
        name="channel_group",
        family=Family.CHANNEL,
        summary="DaViT: softmax attention among the channels of a group, each an image of its own, instead of tokens.",
        equation="W_o A v_i\nA = softmax(qᵀ k / √d)",
        paper=Paper(
            "DaViT: Dual Attention Vision Transformers",
            "Ding et al.",
            2022,
            "arXiv:2204.03645",
            where="§3.3, eq. 4",
        ),
        time="n c d + n c c",
        memory="n c + c d",
        params="4 * c**2 + (3 * qkv_bias + 1) * c",
        flops="8 * n * c**2 + 4 * n * c * d",
        masks={"keys"},
        honours={"qkv_bias"},
        taps={"scores": "b h d r", "weights": "b h d r"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        notes="The r of the taps are channels, too: those that are read. With `channels` what the code calls k, v and "
        "q are the q, k and v of the equation, in weights as well. Scores are sums over all tokens, and grow with "
        "them. The output projection has a bias. Tokens that do not exist are zeros in q and k.",
    )

    def __init__(self, site: Site, *, scale: Literal["channels", "tokens"] = "channels"):
        super().__init__(site)
        # here, so that a list of mechanisms does not wait for timm
        from timm.models.davit import ChannelAttention, ChannelAttentionV2

        self.head_dim, self.by_tokens = site.head_dim, scale == "tokens"
        layers = ChannelAttentionV2 if self.by_tokens else ChannelAttention
        self.layers = layers(site.dim, site.heads, site.qkv_bias)

    def mix(self, x, source, *, mask, layout):
        one, two, three = rearrange(self.layers.qkv(x), "b n (t h d) -> t b h d n", t=3, d=self.head_dim)
        q, k, v = (one, two, three) if self.by_tokens else (two, three, one)
        number = x.shape[1] if self.by_tokens else self.head_dim
        if mask.keys is not None:
            q, k = (t.masked_fill(~mask.keys[:, None, None], 0.0) for t in (q, k))
            if self.by_tokens:
                number = mask.keys.sum(dim=1).clamp(min=1).to(x.dtype)[:, None, None, None]
        weights = self.weights(self.scores(q * number**-0.5 @ k.mT).softmax(dim=-1))  # (b h d d)
        return self.layers.proj(rearrange(weights @ v, "b h d n -> b n (h d)"))
