"""What remains of the core once everything is decided: sites, taps, and what mechanisms derive from."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core.kv_cache import KVCache
from attnzoo.core.layout import Layout
from attnzoo.core.mask import NO_MASK, Mask

NOTHING: Mapping[str, Tensor] = {}
"""No given maps."""


@dataclass(frozen=True)
class Site:
    """A place in a model where a mechanism is put, and what the mechanism may know of it when it is built.

    Args:
        name: Of the place: `blocks.3`, `decoder.0.cross`.
        dim: Width of the tokens, in channels.
        heads: Number of heads.
        layout: How the tokens are arranged.
        layer: Index of the layer, from 0.
        depth: Number of layers.
        context_dim: Width of the context, where there is one.
        context_layout: How the context is arranged.
        attn_drop: Dropout of attention weights, a probability.
        proj_drop: Dropout after the output projection, a probability.
        qkv_bias: Whether input projections have a bias.
        proj_bias: Whether the output projection has a bias.
        qk_norm: Whether queries and keys are normalised per head.
        scale_norm: Whether the merged heads are normalised before the output projection.
        rotary: Whether queries and keys are turned by their positions.
        norm: Builds a normalisation layer for a width.
        rotation: Heads and channels of the rotation that the model brings with each layout.
        qkv_fused: Whether there is one projection of queries, keys and values, or one of each.
        k_bias: Whether keys have a bias where queries and values have one.
        kv_heads: Number of heads of keys and values; None for as many as of queries.
    """

    name: str
    dim: int
    heads: int
    layout: Layout
    layer: int = 0
    depth: int = 1
    context_dim: int | None = None
    context_layout: Layout | None = None
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    scale_norm: bool = False
    rotary: bool = False
    norm: Callable[[int], nn.Module] = nn.LayerNorm
    rotation: tuple[int, int] | None = None
    qkv_fused: bool = True
    k_bias: bool = True
    kv_heads: int | None = None

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.dim // self.heads

    def key_heads(self, heads: int) -> int:
        """The number of heads of keys."""
        return heads


class Tap(nn.Identity):
    """A window into a mechanism: a forward hook sees the tensor, and may put another in its place.

    Args:
        axes: The axes of the tensor, such as `b h n m`.
        dropout: Probability with which an entry is dropped in training, after the hooks have seen it.
    """

    def __init__(self, axes: str, dropout: float = 0.0):
        super().__init__()
        self.axes, self.dropout = axes, dropout

    def __call__(self, x: Tensor) -> Tensor:
        seen = super().__call__(x)
        return F.dropout(seen, self.dropout) if self.dropout and self.training else seen

    @property
    def watched(self) -> bool:
        """Whether anybody looks; mechanisms take a faster way when nobody does."""
        return bool(self._forward_hooks or self._forward_pre_hooks)


class Component(nn.Module):
    """What heads, mechanisms and pools have in common.

    Args:
        site: Where it is put.
    """

    taps: Mapping[str, str] = {}  # axes by name
    given: Collection[str] = ()  # names of the maps on the grid that it reads
    context_grid = False  # whether it reads how the context is arranged
    incremental = False  # whether the newest queries may be asked alone

    def __init__(self, site: Site):
        super().__init__()
        self.heads, self.attn_drop = site.heads, site.attn_drop
        self.length = (site.context_layout or site.layout).length
        for name, axes in self.taps.items():
            self.add_module(name, Tap(axes, site.attn_drop if name.startswith("weights") else 0.0))

    def init_weights(self) -> None:
        """Special initialisation; models call it again after their own."""

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters, beyond 1-D ones, that an optimiser must not decay."""
        return set()


class Head(Component):
    """What each query (b h n d) receives of keys and values (b h m d), between shared projections: `attend`."""

    attend: Callable[..., Tensor]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
        given: Mapping[str, Tensor] = NOTHING,
    ) -> Tensor:
        maps = {name: given[name] for name in self.given}
        return self.attend(q, k, v, mask=mask, layout=layout, **maps)


