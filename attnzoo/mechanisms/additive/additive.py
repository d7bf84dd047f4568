"""Bahdanau's additive attention.

Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2014,
arXiv:1409.0473, §3.1 and appendix A.1.2.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnzoo.core import NO_MASK, Card, Family, Law, Layout, Mask, Mechanism, Paper, PositiveInt, Site, Tap
from attnzoo.functional import additive_scores, attention_from_scores


class Additive(Mechanism):
    """e_ij = vᵀ tanh(W s_i + U h_j), α = softmax_j(e), c_i = Σ_j α_ij h_j.

    The values are the annotations themselves. One head, no biases. A context of another width than the tokens is
    projected after the sum, because the host adds the result to the tokens.

    Args:
        site: Where the mechanism is put.
        hidden: Width of the alignment network, in channels; the width of the tokens when null.
    """

    card = Card(
        name="additive",
        family=Family.ADDITIVE,
        summary="Bahdanau's attention: scores by a small network, values are the annotations themselves.",
        paper=Paper("Neural Machine Translation by Jointly Learning to Align and Translate", "Bahdanau et al.", 2014,
                    "arXiv:1409.0473", where="§3.1, appendix A.1.2"),
        time="n m c",
        memory="m c",
        masks={"keys", "causal", "pairs"},
        context=True,
        weights="b h n m",
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="Weights start at N(0, 0.02²): the paper's v = 0 gives W and U no gradient at the first step.",
    )  # fmt: skip

    def __init__(self, site: Site, *, hidden: PositiveInt | None = None):
        super().__init__(site)
        width = site.context_dim or site.dim
        hidden = hidden or site.dim
        self.query = nn.Linear(site.dim, hidden, bias=False)  # W
        self.key = nn.Linear(width, hidden, bias=False)  # U
        self.score_weight = nn.Parameter(torch.empty(hidden))  # v
        self.scores, self.weights = Tap("b h n m"), Tap("b h n m")
        self.attn_drop = site.attn_drop
        self.proj = nn.Linear(width, site.dim) if width != site.dim else nn.Identity()
        self.proj_drop = nn.Dropout(site.proj_drop)
        self.init_weights()

    def init_weights(self) -> None:
        """v from N(0, 0.02²); the Linears are the host's to initialise."""
        nn.init.normal_(self.score_weight, std=0.02)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m e"] | None = None,
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
    ) -> Float[Tensor, "b n c"]:
        source = self.source(x, context)
        scores = additive_scores(self.query(x)[:, None], self.key(source)[:, None], self.score_weight[None])
        allowed = mask.for_one_head().dense(x.shape[1], source.shape[1], x.device)
        dropout = self.attn_drop if self.training else 0.0
        out = attention_from_scores(scores, source[:, None], allowed, self.scores, self.weights, dropout)
        return self.proj_drop(self.proj(out[:, 0]))
