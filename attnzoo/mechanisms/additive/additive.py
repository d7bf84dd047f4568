"""Bahdanau's additive attention.

Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2014,
arXiv:1409.0473, §3.1 and appendix A.1.2.
"""

import torch
from torch import nn

from attnzoo.core import Card, Family, Law, Mechanism, Paper, PositiveInt, Site
from attnzoo.functional import additive_scores, attention_from_scores


class Additive(Mechanism):
    """e_ij = vᵀ tanh(W x_i + U s_j), α = softmax_j(e), c_i = Σ_j α_ij s_j: the paper's s_i is x_i, its h_j is s_j.

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
        equation="Σ_j α_ij s_j\nα_ij = softmax_j(vᵀ tanh(W x_i + U s_j))",
        paper=Paper(
            "Neural Machine Translation by Jointly Learning to Align and Translate",
            "Bahdanau et al.",
            2014,
            "arXiv:1409.0473",
            where="§3.1, appendix A.1.2",
        ),
        time="n m c + n c c + m c c",
        memory="n m + m c",
        params="(c + e + 1) * (hidden or c) + (0 if e == c else (e + 1) * c)",
        flops="2 * (n * c + m * e) * (hidden or c) + (0 if hidden == 1 else 2 * n * m * (hidden or c))"
        " + 2 * n * m * e + (0 if e == c else 2 * n * e * c)",
        masks={"keys", "causal", "pairs"},
        one_head=True,
        context=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="Weights start at N(0, 0.02²): the paper's v = 0 gives W and U no gradient at the first step.",
    )

    def __init__(self, site: Site, *, hidden: PositiveInt | None = None):
        super().__init__(site)
        width = site.context_dim or site.dim
        hidden = hidden or site.dim
        self.query = nn.Linear(site.dim, hidden, bias=False)  # W
        self.key = nn.Linear(width, hidden, bias=False)  # U
        self.score_weight = nn.Parameter(torch.empty(hidden))  # v
        self.proj = nn.Linear(width, site.dim) if width != site.dim else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """v from N(0, 0.02²); the Linears are the host's to initialise."""
        nn.init.normal_(self.score_weight, std=0.02)

    def mix(self, x, source, *, mask, layout):
        scores = additive_scores(self.query(x)[:, None], self.key(source)[:, None], self.score_weight[None])
        allowed = mask.dense(x.shape[1], source.shape[1], x.device)
        return self.proj(attention_from_scores(self, scores, source[:, None], allowed)[:, 0])
