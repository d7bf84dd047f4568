"""A gate between two branches, from each token and from all (AFF).

Dai et al., "Attentional Feature Fusion", WACV 2021, arXiv:2009.14082, §3, eq. 1-5.
"""

from torch import Tensor, nn

from attnzoo.core import NO_MASK, Fusion, FusionCard, Law, Mask, Paper, PositiveInt, Site, Start, Tap
from attnzoo.functional import mean_token


def _bottleneck(dim: int, ratio: int) -> nn.Sequential:
    """W₂ relu(W₁ u + b₁) + b₂, token by token."""
    hidden = max(1, dim // ratio)
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))


class _Gate(nn.Module):
    """M(u) = σ(L(u) + G(mean_n(u))), of a token and of all."""

    def __init__(self, dim: int, ratio: int):
        super().__init__()
        self.each, self.all = _bottleneck(dim, ratio), _bottleneck(dim, ratio)  # L, G

    def forward(self, u: Tensor, mask: Mask) -> Tensor:
        return (self.each(u) + self.all(mean_token(u, mask))).sigmoid()


class Attentional(Fusion):
    """M ⊙ a_1 + (1 − M) ⊙ a_2, M = σ(L(u) + G(mean_n(u))), u = a_1 + a_2; L and G are W₂ relu(W₁ u + b₁) + b₂.

    Args:
        site: Where it is; `site.dim` is the number of channels that it is given.
        arity: Number of branches, 2.
        ratio: How many times fewer channels the middle of L and G has, rounded down, at least 1.
        iterative: Whether u is what a first fusion of this kind gives, with parameters of its own, instead of the sum.
        start: `free` merges at once; `identity` equals the first branch bit for bit before training.
    """

    card = FusionCard(
        name="attentional",
        summary="A gate between two branches: M ⊙ a₁ + (1 − M) ⊙ a₂, M of the sum in each token and of its mean (AFF).",
        equation="M ⊙ a_1 + (1 − M) ⊙ a_2\nM = σ(L(u) + G(mean_n(u))),  u = a_1 + a_2",
        paper=Paper(
            "Attentional Feature Fusion", "Dai et al.", 2021, "arXiv:2009.14082", where="§3, eq. 1-5"
        ),
        laws={Law.AGREE, Law.CONVEX, Law.IDENTITY_START},
        arity=(2, 2),
        masks={"keys"},
        fidelity="adapted",
        notes="Without BatchNorm, through which samples would have a say in each other; once trained it is part of W "
        "and b anyway. The authors' code doubles what comes out, eq. 4 does not. Inside the heads each head has a "
        "gate of its own, with the same L and G. Special tokens count as tokens.",
    )

    def __init__(
        self,
        site: Site,
        arity: int,
        *,
        ratio: PositiveInt = 4,
        iterative: bool = False,
        start: Start = "free",
    ):
        super().__init__(site, arity, start=start)
        self.first = _Gate(site.dim, ratio) if iterative else None
        self.second = _Gate(site.dim, ratio)
        self.gate = Tap("b n c")
        if iterative:
            self.gate_first = Tap("b n c")

    def merge(self, branches, x, mask=NO_MASK):
        one, two = branches
        u = one + two
        if self.first is not None:
            gate = self.gate_first(self.first(u, mask))
            u = gate * one + (1 - gate) * two
        gate = self.gate(self.second(u, mask))
        return gate * one + (1 - gate) * two
