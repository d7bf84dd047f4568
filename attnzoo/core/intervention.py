"""Interventions: what is changed inside a model while it runs."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from attnzoo.core.instrument import Instrument
from attnzoo.core.layout import Layout
from attnzoo.core.mask import NO_MASK, Mask

EDITS = ("input", "scores", "weights", "heads", "output", "mlp", "block")
"""Where a forward can be edited, in the order in which it comes by."""


@dataclass(eq=False)
class Here:
    """Where an edit happens, and what of this forward is known there.

    Args:
        site: Name of the site: `blocks.3`.
        layer: Which site of the model it is, from 0.
        depth: How many sites there are.
        branch: Name of the branch: `softmax`.
        mechanism: Name of the mechanism.
        heads: Number of its heads.
        layout: How its keys are arranged.
        mask: Who may attend to whom.
        q, k, v: What the head was called with, (b h n d) and (b h m d); None outside of a head.
        tokens: What came into the site's block, before its norm, (b n c).
        context: What keys and values are made of, where that is another sequence, (b m c).
        shared: What an intervention keeps from layer to layer in one forward of the model; empty when it begins.
    """

    site: str
    layer: int
    depth: int
    branch: str
    mechanism: str
    heads: int
    layout: Layout = Layout((1,))
    mask: Mask = NO_MASK
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    tokens: Tensor | None = None
    context: Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class Intervention(Instrument):
    """Changes what passes by at chosen places of a model while it is attached: `attnzoo.intervene(model, this)`.

    A concrete one is a dataclass with a `card`, whose fields are its options, and overrides one or more of the
    methods `edit_*`. Nothing that belongs to one forward is kept on it: `here.shared` is there for that.

    Args:
        at: Names of sites, with `*`: `blocks.3`, `blocks.*`, or several.
        heads: Which heads of these sites, from 0; all when None.
        branch: Name of a branch, where a site has several; all when None.
    """

    at: str | Sequence[str] = "*"
    heads: Sequence[int] | None = None
    branch: str | None = None

    neutral: ClassVar[dict[str, Any]] = {}
    """Options with which it changes nothing: then it is not attached at all, and every bit is as without it."""
    own_keys: ClassVar[bool] = False
    """Whether it speaks of tokens that attend to one another: sites that read another sequence are left alone."""
    mechanisms: ClassVar[Set[str]] = frozenset()
    """Names of the mechanisms whose maths it does itself; of any when empty."""
    enough: ClassVar[Literal["all", "any", "first"]] = "all"
    """Which of its edits a place must let do: `all`, or `any`, of which all are done, or the `first` alone."""

    @property
    def changes_nothing(self) -> bool:
        """Whether its options are neutral."""
        return bool(self.neutral) and all(
            getattr(self, name) == value for name, value in self.neutral.items()
        )

    @classmethod
    def points(cls) -> tuple[str, ...]:
        """Where it edits: those of `EDITS` whose methods it overrides."""
        methods = {kind: f"edit_{kind}" for kind in EDITS}
        return tuple(
            kind for kind, name in methods.items() if getattr(cls, name) is not getattr(Intervention, name)
        )

    def names(self) -> Sequence[str]:
        """Names of sites that its options speak of beside `at`; a model without them is refused."""
        return ()

    def edit_input(self, x: Tensor, here: Here) -> Tensor:
        """Tokens that a mechanism reads, after the norm, (b n c)."""
        raise NotImplementedError

    def edit_scores(self, scores: Tensor, here: Here) -> Tensor:
        """Scores before the softmax, scaled, without the mask, (b h n m)."""
        raise NotImplementedError

    def edit_weights(self, weights: Tensor, here: Here) -> Tensor:
        """Attention weights, (b h n m)."""
        raise NotImplementedError

    def edit_heads(self, out: Tensor, here: Here) -> Tensor:
        """What each head gives, before the output projection, (b h n d)."""
        raise NotImplementedError

    def edit_output(self, out: Tensor, here: Here) -> Tensor:
        """What a mechanism gives, before it is added to the residual, (b n c)."""
        raise NotImplementedError

    def edit_mlp(self, out: Tensor, here: Here) -> Tensor:
        """What the MLP of the site's block gives, before it is added to the residual, (b n c)."""
        raise NotImplementedError

    def edit_block(self, out: Tensor, here: Here) -> Tensor:
        """What the site's block gives, (b n c)."""
        raise NotImplementedError
