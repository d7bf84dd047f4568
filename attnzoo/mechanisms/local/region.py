"""Region attention: tokens attend within regions that the caller hands over.

Yang et al., "Region Attention Transformer for Medical Image Restoration", MICCAI 2024, arXiv:2407.09268, R-MSA.
"""

from dataclasses import replace
from typing import Literal

import torch

from attnzoo.core import Card, Family, Head, Law, Paper, Site
from attnzoo.functional import dot_product_attention


class Region(Head):
    """softmax(s q kᵀ) v over the tokens of one's own region; special tokens attend to all and are seen by all.

    Args:
        site: Where the head is put.
        scale: s: `dim` for d^-½, `heads` for h^-½, which the authors' code has.
    """

    card = Card(
        name="region",
        family=Family.LOCAL,
        summary="Each grid token attends to the tokens of its own region, by a map of labels that is handed over.",
        equation="softmax(q_i k_{ρ(i)}ᵀ / √d) v_{ρ(i)}\nρ(i) = region of i",
        paper=Paper(
            "Region Attention Transformer for Medical Image Restoration",
            "Yang et al.",
            2024,
            "MICCAI 2024",
            where="R-MSA",
        ),
        time="n m c",
        memory="h n m",
        params="0",
        flops="4 * n * m * c",
        masks={"keys", "causal", "pairs"},
        grid="any",
        given={"regions": "labels"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.LINEAR_IN_VALUES, Law.BOUNDED, Law.HEADS_APART},
        notes="`regions` holds a whole number for each grid token; which numbers has no say. Other regions are hidden "
        "exactly, where the authors' code lowers their scores by 1000.",
    )

    def __init__(self, site: Site, *, scale: Literal["dim", "heads"] = "dim"):
        super().__init__(site)
        self.factor = (site.head_dim / site.heads) ** 0.5 if scale == "heads" else 1.0

    def attend(self, q, k, v, *, mask, layout, regions=None):
        labels, p = regions.flatten(1), layout.prefix
        same = torch.nn.functional.pad(labels[:, :, None] == labels[:, None], (p, 0, p, 0), value=True)[
            :, None
        ]
        mask = replace(mask, pairs=same if mask.pairs is None else same & mask.pairs)
        return dot_product_attention(self, q * self.factor, k, v, mask)
