"""NSA, native sparse attention: compressed blocks, the tokens of the best blocks, and a window, each with a gate.

Yuan et al., "Native Sparse Attention", 2025, arXiv:2502.11089, §3.
"""

from typing import Literal

import torch
from torch import Tensor, fx, nn

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site, Tap
from attnzoo.functional import existing, masked_mean, masked_softmax, merge_heads, rearrange, split_heads
from attnzoo.functional.chunks import close, in_blocks, with_places
from attnzoo.functional.greatest import first_greatest


class NativeSparse(Mechanism):
    """W_o Σ_c g_c softmax(q k_cᵀ / √d) v_c over three branches; g = σ(W_g x), for each token, head and branch.

    Compressed: keys and values are φ of l tokens, from every s-th on; a query sees blocks all tokens of which it sees.
    Selected: the tokens of K blocks of l', the same for all heads of a group: a query's own, the one before, the one
    after, the first, then those of greatest Σ_i p_i |i ∩ block|, p compressed weights. Window: tokens less than w away.

    Args:
        site: Where the mechanism is put.
        groups: Number of key and value heads; must divide the heads.
        compress: φ: `mean`, or `mlp`, the mean of W_2 gelu(W_1 [t_i, i / l]), one for keys and values.
        window: w, in tokens; under a causal mask it ends with the query.
        stride: s, in tokens; as in flash-linear-attention, blocks of both kinds are one stride. The paper's is 16.
        length: l / s, how many strides a compressed block is long; 2 in the paper.
        block: l' / s, how many strides a selected block is long; at least `length`; 4 in the paper.
        chosen: K, how many blocks are selected, of those of which anything is seen.

    Raises:
        OptionError: AZ214, when groups do not divide the heads, or selected blocks are shorter than compressed ones.
    """

    card = Card(
        name="native_sparse",
        family=Family.SPARSE,
        summary="NSA: queries read compressed blocks, the tokens of the best blocks, and a window, each gated.",
        equation="W_o Σ_c g_c softmax(q k_cᵀ / √d) v_c\ng = σ(W_g x),  c ∈ {compressed, selected, window}",
        paper=Paper("Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention", "Yuan et al.",
                    2025, "arXiv:2502.11089", "§3, eq. 5-12"),
        time="n m c + n c c",
        memory="h n m + n c",
        params="(c + qkv_bias) * (c + 2 * groups * d + 3 * h) + 4 * qk_norm * d + (c + proj_bias) * c "
        "+ (compress == 'mlp') * (2 * d + 3) * d",
        flops="2 * n * c * (2 * c + 2 * groups * d + 3 * h + 2 * (r := ceil(n / stride)) + 3 * m) + 2 * groups * r "
        "* (n * ceil(n / (block * stride)) + (compress == 'mlp') * 2 * length * stride * (2 * d + 1) * d)",
        masks={"keys", "causal", "pairs"},
        honours={"qkv_bias", "proj_bias", "qk_norm", "rotary"},
        taps={"scores": "b h n m", "weights_compressed": "b h n r", "weights_selected": "b h n m",
              "weights_window": "b h n m", "gate": "b h n k"},
        laws={Law.STOCHASTIC},
        fidelity="adapted",
        notes="All pairs are formed: what NSA saves needs its kernels. The paper's is causal; without a causal mask "
        "windows and neighbouring blocks are on both sides, and the last blocks are cut. As in flash-linear-attention "
        "branches share keys and values, W_g is one layer and φ a mean; in the paper each has its own, and gates and φ "
        "are MLPs that it does not describe. Selection has no gradient; it depends on what any head of a group sees.",
    )  # fmt: skip

    weights_compressed: Tap
    weights_selected: Tap
    weights_window: Tap

    def __init__(
        self, site: Site, *, groups: PositiveInt = 1, compress: Literal["mean", "mlp"] = "mean",
        window: PositiveInt = 512, stride: PositiveInt = 64, length: PositiveInt = 1, block: PositiveInt = 1,
        chosen: PositiveInt = 16,
    ):  # fmt: skip
        super().__init__(site)
        if site.heads % groups:
            raise OptionError(f"`native_sparse`: {groups} groups do not divide {site.heads} heads")
        if block < length:
            raise OptionError(f"`native_sparse`: `block`, {block}, is less than `length`, {length}")
        self.groups, self.chosen, self.window, self.rotary = groups, chosen, window, site.rotary
        self.cuts = length * stride, stride, block * stride  # l, s, l'
        d, mlp = site.head_dim, compress == "mlp"
        self.kv = nn.Linear(site.dim, 2 * site.key_heads(groups) * d, bias=site.qkv_bias)
        self.q_norm, self.k_norm = (site.norm(d) if site.qk_norm else nn.Identity() for _ in "qk")
        self.gates = nn.Linear(site.dim, 3 * site.heads, bias=site.qkv_bias)  # W_g
        self.phi = nn.Sequential(nn.Linear(d + 1, d), nn.GELU(), nn.Linear(d, d)) if mlp else None
        self.q, self.proj = (nn.Linear(site.dim, site.dim, bias=b) for b in (site.qkv_bias, site.proj_bias))

    def mix(self, x, source, *, mask, layout):
        k, v = self.kv(x).chunk(2, dim=-1)
        q, k, v = split_heads(self.q(x), self.heads), split_heads(k, self.groups), split_heads(v, self.groups)
        q, k = self.q_norm(q) * q.shape[-1] ** -0.5, self.k_norm(k)
        if self.rotary:
            q, k = layout.turn(q), layout.turn(k)
        there = existing(x, mask)[:, None, :, None]
        held, blocks = in_blocks(there, *self.cuts[:2]), (in_blocks(t, *self.cuts[:2]) for t in (k, v))
        few = (masked_mean(t if self.phi is None else self.phi(with_places(t)), held, dim=3) for t in blocks)
        k, v, few_k, few_v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v, *few))
        allowed = mask.dense(x.shape[1], x.shape[1], x.device)
        allowed = there.mT if allowed is None else allowed
        p = masked_softmax(q @ few_k.mT, whole_blocks(there, allowed, mask.causal, *self.cuts[:2]))
        best = selected(p.detach(), allowed, self.cuts, self.groups, self.chosen)
        compressed, scores = self.weights_compressed(p) @ few_v, self.scores(q @ k.mT)
        chosen = self.weights_selected(masked_softmax(scores, best)) @ v
        window = self.weights_window(masked_softmax(scores, close(allowed, self.window))) @ v
        gate = self.gate(rearrange(self.gates(x).sigmoid(), "b n (h k) -> b h n k", k=3))
        out = gate[..., :1] * compressed + gate[..., 1:2] * chosen + gate[..., 2:] * window
        return self.proj(merge_heads(out))


