"""LSH attention, of Reformer: tokens are sorted by a hash of their queries, and chunks of them attend.

Kitaev et al., "Reformer: The Efficient Transformer", 2020, arXiv:2001.04451, §2.
"""

from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, Paper, PositiveInt, Site
from attnzoo.functional import masked_softmax, merge_heads, rearrange, split_heads
from attnzoo.functional.hashing import existing_places, hashed_order, meetings
from attnzoo.functional.tokens import picked

ITSELF = -5e4
"""The score of a token for itself: it counts only where nothing else is read."""


class Lsh(Mechanism):
    """W_o softmax(q k̂ᵀ / √d) v, k̂ = q / ‖q‖, over one's chunk and the one before it in each of k rounds.

    In a round tokens are sorted by bucket, argmax of [q R, -q R], R from N(0, 1), then by position, and cut into
    chunks; before the first chunk comes the last. One softmax over all rounds weighs them by their logsumexp.

    Args:
        site: Where the mechanism is put.
        chunk: How many tokens a chunk holds.
        rounds: k, how often the tokens are hashed.
        directions: Columns of R; there are twice as many buckets. The paper has as many buckets as chunks.
        duplicates: Whether a pair that meets in several rounds is `counted` in each, or counts `once`, its scores being
            less by the logarithm of their number, as in the paper's appendix A.
    """

    card = Card(
        name="lsh",
        family=Family.SPARSE,
        summary="Reformer: queries that are keys too are sorted by hash, and chunks of them attend.",
        equation="W_o softmax(q k̂ᵀ / √d) v over near buckets in each round\n"
        "k̂ = q / ‖q‖,  bucket = argmax([q R; −q R])",
        paper=Paper("Reformer: The Efficient Transformer", "Kitaev et al.", 2020, "arXiv:2001.04451", "§2"),
        time="n w c + n c c",
        memory="h n w + n w c",
        params="3 * c**2 + (2 * qkv_bias + proj_bias) * c",
        flops="6 * n * c**2 + 2 * n * rounds * directions * c "
        "+ 4 * rounds * (r := ceil(n / chunk)) * min(2, r) * chunk**2 * c",
        masks={"keys"},
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n w", "weights": "b h n w"},
        laws={Law.STOCHASTIC},
        fidelity="adapted",
        notes="R is a buffer, drawn once, for all heads; the paper draws it in each forward. A causal mask, which the "
        "paper uses, is refused: which tokens share a chunk depends on later ones too, so these would have a say. "
        "Tokens that do not exist are sorted last. A token reads another chunk than in the authors' code at the start "
        "of a round, which there follows the round before. Pairs that meet in several rounds count several times by "
        "default: to count them once costs another pass over the scores for each round.",
    )

    directions: Tensor

    def __init__(
        self,
        site: Site,
        *,
        chunk: PositiveInt = 64,
        rounds: PositiveInt = 4,
        directions: PositiveInt = 8,
        duplicates: Literal["counted", "once"] = "counted",
    ):
        super().__init__(site)
        self.chunk, self.once = chunk, duplicates == "once"
        biases = site.qkv_bias, site.qkv_bias, site.proj_bias
        self.q, self.v, self.proj = (nn.Linear(site.dim, site.dim, bias=bias) for bias in biases)
        self.register_buffer("directions", torch.empty(rounds, site.head_dim, directions))  # R
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 1) for R."""
        nn.init.normal_(self.get_buffer("directions"))

    def mix(self, x, source, *, mask, layout):
        n, c = layout.length, self.chunk
        more, rounds = -n % c, self.directions.shape[0]
        q, v = split_heads(self.q(x), self.heads), split_heads(self.v(x), self.heads)
        kv = torch.cat([F.normalize(q, dim=-1) * q.shape[-1] ** -0.5, v], dim=-1)
        order = hashed_order(q.detach(), self.directions, mask, more)  # (b h k n+more)
        rank = order.argsort(dim=-1)[..., :n]
        at = order.unflatten(3, (-1, c))  # (b h k r c)
        near = at if n + more == c else torch.cat([at.roll(1, dims=3), at], dim=4)  # (b h k r w)

        def sort(t, at):  # (b h n e) to places (b h k r · e)
            return picked(F.pad(t, (0, 0, 0, more)), at.flatten(2)).unflatten(2, at.shape[2:])

        def rows(t):  # chunks (b h k r c e) to the tokens in their order, (b h k n e)
            return picked(t.flatten(3, 4), rank)

        near_k, near_v = sort(kv, near).chunk(2, dim=-1)
        there = existing_places(near[..., None, :], mask, n)  # (b h k r 1 w)
        scores = itself_last(sort(q, at) @ near_k.mT)
        if self.once:
            scores = scores - meetings(order, at, near).to(scores.dtype).log()
        if not (self.scores.watched or self.weights.watched):
            # exponentials by the greatest score of all rounds, then sums
            if more or mask.keys is not None:
                scores = scores.masked_fill_(~there, -torch.inf)
            most = rows(scores.detach().amax(dim=-1, keepdim=True)).amax(dim=2)  # (b h n 1)
            most = most.clamp(min=torch.finfo(most.dtype).min)
            weights = scores.sub_(sort(most, at)).exp_()
            sums = rows(weights.sum(dim=-1, keepdim=True)).sum(dim=2)
            out = rows(F.dropout(weights, self.attn_drop, self.training) @ near_v).sum(dim=2)
            return self.proj(merge_heads(out / torch.where(sums > 0, sums, 1.0)))
        scores = rearrange(rows(scores), "b h k n w -> b h n (k w)")
        allowed = rearrange(rows(there.expand(*[-1] * 4, c, -1)), "b h k n w -> b h n (k w)")
        weights = self.weights(masked_softmax(self.scores(scores), allowed))
        weights = F.pad(rearrange(weights, "b h n (k w) -> b h k n w", k=rounds), (0, 0, 0, more))
        weights = picked(weights, order).unflatten(3, (-1, c))
        return self.proj(merge_heads(rows(weights @ near_v).sum(dim=2)))


def itself_last(scores: Tensor) -> Tensor:
    """Scores (... c w) with `ITSELF` where a token meets itself: its chunk is the last of those it reads."""
    itself = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    first = scores.shape[-1] - scores.shape[-2]
    return scores.masked_fill_(itself.triu(first) & itself.tril(first), ITSELF)


for _name in ("hashed_order", "itself_last", "meetings", "existing_places"):
    fx.wrap(_name)  # symbolic tracing cannot ask for a device
