"""Channels choose among the branches by what all tokens say.

Li et al., "Selective Kernel Networks", CVPR 2019, arXiv:1903.06586, §3.1, eq. 1-6.
"""

from functools import reduce
from operator import add

from torch import nn

from attnzoo.core import NO_MASK, Fusion, FusionCard, Law, Paper, PositiveInt, Site, Start, Tap
from attnzoo.functional import mean_token


class Selective(Fusion):
    """Σ_i w_i ⊙ a_i, w = softmax_i(A_i z) channel by channel, z = relu(LayerNorm(W mean_n(Σ_i a_i))).

    W has c to max(c / reduction, least) channels; A starts at 0, so that all shares are equal.

    Args:
        site: Where it is; `site.dim` is c, the number of channels that it is given.
        arity: Number of branches.
        reduction: How many times fewer channels z has, rounded down.
        least: Fewest channels of z.
        start: `free` merges at once; `identity` equals the first branch bit for bit before training.
    """

    card = FusionCard(
        name="selective",
        summary="A convex mixture per channel, chosen by all tokens: Σ wᵢ ⊙ aᵢ, w = softmax(A z), z of the mean Σ aᵢ.",
        equation="Σ_i w_i ⊙ a_i\nw = softmax_i(A_i z),  z = relu(LayerNorm(W mean_n(Σ_i a_i)))",
        paper=Paper(
            "Selective Kernel Networks", "Li et al.", 2019, "arXiv:1903.06586", where="§3.1, eq. 1-6"
        ),
        laws={Law.SINGLE, Law.AGREE, Law.CONVEX, Law.FAIR_START, Law.IDENTITY_START},
        masks={"keys"},
        fidelity="adapted",
        notes="LayerNorm stands in the place of BatchNorm, through which samples would have a say in each other. "
        "Inside the heads each head chooses for itself, with the same W and A. Special tokens count as tokens.",
    )

    def __init__(
        self,
        site: Site,
        arity: int,
        *,
        reduction: PositiveInt = 16,
        least: PositiveInt = 32,
        start: Start = "free",
    ):
        super().__init__(site, arity, start=start)
        width = max(site.dim // reduction, least)
        self.squeeze = nn.Linear(site.dim, width, bias=False)  # W
        self.norm = nn.LayerNorm(width)
        self.choose = nn.Linear(width, arity * site.dim, bias=False)  # A
        self.shares = Tap("b k c")
        self.init_weights()

    def init_weights(self) -> None:
        """Equal shares."""
        nn.init.zeros_(self.choose.weight)

    def merge(self, branches, x, mask=NO_MASK):
        z = self.norm(self.squeeze(mean_token(reduce(add, branches), mask))).relu()  # (... 1 r)
        logits = self.choose(z).unflatten(-1, (self.arity, -1)).squeeze(-3)  # (... k c)
        shares = self.shares(logits.softmax(dim=-2))
        return reduce(add, (shares[..., i : i + 1, :] * branch for i, branch in enumerate(branches)))
