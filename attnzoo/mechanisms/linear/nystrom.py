"""Nyström attention: the softmax map is rebuilt from its rows and columns at a few landmarks.

Xiong et al., "Nyströmformer", 2021, arXiv:2102.03902, §3.2.
"""

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Head, Law, NonNegativeInt, OptionError, Paper, PositiveInt, Site, Tap
from attnzoo.functional import masked_softmax
from attnzoo.functional.segments import segment_means, segments

TITLE = "Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention"


def pseudo_inverse(a: Tensor, steps: int) -> Tensor:
    """Z ← ¼ Z (13 I - A Z (15 I - A Z (7 I - A Z))), from Aᵀ / (‖A‖₁ ‖A‖∞) of each matrix (... r r); of zero, zero."""
    size = a.sum(dim=-2).amax(dim=-1) * a.sum(dim=-1).amax(dim=-1)
    z = a.mT / torch.where(size > 0, size, 1.0)[..., None, None]
    for _ in range(steps):
        az = a @ z
        inner = 15 * az - az @ (7 * az - az @ az)
        z = (13 * z - z @ inner) / 4
    return z


class Nystrom(Head):
    """softmax(q k̃ᵀ / √d) softmax(q̃ k̃ᵀ / √d)⁺ softmax(q̃ kᵀ / √d) v + DWConv(v).

    q̃ and k̃ are landmarks, the means of q and of k over r stretches of tokens; ⁺ is the pseudo-inverse, iterated.

    Args:
        site: Where the head is put.
        landmarks: The most landmarks, r; each token is one where there are no more tokens.
        iterations: Steps towards the pseudo-inverse.
        kernel: Tokens that the convolution of the values sees, odd; 0 for no convolution. None takes the paper's 33, no
            wider than the tokens it is built for.

    Raises:
        OptionError: AZ214, when the kernel has no middle.
    """

    card = Card(
        name="nystrom",
        family=Family.LINEAR,
        summary="The softmax map from its rows and columns at a few landmarks: cost linear in the number of tokens.",
        equation="softmax(q k̃ᵀ / √d) softmax(q̃ k̃ᵀ / √d)⁺ softmax(q̃ kᵀ / √d) v + DWConv(v)",
        paper=Paper(TITLE, "Xiong et al.", 2021, "arXiv:2102.03902", where="§3.2, eq. 13-15"),
        time="n r c + h n r² + h r³ + n c",
        memory="h n r + n c",
        params="h * (min(33, 2 * n - 1) if kernel is None else kernel)",
        flops="(8 + 4 * (n % (r := min(landmarks, n)) > 0)) * n * r * c + 2 * r**2 * c + 2 * n * h * r**2"
        " + 8 * iterations * h * r**3 + 2 * n * c * (min(33, 2 * n - 1) if kernel is None else kernel)",
        masks={"keys"},
        taps={
            "scores": "b h n r",
            "weights": "b h n r",
            "scores_landmarks": "b h r m",
            "weights_landmarks": "b h r m",
        },
        laws={Law.LINEAR_IN_VALUES, Law.HEADS_APART},
        notes="`weights` shows the first map times the pseudo-inverse: the product of both taps is the map of the "
        "tokens, whose rows sum to 1 as far as the iterations went, and whose entries may be negative. The norms that "
        "the iteration starts from are of each matrix; the authors' are of the whole batch. Stretches differ by a "
        "token where r does not divide n, which the authors refuse; where n is r or less they take plain softmax "
        "attention, to which this converges with the iterations. Means are of the tokens that exist; landmarks of none "
        "have no part. Tokens are taken in their order, special ones first, grids row by row.",
    )

    scores_landmarks: Tap
    weights_landmarks: Tap

    def __init__(
        self,
        site: Site,
        *,
        landmarks: PositiveInt = 64,
        iterations: PositiveInt = 6,
        kernel: NonNegativeInt | None = None,
    ):
        super().__init__(site)
        if kernel and kernel % 2 == 0:
            raise OptionError(f"`nystrom`: a kernel of {kernel} has no middle", help="choose an odd `kernel`")
        self.landmarks, self.iterations = landmarks, iterations
        taps = min(33, 2 * self.length - 1) if kernel is None else kernel
        self.local = nn.Parameter(torch.empty(site.heads, taps)) if taps else None  # DWConv
        self.init_weights()

    def init_weights(self) -> None:
        """As PyTorch's convolutions."""
        if self.local is not None:
            bound = self.local.shape[1] ** -0.5
            nn.init.uniform_(self.local, -bound, bound)

    def attend(self, q, k, v, *, mask, layout):
        dtype, scale, keys, there, share = v.dtype, q.shape[-1] ** -0.5, None, None, None
        if dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()  # what the inverse makes large cancels in the end
        if mask.keys is not None:
            keys = mask.keys[:, None, None]  # (b 1 1 m)
            belongs, v = segments(k, self.landmarks) & keys, v.masked_fill(~keys.mT, 0.0)
            there = belongs.any(dim=-1)[..., None, :]  # (b 1 1 r)
            share = belongs.to(q.dtype) / belongs.sum(dim=-1, keepdim=True).clamp(min=1)
        q_mean, k_mean = (segment_means(t, self.landmarks, share) for t in (q, k))  # (b h r d)
        q_mean = q_mean * scale  # landmarks are fewer than tokens
        middle = masked_softmax(q_mean @ k_mean.mT, there)  # (b h r r)
        if there is not None:
            middle = middle.masked_fill(~there.mT, 0.0)
        left = masked_softmax(self.scores(q @ (k_mean * scale).mT), there)
        weights = self.weights(left @ pseudo_inverse(middle, self.iterations))
        right = self.weights_landmarks(masked_softmax(self.scores_landmarks(q_mean @ k.mT), keys))
        out = weights @ (right @ v)
        if self.local is not None:
            kernel = self.local[:, None, :, None].to(v.dtype)  # (h 1 taps 1)
            out = out.add_(F.conv2d(v, kernel, padding=(kernel.shape[2] // 2, 0), groups=kernel.shape[0]))
        return out.to(dtype)


for _name in ("segments", "segment_means"):
    fx.wrap(_name)  # symbolic tracing knows no lengths
