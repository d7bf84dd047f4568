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

    The arrays: of images `maps`, the answer's row on the grid (b y x), and `by_layer`, (l b y x); of sequences
    `rollout`, (b n n), NaN behind the shorter ones of several batches.

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
        rows: list[Tensor] = []  # (l b y x) or (b n n)
        sums: Any = 0
        count, sites = 0, list[str]()
        absent: dict[str, str] = {}
        for batch, found in streams(subject):
            maps = graded(subject, batch, found, self.to) if self.gradient else found
            layers = [layer.double() for layer in layer_maps(maps, self.fusion, self.discard)]
            rolls = torch.stack(
                list(accumulate(layers[1:], lambda r, a: roll([a]) @ r, initial=roll(layers[:1])))
            )
            asked = self._asked(subject, maps, rolls)  # (l b k n)
            real = found.maps[0].real().to(rolls)
            own = (rolls.diagonal(dim1=-2, dim2=-1) * real).sum(-1) / real.sum(-1)
            spread = torch.special.entr(asked).sum(-1) / real.sum(-1).clamp(min=2).log()[:, None]
            prefix = asked[..., : maps.layout.prefix].sum(-1)
            sums = sums + torch.stack([own, _over(spread, real), _over(prefix, real)]).sum(dim=2)
            rows.append(maps.asked(rolls) if subject.kind == "images" else rolls[-1])
            count, sites = count + len(batch), list(maps.sites)
            absent |= {
                one.site: one.reason for one in maps.absent if all(m.site != one.site for m in maps.maps)
            }
        table = [
            {"layer": i, "site": site, "branch": ""}
            | dict(zip(("own", "spread", "prefix"), map(float, sums[:, i] / count), strict=True))
            for i, site in enumerate(sites)
        ]
        notes = [f"{site} counts as its residual alone: {reason}." for site, reason in absent.items()]
        if subject.kind == "pairs":
            notes.append("Only the encoder is followed: what the decoder reads comes from two sides.")
        return Finding.of(table, shows="spread", notes=notes, arrays=_arrays(subject, rows))

    def _asked(self, subject: Any, maps: Any, rolls: Tensor) -> Tensor:
        """The rows that count, (l b k n): one of an image, all of a sequence."""
        if subject.kind != "images":
            return rolls
        p = maps.layout.prefix
        return rolls[:, :, :1] if maps.class_token else rolls[:, :, p:].mean(dim=2, keepdim=True)

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
    """The mean over rows that are no padding, (l b): of values (l b k) of one row, or of all n."""
    if values.shape[-1] == 1:
        return values[..., 0]
    return (values * real).sum(-1) / real.sum(-1)


def _arrays(subject: Any, rows: list[Tensor]) -> dict[str, np.ndarray]:
    if subject.kind != "images":
        n = max(one.shape[-1] for one in rows)
        wide = [F.pad(one, (0, n - one.shape[-1]) * 2, value=torch.nan) for one in rows]
        return {"rollout": torch.cat(wide).cpu().numpy()}
    by_layer = torch.cat(rows, dim=1).cpu()
    first = subject.batches[0].inputs[0][:SHOWN].detach().double().cpu().movedim(1, -1)
    first = first - first.amin(dim=(1, 2, 3), keepdim=True)
    first = first / first.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    shown = first if first.shape[-1] == 3 else first.mean(dim=-1)
    return {"maps": by_layer[-1].numpy(), "by_layer": by_layer.numpy(), "images": shown.numpy()}
