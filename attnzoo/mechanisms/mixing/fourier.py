"""Token mixing by the Fourier transform.

Lee-Thorp et al., "FNet: Mixing Tokens with Fourier Transforms", 2021, arXiv:2105.03824, §3.2, eq. 3.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attnzoo.core import NO_MASK, Card, Family, Layout, Mask, Mechanism, Paper, Site
from attnzoo.errors import UnsupportedContext


class Fourier(Mechanism):
    """Re(FFT over tokens (FFT over channels (x))). No weights at all.

    Args:
        site: Where the mechanism is put.
        norm: `none` is the paper's unnormalised transform, whose output grows by √(n c); `ortho` keeps the scale, which
            pre-norm backbones want.
    """

    card = Card(
        name="fourier",
        family=Family.MIXING,
        summary="FNet: the real part of a Fourier transform over tokens and channels; no weights.",
        paper=Paper("FNet: Mixing Tokens with Fourier Transforms", "Lee-Thorp et al.", 2021, "arXiv:2105.03824",
                    where="§3.2, eq. 3"),
        time="n c log(n)",
        memory="n c",
        notes="All tokens, special ones included, are one sequence. It cannot honour a mask: every token reaches all.",
    )  # fmt: skip

    def __init__(self, site: Site, *, norm: Literal["none", "ortho"] = "none"):
        super().__init__()
        self.norm = {"none": "backward", "ortho": "ortho"}[norm]  # PyTorch's words

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m e"] | None = None,
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
    ) -> Float[Tensor, "b n c"]:
        mask.only()
        if context is not None:
            raise UnsupportedContext(
                "AZ404", "`fourier` mixes a sequence with itself; it cannot read a context"
            )
        wide = x if x.dtype == torch.float64 else x.float()  # the transform takes no half precision
        return torch.fft.fft2(wide, norm=self.norm).real.to(x.dtype)
