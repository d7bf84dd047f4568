"""How alike what heads, or layers, make of the same inputs is.

Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, arXiv:1905.00414, §3, eqs. 3–5; the
unbiased estimator in batches of Nguyen, Raghu and Kornblith, 2020, arXiv:2010.15327, §3.1, eqs. 2–3.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from attnzoo.core import InstrumentCard, Paper, Probe
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding
from attnzoo.lab.tokens import exist, ids_of

if TYPE_CHECKING:
    from attnzoo.lab.points import Leaf
    from attnzoo.lab.subject import Batch, Subject

Unit = tuple["Leaf", int | None]
"""A head, or with None what the block of a leaf gives."""
LEAST = {"unbiased": 4, "biased": 2}
"""Samples that a batch needs."""
LABELS = 32
"""So many rows of the picture have names of their own; of more only their sites are named."""


@dataclass(kw_only=True, eq=False)
class Cka(Probe):
    """Linear CKA, HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)), with K = X Xᵀ and X (b p) what one head makes of b samples.

    1 where one is a rotated or scaled copy of the other; general linear maps change it. HSICs are averaged over batches
    before the ratio. `biased`: tr(K H L H) / (b − 1)², H = I − 1/b, above 0 also for what has nothing in common, the
    more so the fewer samples; in one batch ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖). `unbiased`: with K̃, L̃ the kernels without their
    diagonals, [tr(K̃ L̃) + 1ᵀK̃1 1ᵀL̃1 / ((b−1)(b−2)) − 2 1ᵀK̃L̃1 / (b−2)] / (b (b−3)): around 0 there, sometimes below.

    The table says of each how alike it is to the `others` on average, and to which `most`; `arrays["cka"]` is the
    matrix, in the order of the rows.

    Args:
        of: What X is: what `heads` give, o_h; attention `maps`, vec(A); or what `blocks` give.
        tokens: Of heads and blocks the mean over tokens, `pooled`, or all tokens side by side, `flat`.
        estimator: Of HSIC, `unbiased` or `biased`.
    """

    card = InstrumentCard(
        "cka",
        "How alike heads or layers are: linear CKA of what they make of the same inputs.",
        equation="CKA(K, L) = HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)), K = X Xᵀ",
        paper=Paper(
            "Similarity of Neural Network Representations Revisited",
            "Kornblith et al.",
            2019,
            "arXiv:1905.00414",
            "§3, eqs. 3–5",
        ),
        notes="What gives the same for every sample is like nothing: its rows are empty.",
    )
    of: Literal["heads", "maps", "blocks"] = "heads"
    tokens: Literal["pooled", "flat"] = "pooled"
    estimator: Literal["unbiased", "biased"] = "unbiased"

    def measure(self, subject) -> Finding:
        units: list[Unit] = []
        sums, batches, left_out = torch.zeros(()), 0, 0
        for features in self._features(subject):
            count = len(next(iter(features.values())))
            if count < LEAST[self.estimator]:
                left_out += count
                continue
            grams = torch.stack([x @ x.T for x in features.values()])  # (units b b)
            units, sums, batches = list(features), sums + hsic(grams, self.estimator), batches + 1
        if not batches:
            raise ZooError(
                "AZ926",
                f"CKA needs batches of at least {LEAST[self.estimator]} samples, and there is none",
                why=f"the {self.estimator} estimate compares samples with each other",
                help="show the model more at once: Subject.of(model, inputs, batch_size=64)",
            )
        matrix = _ratio(sums / batches)
        layers = np.array([leaf.layer for leaf, _ in units])
        apart, same = ~np.eye(len(units), dtype=bool), layers[:, None] == layers
        names = [leaf.name if head is None else f"{leaf.name} {head}" for leaf, head in units]
        rows = []
        for (leaf, head), row, others in zip(units, matrix, apart, strict=True):
            known = others & ~np.isnan(row)
            best = int(np.where(known, row, -np.inf).argmax())
            likeness = {"others": float(row[known].mean()) if known.any() else float("nan")}
            likeness["most"] = float(row[best]) if known.any() else float("nan")
            rows.append(
                subject.about(leaf, head) | likeness | {"most_like": names[best] if known.any() else None}
            )
        figures = {"within_layers": _mean(matrix[apart & same]), "between_layers": _mean(matrix[~same])}
        notes = [f"{left_out} samples in batches that are too small are left out."] if left_out else []
        return Finding.of(rows, shows="others", arrays={"cka": matrix}, figures=figures, notes=notes)

    def _features(self, subject: "Subject") -> Iterator[dict[Unit, Tensor]]:
        """Of every batch what each head or block makes of the samples, (b p), in double precision."""
        if self.of == "maps":
            for batch, maps in subject.maps():
                yield {
                    (leaf, head): (found.matrix()[:, head].double() * _real(subject, leaf, batch)).flatten(1)
                    for leaf, found, _ in maps
                    for head in range(found.heads)
                }
            return
        kind = "heads" if self.of == "heads" else "block"
        blocks = {
            leaf.block: leaf for leaf in reversed(subject.able(kind))
        }  # branches and cross-attention share one
        wanted = subject.able(kind) if kind == "heads" else list(reversed(blocks.values()))
        for batch, seen, _ in subject.recorded(kind):
            found: dict[Unit, Tensor] = {}
            for leaf in wanted:
                out, real = seen[kind, leaf].double(), _real(subject, leaf, batch)
                if kind == "block":
                    found[leaf, None] = self._of_tokens(out, real)
                else:
                    found |= {(leaf, head): self._of_tokens(out[:, head], real) for head in range(leaf.heads)}
            yield found

    def _of_tokens(self, x: Tensor, real: Tensor) -> Tensor:
        """Tokens (b n d) as one row for each sample, (b p).

        Args:
            x: (b n d).
            real: 1 for tokens, 0 for padding, broadcasts to (b n 1).
        """
        x = x * real
        if self.tokens == "flat":
            return x.flatten(1)
        return x.sum(dim=1) / real.expand_as(x[..., :1]).sum(dim=1)

    def draw(self, finding: Finding, figure: Any) -> None:
        """The matrix: heads × heads, or layers × layers."""
        matrix = finding.arrays["cka"]
        about = list(finding.rows())
        names = [
            " ".join(str(row[key]) for key in ("site", "branch", "head") if row.get(key, "") != "")
            for row in about
        ]
        figure.set_size_inches(*2 * (2.4 + min(0.2 * len(names), 5.0),))
        axes = figure.subplots()
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        starts = [next(rows)[0] for _, rows in groupby(enumerate(about), key=lambda pair: pair[1]["site"])]
        for start in starts[1:]:
            axes.axhline(start - 0.5, color="white", linewidth=0.6)
            axes.axvline(start - 0.5, color="white", linewidth=0.6)
        if len(names) > LABELS:
            axes.set_xticks(starts, [about[i]["site"] for i in starts], rotation=90)
            axes.set_yticks(starts, [about[i]["site"] for i in starts])
        else:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        figure.colorbar(image, ax=axes, label="CKA", shrink=0.8)
        axes.set_title(f"linear CKA of {self.of}")


def hsic(grams: Tensor, estimator: str) -> Tensor:
    """HSIC of every pair of kernels, (units units).

    Args:
        grams: K = X Xᵀ of each, (units b b).
        estimator: `unbiased` or `biased`.
    """
    b = grams.shape[-1]
    if estimator == "biased":
        centred = grams - grams.mean(dim=1, keepdim=True)
        centred = (centred - centred.mean(dim=2, keepdim=True)).flatten(1)
        return centred @ centred.T / (b - 1) ** 2
    bare = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    rows = bare.sum(dim=2)  # (units b)
    total = rows.sum(dim=1)
    traces, products = bare.flatten(1) @ bare.flatten(1).T, rows @ rows.T
    summed = traces + total[:, None] * total / ((b - 1) * (b - 2)) - 2 * products / (b - 2)
    return summed / (b * (b - 3))


def _ratio(shared: Tensor) -> np.ndarray:
    """HSICs as CKAs; NaN where one is of what does not vary."""
    own = shared.diagonal().clone()
    own[own <= 1e-12 * own.abs().max()] = float("nan")
    return (shared / (own[:, None] * own).sqrt()).cpu().numpy()


def _real(subject: "Subject", leaf: "Leaf", batch: "Batch") -> Tensor:
    """1 for tokens, 0 for padding, (b n 1); (1 1 1) where there is no padding."""
    if subject.kind != "pairs":
        return torch.ones(1, 1, 1, dtype=torch.float64, device=batch.inputs[0].device)
    return exist(subject, ids_of(leaf, batch)).double()[..., None]


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
