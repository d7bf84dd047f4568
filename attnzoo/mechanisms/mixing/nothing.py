"""Nothing in the place of attention, as in LIT's early blocks, which are MLPs alone.

Pan et al., "Less is More: Pay Less Attention in Vision Transformers", AAAI 2022, arXiv:2105.14217, §3.
"""

import torch

from attnzoo.core import Card, Family, Law, Mechanism, Paper, Site


class Nothing(Mechanism):
    """0: no token hears of another, so that of a block the MLP and its residual are left.

    Args:
        site: Where the mechanism is put.
    """

    card = Card(
        name="nothing",
        family=Family.MIXING,
        summary="No attention: the site gives zeros, and of a block its MLP is left.",
        equation="0",
        paper=Paper(
            "Less is More: Pay Less Attention in Vision Transformers",
            "Pan et al.",
            2022,
            "arXiv:2105.14217",
            where="§3, the first two stages",
        ),
        time="n c",
        memory="n c",
        params="0",
        flops="0",
        masks={"keys", "causal", "pairs"},
        laws={Law.PERMUTATION_EQUIVARIANT, Law.SHIFT_EQUIVARIANT, Law.LOCAL, Law.SILENT},
        notes="Every mask is kept, for nobody has influence on anybody. What stands before the site, such as the norm "
        "of a block, which LIT leaves out, gets gradients of zero.",
    )

    def __init__(self, site: Site):
        super().__init__(site)

    def reach(self) -> int:
        return 0

    def mix(self, x, source, *, mask, layout):
        # zeros that come of x: with new ones what stands before would get no gradient, which DDP does not forgive
        return x.masked_fill(x.new_ones((), dtype=torch.bool), 0.0)
