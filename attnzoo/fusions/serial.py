"""One branch after the other: each works on what the one before it gives."""

from functools import reduce
from operator import add

from attnzoo.core import Fusion, FusionCard, Law, Site, Start


class Serial(Fusion):
    """a_1 = f_1(x), a_i = f_i(a_{i−1}); a_k comes out. With `residual` a_i = a_{i−1} + f_i(a_{i−1}) from i = 2 on.

    All branches have the same mask, layout and context. What a host adds to the result, x, is its own.

    Args:
        site: Where it is.
        arity: Number of branches.
        residual: Whether what a branch works on is added to what it gives; a_1 is f_1(x) all the same.
        start: `free` merges at once; `identity` equals the first branch bit for bit before training.
    """

    card = FusionCard(
        name="serial",
        summary="One branch after the other: a₁ = f₁(x), aᵢ = fᵢ(aᵢ₋₁).",
        equation="a_k\na_1 = f_1(x),  a_i = f_i(a_{i−1})",
        laws={Law.SINGLE, Law.IDENTITY_START, Law.TOKEN_LOCAL},
        masks={"keys", "causal"},
        inside_heads=False,
        notes="Masks of pairs are refused: what one branch may not show a token, the next shows it by way of a third.",
    )

    def __init__(self, site: Site, arity: int, *, residual: bool = False, start: Start = "free"):
        super().__init__(site, arity, start=start)
        self.residual = residual

    def feed(self, part, done):
        return self.merge(done, part) if done else part

    def merge(self, branches, x):
        return reduce(add, branches) if self.residual else branches[-1]
