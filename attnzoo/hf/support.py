"""Which mechanisms can work inside a model of transformers, and what of it they can do."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from attnzoo.alone.build import planned
from attnzoo.core import Card, Head, Layout, Mask, Pool, Site
from attnzoo.errors import ZooError
from attnzoo.hf.chance import drawn_from
from attnzoo.recipe.plan import Plan
from attnzoo.zoo import load_zoo


@dataclass(frozen=True)
class Support:
    """What a mechanism can do inside a model of transformers.

    Args:
        card: What it claims.
        refused: Why it cannot work there at all; empty where it can.
    """

    card: Card
    refused: str = ""

    def __bool__(self) -> bool:
        return not self.refused

    @property
    def causal(self) -> bool:
        """Whether it works in models that generate, which see no later tokens."""
        return "causal" in self.card.masks

    @property
    def cache(self) -> bool:
        """Whether it goes on from a cache; otherwise `generate(use_cache=False)`."""
        return self.card.incremental

    @property
    def cross(self) -> bool:
        """Whether it reads other tokens than its own, as the decoder of an encoder-decoder does."""
        return bool(self.card.context)

    @property
    def pairs(self) -> bool:
        """Whether it honours masks of any form, so also sliding windows and packed sequences."""
        return "pairs" in self.card.masks

    @property
    def dropout(self) -> bool:
        """Whether it forms weights that can be dropped."""
        return bool(self.card.tapped("weights"))

    @property
    def weights(self) -> bool:
        """Whether it can show weights of queries over keys, for `output_attentions=True`."""
        return list(self.card.tapped("weights").values()) == ["b h n m"]

    def __str__(self) -> str:
        if self.refused:
            return f"no: {self.refused}"
        found = (
            what
            for what in ("causal", "cache", "cross", "pairs", "dropout", "weights")
            if getattr(self, what)
        )
        return ", ".join(found) or "self-attention in an encoder"


def supported() -> dict[str, Support]:
    """What each mechanism of the zoo can do inside a model of transformers, by name; those that can do nothing, too.

    for name, support in attnzoo.hf.supported().items():
        print(name, support)            # softmax causal, cache, cross, pairs, dropout, weights
    """
    return {name: support_of(planned(name, {}, {})) for name in load_zoo().mechanisms}


def support_of(plan: Plan) -> Support:
    """What a planned mechanism can do inside a model of transformers.

    Args:
        plan: The mechanism with its options.
    """
    return Support(plan.card, why_not(plan))


def those_that(can: Callable[[Support], bool]) -> str:
    """Names of mechanisms, for errors.

    Args:
        can: Which.
    """
    return ", ".join(f"`{name}`" for name, support in supported().items() if support and can(support))


def why_not(plan: Plan) -> str:
    """Why a planned mechanism cannot work between somebody else's projections; empty where it can.

    Args:
        plan: The mechanism with its options.
    """
    card, kinds = plan.card, {leaf.entry.value for leaf in plan.leaves()}
    if any(issubclass(kind, Pool) for kind in kinds):
        return "it makes one token of all"
    if not plan.inside_heads:
        return "it works on tokens, and transformers hands over queries, keys and values"
    if card.given:
        return f"it needs the map `{next(iter(card.given))}`, and transformers hands over none"
    if card.grid is not None:
        return "it needs the grid of the tokens, and transformers does not say how they lie"
    if card.fixed_length:
        return "it is built for a number of tokens, and transformers does not say for which"
    try:
        short, long = (plan_head(plan, 8), plan_head(plan, 16))
    except ZooError as error:
        return f"it cannot be built: {error.diagnostics[0].message}"
    learned = [name for name, _ in short.named_parameters()]
    if learned:
        return f"it learns `{learned[0].rpartition('.')[2]}`, which transformers would neither train nor save"
    if not torch.equal(_answer(short), _answer(long)):
        return "it depends on the number of tokens it is built for, and transformers does not say which"
    return ""


def plan_head(plan: Plan, length: int) -> Head:
    """A small head, for a number of tokens.

    Args:
        plan: What it is.
        length: For how many tokens it is built.
    """
    with drawn_from(0):
        return plan.head(Site("attention", 16, 2, Layout((length,)))).eval()


@torch.no_grad()
def _answer(head: nn.Module) -> torch.Tensor:
    """What it makes of four tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 8, generator=generator) for _ in range(3))
    return head(q, k, v, mask=Mask(), layout=Layout((4,)))
