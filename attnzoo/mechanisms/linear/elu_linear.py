"""Linear attention with the feature map elu(x) + 1.

Katharopoulos et al., "Transformers are RNNs", 2020, arXiv:2006.16236, §3.2-3.3.
"""

import torch
from torch.nn import functional as F

from attnzoo.core import Card, Family, Head, Law, Paper, PositiveFloat, Site


class EluLinear(Head):
    """Replaces softmax(q kᵀ) v by φ(q) (φ(k)ᵀ v), φ = elu + 1, so that cost grows with n instead of n m.

    Args:
        site: Where the head is put.
        eps: Added to the normaliser; no unit, keeps empty rows at zero.
    """

    card = Card(
        name="elu_linear",
        family=Family.LINEAR,
        summary="Kernelised attention with φ = elu + 1; cost linear in the number of tokens.",
        paper=Paper(
            "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
            "Katharopoulos et al.",
            2020,
            "arXiv:2006.16236",
            where="§3.2-3.3, eq. 4-12",
        ),
        time="n c d",
        memory="h n d²",
        masks={"keys", "causal"},
        context=True,
        incremental=True,
        laws={Law.PERMUTATION_EQUIVARIANT, Law.LINEAR_IN_VALUES, Law.HEADS_APART},
        fidelity="adapted",
        notes="The causal form materialises all prefix sums, h n d² memory; the paper's kernel does not. Below some "
        "400 tokens softmax is as fast.",
    )

    def __init__(self, site: Site, *, eps: PositiveFloat = 1e-6):
        super().__init__(site)
        self.eps = eps

    def attend(self, q, k, v, *, mask, layout):
        dtype = v.dtype
        if dtype in (torch.float16, torch.bfloat16):
            # sums over all keys overflow and lose digits in half precision
            q, k, v = q.float(), k.float(), v.float()
        q, k = F.elu(q) + 1, F.elu(k) + 1  # eq. 7
        if mask.keys is not None:
            k = k * mask.keys[:, None, :, None]
        if mask.causal:
            kv = torch.einsum("bhmd,bhme->bhmde", k, v).cumsum(dim=2)  # eq. 10
            total = k.cumsum(dim=2)  # eq. 11
            n, m = q.shape[2], k.shape[2]
            # queries before the first key see nothing
            q, first = q[:, :, max(0, n - m) :], q[:, :, : max(0, n - m)]
            kv, total = kv[:, :, m - q.shape[2] :], total[:, :, m - q.shape[2] :]
            top = torch.einsum("bhnd,bhnde->bhne", q, kv)
            norm = (q * total).sum(dim=-1, keepdim=True)
            return torch.cat([torch.zeros_like(first), top / (norm + self.eps)], dim=2).to(dtype)
        top = q @ (k.mT @ v)  # eq. 5
        norm = q @ k.sum(dim=2)[..., None]
        return (top / (norm + self.eps)).to(dtype)