class Mechanism(Component):
    """Mixes tokens (b n c), reading from a context (b m e), or from themselves: `mix`; then dropout.

    Args:
        site: Where it is put.
    """

    mix: Callable[..., Tensor]

    def __init__(self, site: Site):
        super().__init__(site)
        self.context_dim = site.context_dim
        self.proj_drop = nn.Dropout(site.proj_drop)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
        context_layout: Layout | None = None,
        given: Mapping[str, Tensor] = NOTHING,
    ) -> Tensor:
        more: dict[str, Any] = {name: given[name] for name in self.given}
        if context is not None and self.context_grid:
            more["context_layout"] = context_layout or Layout((context.shape[1],))
        return self.proj_drop(self.mix(x, self.source(x, context), mask=mask, layout=layout, **more))

    def source(self, x: Tensor, context: Tensor | None) -> Tensor:
        """What is read from: the context, or the tokens themselves where there is none."""
        return x if context is None else context

    def step(
        self,
        x: Tensor,
        cache: KVCache,
        context: Tensor | None = None,
        *,
        mask: Mask,
        layout: Layout,
        context_layout: Layout | None = None,
    ) -> Tensor:
        """The newest tokens only: the last rows of what `forward` gives for all tokens so far."""
        (tokens,) = cache.extend(x)
        out = self.forward(tokens, context, mask=mask, layout=layout, context_layout=context_layout)
        return out[:, -x.shape[1] :]


class Pool(Component):
    """Makes one token (b c) of all (b n c): `pool`; then dropout.

    Args:
        site: Where it is put.
    """

    pool: Callable[..., Tensor]

    def __init__(self, site: Site):
        super().__init__(site)
        self.proj_drop = nn.Dropout(site.proj_drop)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
        given: Mapping[str, Tensor] = NOTHING,
    ) -> Tensor:
        maps = {name: given[name] for name in self.given}
        return self.proj_drop(self.pool(x, mask=mask, layout=layout, **maps))


