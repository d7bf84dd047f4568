"""A fusion of frequency bands along the tokens."""

import torch
from attnzoo.core import Fusion, FusionCard, Law, Site, Start

from attnzoo_wavelets.transform import join, split


class Subband(Fusion):
    """Of each pair of neighbours, the sum comes from the first branch, the difference from the mean of the others.

    Pairs are taken in the order of the tokens, special tokens aside. What has no partner, special tokens and the last
    of an odd number, is the mean of all branches.
    """

    card = FusionCard(
        name="subband",
        summary="Low frequencies along the tokens from the first branch, high ones from the others.",
        equation="join(low(a_1), high(m))\nm = 1/(k − 1) Σ_{i>1} a_i",
        laws={Law.AGREE, Law.ADDITIVE, Law.IDENTITY_START},
        arity=(2, None),
        notes="Not token-local: a token also depends on its partner, which may come after it. A grid is read row "
        "by row: partners lie side by side; where rows are odd, some lie at the end of one and the start of the next.",
    )

    def __init__(self, site: Site, arity: int, *, start: Start = "free"):
        super().__init__(site, arity, start=start)
        self.prefix = site.layout.prefix

    def merge(self, branches, x):
        axis = x.ndim - 2  # of the tokens, at both levels
        mean = torch.stack(list(branches)).mean(dim=0)
        details = torch.stack(list(branches[1:])).mean(dim=0)
        paired = (x.shape[axis] - self.prefix) // 2 * 2
        low, _ = split(branches[0].narrow(axis, self.prefix, paired), axis)
        _, high = split(details.narrow(axis, self.prefix, paired), axis)
        special = mean.narrow(axis, 0, self.prefix)
        alone = mean.narrow(axis, self.prefix + paired, x.shape[axis] - self.prefix - paired)
        return torch.cat([special, join(low, high, axis), alone], axis)
