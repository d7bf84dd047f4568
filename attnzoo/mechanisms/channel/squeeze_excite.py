"""Squeeze-and-excitation: gate the channels by what the tokens hold on average.

Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv:1709.01507, §3, eq. 2-4. The layers are timm's `SEModule`.
"""

from attnzoo.core import Card, Family, Fraction, Law, Mechanism, Paper, Site
from attnzoo.functional import masked_mean


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
        equation="x ⊙ σ(W₂ relu(W₁ mean(x)))",
        paper=Paper(
            "Squeeze-and-Excitation Networks", "Hu et al.", 2018, "arXiv:1709.01507", where="§3, eq. 2-4"
        ),
        time="n c + c c",
        memory="n c",
        params="(2 * c + 1) * max(8, (c * ratio + 4) // 8 * 8) + c",
        flops="4 * c * max(8, (c * ratio + 4) // 8 * 8)",
        masks={"keys"},
        taps={"gate": "b c"},
        laws={Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="timm's layers have biases and round the bottleneck to a multiple of 8. Special tokens do not enter the "
        "mean, and are gated like all others.",
    )

    def __init__(self, site: Site, *, ratio: Fraction = 1 / 16):
        super().__init__(site)
        from timm.layers import SEModule  # here, so that a list of mechanisms does not wait for timm

        self.se = SEModule(site.dim, rd_ratio=ratio)

    def mix(self, x, source, *, mask, layout):
        _, grid = layout.split(x)
        mean = masked_mean(grid, None if mask.keys is None else mask.keys[:, layout.prefix :, None], dim=1)
        squeezed = self.se.act(self.se.bn(self.se.fc1(mean[..., None, None])))
        gate = self.gate(self.se.gate(self.se.fc2(squeezed))[..., 0, 0])  # (b c)
        return x * gate[:, None]
