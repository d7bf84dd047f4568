"""Spectral hashing attention (SAH-MSA): in patches of the grid, tokens of similar hash attend to each other.

Cai et al., "Coarse-to-Fine Sparse Transformer for Hyperspectral Image Reconstruction", 2022, arXiv:2203.04845.
"""

from dataclasses import replace

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, Paper, PositiveInt, Site
from attnzoo.functional import einsum, existing, masked_mean, masked_softmax, rearrange
from attnzoo.functional.windows import Patches

TITLE = "Coarse-to-Fine Sparse Transformer for Hyperspectral Image Reconstruction"


class SpectralHashing(Mechanism):
    """W_o softmax(q kᵀ) v over the tokens of one's chunk, in each of k rounds: q, k and v are three times as wide as x.

    In a round the tokens of a patch are sorted by a_k · [x_h, √(max ‖x_h‖² - ‖x_h‖²)], a_k from N(0, 1) and x_h the
    head's channels of x, and cut into chunks. One softmax over all rounds weighs them by their logsumexp.

    Args:
        site: Where the mechanism is put.
        patch: Side of a patch; a shorter side of the grid is one patch.
        chunk: How many tokens a chunk holds: a quarter of a patch is the authors'.
        rounds: k, how often the tokens are sorted.
        scaled: Whether scores are divided by √(3 d); the authors' are not.
        shifted: Whether patches are shifted by half their side, around the edges; the authors' are in odd layers.
        screening: Whether only the better half of the patches takes part, by the means of the map `sparsity`.
    """

    card = Card(
        name="spectral_hashing",
        family=Family.SPARSE,
        summary="SAH-MSA: tokens of a patch are sorted by a random projection, and chunks of them attend.",
        equation="W_o softmax(q kᵀ) v over near hashes in each round\nhash = a_k·[x_h; √(max ‖x_h‖² − ‖x_h‖²)]",
        paper=Paper(TITLE, "Cai et al.", 2022, "arXiv:2203.04845"),
        time="n w c + n c c",
        memory="h n w + n c",
        params="12 * c**2 + 9 * qkv_bias * c",
        flops="24 * n * c**2 + 12 * p * n * c + rounds * sum(ceil(sides[0] / i) * ceil(sides[1] / j) * ceil(i * j / g) "
        "* g * (2 * (c + h) + 12 * g * c) for i, j in [[ceil(s / 2) if screening and patch >= max(sides) else "
        "min(patch, s) for s in sides]] for g in [min(chunk, i * j)])",
        masks={"keys"},
        grid=2,
        honours={"qkv_bias"},
        taps={"scores": "b h x w", "weights": "b h x w"},
        laws={Law.STOCHASTIC, Law.LOCAL},
        fidelity="adapted",
        notes="a_k are buffers, drawn once; the authors draw them in each forward, and shift and rescale hashes, which "
        "keeps their order. Hidden tokens are sorted last and receive nothing. Special tokens, which are ours, read "
        "all and are read by each other. Taps show the rows of the grid, over all rounds' chunks. The authors' map, of "
        "a network with its own loss, only chooses; here σ of its means multiplies. One patch is cut in four for it.",
    )

    @classmethod
    def claims(cls, *, shifted: bool, screening: bool, **options) -> Card:
        laws = {Law.SUBSTOCHASTIC if screening else Law.STOCHASTIC} | (set() if shifted else {Law.LOCAL})
        return replace(cls.card, laws=laws, given={"sparsity": "scores"} if screening else {})

    def __init__(
        self, site: Site, *, patch: PositiveInt = 16, chunk: PositiveInt = 64, rounds: PositiveInt = 2,
        scaled: bool = False, shifted: bool = False, screening: bool = False,
    ):  # fmt: skip
        super().__init__(site)
        self.patch, self.chunk, self.shifted, self.screening = patch, chunk, shifted, screening
        self.factor = (3 * site.head_dim) ** -0.5 if scaled else 1.0
        self.qkv = nn.Linear(site.dim, 9 * site.dim, bias=site.qkv_bias)
        self.proj = nn.Linear(3 * site.dim, site.dim, bias=False)
        self.register_buffer("directions", torch.empty(rounds, site.head_dim + 1))  # a_k
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 1) for a_k."""
        nn.init.normal_(self.get_buffer("directions"))

    def reach(self) -> int:
        return self.patch - 1

    def mix(self, x, source, *, mask, layout, sparsity=None):
        p, patches, rounds = layout.prefix, self._patches(layout), len(self.get_buffer("directions"))
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.heads)
        q, x_h = q * self.factor, rearrange(x[:, p:], "b x (h d) -> b h x d", h=self.heads)
        exists = existing(x, mask)[:, None]
        there = patches.cut(exists[:, :, p:, None])  # (b 1 t n 1)
        order = self._order(patches.cut(x_h.detach()), there[..., 0])[..., None]
        rank = order.sort(dim=-2).indices

        def sort(t):  # (b h k t n e), of which h and k may be 1, to the chunks of all rounds, (b h k t g w e)
            t = t.expand(-1, self.heads, rounds, -1, -1, -1)
            return t.gather(-2, order.expand(*[-1] * 5, t.shape[-1])).unflatten(-2, (-1, patches.chunk))

        def rows(t):  # chunks to rows of the grid, (b h x k e)
            t = t.flatten(-3, -2).gather(-2, rank.expand(*[-1] * 5, t.shape[-1]))
            return patches.join(rearrange(t, "b h k t n e -> b h t n (k e)")).unflatten(-1, (rounds, -1))

        near_q, near_k, near_v = (sort(patches.cut(t[:, :, p:])[:, :, None]) for t in (q, k, v))
        scores = self.scores(rows(near_q @ near_k.mT).flatten(-2))
        allowed = rows(sort(there[:, :, None]).mT.expand(-1, -1, -1, -1, -1, patches.chunk, -1)).flatten(-2)
        weights = masked_softmax(scores, allowed & exists[:, :, p:, None])
        weights = weights * self._screen(patches, sparsity.to(x), there) if self.screening else weights
        weights = rearrange(patches.cut(self.weights(weights)), "b h t n (k w) -> b h k t n w", k=rounds)
        out = rows(sort(weights) @ near_v).sum(dim=-2)
        if p:  # special tokens
            weights = masked_softmax(q[:, :, :p] @ k.mT, exists[:, :, None])
            out = torch.cat([nn.functional.dropout(weights, self.attn_drop, self.training) @ v, out], dim=2)
        return self.proj(rearrange(out, "b h n e -> b n (h e)"))

    def _patches(self, layout):
        """How the grid is cut."""
        i, j = (min(self.patch, side) for side in layout.grid)
        if self.screening and (i, j) == layout.grid:
            i, j = -(-i // 2), -(-j // 2)
        return Patches(layout.grid, (i, j), min(self.chunk, i * j), self.shifted)

    def _order(self, x, there):
        """The places of each patch, those of the least hash first and those that do not exist last, (b h k t n)."""
        norms = x.square().sum(dim=-1)
        lift = torch.where(there, norms, 0.0).amax(dim=-1, keepdim=True) - norms
        lifted = torch.cat([x, lift.clamp(min=0).sqrt()[..., None]], dim=-1)
        hashes = einsum(lifted, self.directions, "b h t n d, k d -> b h k t n")
        return hashes.masked_fill(~there[:, :, None], float("inf")).sort(dim=-1).indices

    def _screen(self, patches, sparsity, there):
        """σ of its patch's mean for each token of the better half of the patches, 0 for others: (b 1 x 1)."""
        values = patches.cut(sparsity.flatten(1)[:, None, :, None])
        mean = masked_mean(values, there, dim=3).masked_fill(~there.any(dim=3), float("-inf"))  # (b 1 t 1)
        best = torch.zeros_like(mean).scatter(2, mean.topk(max(1, mean.shape[2] // 2), dim=2).indices, 1.0)
        return patches.join((best * mean.sigmoid())[:, :, :, None].expand(-1, -1, -1, there.shape[3], -1))
