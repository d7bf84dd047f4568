"""Fusions: what merges the outputs of several branches into one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnzoo.core.card import FusionCard
from attnzoo.core.mask import NO_MASK, Mask
from attnzoo.core.site import Site
from attnzoo.errors import RecipeError

Start = Literal["free", "identity"]


class Fusion(nn.Module, ABC):
    """Merges k branch outputs into one. Built as `Cls(site, arity, **options)`; write `merge`.

    It works at both levels: on tokens branches and x are (b n c), inside the heads they are (b h n d) and x is the
    query. Write it for (..., n, c); learnable parameters are per channel of what it is given (`site.dim`).
    Special initialisation belongs in `init_weights()`, which hosts call after their own.

    Args:
        site: Where it is; `site.dim` is the number of channels that it is given.
        arity: Number of branches.
        start: `free` merges at once; `identity` equals the first branch bit for bit before training, because the rest
            enters through a γ per channel that starts at zero.

    Raises:
        RecipeError: AZ312, when the fusion cannot merge so many branches.
    """

    card: ClassVar[FusionCard]
    gamma: nn.Parameter  # None unless the fusion starts as its first of several branches

    def __init__(self, site: Site, arity: int, *, start: Start = "free"):
        super().__init__()
        self._check_arity(arity)
        self.arity, self.start = arity, start
        # where heads lie: among the channels on tokens; `FusedHeads` sets 1, an axis of their own
        self.head_axis = -1
        gamma = nn.Parameter(torch.zeros(site.dim)) if start == "identity" and arity > 1 else None
        self.register_parameter("gamma", gamma)

    @classmethod
    def _check_arity(cls, arity: int) -> None:
        fewest, most = cls.card.arity
        if arity < fewest or (most is not None and arity > most):
            more = " or more" if most is None else "" if most == fewest else f" to {most}"
            raise RecipeError(
                "AZ312",
                f"`{cls.card.name}` merges {fewest}{more} branches; it was given {arity}",
                help="change the list under `of:` or choose another fusion",
            )

    @classmethod
    def sites(cls, site: Site, arity: int) -> list[Site]:
        """What each branch is told of its place; all see the whole site unless the fusion divides it."""
        cls._check_arity(arity)
        return [site] * arity

    def split(self, x: Tensor, axis: int) -> list[Tensor]:
        """What each branch sees of x.

        Args:
            x: Tokens (b n c), or something with an axis of heads (b h ...).
            axis: Where heads lie: -1 on tokens, 1 with an axis of their own.
        """
        return [x] * self.arity

    def feed(self, part: Tensor, done: Sequence[Tensor]) -> Tensor:
        """What the next branch works on: its part of x, unless what the branches before it gave has a say.

        Args:
            part: Of x, or of the query inside the heads, as `split` gives it.
            done: What the branches before it gave, in order; none for the first.
        """
        return part

    @abstractmethod
    def merge(
        self, branches: Sequence[Float[Tensor, "*b n c"]], x: Float[Tensor, "*_ n _"]
    ) -> Float[Tensor, "*_ n _"]:
        """One output from the branches' outputs.

        A fusion that mixes tokens and claims masks takes one more, `mask` (with the default `NO_MASK`, so that type
        checkers agree): of the claimed kinds only, and about its own tokens, so that `mask.keys` says which exist.

        Args:
            branches: k tensors (... n c).
            x: What the branches were given: the tokens, or the query inside the heads.
        """

    def merge_from_first(
        self, branches: Sequence[Float[Tensor, "*b n c"]], x: Float[Tensor, "*_ n _"], **handed: Any
    ) -> Float[Tensor, "*_ n _"]:
        """The merge reached from the first branch: a + γ (merge − a), γ = 0 at first."""
        first = branches[0]
        return first + self.gamma * (self.merge(branches, x, **handed) - first)

    def forward(
        self,
        branches: Sequence[Float[Tensor, "*b n c"]],
        x: Float[Tensor, "*_ n _"],
        *,
        mask: Mask = NO_MASK,
    ) -> Float[Tensor, "*_ n _"]:
        """`merge`, or `merge_from_first` with `start: identity`.

        Args:
            branches: k tensors (... n c).
            x: What the branches were given.
            mask: Who may attend to whom, as the branches were told.

        Raises:
            UnsupportedMask: AZ402, for a kind that the card does not claim.
        """
        if not mask.free:
            mask.only(*self.card.masks, by=self.card.name)
        handed = {"mask": mask} if self.card.mixes_tokens and self.card.masks else {}
        if self.start == "identity":
            return self.merge_from_first(branches, x, **handed) if self.arity > 1 else branches[0]
        return self.merge(branches, x, **handed)

    def auxiliary(self, *_: Any, **shown: Any) -> Tensor | None:
        """What it adds to the loss in training, where `card.auxiliary` says so; as of a `Component`."""
        return None

    def init_weights(self) -> None:
        """Special initialisation; called at construction by whoever needs it and by hosts after their own."""

    def reset_parameters(self) -> None:
        """PyTorch's name for `init_weights`; also puts γ back to zero."""
        if self.gamma is not None:
            nn.init.zeros_(self.gamma)
        self.init_weights()

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that an optimiser must not decay."""
        return {"gamma"} if self.gamma is not None else set()


def inside_heads(site: Site) -> Site:
    """The site as a fusion inside the heads sees it: as many channels as a head has."""
    return replace(site, dim=site.head_dim)
