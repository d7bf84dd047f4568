"""How spread out each head attends.

Entropy of attention rows, as in Clark et al., "What Does BERT Look At?", 2019, arXiv:1906.04341, §3.3.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.core import InstrumentCard, Layout, Paper, Probe
from attnzoo.lab.finding import Finding
from attnzoo.lab.tokens import crosses


@dataclass(kw_only=True, eq=False)
class Entropy(Probe):
    """−Σ_j A_ij log A_ij, the mean over queries and samples, in nats; e to it counts the keys that matter.

    One key alone gives 0, n keys alike log n. `share` divides each row by the log of how many keys it may see, so that
    causal rows and rows with padding compare; rows that see one key alone, which have no choice, are left out there.

    Args:
        tokens: Which queries count: `all`, those of the `grid`, or the `prefix` (class token, registers).
    """

    card = InstrumentCard(
        "entropy",
        "How spread out each head attends, in nats and as a share of the most there can be.",
        equation="H_i = −Σ_j A_ij log A_ij",
        paper=Paper(
            "What Does BERT Look At? An Analysis of BERT's Attention",
            "Clark et al.",
            2019,
            "arXiv:1906.04341",
            "§3.3",
        ),
        needs={"weights"},
        notes="Of maps that may be negative (what a head does to its values) the positive part counts, rescaled to 1.",
    )
    tokens: Literal["all", "grid", "prefix"] = "all"

    def measure(self, subject) -> Finding:
        sums: dict = defaultdict(float)
        for _, maps in subject.maps():
            for leaf, found, layout in maps:
                shares, rows = found.rows(), self._rows(layout)  # (b h n m)
                keys = found.visible().expand_as(shares[..., 0])
                there = (
                    torch.ones_like(shares[:, 0, :, 0], dtype=torch.bool) if crosses(leaf) else found.real()
                )
                there = there[:, None, rows]  # what is padding asks nothing
                entropy, share, counted = _of_rows(shares[:, :, rows], keys[:, :, rows], there)
                sums[leaf, "rows"] += int(there.sum())
                sums[leaf, "entropy"] += entropy.sum(dim=(0, 2))
                sums[leaf, "share"] += share.sum(dim=(0, 2))
                sums[leaf, "counted"] += counted.sum(dim=(0, 2))
        about = [
            (leaf, head) for leaf in subject.leaves if (leaf, "rows") in sums for head in range(leaf.heads)
        ]
        table = [
            subject.about(leaf, head)
            | {"entropy": float(mean := sums[leaf, "entropy"][head] / sums[leaf, "rows"])}
            | {
                "keys": float(mean.exp()),
                "share": float(sums[leaf, "share"][head] / sums[leaf, "counted"][head]),
            }
            for leaf, head in about
        ]
        return Finding.of(table, shows="share")

    def _rows(self, layout: Layout) -> slice:
        """The queries that count."""
        if self.tokens == "prefix":
            return slice(layout.prefix)
        return slice(layout.prefix if self.tokens == "grid" else 0, None)


def _of_rows(shares: Tensor, keys: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy of each row (b h n), its share of the most there can be, and whether the row has a choice.

    Args:
        shares: (b h n m), rows that sum to 1.
        keys: How many keys each row may see, (b h n).
        there: Which queries exist, broadcasts to (b h n); of the others all is 0.
    """
    entropy = -torch.xlogy(shares, shares).sum(dim=-1) * there
    choice = (keys > 1) & there
    return entropy, entropy / keys.clamp(min=2).log() * choice, choice.to(entropy.dtype)
