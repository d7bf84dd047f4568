"""Heads: what happens inside the heads, between shared projections."""

from abc import abstractmethod
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from attnzoo.core.component import NOTHING, Component
from attnzoo.core.layout import Layout
from attnzoo.core.mask import NO_MASK, Mask


class Head(Component):
    """What each query receives, inside the heads. `MultiHead` puts projections around it.

    Parameters and buffers have a leading head axis, but for those that `shared` names.

    Args:
        site: Where it is put.
    """

    def shared(self) -> set[str]:
        """Names of parameters and buffers that are one for all heads, and have no leading head axis."""
        return set()

    @abstractmethod
    def attend(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m d"],
        *,
        mask: Mask,
        layout: Layout,
    ) -> Float[Tensor, "b h n d"]:
        """What each query token receives. Write it with bare arguments: `def attend(self, q, k, v, *, mask, layout)`.

        After `layout` come the maps that the card names, (b *grid), each as a parameter of its own (with the default
        None, so that type checkers agree).

        Args:
            q: Queries (b h n d).
            k: Keys (b h m d).
            v: Values (b h m d).
            mask: Who may attend to whom; of the claimed kinds only, and it fits.
            layout: How the key tokens are arranged.
        """

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b h m d"],
        v: Float[Tensor, "b h m d"],
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
        given: Mapping[str, Tensor] = NOTHING,
    ) -> Float[Tensor, "b h n d"]:
        """`attend`, once it is certain that nothing is asked of it that the card does not claim.

        Args:
            q, k, v: Queries (b h n d), keys and values (b h m d).
            mask: Who may attend to whom.
            layout: How the key tokens are arranged.
            given: Maps on the grid by name, (b *grid) each.

        Raises:
            ZooError: AZ401 to AZ403, AZ405, AZ408, AZ409: see `admit`, `lies_on` and `given_maps`.
        """
        self.admit(q, k, mask)
        self.lies_on(self.card.grid, k, layout)
        maps = self.given_maps(given, q.shape[0], layout) if self.card.given else {}
        return self.attend(q, k, v, mask=mask, layout=layout, **maps)
