"""Global-local cross-attention: the patches that the class token looked at most ask all tokens; the others wait.

Zhu et al., "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification", CVPR
2022, §3.2.
"""

import fractions

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Fraction, Law, Mask, Mechanism, Paper, Site
from attnzoo.functional import dot_product_attention, rearrange


class GlobalLocalCross(Mechanism):
    """softmax(q_l kᵀ / √d) v, q_l of the special tokens and of the ⌈share N⌉ grid tokens with the largest scores.

    The scores, `rollout` (b *grid), are row 0, without special tokens, of Ŝ_i = S̄_i Ŝ_{i-1}: S̄_i = ½ S_i + ½ E, S_i the
    mean over heads of the weights of layer i. Of equal scores the first goes first. Keys and values are those of all
    tokens; tokens that do not ask get 0.

    Args:
        site: Where the mechanism is put.
        share: Of the N grid tokens that exist, those that ask, at least one: 0.1 in the paper for fine-grained
            classes, 0.3 for re-identification.
    """

    card = Card(
        name="global_local_cross",
        family=Family.CROSS,
        summary="The patches that the layers so far looked at most, and the class token, ask all tokens.",
        equation="W_o softmax(q_l kᵀ / √d) v\nq_l = W_q x_l,  l ∈ special tokens ∪ top_{⌈share N⌉}(rollout)",
        paper=Paper(
            "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
            "Zhu et al.",
            2022,
            "CVPR 2022",
            where="§3.2",
        ),
        time="n m c + n c c",
        memory="h n m + n c",
        params="3 * (c + qkv_bias) * c + (c + proj_bias) * c + 4 * qk_norm * d",
        flops="sum(4 * r * c * c + 4 * n * c * c + 4 * r * n * c "
        "for r in [p + max(1, ceil(round(share * (n - p), 6)))])",
        masks={"keys", "causal", "pairs"},
        grid="any",
        given={"rollout": "scores"},
        honours={"qkv_bias", "proj_bias", "qk_norm"},
        taps={"scores": "b h r m", "weights": "b h r m"},
        laws={Law.STOCHASTIC},
        fidelity="adapted",
        notes="A host of kind vit makes `rollout` itself, of the layers before; elsewhere it is the caller's. That "
        "special tokens always ask is ours: the class is read from one. The residual keeps tokens that do not ask as "
        "they are; the host's MLP then sees all, the paper's those that ask. The paper's second classifier and its "
        "losses are those of `train: {method: dual_cross}`. In the last layer of a model whose class is read from the "
        "class token, what patches receive has no say; with `global_pool: avg` it has. In the taps r counts "
        "special tokens, then chosen ones from the largest score on. The choice has no gradient.",
    )

    def __init__(self, site: Site, *, share: Fraction = 0.1):
        super().__init__(site)
        # 0.7 · 10 is 7 tokens, not 8
        self.share = fractions.Fraction(share).limit_denominator(10**6)
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=site.qkv_bias)
        self.q_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.k_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)

    def mix(self, x, source, *, mask, layout, rollout=None):
        (b, n, c), weight, bias = x.shape, self.qkv.weight, self.qkv.bias
        rows, asks = self._chosen(rollout, mask.keys, layout)
        at = rows[..., None].expand(-1, -1, c)
        some = F.linear(x.gather(1, at), weight[:c], None if bias is None else bias[:c])
        both = F.linear(x, weight[c:], None if bias is None else bias[c:])
        q = self.q_norm(rearrange(some, "b r (h d) -> b h r d", h=self.heads))
        k, v = rearrange(both, "b m (two h d) -> two b h m d", two=2, h=self.heads)
        allowed = mask.dense(n, n, x.device)
        if allowed is not None:
            pairs = allowed.expand(b, -1, n, n)
            pairs = pairs.gather(2, rows[:, None, :, None].expand(-1, pairs.shape[1], -1, n))
            mask = Mask(pairs=pairs & asks[:, None, :, None])
        out = dot_product_attention(self, q, self.k_norm(k), v, mask)
        out = self.proj(rearrange(out, "b h r d -> b r (h d)")).masked_fill(~asks[..., None], 0.0)
        return out.new_zeros(b, n, c).scatter(1, at, out)

    def _chosen(self, scores, keys, layout):
        """Which tokens ask, (b r), and whether they do, (b r): where much is padding, fewer than r ask."""
        p, looks = layout.prefix, scores.detach().flatten(1)
        (b, n), device = looks.shape, looks.device
        asks = torch.ones(b, p + self._part(n), dtype=torch.bool, device=device)
        order = looks.argsort(dim=1, descending=True)
        value = looks.gather(1, order)
        # of equal scores the first place first: a stable sort, which ONNX has not
        turn = F.pad((value[:, 1:] != value[:, :-1]).cumsum(dim=1), (1, 0)) * n + order
        if keys is not None:
            there = keys[:, p:]
            turn = turn + ~there.gather(1, order) * n * n
            found = there.sum(dim=1)
            most = torch.minimum(self._part(found).clamp(min=1), found)
            asks[:, p:] = torch.arange(asks.shape[1] - p, device=device) < most[:, None]
        order = order.gather(1, turn.argsort(dim=1))
        special = torch.arange(p, device=device).expand(b, p)
        return torch.cat([special, p + order[:, : asks.shape[1] - p]], dim=1), asks

    def _part(self, n):
        """⌈share n⌉ of a number of tokens, at least 1, or of several."""
        part = (n * self.share.numerator + self.share.denominator - 1) // self.share.denominator
        return max(1, part) if isinstance(part, int) else part
