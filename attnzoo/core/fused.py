"""Several branches and a fusion: inside the heads a head again, on tokens a mechanism again. So fusions nest."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast, final

from jaxtyping import Float
from torch import Tensor, nn

from attnzoo.core.card import Card, FusionCard, Law
from attnzoo.core.component import Component
from attnzoo.core.fusion import Fusion, inside_heads
from attnzoo.core.head import Head
from attnzoo.core.kv_cache import KVCache
from attnzoo.core.layout import Layout
from attnzoo.core.mask import Mask
from attnzoo.core.mechanism import Mechanism
from attnzoo.core.site import Site
from attnzoo.errors import RecipeError

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
    lengths = [card.fixed_length for card in branches]
    contexts = [card.context_grid for card in branches if card.context_grid is not None]
    return Card(
        name=fusion.name,
        family=branches[0].family,
        summary=f"{fusion.name} of {', '.join(card.name for card in branches)}",
        time=" + ".join(dict.fromkeys(card.time for card in branches)),
        memory=" + ".join(dict.fromkeys(card.memory for card in branches)),
        masks=frozenset(fusion.masks).intersection(*(card.masks for card in branches)),
        one_head=any(card.one_head for card in branches),
        # which of the own tokens exist, nobody says where masks are about a context
        context=(context := not fusion.mixes_tokens and _context(branches)),
        context_grid=contexts[0] if contexts and context else None,
        # a number asks for more than `any`
        grid=max(grids, key=lambda grid: grid != "any", default=None),
        # an exact length asks for more than a longest one
        fixed_length=any(lengths) and (True in lengths or "most"),
        incremental=all(card.incremental for card in branches)
        and "causal" in fusion.masks
        and not fusion.mixes_tokens,
        given={name: kind for card in branches for name, kind in card.given.items()},
        extra=frozenset().union(*(card.extra for card in branches)),
    )


def _context(branches: Sequence[Card]) -> bool | Literal["beside"]:
    """Whether all can read from a context, and `beside` when all do so beside their own tokens."""
    if all(card.context == "beside" for card in branches):
        return "beside"
    return all(card.context for card in branches)


def _masks(fusion: Fusion, mask: Mask) -> list[Mask]:
    """The mask of each branch: the pairs of its own heads, where there are pairs for each head."""
    if mask.pairs is None or mask.pairs.shape[1] == 1:
        return [mask] * fusion.arity
    return [replace(mask, pairs=pairs) for pairs in fusion.split(mask.pairs, 1)]


@final
class FusedHeads(Head):
    """Several heads and a fusion, between the same projections: a head again.

    Args:
        site: Where it is put.
        fusion: Builds the fusion for a site and a number of branches.
        branches: Build a head each.

    Raises:
        RecipeError: AZ303, when the fusion merges on tokens only.
    """

    def __init__(self, site: Site, fusion: Callable[[Site, int], Fusion], branches: Sequence[Build]):
        merge = fusion(inside_heads(site), len(branches))
        if not merge.card.inside_heads:
            raise RecipeError(
                "AZ303", f"`{merge.card.name}` cannot fuse inside the heads", help="write `level: tokens`"
            )
        parts = _branches(type(merge).sites(site, len(branches)), branches)
        cards = [cast(Head, part).card for part in parts.values()]
        self.card = fused_card(merge.card, cards)
        # a fusion sees (... n c), whatever the heads, unless it deals them out
        if type(merge).split is Fusion.split and all(Law.HEADS_APART in card.laws for card in cards):
            self.card = replace(self.card, laws={Law.HEADS_APART})
        super().__init__(site)
        self.fusion, self.branches = merge, parts
        self.fusion.head_axis = 1

    def shared(self) -> set[str]:
        """What the fusion has, and what branches share among their heads."""
        own = {f"fusion.{name}" for name in self.fusion.state_dict()}
        heads = {name: cast(Head, part) for name, part in self.branches.items()}
        return own | {f"branches.{name}.{entry}" for name, head in heads.items() for entry in head.shared()}

    def attend(self, q, k, v, *, mask: Mask, layout: Layout, **given: Tensor):
        parts = zip(*(self.fusion.split(t, 1) for t in (q, k, v)), _masks(self.fusion, mask), strict=True)
        outs: list[Tensor] = []
        for branch, (q_i, k_i, v_i, mask_i) in zip(self.branches.values(), parts, strict=True):
            asked = self.fusion.feed(q_i, outs)
            outs.append(branch(asked, k_i, v_i, mask=mask_i, layout=layout, given=given))
        return self.fusion(outs, q, mask=mask)


@final
class Fused(Mechanism):
    """Several token-level branches and a fusion: a mechanism again, so hosts know nothing of fusions.

    Args:
        site: Where it is put.
        fusion: Builds the fusion for a site and a number of branches.
        branches: Build a mechanism each.
    """

    def __init__(self, site: Site, fusion: Callable[[Site, int], Fusion], branches: Sequence[Build]):
        merge = fusion(site, len(branches))
        parts = _branches(type(merge).sites(site, len(branches)), branches)
        self.card = fused_card(merge.card, [cast(Mechanism, part).card for part in parts.values()])
        super().__init__(replace(site, proj_drop=0.0))  # each branch drops its own
        self.fusion, self.branches = merge, parts

    def mix(self, x, source, *, mask: Mask, layout: Layout, context_layout: Layout | None = None, **given):
        context = None if self.context_dim is None else source
        where = {"layout": layout, "context_layout": context_layout, "given": given}
        split = zip(self.branches.values(), self.fusion.split(x, -1), _masks(self.fusion, mask), strict=True)
        outs: list[Tensor] = []
        for branch, x_i, mask_i in split:
            outs.append(branch(self.fusion.feed(x_i, outs), context, mask=mask_i, **where))
        return self.fusion(outs, x, mask=mask)

    def step(
        self,
        x: Float[Tensor, "b n c"],
        cache: KVCache,
        context: Float[Tensor, "b m e"] | None = None,
        *,
        mask: Mask,
        layout: Layout,
        context_layout: Layout | None = None,
    ) -> Float[Tensor, "b n c"]:
        where: dict[str, Any] = {"layout": layout, "context_layout": context_layout}
        if self.fusion.card.mixes_tokens:
            return super().step(x, cache, context, mask=mask, **where)
        split = zip(self.branches.items(), self.fusion.split(x, -1), _masks(self.fusion, mask), strict=True)
        outs: list[Tensor] = []
        for (name, branch), x_i, mask_i in split:
            newest, own = self.fusion.feed(x_i, outs), cache.branch(name)
            outs.append(cast(Mechanism, branch).step(newest, own, context, mask=mask_i, **where))
        return self.fusion(outs, x, mask=mask)
