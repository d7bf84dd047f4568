"""What heads, mechanisms and pools have in common: a card, its taps, and the refusal of what it does not claim."""

import inspect
from abc import ABC
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, fx, nn

from attnzoo.core.card import Card
from attnzoo.core.layout import Layout
from attnzoo.core.mask import Mask
from attnzoo.core.options import defaults_of
from attnzoo.core.site import Site
from attnzoo.core.tap import Tap, kind_of
from attnzoo.errors import LayoutMismatch, MissingMap

NOTHING: Mapping[str, Tensor] = {}
"""No given maps."""


class Component(nn.Module, ABC):
    """A head, a mechanism or a pool, built as `Cls(site, **options)`; a concrete one is final, never subclassed.

    What the card says, the base does: `card` of an instance is that of its options; there is a tap for each entry of
    `card.taps`; the site's dropout of weights is in the taps called `weights`; masks, lengths, layouts and given maps
    that the card does not claim are refused before the maths begins.

    Args:
        site: Where it is put.
    """

    card: Card
    # those that the card names
    scores: Tap
    weights: Tap
    gate: Tap
    state: Tap

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = inspect.signature(cls.__init__)  # what people see, in the place of that of `__new__`
        cls.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])  # type: ignore[attr-defined]

    def __new__(cls, site: Site | None = None, *_: Any, **options: Any) -> Self:
        self = super().__new__(cls)
        # a copy brings its own card, a wrapper has that of its content
        if site is not None and hasattr(cls, "card"):
            self.card = cls.card_for(**options)
        return self

    def __init__(self, site: Site):
        super().__init__()
        self.heads, self.attn_drop = site.heads, site.attn_drop
        self.length = (site.context_layout or site.layout).length
        for name, axes in self.card.taps.items() if hasattr(type(self), "card") else ():
            self.add_module(name, Tap(axes, site.attn_drop if kind_of(name) == "weights" else 0.0))

    @classmethod
    def claims(cls, *_: Any, **options: Any) -> Card:
        """The card under these options, all of which are given; override it where an option changes the claims."""
        return cls.card

    @classmethod
    def card_for(cls, **options: Any) -> Card:
        """`claims` for these options and the defaults of the others."""
        return cls.claims(**{**defaults_of(cls), **options})

    def init_weights(self) -> None:
        """Special initialisation. Call it in `__init__`; hosts call it again after their own initialisation."""

    def reset_parameters(self) -> None:
        """PyTorch's name for `init_weights`."""
        self.init_weights()

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters, beyond 1-D ones, that an optimiser must not decay."""
        return set()

    def auxiliary(self, *_: Any, **shown: Any) -> Tensor | None:
        """What it adds to the loss in training, a number, where `card.auxiliary` says that there is something.

        Override it with a parameter for each tap of which it is made, by name: `auxiliary(self, *, shares)`. It is
        called by `auxiliary_losses`, after the forward. None where, as built, there is nothing to add.
        """
        return None

    @property
    def tap_heads(self) -> int:
        """How many heads its taps show, the size of their axis h; override it where these are not the site's."""
        return 1 if self.card.one_head else self.heads

    def reach(self) -> int:
        """For the law `LOCAL`: how far, in grid steps along any dimension, a token has influence."""
        raise NotImplementedError(
            f"{type(self).__name__} claims the law `local` but does not say how far it reaches"
        )

    def admit(self, x: Tensor, source: Tensor, mask: Mask) -> None:
        """Refuse masks and lengths that the card does not claim.

        Args:
            x: What asks, (b ... n c).
            source: What is read from, (b ... m c).
            mask: Who may attend to whom.

        Raises:
            UnsupportedMask: AZ402 for a kind that is not claimed, AZ405 for one that does not fit.
            LayoutMismatch: AZ403 for more tokens than it was built for, AZ408 for another number.
        """
        if not mask.free:
            mask.only(*self.card.masks, by=self.card.name)
            mask.fit(x.shape[0], 1 if self.card.one_head else self.heads, x.shape[-2], source.shape[-2])
        if not self.card.fixed_length or isinstance(source, fx.Proxy):  # symbolic tracing knows no lengths
            return
        given, most = source.shape[-2], self.card.fixed_length == "most"
        if given > self.length or (given < self.length and not most):
            raise LayoutMismatch(
                "AZ403" if most else "AZ408",
                f"`{self.card.name}` was built for {'at most ' if most else ''}{self.length} tokens; "
                f"it was given {given}",
                why="some of its weights belong to a position each",
                help=f"build it for {'the longest input' if most else 'this length'}, or use another mechanism",
            )

    def lies_on(self, grid: int | str | None, tokens: Tensor, layout: Layout) -> None:
        """Refuse tokens that do not lie as the card wants them.

        Args:
            grid: Number of grid dimensions that is wanted; `any`; None when the arrangement has no say.
            tokens: (b ... n c).
            layout: How they are said to be arranged.

        Raises:
            LayoutMismatch: AZ401.
        """
        if grid is None:
            return
        layout.check(tokens)
        if grid not in ("any", len(layout.grid)):
            raise LayoutMismatch(
                "AZ401",
                f"`{self.card.name}` needs a {grid}-D grid; the layout {layout} has {len(layout.grid)} dimensions",
                help="hand it a layout with that many: Layout(grid=..., prefix=...)",
            )

    def given_maps(self, given: Mapping[str, Tensor], batch: int, layout: Layout) -> dict[str, Tensor]:
        """The maps that the card names, out of those that were handed over.

        Args:
            given: By name, (b *grid) each; others than the card's are left alone, for they are somebody else's.
            batch: b.
            layout: How the tokens are arranged.

        Raises:
            MissingMap: AZ409, when one is missing, does not lie on the grid, or has labels that are no whole numbers.
        """
        maps = {}
        for name, kind in self.card.given.items():
            if name not in given:
                raise MissingMap(
                    "AZ409",
                    f"`{self.card.name}` needs the map `{name}` ({kind}), and none was given",
                    help=f"hand it over: model(x, {name}=...), or given={{'{name}': ...}} to the mechanism itself",
                )
            maps[name] = given[name]
            wanted = (batch, *layout.grid)
            if not isinstance(maps[name], fx.Proxy) and tuple(maps[name].shape) != wanted:
                raise MissingMap(
                    "AZ409",
                    f"the map `{name}` has shape {tuple(maps[name].shape)}; the tokens want {wanted}",
                    help="one entry for each token of the grid, without special tokens",
                )
            if kind == "labels" and not isinstance(maps[name], fx.Proxy) and maps[name].is_floating_point():
                raise MissingMap(
                    "AZ409",
                    f"the map `{name}` names regions by whole numbers; this one is of {maps[name].dtype}",
                    help=f"hand over {name}=....long()",
                )
        return maps
