"""Token mixing by the Fourier transform.

Lee-Thorp et al., "FNet: Mixing Tokens with Fourier Transforms", 2021, arXiv:2105.03824, §3.2, eq. 3.
"""

from typing import Literal

import torch

from attnzoo.core import Card, Family, Mechanism, Paper, Site


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
        equation="Re(FFT_n(FFT_c(x)))",
        paper=Paper(
            "FNet: Mixing Tokens with Fourier Transforms",
            "Lee-Thorp et al.",
            2021,
            "arXiv:2105.03824",
            where="§3.2, eq. 3",
        ),
        time="n c log(n)",
        memory="n c",
        params="0",
        flops="0",
        notes="All tokens, special ones included, are one sequence. It cannot honour a mask: every token reaches all.",
    )

    def __init__(self, site: Site, *, norm: Literal["none", "ortho"] = "none"):
        super().__init__(site)
        self.norm = {"none": "backward", "ortho": "ortho"}[norm]  # PyTorch's words

    def mix(self, x, source, *, mask, layout):
        wide = x if x.dtype == torch.float64 else x.float()  # the transform takes no half precision
        return torch.fft.fft2(wide, norm=self.norm).real.to(x.dtype)
