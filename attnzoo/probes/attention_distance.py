"""How far each head looks, in pixels.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, arXiv:2010.11929, Fig. 7 and Appendix D.7.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.core import InstrumentCard, Layout, Paper, Probe
from attnzoo.core.options import PositiveFloat
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding


@dataclass(kw_only=True, eq=False)
class AttentionDistance(Probe):
    """d̄_h = mean_i Σ_j A_ij ‖p_i − p_j‖, over samples and grid tokens i and j; p are their places in pixels.

    A head that looks at its own token has 0; `share` divides by what a head has that looks at everything that it may
    see alike. Of sequences places are positions, and padding does not count.

    Args:
        renorm: Whether what a row gives to prefix tokens (class token, registers) is left out of its sum, Σ_j A_ij =
            1 over the grid; otherwise it counts with distance 0, as in the common code.
        patch: Pixels from one token to the next; None for the image's size over the grid's, and 1 in sequences.
    """

    card = InstrumentCard(
        "attention_distance",
        "How far each head looks on the image, in pixels.",
        equation="d̄_h = mean_i Σ_j A_ij ‖p_i − p_j‖",
        paper=Paper(
            "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
            "Dosovitskiy et al.",
            2021,
            "arXiv:2010.11929",
            "Fig. 7, §D.7",
        ),
        needs={"weights"},
        notes="Of maps that may be negative (what a head does to its values) the positive part counts, rescaled to 1.",
    )
    renorm: bool = False
    patch: PositiveFloat | None = None

    def measure(self, subject) -> Finding:
        sums: dict = defaultdict(float)
        left: dict[str, None] = {}
        for batch, maps in subject.maps():
            for leaf, found, layout in maps:
                weights, p = found.rows(), layout.prefix
                if leaf.outer.context_dim is not None or weights.shape[-2] != weights.shape[-1]:
                    left[leaf.name] = None
                    continue
                far = self.distances(layout, batch.inputs[0]).to(weights)
                counted = found.real()[:, p:].to(weights)  # (b n)
                sums[leaf, "rows"] += counted.sum()
                for name, rows in (("head", weights), ("alike", _alike(found, weights))):
                    each = _per_row(rows[..., p:, p:], far, self.renorm)  # (b h n)
                    sums[leaf, name] += (each * counted[:, None]).sum(dim=(0, 2))
        if not (known := [leaf for leaf in subject.leaves if (leaf, "rows") in sums]):
            raise ZooError(
                "AZ924",
                f"no token of `{subject.name}` looks at tokens of its own grid",
                why="a distance lies between two places on one grid",
                help="`attnzoo show NAME` says what a mechanism reads",
            )
        table = [
            subject.about(leaf, head)
            | {"distance": float(sums[leaf, "head"][head] / sums[leaf, "rows"])}
            | {"share": float(sums[leaf, "head"][head] / sums[leaf, "alike"][head])}
            for leaf in known
            for head in range(leaf.heads)
        ]
        where = ", ".join(left)
        notes = [f"{where}: no distances, because queries and keys lie on other grids."] if left else []
        return Finding.of(table, shows="distance", notes=notes)

    def distances(self, layout: Layout, inputs: Tensor) -> Tensor:
        """From every grid token to every other, (n n), in pixels, or in tokens of a sequence.

        Args:
            layout: How they are arranged.
            inputs: Images (b c y x), or a sequence.
        """
        step = torch.ones(len(layout.grid), dtype=torch.float64)
        if self.patch is not None:
            step = step * self.patch
        elif inputs.ndim == 4 and len(layout.grid) == 2:
            step = torch.tensor(inputs.shape[-2:], dtype=torch.float64) / torch.tensor(layout.grid)
        places = layout.coords() * step
        return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")

    def draw(self, finding: Finding, figure: Any) -> None:
        figure.set_size_inches(6.4, 4)
        axes = figure.subplots()
        branches = list(dict.fromkeys(finding["branch"]))
        for number, branch in enumerate(branches):
            rows = [row for row in finding.rows() if row["branch"] == branch]
            layers = sorted({row["layer"] for row in rows})
            means = [_mean([row["distance"] for row in rows if row["layer"] == layer]) for layer in layers]
            axes.plot(layers, means, color=f"C{number}", linewidth=1.5, zorder=1)
            axes.scatter(
                [row["layer"] for row in rows],
                [row["distance"] for row in rows],
                s=26,
                color=f"C{number}",
                edgecolor="white",
                label=branch or "a head",
                zorder=2,
            )
        axes.set_xticks(sorted(set(finding["layer"])))
        axes.set_ylim(0, 1.1 * max(finding["distance"]) or 1)
        axes.set(
            xlabel="layer", ylabel="mean attention distance", title="attention distance; line: mean of heads"
        )
        if len(branches) > 1:
            axes.legend()


def _alike(found: Any, weights: Tensor) -> Tensor:
    """The map of a head that looks at everything it may see alike, (b h n m)."""
    allowed = (
        torch.ones_like(weights) if found.allowed is None else found.allowed.to(weights).expand_as(weights)
    )
    return allowed / allowed.sum(dim=-1, keepdim=True).clamp(min=1)


def _per_row(weights: Tensor, far: Tensor, renorm: bool) -> Tensor:
    """Σ_j A_ij d_ij of each row, (b h n).

    Args:
        weights: Of grid tokens about grid tokens, (b h n n).
        far: (n n).
        renorm: Whether each row is divided by its sum first.
    """
    each = (weights * far).sum(dim=-1)
    return each / weights.sum(dim=-1).clamp(min=torch.finfo(weights.dtype).tiny) if renorm else each


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