class MultiHead(Mechanism):
    """Projections around a head: qkv -> attend -> merge -> proj.

    Args:
        site: Where it is put.
        head: What happens inside the heads, built for the same site.
    """

    q_bias: nn.Parameter
    v_bias: nn.Parameter

    def __init__(self, site: Site, head: Head):
        super().__init__(site)
        self.given, self.context_grid, self.incremental = head.given, head.context_grid, head.incremental
        self.head_dim = site.head_dim
        if site.context_dim is not None:
            self.q = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)
            self.kv = nn.Linear(site.context_dim, 2 * site.dim, bias=site.qkv_bias)
        elif site.qkv_fused:
            self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=site.qkv_bias and site.k_bias)
            if not site.k_bias:
                self.register_parameter(
                    "q_bias", nn.Parameter(torch.zeros(site.dim)) if site.qkv_bias else None
                )
                self.register_parameter(
                    "v_bias", nn.Parameter(torch.zeros(site.dim)) if site.qkv_bias else None
                )
        else:
            self.sharing = site.heads // (site.kv_heads or site.heads)
            width = site.dim // self.sharing
            self.q_proj = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)
            self.k_proj = nn.Linear(site.dim, width, bias=site.qkv_bias and site.k_bias)
            self.v_proj = nn.Linear(site.dim, width, bias=site.qkv_bias)
        self.q_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.k_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.inner = head
        self.norm = site.norm(site.dim) if site.scale_norm else nn.Identity()
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)
        self.rotary = site.rotary
        self.qkv_fused = site.qkv_fused
        self.k_bias = site.k_bias
        self.skip: nn.Module = nn.Identity()  # where what is handed on from layer to layer comes in

    def queries(self, x: Tensor) -> Tensor:
        """Queries for a context, (b h n d)."""
        return self.q_norm(self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2))

    def read(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context, (b h m d) each."""
        kv = self.kv(context).unflatten(-1, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)
        return self.k_norm(k), v

    def project(self, x: Tensor, first: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens themselves, (b h n d) each.

        Args:
            x: (b n c).
            first: Position of the first token.
            layout: How all tokens are arranged.
        """
        if self.qkv_fused:
            q, k, v = self.fused(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            layers = self.q_proj, self.k_proj, self.v_proj
            q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in layers)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = layout.turn(q, first).type_as(v), layout.turn(k, first).type_as(v)
        if not self.qkv_fused and self.sharing > 1:
            k, v = (t.repeat_interleave(self.sharing, dim=1) for t in (k, v))
        return q, k, v

    def fused(self, x: Tensor) -> Tensor:
        """Queries, keys and values by one projection, (b n 3c)."""
        if self.k_bias or self.q_bias is None:
            return self.qkv(x)
        bias = [self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]
        return F.linear(x, self.qkv.weight, torch.cat(bias))

    def merge(self, heads: Tensor) -> Tensor:
        """Heads (b h n d) as tokens (b n c), projected."""
        return self.proj(self.norm(self.skip(heads.transpose(1, 2).flatten(2))))

    def mix(self, x, source, *, mask: Mask, layout: Layout, context_layout: Layout | None = None, **given):
        if self.context_dim is None:
            q, k, v = self.project(x, 0, layout)
        else:
            q, (k, v) = self.queries(x), self.read(source)
            layout = context_layout or Layout((source.shape[1],))
        return self.merge(self.inner(q, k, v, mask=mask, layout=layout, given=given))

    def step(
        self,
        x: Tensor,
        cache: KVCache,
        context: Tensor | None = None,
        *,
        mask: Mask,
        layout: Layout,
        context_layout: Layout | None = None,
    ) -> Tensor:
        if not self.inner.incremental:
            return super().step(x, cache, context, mask=mask, layout=layout, context_layout=context_layout)
        if context is None:
            q, k, v = self.project(x, cache.length, layout)
            k, v = cache.extend(k, v)
        else:
            q = self.queries(x)
            k, v = cache.keep(lambda: self.read(context))
            layout = context_layout or Layout((context.shape[1],))
        return self.proj_drop(self.merge(self.inner(q, k, v, mask=mask, layout=layout)))


class Fusion(nn.Module):
    """Merges what k branches give into one: `merge`. It sees tokens (b n c), or (b h n d) inside the heads.

    Args:
        site: Where it is; `site.dim` is the number of channels that it is given.
        arity: Number of branches.
        start: `free` merges at once; `identity` equals the first branch before training, because the rest enters
            through a γ per channel that starts at zero.
    """

    gamma: nn.Parameter
    merge: Callable[..., Tensor]
    mixes_tokens = False  # whether a token of the output may depend on other tokens of the branches
    takes_mask = False

    def __init__(self, site: Site, arity: int, *, start: str = "free"):
        super().__init__()
        self.arity, self.start, self.head_axis = arity, start, -1
        gamma = nn.Parameter(torch.zeros(site.dim)) if start == "identity" and arity > 1 else None
        self.register_parameter("gamma", gamma)

    @classmethod
    def sites(cls, site: Site, arity: int) -> list[Site]:
        """What each branch is told of its place."""
        return [site] * arity

    def split(self, x: Tensor, axis: int) -> list[Tensor]:
        """What each branch sees of x, whose heads lie along an axis: -1 on tokens, 1 inside the heads."""
        return [x] * self.arity

    def feed(self, part: Tensor, done: Sequence[Tensor]) -> Tensor:
        """What the next branch works on, given what those before it gave."""
        return part

    def merge_from_first(self, branches: Sequence[Tensor], x: Tensor, **handed: Any) -> Tensor:
        """The merge reached from the first branch: a + γ (merge − a), γ = 0 at first."""
        first = branches[0]
        return first + self.gamma * (self.merge(branches, x, **handed) - first)

    def forward(self, branches: Sequence[Tensor], x: Tensor, *, mask: Mask = NO_MASK) -> Tensor:
        handed = {"mask": mask} if self.takes_mask else {}
        if self.start == "identity":
            return self.merge_from_first(branches, x, **handed) if self.arity > 1 else branches[0]
        return self.merge(branches, x, **handed)

    def init_weights(self) -> None:
        """Special initialisation; models call it again after their own."""

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that an optimiser must not decay."""
        return {"gamma"} if self.gamma is not None else set()


Build = Callable[[Site], Component]
"""Builds a branch for the site that the fusion gives it."""


def built_branches(sites: Sequence[Site], names: Sequence[str], builds: Sequence[Build]) -> nn.ModuleDict:
    """The branches by name."""
    return nn.ModuleDict({name: build(site) for site, name, build in zip(sites, names, builds, strict=True)})


def masks_of(fusion: Fusion, mask: Mask) -> list[Mask]:
    """The mask of each branch: the pairs of its own heads, where there are pairs for each head."""
    if mask.pairs is None or mask.pairs.shape[1] == 1:
        return [mask] * fusion.arity
    return [replace(mask, pairs=pairs) for pairs in fusion.split(mask.pairs, 1)]


class FusedHeads(Head):
    """Several heads and a fusion, between the same projections: a head again.

    Args:
        site: Where it is put.
        fusion: Builds the fusion for a site and a number of branches.
        branches: Build a head each, by name.
    """

    def __init__(self, site: Site, fusion: Callable[[Site, int], Fusion], branches: Mapping[str, Build]):
        super().__init__(site)
        self.fusion = fusion(replace(site, dim=site.head_dim), len(branches))
        self.fusion.head_axis = 1
        sites = self.fusion.sites(site, len(branches))
        self.branches = built_branches(sites, list(branches), list(branches.values()))
        parts: list[Any] = list(self.branches.values())
        self.given = {name for part in parts for name in part.given}
        self.context_grid = any(part.context_grid for part in parts)
        self.incremental = not self.fusion.mixes_tokens and all(part.incremental for part in parts)

    def attend(self, q, k, v, *, mask: Mask, layout: Layout, **given: Tensor):
        parts = zip(*(self.fusion.split(t, 1) for t in (q, k, v)), masks_of(self.fusion, mask), strict=True)
        outs: list[Tensor] = []
        for branch, (q_i, k_i, v_i, mask_i) in zip(self.branches.values(), parts, strict=True):
            asked = self.fusion.feed(q_i, outs)
            outs.append(branch(asked, k_i, v_i, mask=mask_i, layout=layout, given=given))
        return self.fusion(outs, q, mask=mask)


class Fused(Mechanism):
    """Several branches and a fusion, on tokens: a mechanism again.

    Args:
        site: Where it is put.
        fusion: Builds the fusion for a site and a number of branches.
        branches: Build a mechanism each, by name.
    """

    def __init__(self, site: Site, fusion: Callable[[Site, int], Fusion], branches: Mapping[str, Build]):
        super().__init__(replace(site, proj_drop=0.0))  # each branch drops its own
        self.fusion = fusion(site, len(branches))
        sites = self.fusion.sites(site, len(branches))
        self.branches = built_branches(sites, list(branches), list(branches.values()))
        parts: list[Any] = list(self.branches.values())
        self.given = {name for part in parts for name in part.given}
        self.context_grid = any(part.context_grid for part in parts)

    def mix(self, x, source, *, mask: Mask, layout: Layout, context_layout: Layout | None = None, **given):
        context = None if self.context_dim is None else source
        where = {"layout": layout, "context_layout": context_layout, "given": given}
        split = zip(
            self.branches.values(), self.fusion.split(x, -1), masks_of(self.fusion, mask), strict=True
        )
        outs: list[Tensor] = []
        for branch, x_i, mask_i in split:
            outs.append(branch(self.fusion.feed(x_i, outs), context, mask=mask_i, **where))
        return self.fusion(outs, x, mask=mask)

    def step(
        self,
        x: Tensor,
        cache: KVCache,
        context: Tensor | None = None,
        *,
        mask: Mask,
        layout: Layout,
        context_layout: Layout | None = None,
    ) -> Tensor:
        where: dict[str, Any] = {"layout": layout, "context_layout": context_layout}
        if self.fusion.mixes_tokens:
            return super().step(x, cache, context, mask=mask, **where)
        branches: Any = self.branches.items()
        split = zip(branches, self.fusion.split(x, -1), masks_of(self.fusion, mask), strict=True)
        outs: list[Tensor] = []
        for (name, branch), x_i, mask_i in split:
            newest, own = self.fusion.feed(x_i, outs), cache.branch(name)
            outs.append(branch.step(newest, own, context, mask=mask_i, **where))
        return self.fusion(outs, x, mask=mask)


# -- einops' notation -------------------------------------------------------------------------------------------------


def axes_of(side: str) -> list[list[str]]:
    """`b (h d) 1` as [[b], [h, d], []]."""
    groups: list[list[str]] = []
    inside = False
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            if inside:
                groups.append([])
        elif inside:
            groups[-1].append(word)
        else:
            groups.append([] if word == "1" else [word])
    return groups


def rearrange(t: Tensor, pattern: str, /, **sizes: int) -> Tensor:
    """Axes split, permuted and merged, in einops' notation: `b n (h d) -> b h n d`.

    Args:
        t: Any shape.
        pattern: Axes before and after; `...` stands for any number of them.
        sizes: Of axes that the shape does not tell.
    """
    left, right = (axes_of(side) for side in pattern.split("->"))
    if ["..."] in left:
        more = [[f"_{i}"] for i in range(t.ndim - len(left) + 1)]
        left, right = (
            [axis for group in side for axis in (more if group == ["..."] else [group])]
            for side in (left, right)
        )
    split: list[int] = []
    for group, size in zip(left, t.shape, strict=True):
        known = prod(sizes[axis] for axis in group if axis in sizes)
        split += [sizes.get(axis, size // known) for axis in group]
    before, after = [axis for group in left for axis in group], [axis for group in right for axis in group]
    length = dict(zip(before, split, strict=True))
    if split != list(t.shape):
        t = t.reshape(split)
    order = [before.index(axis) for axis in after]
    if order != sorted(order):
        t = t.permute(order)
    if any(len(group) != 1 for group in right):
        t = t.reshape([prod(length[axis] for axis in group) for group in right])
    return t


def repeat(t: Tensor, pattern: str, /, **sizes: int) -> Tensor:
    """New axes, along which a tensor is repeated, in einops' notation: `r c -> b r c`, `c -> b 1 c`."""
    left, right = (axes_of(side) for side in pattern.split("->"))
    have, axes = [axis for group in left for axis in group], [group[0] if group else "" for group in right]
    t = t.reshape([size for size, group in zip(t.shape, left, strict=True) if group])
    shape = [t.shape[have.index(axis)] if axis in have else sizes.get(axis, 1) for axis in axes]
    for place, axis in enumerate(axes):
        if axis not in have:
            t = t.unsqueeze(place)
    return t.expand(shape)


def reduce(t: Tensor, pattern: str, how: str, /, **sizes: int) -> Tensor:
    """`rearrange`, and a sum, mean or largest entry over the axes that are left out."""
    left, right = pattern.split("->")
    before, after = ([axis for group in axes_of(side) for axis in group] for side in (left, right))
    gone = [axis for axis in before if axis not in after]
    t = rearrange(t, f"{left} -> {' '.join([*after, *gone])}", **sizes)
    over = tuple(range(len(after), t.ndim))
    t = getattr(t, {"sum": "sum", "mean": "mean", "max": "amax"}[how])(dim=over)
    return rearrange(t, f"{' '.join(after)} -> {right}")


def einsum(*operands: Any) -> Tensor:
    """Einstein's sum of tensors, in einops' notation: `einsum(q, k, "b h n d, b h m d -> b h n m")`."""
    *tensors, pattern = operands
    letters: dict[str, str] = {}
    for axis in pattern.replace("->", " ").replace(",", " ").split():
        if axis != "...":
            letters.setdefault(axis, chr(ord("a") + len(letters)))
    words = pattern.replace(",", " , ").replace("->", " -> ").split()
    return torch.einsum("".join(letters.get(word, word) for word in words), *tensors)
