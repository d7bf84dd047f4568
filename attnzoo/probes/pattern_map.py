"""Which heads attend in the same pattern: their maps, made small by an autoencoder, laid out on a plane.

Li et al., "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", IEEE TVCG 2023,
arXiv:2303.13731.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from attnzoo.core import InstrumentCard, Paper, Probe
from attnzoo.core.options import NonNegativeInt, PositiveInt
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding


@dataclass(kw_only=True, eq=False)
class PatternMap(Probe):
    """Maps of grid tokens (n n) → squares (size size) → a convolutional autoencoder's code → two axes, and clusters.

    A square's pixel is the root of what its queries give to its keys, on average, so that heads that look at one
    token and heads that look at all weigh the same; what all squares have in common is taken off. The autoencoder
    learns the squares of all heads and samples here; the code of a head is the mean over samples. `x` and `y` are
    its first principal components, `cluster` comes of k-means, the largest first. Same model, data and `seed`, same
    result.

    The arrays: `codes` (heads, width), `maps` (heads, size, size), `clusters` (clusters, size, size), the means of
    their heads. `silhouette` says how clearly the clusters part, from -1 to 1; `explained` is the share of the
    squares' variance that the autoencoder keeps.

    Args:
        clusters: How many there are, at most.
        size: Pixels of a square's side.
        width: Numbers in a code.
        samples: How many samples count, the first ones.
        steps: Of training, with 256 squares each.
        seed: Of the autoencoder and of k-means.
    """

    card = InstrumentCard(
        "pattern_map",
        "Which heads attend in the same pattern.",
        equation="k-means(Enc(A)), Enc from min ‖A − Dec(Enc(A))‖²",
        paper=Paper(
            "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
            "Li et al.",
            2023,
            "arXiv:2303.13731",
        ),
        needs={"weights"},
        fidelity="adapted",
        notes="Written from the idea; the authors' code is not public, and the sizes of the autoencoder are ours.",
    )
    clusters: PositiveInt = 4
    size: Literal[8, 16, 32] = 16
    width: PositiveInt = 8
    samples: PositiveInt = 16
    steps: PositiveInt = 300
    seed: NonNegativeInt = 0

    def measure(self, subject) -> Finding:
        from sklearn.cluster import KMeans
        from sklearn.decomposition import PCA
        from sklearn.metrics import silhouette_score

        leaves, squares, left = self._squares(subject)  # (heads b size size)
        each = squares.flatten(0, 1)[:, None]  # (b 1 size size)
        each = each - each.mean(dim=0)
        each = each / each.square().mean().sqrt().clamp(min=1e-6)
        coder = self._trained(each)
        with torch.no_grad():
            codes = coder[0](each)
            lost = (coder[1](codes) - each).square().mean()
        codes = codes.unflatten(0, squares.shape[:2]).mean(dim=1).double().numpy()
        different = len(np.unique(codes.round(6), axis=0))
        places, axes = np.zeros((len(codes), 2)), min(2, different - 1, self.width)
        if axes:
            places[:, :axes] = PCA(axes, svd_solver="full").fit_transform(codes)
        count = min(self.clusters, different)
        found = KMeans(count, n_init=10, random_state=self.seed).fit_predict(codes)
        order = np.argsort(-np.bincount(found, minlength=count), kind="stable")
        found = np.argsort(order)[found]
        maps = squares.mean(dim=1).numpy()
        table = [
            subject.about(leaf, head) | {"x": float(x), "y": float(y), "cluster": int(cluster)}
            for (leaf, head), (x, y), cluster in zip(leaves, places, found, strict=True)
        ]
        parted = float(silhouette_score(codes, found)) if 1 < count < len(codes) else float("nan")
        figures = {"silhouette": parted, "explained": float(1 - lost)}
        means = np.stack([maps[found == cluster].mean(axis=0) for cluster in range(count)])
        notes = [f"{', '.join(left)}: left out, because queries and keys lie on other grids."] if left else []
        arrays = {"codes": codes, "maps": maps, "clusters": means}
        return Finding.of(table, shows="cluster", arrays=arrays, figures=figures, notes=notes)

    def _squares(self, subject: Any) -> tuple[list[tuple[Any, int]], Tensor, list[str]]:
        """Every head, the squares of its maps (heads b size size), and the leaves that have none."""
        by_leaf: dict[Any, list[Tensor]] = {}
        left: dict[str, None] = {}
        seen = 0
        for batch, maps in subject.maps():
            for leaf, found, layout in maps:
                weights, p = found.rows()[: self.samples - seen], layout.prefix
                if leaf.outer.context_dim is not None or weights.shape[-2] != weights.shape[-1]:
                    left[leaf.name] = None
                    continue
                real = found.real()[: len(weights), None, p:, None].to(weights)
                grid = weights[..., p:, p:] * real
                pooled = F.adaptive_avg_pool2d(grid, self.size) * grid.shape[-1] / self.size
                by_leaf.setdefault(leaf, []).append(pooled.sqrt().float().cpu())
            seen += len(batch)
            if seen >= self.samples:
                break
        if not by_leaf:
            raise ZooError(
                "AZ924",
                f"no token of `{subject.name}` looks at tokens of its own grid",
                why="a pattern is a map of the tokens of one grid",
                help="`attnzoo show NAME` says what a mechanism reads",
            )
        known = [leaf for leaf in subject.leaves if leaf in by_leaf]
        squares = torch.cat([torch.cat(by_leaf[leaf]).transpose(0, 1) for leaf in known])
        return [(leaf, head) for leaf in known for head in range(leaf.heads)], squares, list(left)

    @torch.enable_grad()
    def _trained(self, squares: Tensor) -> nn.Sequential:
        """The autoencoder of these squares, (b 1 size size): an encoder and a decoder."""
        generator, small = torch.Generator().manual_seed(self.seed), self.size // 4
        flat = 16 * small**2
        encoder = nn.Sequential(
            skip_init(nn.Conv2d, 1, 8, 3, stride=2, padding=1),
            nn.GELU(),
            skip_init(nn.Conv2d, 8, 16, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            skip_init(nn.Linear, flat, self.width),
        )
        decoder = nn.Sequential(
            skip_init(nn.Linear, self.width, flat),
            nn.Unflatten(1, (16, small, small)),
            nn.GELU(),
            skip_init(nn.ConvTranspose2d, 16, 8, 4, stride=2, padding=1),
            nn.GELU(),
            skip_init(nn.ConvTranspose2d, 8, 1, 4, stride=2, padding=1),
        )
        coder = nn.Sequential(encoder, decoder)
        for name, parameter in coder.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_normal_(parameter, generator=generator)
        optimizer = torch.optim.Adam(coder.parameters(), lr=3e-3)
        for _ in range(self.steps):
            some = squares[torch.randperm(len(squares), generator=generator)[:256]]
            optimizer.zero_grad()
            F.mse_loss(coder(some), some).backward()
            optimizer.step()
        return coder

    def draw(self, finding: Finding, figure: Any) -> None:
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage

        means = finding.arrays["clusters"]
        figure.set_size_inches(9, 6)
        plane, side = figure.subfigures(1, 2, width_ratios=(4, 1))
        axes = plane.subplots()
        axes.scatter(finding["x"], finding["y"], s=0)
        axes.margins(0.12)
        zoom = max(0.7, 2.2 - len(finding) / 80) * 16 / means.shape[-1]
        for row, square in zip(finding.rows(), finding.arrays["maps"], strict=True):
            picture = OffsetImage(square, zoom=zoom, cmap="viridis", interpolation="nearest")
            frame = {"edgecolor": f"C{row['cluster']}", "linewidth": 2}
            axes.add_artist(AnnotationBbox(picture, (row["x"], row["y"]), pad=0.1, bboxprops=frame))
        axes.set(
            xlabel="first component", ylabel="second component", title="heads by the pattern of their maps"
        )
        panels = side.subplots(len(means), 1, squeeze=False)[:, 0]
        for cluster, (panel, mean) in enumerate(zip(panels, means, strict=True)):
            panel.imshow(mean, cmap="viridis")
            panel.set(xticks=[], yticks=[])
            count = finding["cluster"].count(cluster)
            panel.set_title(f"cluster {cluster}: {count}", fontsize="small", color=f"C{cluster}")
