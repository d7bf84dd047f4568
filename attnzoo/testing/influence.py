"""Masks of all kinds, and who has influence on whom under them: measured, never derived from the code."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor, nn

from attnzoo.core import NO_MASK, Family, Fusion, Law, Mask, Pool, watch
from attnzoo.core.mask import KINDS
from attnzoo.testing.strategies import Scene

FELT = 1e-6
"""A change that is felt, relative to the largest output."""
ANY = 1e-13
"""A change that is more than nothing: masks leave it, rounding seldom makes it."""
MOST = 12
"""Most tokens whose influence is measured at a time."""


def hard(scene: Scene) -> bool:
    """Whether a small change may choose another key or branch, so that influence comes and goes in steps."""
    card = scene.card
    return card.hard_routing or getattr(card, "family", None) in (
        Family.SPARSE,
        Family.ROUTING,
    )


def partial(scene: Scene, component: nn.Module, tensors: list[Tensor]) -> bool:
    """Whether not everything is read, without a mask: the law `local` is claimed, or tapped weights hold zeros."""
    shown: list[Tensor] = []
    with torch.no_grad(), watch(component, "weights", lambda name, seen: shown.append(seen)):
        scene.run(component, tensors)
    return Law.LOCAL in scene.card.laws or any(bool((weights == 0).any()) for weights in shown)


def random_mask(scene: Scene, kinds: frozenset[str] | set[str], stream: int = 50, heads: bool = True) -> Mask:
    """A mask of these kinds, different for each sample and head; a query may always attend to some key.

    Args:
        scene: Where; tokens ask, and what is read from is asked.
        kinds: Of `keys`, `pairs`, `causal`.
        stream: Which of several independent masks.
        heads: Whether `pairs` tell heads apart, where the component has more than one.
    """
    n, m, random = scene.layout.length, scene.reads, scene.generator(stream)
    h = scene.site.heads if heads and not getattr(scene.card, "one_head", False) else 1
    keys = torch.rand(scene.batch, m, generator=random) < 0.6
    pairs = torch.rand(scene.batch, h, n, m, generator=random) < 0.6
    pairs |= torch.eye(n, m, dtype=torch.bool)
    keys[:, 0] = pairs[..., 0] = True
    return Mask(
        keys=keys if "keys" in kinds else None,
        pairs=pairs if "pairs" in kinds else None,
        causal="causal" in kinds,
    )


def every_kind(scene: Scene, fewest: int = 1) -> Iterator[frozenset[str]]:
    """Every combination of the kinds of mask that the card claims.

    Args:
        scene: Whose card.
        fewest: Fewest kinds in one.
    """
    claimed = [kind for kind in KINDS if kind in scene.card.masks]
    for size in range(fewest, len(claimed) + 1):
        yield from map(frozenset, combinations(claimed, size))


def some_kinds(scene: Scene, fewest: int = 1, most: int = 2) -> list[frozenset[str]]:
    """A few of the combinations of the kinds of mask that the card claims, others in each scene.

    Args:
        scene: Whose card, and whose seed chooses.
        fewest: Fewest kinds in one.
        most: How many combinations.
    """
    found = list(every_kind(scene, fewest))
    return [found[i] for i in torch.randperm(len(found), generator=scene.generator(63))[:most]]


def allowed(scene: Scene, mask: Mask, itself: bool = True) -> Tensor:
    """Who may attend to whom in some head: (b n m); for a pool (b 1 m).

    Args:
        scene: Where.
        mask: Who may attend to whom.
        itself: Whether a token counts as allowed to itself: it is its own query.
    """
    n, m = scene.layout.length, scene.reads
    dense = mask.dense(n, m)
    seen = torch.ones(scene.batch, n, m, dtype=torch.bool)
    if dense is not None:
        seen &= dense.any(dim=1)
    if issubclass(scene.component, Pool):
        return seen[:, :1]
    return (
        seen if scene.site.context_dim is not None or not itself else seen | torch.eye(n, m, dtype=torch.bool)
    )


def copies(mask: Mask, times: int) -> Mask:
    """The mask of a batch that is repeated."""
    pairs = mask.pairs
    return replace(
        mask,
        keys=None if mask.keys is None else mask.keys.repeat(times, 1),
        pairs=pairs if pairs is None or pairs.shape[0] == 1 else pairs.repeat(times, 1, 1, 1),
    )


def changed(x: Tensor, where: Tensor, scene: Scene, stream: int = 60) -> Tensor:
    """x with other content where a boolean (b n) says so."""
    other = 3 * scene.scale * scene.random(*x.shape, stream=stream)
    return torch.where(where[..., None], other.to(x.dtype), x)


def chosen(scene: Scene) -> bool:
    """Whether a map of scores may choose among the tokens that exist, so that a mask of keys changes who asks."""
    return "scores" in getattr(scene.card, "given", {}).values()


def tokens_of(scene: Scene) -> list[int]:
    """Some of the tokens that are read from: all, where there are few; the last ones, in any case."""
    m = scene.reads
    some = torch.randperm(m, generator=scene.generator(61))[: MOST - 4].tolist()
    return sorted({*some, *range(max(0, m - 4), m)})


def influence(scene: Scene, component: nn.Module, tensors: list[Tensor], mask: Mask = NO_MASK) -> Tensor:
    """How far a sample's output token i moves when token j of what is read from is another one.

    All is one batch: the scene, and beside it a copy for each token that is changed.

    Args:
        scene: Where.
        component: What `build` returned; no fusion.
        tensors: What `inputs` returned.
        mask: Who may attend to whom.

    Returns:
        (b n j), relative to the largest output; j counts `tokens_of(scene)`. For a pool n is 1.
    """
    assert not isinstance(component, Fusion)
    *asking, source = tensors
    tokens = tokens_of(scene)
    at = torch.arange(source.shape[1])
    moved = [changed(source, (at == j).expand(source.shape[:2]), scene) for j in tokens]
    repeated = [x.repeat(1 + len(tokens), 1, 1) for x in asking]
    with torch.no_grad():
        out = scene.run(component, [*repeated, torch.cat([source, *moved])], copies(mask, 1 + len(tokens)))
    out = out.reshape(1 + len(tokens), scene.batch, -1, out.shape[-1])
    return ((out[1:] - out[:1]).abs().amax(dim=-1) / (1 + out[0].abs().max())).permute(1, 2, 0)
