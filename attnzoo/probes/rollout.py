"""Where what the answer is read from comes from, through all layers.

Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020, arXiv:2005.00928, §3. Discarding, the other
fusions of heads and the form with gradients are those of Gildenblat's vit-explain, with rows that are normalised as
rows.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import InstrumentCard, Paper, Probe
from attnzoo.core.options import Fraction
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding

SHOWN = 4
"""Samples that the picture shows."""


@dataclass(kw_only=True, eq=False)
class Rollout(Probe):
    """R_l = Â_l R_{l-1} with Â = (F + I) / 2, rows divided by their sum; F is one map of all heads of a layer, (n n).

    Row i of R_l says how much of each first token is in token i behind layer l, as far as attention and the residual
    go; rows sum to 1. `own` is the mean of R_ii; `spread` the entropy of the row that the answer is read from (of
    sequences: of all rows), as a share of log n; `prefix` what that row gives to the class token and registers.

    Both streams of a `dual` model are followed as one set of tokens, a's first: the maps of self-attention of a layer
    are blocks on the diagonal of F, those of cross-attention beside it; the answer's row is the mean of both streams'
    rows. Where tokens of a `pyramid` model merge, R_l = M R_{l-1}, M_ij being the norm of the convolution's weights
    there, rows divided by their sum.

    The arrays: of images `maps`, the answer's row on the grid (b y x), and `by_layer`, (l b y x), and of stream b
    `maps_b` and `by_layer_b`; of sequences `rollout`, (b n n), NaN behind the shorter ones of several batches.

    Args:
        fusion: How heads become F: `mean`, or `max` or `min` element by element.
        discard: Share of the smallest entries of each sample's F that is set to 0; vit-explain's is 0.9.
        gradient: F = relu(mean_h(A ⊙ ∂y_c/∂A)) instead, y_c being the logit of a class. `fusion` has no say then.
        to: Class c: the `predicted` one, or the `true` one.
    """

    card = InstrumentCard(
        "rollout",
        "How much of each first token is in what the answer is read from, layer by layer.",
        equation="R = Â_L ⋯ Â_1,  Â = rownorm(F + I)",
        paper=Paper(
            "Quantifying Attention Flow in Transformers", "Abnar, Zuidema", 2020, "arXiv:2005.00928", "§3"
        ),
        needs={"weights"},
        notes="MLPs and the size of values have no say. Signed maps count by their absolute values; a layer without "
        "any map counts as its residual alone.",
    )
    fusion: Literal["mean", "max", "min"] = "mean"
    discard: Fraction = 0.0
    gradient: bool = False
    to: Literal["predicted", "true"] = "predicted"

    def measure(self, subject) -> Finding:
        from attnzoo.lab.rollout import graded, layer_maps, roll, streams

        if self.gradient and subject.kind != "images":
            raise ZooError(
                "AZ927", "`gradient` asks for the logit of a class", help="leave it out for sequences"
            )
        rows: dict[str, list[Tensor]] = {}  # (l b *grid) of each set of tokens that came in, or (b n n)
        sums: Any = 0
        count, names = 0, list[str]()
        absent: dict[str, str] = {}
        for batch, found in streams(subject):
            maps = graded(subject, batch, found, self.to) if self.gradient else found
            layers = [layer.double() for layer in layer_maps(maps, self.fusion, self.discard)]
            rolls = list(accumulate(layers[1:], lambda r, a: roll([a]) @ r, initial=roll(layers[:1])))
            passage = maps.passage
            steps = [number for number, step in enumerate(passage.steps) if step.sites]
            real = found.maps[0].real().to(rolls[0])  # (b n) of sequences
            sums = sums + torch.stack([self._figures(subject, maps, i, rolls[i], real) for i in steps])
            if subject.kind == "images":
                for name in passage.steps[0].tokens:
                    by_layer = torch.stack([maps.asked(rolls[i], i, name) for i in steps])
                    rows.setdefault(name, []).append(by_layer)
            else:
                rows.setdefault("", []).append(rolls[-1])
            count, names = count + len(batch), [passage.steps[i].name for i in steps]
            absent |= {
                one.site: one.reason for one in maps.absent if all(m.site != one.site for m in maps.maps)
            }
        table = [
            {"layer": i, "site": name, "branch": ""}
            | dict(zip(("own", "spread", "prefix"), map(float, sums[i] / count), strict=True))
            for i, name in enumerate(names)
        ]
        notes = [f"{site} counts as its residual alone: {reason}." for site, reason in absent.items()]
        if subject.kind == "pairs":
            notes.append("Only the encoder is followed: what the decoder reads comes from two sides.")
        if bool(sums.isnan().any()):
            notes.append("Behind a merge there is no `own`: its tokens are not those that came in.")
        return Finding.of(table, shows="spread", notes=notes, arrays=_arrays(subject, rows))

    def _figures(self, subject: Any, maps: Any, step: int, rolled: Tensor, real: Tensor) -> Tensor:
        """`own`, `spread` and `prefix` behind a step, summed over samples, (3,)."""
        if subject.kind == "images":
            asked = (maps.shares(step).to(rolled) @ rolled)[:, :1]  # (b 1 n), the row that counts
            real = rolled.new_ones(rolled.shape[0], rolled.shape[2])
        else:
            asked = rolled  # all rows of a sequence
        diagonal = rolled.diagonal(dim1=-2, dim2=-1)
        own = (diagonal * real[:, : diagonal.shape[1]]).sum(-1) / real.sum(-1)
        if rolled.shape[-2] != rolled.shape[-1]:
            own = torch.full_like(own, torch.nan)
        spread = torch.special.entr(asked).sum(-1) / real.sum(-1).clamp(min=2).log()[:, None]
        places = maps.passage.places(maps.passage.steps[0])
        special = [
            asked[..., place.start : place.start + maps.passage.layouts[name].prefix].sum(-1)
            for name, place in places.items()
        ]
        prefix = torch.stack(special).sum(dim=0)
        return torch.stack([own, _over(spread, real), _over(prefix, real)]).sum(dim=1)

    def draw(self, finding: Finding, figure: Any) -> None:
        rows: list[list[tuple[str, str, np.ndarray]]]  # title, colour map, picture
        if "rollout" in finding.arrays:
            rows = [
                [(f"sequence {i}", "viridis", one) for i, one in enumerate(finding.arrays["rollout"][:SHOWN])]
            ]
        else:
            by_layer, images = finding.arrays["by_layer"], finding.arrays["images"]
            chosen = np.unique(np.linspace(0, len(by_layer) - 1, 6).round().astype(int))
            rows = [
                [
                    ("image", "gray", image),
                    *((finding["site"][i], "viridis", by_layer[i, number]) for i in chosen),
                ]
                for number, image in enumerate(images)
            ]
        figure.set_size_inches(max(1.5 * len(rows[0]), 4), 1.5 * len(rows) + 0.6)
        panels = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        for number, (row, line) in enumerate(zip(rows, panels, strict=True)):
            for axes, (title, colours, picture) in zip(line, row, strict=True):
                axes.imshow(picture, cmap=colours, vmin=0)
                axes.set(xticks=[], yticks=[])
                if number == 0:
                    axes.set_title(title, fontsize="medium")
        figure.suptitle("rollout: each map from 0 to its most")


def _over(values: Tensor, real: Tensor) -> Tensor:
    """The mean over rows that are no padding, (b): of values (b k) of one row, or of all n."""
    if values.shape[-1] == 1:
        return values[..., 0]
    return (values * real).sum(-1) / real.sum(-1)


def _arrays(subject: Any, rows: dict[str, list[Tensor]]) -> dict[str, np.ndarray]:
    if subject.kind != "images":
        n = max(one.shape[-1] for one in rows[""])
        wide = [F.pad(one, (0, n - one.shape[-1]) * 2, value=torch.nan) for one in rows[""]]
        return {"rollout": torch.cat(wide).cpu().numpy()}
    first = subject.batches[0].inputs[0][:SHOWN].detach().double().cpu().movedim(1, -1)
    first = first - first.amin(dim=(1, 2, 3), keepdim=True)
    first = first / first.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    shown = first if first.shape[-1] == 3 else first.mean(dim=-1)
    arrays = {"images": shown.numpy()}
    for number, (name, parts) in enumerate(rows.items()):
        by_layer, end = torch.cat(parts, dim=1).cpu().numpy(), f"_{name}" if number else ""
        arrays |= {f"maps{end}": by_layer[-1], f"by_layer{end}": by_layer}
    return arrays
