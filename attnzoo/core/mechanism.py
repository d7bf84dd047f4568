"""Mechanisms: what mixes tokens. One method each.

`Head` works inside the heads, `Mechanism` on tokens. `MultiHead` makes a mechanism of a head; `FusedHeads` and `Fused`
make one of several.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, cast, final

from jaxtyping import Float
from torch import Tensor, nn

from attnzoo.core.card import Card, FusionCard, Law
from attnzoo.core.fusion import Fusion, inside_heads
from attnzoo.core.kv_cache import KVCache
from attnzoo.core.layout import Layout
from attnzoo.core.mask import NO_MASK, Mask
from attnzoo.core.rotary import rotate
from attnzoo.core.site import Site
from attnzoo.errors import UnsupportedContext


class Component(nn.Module):
    """What heads and mechanisms have in common: a card, and a word in initialisation and weight decay."""

    card: ClassVar[Card]

    def __init__(self, site: Site | None = None):
        super().__init__()

    @classmethod
    def claims(cls, **options) -> Card:
        """The card under these options; override it where an option changes what can be claimed."""
        return cls.card

    def init_weights(self) -> None:
        """Special initialisation. Call it in `__init__`; hosts call it again after their own initialisation."""

    def reset_parameters(self) -> None:
        """PyTorch's name for `init_weights`."""
        self.init_weights()

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters, beyond 1-D ones, that an optimiser must not decay."""
        return set()

    def reach(self) -> int:
        """For the law `LOCAL`: how far, in grid steps along any dimension, a token has influence."""
        raise NotImplementedError(
            f"{type(self).__name__} claims the law `local` but does not say how far it reaches"
        )


class Head(Component, ABC):
    """What happens inside the heads, between shared projections. Built as `Cls(site, **options)`.

    Parameters, if any, have a leading head axis. A concrete head is final: it is never subclassed.
    """

    @abstractmethod
    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m d"],
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
    ) -> Float[Tensor, "b h n d"]:
        """What each query token receives.

        Args:
            q: Queries (b h n d).
            k: Keys (b h m d).
            v: Values (b h m d).
            mask: Who may attend to whom; refuse what cannot be honoured with `mask.only(...)`.
            layout: How the key tokens are arranged.
        """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = NO_MASK, layout: Layout) -> Tensor:
        """`attend`, so that hooks and tools of PyTorch see heads as modules."""
        return self.attend(q, k, v, mask=mask, layout=layout)


class Mechanism(Component, ABC):
    """Mixes n tokens, reading from a context of m tokens (itself when none is given).

    Built as `Cls(site, **options)`. A concrete mechanism is final: it is never subclassed. Hand the site to
    `super().__init__` if it can read a context.
    """

    def __init__(self, site: Site | None = None):
        super().__init__()
        self.context_dim = site.context_dim if site is not None else None

    def source(self, x: Tensor, context: Tensor | None) -> Tensor:
        """What is read from: the context at a site with one, x itself at a site without.

        Raises:
            UnsupportedContext: AZ404, when a context is given to a site without, or none to a site with one.
        """
        if (context is None) != (self.context_dim is None):
            raise UnsupportedContext(
                "AZ404",
                "this mechanism reads from a context, and none was given"
                if context is None
                else "a context was given, but this site has none",
                help="build it for a site with `context_dim` (cross-attention) or without (self-attention)",
            )
        return x if context is None else context

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m e"] | None = None,
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
    ) -> Float[Tensor, "b n c"]:
        """Mixed tokens.

        Args:
            x: Tokens (b n c).
            context: Tokens to read from (b m e), of width `site.context_dim`; x itself when None.
            mask: Who may attend to whom; refuse what cannot be honoured with `mask.only(...)`.
            layout: How the tokens that are read from are arranged.
        """

    def step(
        self,
        x: Float[Tensor, "b n c"],
        cache: KVCache,
        context: Float[Tensor, "b m e"] | None = None,
        *,
        mask: Mask,
        layout: Layout,
    ) -> Float[Tensor, "b n c"]:
        """The newest tokens only: the last rows of what `forward` gives for all tokens so far.

        Here it is just that, which holds for every mechanism. What need not look at the old tokens again overrides it.

        Args:
            x: The newest n tokens (b n c).
            cache: What was kept of the tokens before; is extended.
            context: As for `forward`; the same in every step.
            mask: As `forward` would get it for all tokens so far: causal without a context.
            layout: All tokens so far, or the context's.
        """
        (tokens,) = cache.extend(x)
        return self.forward(tokens, context, mask=mask, layout=layout)[:, -x.shape[1] :]


@final
class MultiHead(Mechanism):
    """Projections around a head: qkv -> attend -> merge -> proj.

    With a `softmax` head its state-dict keys are timm's (`qkv.*`, `proj.*`, ...) and so is its arithmetic, so that
    timm's checkpoints load and give timm's numbers.

    Args:
        site: Where it is put.
        head: What happens inside the heads, built for the same site.
    """

    def __init__(self, site: Site, head: Head):
        super().__init__(site)
        self.card = head.card
        self.heads, self.head_dim, self.dim = site.heads, site.head_dim, site.dim
        if site.context_dim is not None:
            self.q = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)
            self.kv = nn.Linear(site.context_dim, 2 * site.dim, bias=site.qkv_bias)
        else:
            self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=site.qkv_bias)
        self.q_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.k_norm = site.norm(site.head_dim) if site.qk_norm else nn.Identity()
        self.head = head
        self.norm = site.norm(site.dim) if site.scale_norm else nn.Identity()
        self.proj = nn.Linear(site.dim, site.dim, bias=site.proj_bias)
        self.proj_drop = nn.Dropout(site.proj_drop)
        self.rotary = site.rotary
        self.skip: nn.Module = nn.Identity()  # hosts put here what joins the merged heads of two layers

    def queries(self, x: Tensor) -> Tensor:
        """Queries for a context, (b h n d)."""
        b, n, _ = x.shape
        return self.q_norm(self.q(x).reshape(b, n, self.heads, self.head_dim).transpose(1, 2))

    def read(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context, (b h m d) each."""
        b, m, _ = context.shape
        kv = self.kv(context).reshape(b, m, 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)
        return self.k_norm(k), v

    def project(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens themselves, (b h n d) each.

        Args:
            x: (b n c).
            first: Position of the first token.
        """
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        return (rotate(q, first), rotate(k, first), v) if self.rotary else (q, k, v)

    def merge(self, heads: Tensor) -> Tensor:
        """Heads (b h n d) as tokens (b n c), projected."""
        b, _, n, _ = heads.shape
        merged = self.skip(heads.transpose(1, 2).reshape(b, n, self.dim))
        return self.proj_drop(self.proj(self.norm(merged)))

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m e"] | None = None,
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
    ) -> Float[Tensor, "b n c"]:
        source = self.source(x, context)
        q, k, v = self.project(x) if context is None else (self.queries(x), *self.read(source))
        return self.merge(self.head(q, k, v, mask=mask, layout=layout))

    def step(
        self,
        x: Float[Tensor, "b n c"],
        cache: KVCache,
        context: Float[Tensor, "b m e"] | None = None,
        *,
        mask: Mask,
        layout: Layout,
    ) -> Float[Tensor, "b n c"]:
        if not self.head.card.incremental:
            return super().step(x, cache, context, mask=mask, layout=layout)
        source = self.source(x, context)
        if context is None:
            q, k, v = self.project(x, cache.length)
            k, v = cache.extend(k, v)
        else:
            q = self.queries(x)
            k, v = cache.keep(lambda: self.read(source))
        return self.merge(self.head(q, k, v, mask=mask, layout=layout))


Build = Callable[[Site], Component]
"""Builds a branch for the site that the fusion gives it."""


def _branches(sites: Sequence[Site], builds: Sequence[Build]) -> nn.ModuleDict:
    branches, seen = nn.ModuleDict(), Counter[str]()
    for site, build in zip(sites, builds, strict=True):
        component = build(site)
        name = component.card.name
        seen[name] += 1
        branches[name if seen[name] == 1 else f"{name}_{seen[name]}"] = component
    return branches


def fused_card(fusion: FusionCard, branches: Sequence[Card]) -> Card:
    """What a fusion of these branches can claim: what all can, and the needs of each."""
    grids = [card.grid for card in branches if card.grid is not None]
    return Card(
        name=fusion.name,
        family=branches[0].family,
        summary=f"{fusion.name} of {', '.join(card.name for card in branches)}",
        time=" + ".join(dict.fromkeys(card.time for card in branches)),
        memory=" + ".join(dict.fromkeys(card.memory for card in branches)),
        masks=frozenset.intersection(*(frozenset(card.masks) for card in branches)),
        context=all(card.context for card in branches),
        grid=max(grids, key=lambda grid: grid != "any", default=None),  # a number asks for more than `any`
        fixed_length=any(card.fixed_length for card in branches),
        incremental=all(card.incremental for card in branches) and Law.TOKEN_LOCAL in fusion.laws,
        extra=frozenset().union(*(card.extra for card in branches)),
    )


def _masks(fusion: Fusion, mask: Mask) -> list[Mask]:
    """The mask of each branch: the pairs of its own heads, where there are pairs for each head."""
    if mask.pairs is None or mask.pairs.shape[1] == 1:
        return [mask] * fusion.arity
    return [replace(mask, pairs=pairs) for pairs in fusion.split(mask.pairs, 1)]


@final
class FusedHeads(Head):
    """Several heads and a fusion, between the same projections: a head again, so fusions nest.

    Args:
        site: Where it is put.
        fusion: Builds the fusion for a site and a number of branches.
        branches: Build a head each.
    """

    def __init__(self, site: Site, fusion: Callable[[Site, int], Fusion], branches: Sequence[Build]):
        super().__init__()
        self.fusion = fusion(inside_heads(site), len(branches))
        self.fusion.head_axis = 1
        self.branches = _branches(type(self.fusion).sites(site, len(branches)), branches)
        self.card = fused_card(self.fusion.card, [component.card for component in self.branches.values()])

    def attend(self, q, k, v, *, mask: Mask = NO_MASK, layout: Layout) -> Float[Tensor, "b h n d"]:
        components = zip(
            *(self.fusion.split(t, 1) for t in (q, k, v)), _masks(self.fusion, mask), strict=True
        )
        outs = [
            branch(q_i, k_i, v_i, mask=mask_i, layout=layout)
            for branch, (q_i, k_i, v_i, mask_i) in zip(self.branches.values(), components, strict=True)
        ]
        return self.fusion(outs, q)


@final
class Fused(Mechanism):
    """Several token-level branches and a fusion: a mechanism again, so fusions nest and hosts know nothing of them.

    Args:
        site: Where it is put.
        fusion: Builds the fusion for a site and a number of branches.
        branches: Build a mechanism each.
    """

    def __init__(self, site: Site, fusion: Callable[[Site, int], Fusion], branches: Sequence[Build]):
        super().__init__(site)
        self.fusion = fusion(site, len(branches))
        self.branches = _branches(type(self.fusion).sites(site, len(branches)), branches)
        self.card = fused_card(self.fusion.card, [component.card for component in self.branches.values()])

    def forward(self, x, context=None, *, mask: Mask = NO_MASK, layout: Layout) -> Float[Tensor, "b n c"]:
        outs = [
            branch(x_i, context, mask=mask_i, layout=layout)
            for branch, x_i, mask_i in zip(
                self.branches.values(), self.fusion.split(x, -1), _masks(self.fusion, mask), strict=True
            )
        ]
        return self.fusion(outs, x)

    def step(self, x, cache: KVCache, context=None, *, mask: Mask, layout: Layout) -> Float[Tensor, "b n c"]:
        if Law.TOKEN_LOCAL not in self.fusion.card.laws:
            return super().step(x, cache, context, mask=mask, layout=layout)
        components = zip(
            self.branches.items(), self.fusion.split(x, -1), _masks(self.fusion, mask), strict=True
        )
        outs = [
            cast(Mechanism, branch).step(x_i, cache.branch(name), context, mask=mask_i, layout=layout)
            for (name, branch), x_i, mask_i in components
        ]
        return self.fusion(outs, x)