def whole_blocks(there: Tensor, allowed: Tensor, causal: bool, length: int, stride: int) -> Tensor:
    """Which compressed blocks have tokens, all of which a query sees: broadcasts to (b h n r)."""
    blocks = in_blocks(there, length, stride).any(dim=3).mT
    blocks = blocks & ~in_blocks((there.mT & ~allowed).mT, length, stride).any(dim=3).mT
    last = length - 1 + stride * torch.arange(blocks.shape[3], device=there.device)
    return blocks & (last <= torch.arange(there.shape[2], device=there.device)[:, None]) if causal else blocks


def selected(p: Tensor, allowed: Tensor, cuts: tuple[int, int, int], groups: int, chosen: int) -> Tensor:
    """Who sees whom in the blocks that a query selects, (b h n m), by the compressed weights p (b h n r), eq. 9-12."""
    (length, stride, size), (_, h, n, r) = cuts, p.shape
    some = in_blocks(allowed.mT, size, size).any(dim=3).mT  # of which blocks anything is seen, (b h n t)
    some = some if some.shape[1] == 1 else some.unflatten(1, (groups, -1)).any(dim=2)
    first, block, at = (torch.arange(t, device=p.device) for t in (r, some.shape[3], n))
    first, block, own = stride * first[:, None], size * block, (at - at % size)[:, None]
    common = torch.minimum(first + length, block + size) - torch.maximum(first, block)  # |i ∩ block|
    p = p.to(torch.promote_types(p.dtype, torch.float32)).unflatten(1, (groups, -1)).mean(dim=2)
    rank = p @ common.clamp(min=0).to(p.dtype) / length  # at most 1, (b g n t)
    certain = (block == 0, block == own + size, block == own - size, block == own)
    for value, where in zip((2, 3, 4, 5, -1), (*certain, ~some), strict=True):
        rank = rank.masked_fill(where, value)
    taken = first_greatest(rank, chosen).repeat_interleave(size, dim=-1)[..., :n]
    return taken.repeat_interleave(h // groups, dim=1) & allowed


for _name in ("in_blocks", "with_places", "close", "whole_blocks", "selected"):
    fx.wrap(_name)  # symbolic tracing knows no lengths
