"""How strongly each head looks at neighbours of each distance.

Li et al., "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", IEEE TVCG 2023,
arXiv:2303.13731.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnzoo.core import InstrumentCard, Layout, Paper, Probe
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding


@dataclass(kw_only=True, eq=False)
class StrengthProfile(Probe):
    """s_h(k) = Σ_{j: |p_i − p_j|_∞ = k} A_ij, the mean over samples and grid tokens i: what goes k hops away.

    A hop is a step to one of the eight neighbours, so token i and k make a square ring, cut off at the border. The
    array `sums` holds s_h(k), (heads of all layers, k); `means` what one token of the ring gets, s_h(k) over its
    size, the mean over those i that have such a ring: constant in k where a head looks at everything alike. Sums
    over k and `to_prefix` make 1. The columns: `own` is s_h(0), `near` s_h(1), `hops` the mean of k; `to_prefix`
    what grid tokens give to the class token and registers, `from_prefix` what those give to the grid. Of rings only
    what may be seen counts.
    """

    card = InstrumentCard(
        "strength_profile",
        "How strongly each head looks at itself, its neighbours, theirs, and at the class token.",
        equation="s_h(k) = mean_i Σ_{j: hop(i, j) = k} A_ij",
        paper=Paper(
            "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
            "Li et al.",
            2023,
            "arXiv:2303.13731",
        ),
        needs={"weights"},
        fidelity="adapted",
        notes="Written from the idea; the authors' code is not public. Of maps that may be negative (what a head "
        "does to its values) the positive part counts, rescaled to 1.",
    )

    def measure(self, subject) -> Finding:
        sums: dict = defaultdict(float)
        left: dict[str, None] = {}
        for _, maps in subject.maps():
            for leaf, found, layout in maps:
                weights, p = found.rows(), layout.prefix
                if leaf.outer.context_dim is not None or weights.shape[-2] != weights.shape[-1]:
                    left[leaf.name] = None
                    continue
                grid, rings = weights[..., p:, p:], hops(layout).to(weights)
                seen = (
                    torch.ones_like(weights[:1, :1]) if found.allowed is None else found.allowed.to(weights)
                )
                strength = torch.einsum("bhij,ijk->bhik", grid, rings)
                sizes = torch.einsum(
                    "bhij,ijk->bhik", seen.expand(-1, -1, *weights.shape[2:])[..., p:, p:], rings
                )
                real = found.real()[:, None, p:].to(weights)  # (b 1 n)
                there = (sizes > 0) * real[..., None]
                sums[leaf, "sums"] += (strength * real[..., None]).sum(dim=(0, 2))
                sums[leaf, "means"] += (strength / sizes.clamp(min=1) * there).sum(dim=(0, 2))
                sums[leaf, "rings"] += there.expand_as(strength).sum(dim=(0, 2))
                sums[leaf, "to_prefix"] += (weights[..., p:, :p].sum(dim=-1) * real).sum(dim=(0, 2))
                sums[leaf, "from_prefix"] += weights[..., :p, p:].sum(dim=-1).mean(dim=-1).sum(dim=0)
                sums[leaf, "rows"] += real.sum()
                sums[leaf, "samples"] += len(weights)
        if not (known := [leaf for leaf in subject.leaves if (leaf, "rows") in sums]):
            raise ZooError(
                "AZ924",
                f"no token of `{subject.name}` looks at tokens of its own grid",
                why="hops lead from one place of a grid to another of the same",
                help="`attnzoo show NAME` says what a mechanism reads",
            )
        longest = max(sums[leaf, "sums"].shape[-1] for leaf in known)
        table, profiles = [], {"sums": np.full((0, longest), np.nan), "means": np.full((0, longest), np.nan)}
        for leaf in known:
            shares = sums[leaf, "sums"] / sums[leaf, "rows"]  # (h k)
            means = sums[leaf, "means"] / sums[leaf, "rings"]
            for name, profile in (("sums", shares), ("means", means)):
                wide = np.full((leaf.heads, longest), np.nan)
                wide[:, : profile.shape[-1]] = profile.cpu().numpy()
                profiles[name] = np.concatenate([profiles[name], wide])
            steps = torch.arange(shares.shape[-1]).to(shares)
            far = (shares * steps).sum(dim=-1) / shares.sum(dim=-1)
            to_prefix = sums[leaf, "to_prefix"] / sums[leaf, "rows"]
            from_prefix = sums[leaf, "from_prefix"] / sums[leaf, "samples"]
            near = shares[:, 1] if shares.shape[-1] > 1 else torch.zeros_like(far)
            columns = (shares[:, 0], near, far, to_prefix, from_prefix)
            for head, values in enumerate(zip(*columns, strict=True)):
                named = zip(
                    ("own", "near", "hops", "to_prefix", "from_prefix"), map(float, values), strict=True
                )
                table.append(subject.about(leaf, head) | dict(named))
        where = ", ".join(left)
        notes = [f"{where}: no hops, because queries and keys lie on other grids."] if left else []
        return Finding.of(table, shows="hops", notes=notes, arrays=profiles)

    def draw(self, finding: Finding, figure: Any) -> None:
        from matplotlib import colormaps

        figure.set_size_inches(10, 3.4)
        mean, total, tokens = figure.subplots(1, 3)
        sites, rows = finding.layers(), np.array(finding["site"])
        for number, site in enumerate(sites):
            colour = colormaps["viridis"](0.9 * number / max(len(sites) - 1, 1))
            here = {name: profile[rows == site].mean(axis=0) for name, profile in finding.arrays.items()}
            mean.plot(here["means"], ".-", color=colour, label=site)
            total.plot(here["sums"], ".-", color=colour)
        names = [*("own", "near"), *(("to_prefix", "from_prefix") if any(finding["to_prefix"]) else ())]
        for name in names:
            column = np.array(finding[name])
            values = [column[rows == site].mean() for site in sites]
            tokens.plot(range(len(sites)), values, ".-", label=name.replace("_", " "))
        mean.set(xlabel="hops", ylabel="attention", title="one token of the ring", ylim=(0, None))
        total.set(xlabel="hops", title="the whole ring", ylim=(0, None))
        tokens.set(xlabel="layer", title="by layer", ylim=(0, None), xticks=range(len(sites)))
        tokens.legend(fontsize="small")
        if len(sites) <= 12:
            mean.legend(fontsize="x-small")


def hops(layout: Layout) -> Tensor:
    """Which grid tokens are k steps from which, diagonal ones counting as one, as ones and zeros, (n n k).

    Args:
        layout: How they are arranged.
    """
    places = layout.coords()
    steps = (places[:, None] - places).abs().amax(dim=-1)  # (n n)
    return steps[..., None] == torch.arange(int(steps.max()) + 1)
