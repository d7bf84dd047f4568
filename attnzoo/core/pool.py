"""Pools: n tokens to one."""

from abc import abstractmethod
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from attnzoo.core.component import NOTHING, Component
from attnzoo.core.layout import Layout
from attnzoo.core.mask import NO_MASK, Mask
from attnzoo.core.site import Site


class Pool(Component):
    """Reads n tokens and gives one, at a host's site `pool`, in the place of a class token or a mean.

    The only kind of mask that has a meaning here is `keys`.

    Args:
        site: Where it is put.
    """

    def __init__(self, site: Site):
        super().__init__(site)
        self.proj_drop = nn.Dropout(site.proj_drop)

    @abstractmethod
    def pool(self, x: Float[Tensor, "b n c"], *, mask: Mask, layout: Layout) -> Float[Tensor, "b c"]:
        """One token from n. Write it with bare arguments: `def pool(self, x, *, mask, layout)`.

        After `layout` come the maps that the card names, (b *grid), each as a parameter of its own (with the default
        None, so that type checkers agree).

        Args:
            x: Tokens (b n c).
            mask: Which tokens exist (`keys`); of the claimed kinds only.
            layout: How the tokens are arranged.
        """

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
        given: Mapping[str, Tensor] = NOTHING,
    ) -> Float[Tensor, "b c"]:
        """`pool`, once it is certain that nothing is asked of it that the card does not claim; then dropout.

        Args:
            x: Tokens (b n c).
            mask: Which tokens exist.
            layout: How the tokens are arranged.
            given: Maps on the grid by name, (b *grid) each.

        Raises:
            ZooError: AZ401 to AZ403, AZ405, AZ408, AZ409: see `admit`, `lies_on` and `given_maps`.
        """
        self.admit(x, x, mask)
        self.lies_on(self.card.grid, x, layout)
        maps = self.given_maps(given, x.shape[0], layout) if self.card.given else {}
        return self.proj_drop(self.pool(x, mask=mask, layout=layout, **maps))
