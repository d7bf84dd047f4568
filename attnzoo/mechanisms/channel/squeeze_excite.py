"""Squeeze-and-excitation: gate the channels by what the tokens hold on average.

Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv:1709.01507, §3, eq. 2-4. The layers are timm's `SEModule`.
"""

from jaxtyping import Float
from torch import Tensor, nn

from attnzoo.core import NO_MASK, Card, Family, Fraction, Law, Layout, Mask, Mechanism, Paper, Site, Tap
from attnzoo.errors import UnsupportedContext


class SqueezeExcite(Mechanism):
    """x ⊙ σ(W₂ relu(W₁ mean(x))): the mean is over grid tokens, the gate applies to all tokens.

    Args:
        site: Where the mechanism is put.
        ratio: Width of the bottleneck as a share of the channels; rounded to a multiple of 8, as timm does.
    """

    card = Card(
        name="squeeze_excite",
        family=Family.CHANNEL,
        summary="Channel gates from the mean token, by timm's layers.",
        paper=Paper(
            "Squeeze-and-Excitation Networks", "Hu et al.", 2018, "arXiv:1709.01507", where="§3, eq. 2-4"
        ),
        time="n c",
        memory="n c",
        masks={"keys"},
        laws={Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="timm's layers have biases and round the bottleneck to a multiple of 8. Special tokens do not enter the "
        "mean, and are gated like all others.",
    )

    def __init__(self, site: Site, *, ratio: Fraction = 1 / 16):
        super().__init__()
        from timm.layers import SEModule  # here, so that a list of mechanisms does not wait for timm

        self.se = SEModule(site.dim, rd_ratio=ratio)
        self.gate = Tap("b c")
        self.proj_drop = nn.Dropout(site.proj_drop)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m e"] | None = None,
        *,
        mask: Mask = NO_MASK,
        layout: Layout,
    ) -> Float[Tensor, "b n c"]:
        mask.only("keys")
        if context is not None:
            raise UnsupportedContext(
                "AZ404", "`squeeze_excite` gates tokens by themselves; it cannot read a context"
            )
        _, grid = layout.split(x)
        if mask.keys is None:
            mean = grid.mean(dim=1)
        else:
            keys = mask.keys[:, layout.prefix :, None]
            mean = (grid * keys).sum(dim=1) / keys.sum(dim=1).clamp(min=1)  # of nothing: zero
        squeezed = self.se.act(self.se.bn(self.se.fc1(mean[..., None, None])))
        gate = self.gate(self.se.gate(self.se.fc2(squeezed))[..., 0, 0])  # (b c)
        return self.proj_drop(x * gate[:, None])
