"""Mechanisms: what mixes tokens, with projections of its own or none."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from attnzoo.core.component import NOTHING, Component
from attnzoo.core.kv_cache import KVCache
from attnzoo.core.layout import Layout
from attnzoo.core.mask import NO_MASK, Mask
from attnzoo.core.site import Site
from attnzoo.errors import RecipeError, UnsupportedContext


class Mechanism(Component):
    """Mixes n tokens, reading from a context of m tokens, or from themselves at a site without one.

    Args:
        site: Where it is put.

    Raises:
        RecipeError: AZ317, when the site wishes for something that the card does not say it honours.
    """

    def __init__(self, site: Site):
        super().__init__(site)
        self.context_dim = site.context_dim
        self.proj_drop = nn.Dropout(site.proj_drop)
        unheard = sorted(site.wishes - self.card.honours) if hasattr(type(self), "card") else []
        if unheard:
            raise RecipeError(
                "AZ317",
                f"`{self.card.name}` at `{site.name}` cannot honour {' and '.join(f'`{w}`' for w in unheard)}",
                why="it has projections of its own, or none, and a wish that is ignored changes the model silently",
                help="leave it out of the host, or put a mechanism there that works inside the heads",
            )

    @abstractmethod
    def mix(
        self,
        x: Float[Tensor, "b n c"],
        source: Float[Tensor, "b m e"],
        *,
        mask: Mask,
        layout: Layout,
    ) -> Float[Tensor, "b n c"]:
        """Mixed tokens. Write it with bare arguments: `def mix(self, x, source, *, mask, layout)`.

        After `layout` come, each as a parameter of its own (with the default None, so that type checkers agree), the
        maps that the card names (b *grid) and, where the card claims `context_grid`, `context_layout`.

        Args:
            x: Tokens (b n c).
            source: What is read from: the context (b m e), of width `site.context_dim`, or x itself.
            mask: Who may attend to whom; of the claimed kinds only, and it fits.
            layout: How x is arranged.
        """

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m e"] | None = None,
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
        context_layout: Layout | None = None,
        given: Mapping[str, Tensor] = NOTHING,
    ) -> Float[Tensor, "b n c"]:
        """`mix`, once it is certain that nothing is asked of it that the card does not claim; then dropout.

        Args:
            x: Tokens (b n c).
            context: Tokens to read from (b m e), at a site with `context_dim`.
            mask: Who may attend to whom.
            layout: How x is arranged.
            context_layout: How the context is arranged; a line when None.
            given: Maps on the grid by name, (b *grid) each.

        Raises:
            ZooError: AZ404 for a context too many or too few; AZ401 to AZ403, AZ405, AZ408, AZ409: see `admit`,
                `lies_on` and `given_maps`.
        """
        source = self.source(x, context)
        more: dict[str, Any] = {}
        self.admit(x, source, mask)
        self.lies_on(self.card.grid, x, layout)
        if context is not None and self.card.context_grid is not None:
            more["context_layout"] = context_layout or Layout((context.shape[1],))
            self.lies_on(self.card.context_grid, context, more["context_layout"])
        if self.card.given:
            more |= self.given_maps(given, x.shape[0], layout)
        return self.proj_drop(self.mix(x, source, mask=mask, layout=layout, **more))

    def source(self, x: Tensor, context: Tensor | None) -> Tensor:
        """What is read from: the context at a site with one, x itself at a site without.

        Raises:
            UnsupportedContext: AZ404, when a context is given to a site without, or none to a site with one.
        """
        if (context is None) == (self.context_dim is None) and (context is None or self.card.context):
            return x if context is None else context
        if context is None:
            text = f"`{self.card.name}` reads from a context here, and none was given"
        elif not self.card.context:
            text = f"`{self.card.name}` mixes a sequence with itself; it cannot read a context"
        else:
            text = f"a context was given to `{self.card.name}`, but its site has none"
        raise UnsupportedContext(
            "AZ404",
            text,
            help="build it for a site with `context_dim` (cross-attention) or without (self-attention)",
        )

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
        """The newest tokens only: the last rows of what `forward` gives for all tokens so far.

        Here it is just that, which holds for every mechanism. What need not look at the old tokens again overrides it.

        Args:
            x: The newest n tokens (b n c).
            cache: What was kept of the tokens before; is extended.
            context: As for `forward`; the same in every step.
            mask: As `forward` would get it for all tokens so far: causal without a context.
            layout: All tokens so far.
            context_layout: How the context is arranged; a line when None.
        """
        (tokens,) = cache.extend(x)
        out = self.forward(tokens, context, mask=mask, layout=layout, context_layout=context_layout)
        return out[:, -x.shape[1] :]
