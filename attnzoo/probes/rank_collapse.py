"""How alike tokens become, layer by layer.

Dong et al., "Attention is Not All You Need: Pure Attention Loses Rank Doubly Exponentially with Depth", 2021,
arXiv:2103.03404, §2 and §4.1.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import InstrumentCard, Paper, Probe
from attnzoo.core.options import PositiveFloat
from attnzoo.lab.finding import Finding

MEASURES = "residual", "composite", "rank", "cosine"
TINY = torch.finfo(torch.float64).tiny


@dataclass(kw_only=True, eq=False)
class RankCollapse(Probe):
    """‖res(X)‖ / ‖X‖ with res(X) = X − 1 x̄ᵀ, x̄ the mean of the tokens, the rows of X (n c).

    `residual` is that in the Frobenius norm, `composite` in √(‖·‖_1 ‖·‖_∞); both are 0 where all tokens are the same.
    `rank` counts the singular values of X above `tolerance`, X being scaled to a mean square of 1; `cosine` is the
    mean over pairs of different tokens. Each is a mean over samples; padding does not count.

    A row says `of` what: `tokens` behind a block; `attention`, what the mechanism gives there, before it is added;
    `attention alone`, the same in a model whose blocks give what their mechanism gives, without skips and MLPs, from
    the first block on: the paper's pure attention. Norms stay as they are in all of them.

    Args:
        norm: `layer` for a layer norm of each token without weights before anything is measured, as the authors' code
            does; `none`.
        tolerance: Least singular value that counts, the authors' 0.5.
    """

    card = InstrumentCard(
        "rank_collapse",
        "How alike the tokens become from layer to layer, with and without skips.",
        equation="‖X − 1 x̄ᵀ‖ / ‖X‖",
        paper=Paper(
            "Attention is Not All You Need: Pure Attention Loses Rank Doubly Exponentially with Depth",
            "Dong et al.",
            2021,
            "arXiv:2103.03404",
            "§2, §4.1",
        ),
    )
    norm: Literal["none", "layer"] = "none"
    tolerance: PositiveFloat = 0.5

    def measure(self, subject) -> Finding:
        sums: dict = defaultdict(float)
        given: dict[Any, Tensor] = {}  # what the mechanism in each block gave in this forward
        sites = list({leaf.outer: leaf for leaf in subject.leaves}.values())
        blocks = list({leaf.block: leaf for leaf in sites}.values())  # of a block with several sites the last

        def note(of: str, leaf: Any, x: Tensor, here: Any) -> None:
            keys = here.mask.keys if leaf.outer.context_dim is None else None
            sums[of, leaf] += self.of_tokens(x, keys).sum(dim=0)

        def behind(leaf: Any, x: Tensor, here: Any) -> None:
            note("tokens", leaf, x, here)
            if leaf is blocks[0]:
                note("came in", leaf, here.tokens, here)

        def kept(leaf: Any, x: Tensor, here: Any) -> None:
            given[leaf.block] = x

        def instead(leaf: Any, x: Tensor, here: Any) -> Tensor:
            note("attention alone", leaf, given[leaf.block], here)
            return given[leaf.block]

        def at_mechanism(leaf: Any, x: Tensor, here: Any) -> None:
            note("attention", leaf, x, here)

        with torch.no_grad():
            for batch in subject.batches:
                with subject.editing("output", at_mechanism, sites), subject.editing("block", behind, blocks):
                    subject.call(batch)
                with subject.editing("output", kept, blocks), subject.editing("block", instead, blocks):
                    subject.call(batch)
        count = sum(map(len, subject.batches))
        table = [
            {"layer": leaf.layer, "site": leaf.site, "branch": "", "of": of}
            | dict(zip(MEASURES, (sums[of, leaf] / count).tolist(), strict=True))
            for of, among in (("tokens", blocks), ("attention", sites), ("attention alone", blocks))
            for leaf in among
            if (of, leaf) in sums
        ]
        if ("came in", blocks[0]) not in sums:  # two streams go from block to block by ways of their own
            notes = [
                "Only what attention gives: tokens do not pass the blocks of this model one after the other."
            ]
            return Finding.of(table, shows="residual", notes=notes)
        came_in = (sums["came in", blocks[0]] / count).tolist()
        figures = {f"{name} of what came in": value for name, value in zip(MEASURES, came_in, strict=True)}
        return Finding.of(table, shows="residual", figures=figures)

    def of_tokens(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """The four measures of each sample, (b 4).

        Args:
            x: Tokens (b n c).
            keys: Which of them are no padding, (b n).
        """
        x = x.detach().double()
        if self.norm == "layer":
            x = F.layer_norm(x, x.shape[-1:])
        real = torch.ones_like(x[..., :1]) if keys is None else keys[..., None].to(x)
        n = real.sum(dim=(1, 2)).clamp(min=1)
        x = x * real
        rest = (x - x.sum(dim=1, keepdim=True) / n[:, None, None]) * real
        size = torch.linalg.matrix_norm(x).clamp(min=TINY)
        root = (n * x.shape[-1]).sqrt() / size
        squares = torch.linalg.eigvalsh(x @ x.mT).clamp(min=0)  # of the singular values
        rank = (squares.sqrt() * root[:, None] > self.tolerance).sum(dim=-1)
        together = F.normalize(x, dim=-1).sum(dim=1).square().sum(dim=-1)  # n + the cosines of all pairs
        cosine = (together - n) / (n * (n - 1)).clamp(min=1)
        return torch.stack(
            [
                torch.linalg.matrix_norm(rest) / size,
                _composite(rest) / _composite(x).clamp(min=TINY),
                rank,
                cosine,
            ],
            -1,
        )

    def draw(self, finding: Finding, figure: Any) -> None:
        figure.set_size_inches(8, 5.6)
        panels = figure.subplots(2, 2).flat
        labels = "‖res(X)‖ / ‖X‖", "the same in √(‖·‖₁‖·‖∞)", "numerical rank", "mean cosine of two tokens"
        for axes, name, label in zip(panels, MEASURES, labels, strict=True):
            for of in dict.fromkeys(finding["of"]):
                rows = [row for row in finding.rows() if row["of"] == of]
                axes.plot([row["layer"] for row in rows], [row[name] for row in rows], ".-", label=of)
            axes.set(xlabel="layer", title=label, xticks=sorted(set(finding["layer"])))
            if name in ("residual", "composite"):
                axes.set_yscale("log")
        figure.axes[0].legend(fontsize="small")


def _composite(x: Tensor) -> Tensor:
    """√(‖X‖_1 ‖X‖_∞), (b)."""
    return (torch.linalg.matrix_norm(x, ord=1) * torch.linalg.matrix_norm(x, ord=torch.inf)).sqrt()
