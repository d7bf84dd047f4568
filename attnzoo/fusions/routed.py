"""A router sends each token to a few of the branches.

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017,
arXiv:1701.06538, §2; Fedus et al., "Switch Transformers", 2021, arXiv:2101.03961, eq. 1-6.
"""

from torch import nn

from attnzoo.core import Fusion, FusionCard, Law, OptionError, Paper, PositiveInt, Site, Start, Tap
from attnzoo.functional import balance_loss, greatest


class Routed(Fusion):
    """Σ_i g_i a_i: g_i = p_i for the `active` branches with the greatest p = softmax(W x), for each token, otherwise 0.

    Args:
        site: Where it is.
        arity: Number of branches.
        active: How many branches a token has.
        renormalise: Whether g is divided by its sum, as in Shazeer et al.; otherwise as in Switch Transformers. Of one
            branch alone g would be 1 whatever the router says, so this asks for two active ones.
        start: `free` merges at once; `identity` equals the first branch bit for bit before training.

    Raises:
        OptionError: AZ214, for more active branches than there are, or one alone that is renormalised.
    """

    card = FusionCard(
        name="routed",
        summary="A router gives each token the best few branches: Σ gᵢ aᵢ, g the greatest of softmax(W x).",
        equation="Σ_i g_i a_i\ng_i = p_i of the best branch,  g_i = 0 of others,  p = softmax(W x)",
        paper=Paper("Switch Transformers", "Fedus et al.", 2021, "arXiv:2101.03961", where="eq. 1-6"),
        laws={Law.SINGLE, Law.ADDITIVE, Law.IDENTITY_START, Law.TOKEN_LOCAL},
        hard_routing=True,
        auxiliary="k Σ_i P_i f_i: P_i the mean of p_i over tokens, f_i how many have branch i active",
        fidelity="adapted",
        notes="All branches are computed, for attention needs all keys: no operation is saved, and there is no "
        "capacity to exceed. The papers' noise for the router is left out; a hook on the tap `scores` can add it. "
        "The tap `gate` shows who goes where. Ties are broken as PyTorch's topk does. Fedus et al. weigh the loss "
        "with 0.01.",
    )

    def __init__(
        self,
        site: Site,
        arity: int,
        *,
        active: PositiveInt = 1,
        renormalise: bool = False,
        start: Start = "free",
    ):
        super().__init__(site, arity, start=start)
        if active > arity:
            raise OptionError(f"`routed`: {active} active of {arity} branches", help=f"at most {arity}")
        if renormalise and active == 1 and arity > 1:
            raise OptionError(
                "`routed`: one active branch, renormalised",
                why="its gate would be 1, and the router would learn nothing",
                help="write `active: 2`, or leave `renormalise` out",
            )
        self.active, self.renormalise = active, renormalise
        self.router = nn.Linear(site.dim, arity, bias=False)  # W
        self.scores, self.shares, self.gate = Tap("b n k"), Tap("b n k"), Tap("b n k")

    def auxiliary(self, *, shares):
        if self.active == self.arity:  # nothing to balance
            return None
        return balance_loss(shares.flatten(0, -2)[None], self.active)

    def merge(self, branches, x):
        shares = self.shares(self.scores(self.router(x)).softmax(dim=-1))  # p, (... n k)
        gate = shares
        if self.active < self.arity:
            gate = greatest(shares, self.active) * shares
        if self.renormalise:
            gate = gate / gate.sum(dim=-1, keepdim=True)
        gate = self.gate(gate)
        total = branches[0] * gate[..., :1]
        for i in range(1, self.arity):
            total = total + branches[i] * gate[..., i : i + 1]
        return total
