"""Linear attention with the feature map elu(x) + 1.

Katharopoulos et al., "Transformers are RNNs", 2020, arXiv:2006.16236, §3.2-3.3.
"""

import torch
from torch.nn import functional as F

from attnzoo.core import Card, Family, Head, Law, Paper, PositiveFloat, Site
from attnzoo.functional import causal_sums


class EluLinear(Head):
    """Replaces softmax(q kᵀ) v by φ(q) (φ(k)ᵀ v), φ = elu + 1, so that cost grows with n instead of n m.

    Args:
        site: Where the head is put.
        eps: ε, added to the normaliser; no unit, keeps empty rows at zero.
    """

    card = Card(
        name="elu_linear",
        family=Family.LINEAR,
        summary="Kernelised attention with φ = elu + 1; cost linear in the number of tokens.",
        equation="(φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ) / (φ(q_i)ᵀ Σ_j φ(k_j) + ε)\nφ(x) = elu(x) + 1",
        paper=Paper(
            "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
            "Katharopoulos et al.",
            2020,
            "arXiv:2006.16236",
            where="§3.2-3.3, eq. 4-12",
        ),
        time="n c d + m c d",
        memory="n c + h d²",
        params="0",
        flops="2 * (n + m) * c * (d + 1)",
        masks={"keys", "causal"},
        context=True,
        incremental=True,
        laws={Law.PERMUTATION_EQUIVARIANT, Law.LINEAR_IN_VALUES, Law.HEADS_APART},
        fidelity="adapted",
        notes="The causal form is computed in chunks of as many tokens as a head has channels, exactly; ε, which keeps "
        "empty rows at zero, is ours. Below some 400 tokens softmax is as fast.",
    )

    def __init__(self, site: Site, *, eps: PositiveFloat = 1e-6):
        super().__init__(site)
        self.eps = eps
        self.chunk = site.head_dim  # then the states between chunks are as large as tokens

    def attend(self, q, k, v, *, mask, layout):
        dtype = v.dtype
        if dtype in (torch.float16, torch.bfloat16):
            # sums over all keys overflow and lose digits in half precision
            q, k, v = q.float(), k.float(), v.float()
        q, k = F.elu(q) + 1, F.elu(k) + 1  # eq. 7
        if mask.keys is not None:
            k = k * mask.keys[:, None, :, None]
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the last column sums the weights
        causal = mask.causal and q.shape[2] != 1  # the newest query alone sees all keys
        out = causal_sums(q, k, v, self.chunk) if causal else q @ (k.mT @ v)  # eq. 10-12, eq. 5
        return (out[..., :-1] / (out[..., -1:] + self.eps)).to(dtype)
