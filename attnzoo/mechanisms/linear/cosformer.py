"""cosFormer: linear attention by relu, with weights that fall like a cosine of the distance.

Qin et al., "cosFormer: Rethinking Softmax in Attention", 2022, arXiv:2202.08791, §3.3, eq. 10-12.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, fx

from attnzoo.core import Card, Family, Head, Law, Paper, Site
from attnzoo.functional import causal_sums

EPS = 1e-6
"""ε, the authors'."""


def angles(q: Tensor, k: Tensor, keys: Tensor | None, length: int | None) -> tuple[Tensor, Tensor]:
    """π i / 2M of each query and of each key, (b or 1, 1, n, 1) and (b or 1, 1, m, 1); the last two are at one place.

    M is `length`, or the number of tokens from the first to the last that exists; others are as the next of these.
    """
    n, m = q.shape[2], k.shape[2]
    at = torch.arange(max(n, m), device=q.device).to(q.dtype)
    first, most = at.new_zeros(1), at.new_full((1,), length or max(n, m))
    if keys is not None and length is None:
        first = torch.where(keys, at[-m:], at[-1]).amin(dim=-1)
        most = (torch.where(keys, at[-m:], 0.0).amax(dim=-1) - first + 1).clamp(min=1)
    turn = ((at - first[:, None]) / most[:, None]).clamp(0, 1)[:, None, :, None] * (math.pi / 2)
    return turn[:, :, -n:], turn[:, :, -m:]


fx.wrap("angles")  # symbolic tracing knows no lengths


class Cosformer(Head):
    """Σ_j z_ij v_j / max(Σ_j z_ij, ε), z_ij = relu(q_i)·relu(k_j) cos(π (i - j) / 2M), in cost linear in the tokens.

    cos(a - b) = cos a cos b + sin a sin b splits z_ij into features of i and of j, twice as wide as a head. A query
    whose sum is 0 gets zeros.

    Args:
        site: Where the head is put.
        length: M: `input`, the number of tokens that are given, without padding, or `site`, that of those it was built
            for. With `input` what a token receives depends on how many follow, so that alone `site` is causal.
    """

    card = Card(
        name="cosformer",
        family=Family.LINEAR,
        summary="Linear attention with relu features and weights that fall like a cosine of the distance.",
        equation="(Σ_j z_ij v_j) / max(Σ_j z_ij, ε)\nz_ij = relu(q_i)·relu(k_j) cos(π (i − j) / 2M)",
        paper=Paper(
            "cosFormer: Rethinking Softmax in Attention",
            "Qin et al.",
            2022,
            "arXiv:2202.08791",
            where="§3.3, eq. 10-12",
        ),
        time="n c d + m c d",
        memory="n c + m c + h d²",
        params="0",
        flops="4 * (n + m) * c * (d + 1)",
        masks={"keys"},
        laws={Law.LINEAR_IN_VALUES, Law.HEADS_APART},
        notes="Scores are not scaled. Tokens lie in a line, special ones first. `length: site` takes no more tokens "
        "than that, for weights would be negative beyond; a causal pass forms pairs in chunks of d tokens, and "
        "decoding keeps keys and values. The authors' M is that of the input, with padding, under causal masks too. A "
        "context, which is no continuation of the tokens, is not read.",
    )

    @classmethod
    def claims(cls, *, length: str, **options) -> Card:
        if length == "input":
            return cls.card
        return replace(cls.card, masks={"keys", "causal"}, fixed_length="most", incremental=True)

    def __init__(self, site: Site, *, length: Literal["input", "site"] = "input"):
        super().__init__(site)
        self.reaches = None if length == "input" else self.length
        self.chunk = site.head_dim  # then states are as large as tokens

    def attend(self, q, k, v, *, mask, layout):
        dtype = v.dtype
        if dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()  # sums over all keys overflow and lose digits
        at_q, at_k = angles(q, k, mask.keys, self.reaches)
        q, k = q.relu(), k.relu()
        if mask.keys is not None:
            k = k * mask.keys[:, None, :, None]
        q = torch.cat([q * at_q.cos(), q * at_q.sin()], dim=-1)
        k = torch.cat([k * at_k.cos(), k * at_k.sin()], dim=-1)
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the last column sums the weights
        causal = mask.causal and q.shape[2] != 1  # the newest query alone sees all keys
        out = causal_sums(q, k, v, self.chunk) if causal else q @ (k.mT @ v)
        return (out[..., :-1] / out[..., -1:].clamp(min=EPS)).to(dtype)
