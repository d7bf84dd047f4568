"""The second branch is a gate for the first.

Dauphin et al., "Language Modeling with Gated Convolutional Networks", 2017, arXiv:1612.08083, §2, eq. 1.
"""

from attnzoo.core import Fusion, FusionCard, Law, Paper, Site, Start, Tap


class SigmoidGate(Fusion):
    """a_1 ⊙ σ(a_2), for each token and channel."""

    card = FusionCard(
        name="sigmoid_gate",
        summary="The second branch is a gate for the first: a₁ ⊙ σ(a₂).",
        equation="a_1 ⊙ σ(a_2)",
        paper=Paper(
            "Language Modeling with Gated Convolutional Networks",
            "Dauphin et al.",
            2017,
            "arXiv:1612.08083",
            where="§2, eq. 1",
        ),
        laws={Law.IDENTITY_START, Law.TOKEN_LOCAL},
        arity=(2, 2),
        fidelity="adapted",
        notes="The branches are any mechanisms, in the paper two convolutions.",
    )

    def __init__(self, site: Site, arity: int, *, start: Start = "free"):
        super().__init__(site, arity, start=start)
        self.gate = Tap("b n c")

    def merge(self, branches, x):
        return branches[0] * self.gate(branches[1].sigmoid())
