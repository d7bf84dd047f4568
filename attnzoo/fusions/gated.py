"""A gate per token chooses how much of each branch goes through."""

from torch import nn

from attnzoo.core import Fusion, FusionCard, Law, Site, Start, Tap


class Gated(Fusion):
    """Σ_i g_i a_i, g = softmax(W x + b) over the branches, for each token.

    W and b start at 0, so that all shares are equal.
    """

    card = FusionCard(
        name="gated",
        summary="A convex mixture per token: Σ gᵢ aᵢ, g = softmax(W x + b).",
        equation="Σ_i g_i a_i\ng = softmax(W x + b)",
        laws={
            Law.SINGLE,
            Law.AGREE,
            Law.CONVEX,
            Law.ADDITIVE,
            Law.FAIR_START,
            Law.IDENTITY_START,
            Law.TOKEN_LOCAL,
        },
    )

    def __init__(self, site: Site, arity: int, *, start: Start = "free"):
        super().__init__(site, arity, start=start)
        self.gate = nn.Linear(site.dim, arity)
        self.shares = Tap("b n k")
        self.init_weights()

    def init_weights(self) -> None:
        """Equal shares."""
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def merge(self, branches, x):
        shares = self.shares(self.gate(x).softmax(dim=-1))  # (... n k)
        total = branches[0] * shares[..., :1]
        for i in range(1, self.arity):
            total = total + branches[i] * shares[..., i : i + 1]
        return total
