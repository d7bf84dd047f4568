"""Attention that sinks draw, given back to the tokens that say something.

Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", 2025, arXiv:2503.03321, §4, §5.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.core import (
    Fraction,
    Here,
    InstrumentCard,
    Intervention,
    Layout,
    NonNegativeInt,
    Paper,
    PositiveFloat,
)
from attnzoo.errors import ZooError
from attnzoo.functional.tokens import Tokens, chosen_tokens


@dataclass(kw_only=True, eq=False)
class RedistributeSink(Intervention):
    """Sinks keep the share p of their weight; the rest goes to the other target tokens, in proportion to theirs (VAR).

    A token is a sink when φ(x) = max_{d∈D} |x_d| / RMS(x) ≥ τ for what comes into the layer, x (b m c). In the rows
    (b h n) of chosen queries with Σ_T A ≥ `least` and r = Σ_{T∖S} A / Σ_T A ≥ ρ, T the targets and S the sinks,

        A_j ← p A_j for j ∈ S,   A_j ← A_j (1 + (1 − p) Σ_S A / Σ_{T∖S} A) for j ∈ T∖S.

    Rows keep their sums. φ is at most √c, so that τ = 20 speaks of more than 400 channels; a narrow model wants less.
    Where tokens attend to another sequence, x is that.

    Args:
        dims: D, the channels in which sinks are large, as `attnzoo.lab.calibration.sink_dims` finds them; all when
            empty. Of LLaMA-2-7B the paper gives 2533 and 1415.
        threshold: τ.
        keep: p.
        ratio: ρ; the paper has 0.8, 0.5 against hallucination, 0.9 where vision counts most.
        form: `paper`: r ≥ ρ; `code`: r ≥ 1 − ρ, which the authors' code tests. They agree at ρ = 0.5.
        least: Part of a row that targets must have together.
        targets: T, the keys to be told apart: the patches.
        queries: Whose rows are changed; in the paper those after the image.
        skip_first: How many layers at the beginning are left alone; 2 in the paper.
        skip_last: How many layers at the end are left alone; 1 in the paper.
    """

    card = InstrumentCard(
        "redistribute_sink",
        "Take attention from sinks and give it to the other tokens of the image (VAR).",
        equation="A_S ← p A_S;  A_{T∖S} ← A_{T∖S} (1 + (1 − p) Σ_S A / Σ_{T∖S} A)",
        paper=Paper(
            "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
            "Kang et al.",
            2025,
            "arXiv:2503.03321",
            "§4, §5",
        ),
    )
    neutral = {"keep": 1.0}
    dims: Sequence[int] = ()
    threshold: PositiveFloat = 20.0
    keep: Fraction = 0.6
    ratio: Fraction = 0.5
    form: Literal["paper", "code"] = "paper"
    least: Fraction = 0.2
    targets: Tokens = "grid"
    queries: Tokens = "all"
    skip_first: NonNegativeInt = 0
    skip_last: NonNegativeInt = 0

    def edit_weights(self, weights: Tensor, here: Here) -> Tensor:
        if not self.skip_first <= here.layer < here.depth - self.skip_last:
            return weights
        n, m = weights.shape[-2:]
        sinks = self._sinks(here, m)[:, None, None]  # (b 1 1 m)
        targets = chosen_tokens(self.targets, here.layout, m, weights.device)
        asked = here.layout if here.context is None else Layout((n,))
        queries = chosen_tokens(self.queries, asked, n, weights.device)[:, None]  # (n 1)
        rest = targets & ~sinks
        of_targets, of_rest, of_sinks = (
            (weights * part).sum(dim=-1, keepdim=True) for part in (targets, rest, sinks)
        )  # (b h n 1)
        share = self.ratio if self.form == "paper" else 1 - self.ratio
        chosen = queries & (of_targets >= self.least) & (of_rest > 0) & (of_rest >= share * of_targets)
        # at most 1 of the rest; what is freed over it may be infinite
        shares = weights / of_rest.masked_fill(~chosen, 1.0)
        more = weights + (1 - self.keep) * of_sinks * shares
        changed = torch.where(sinks, self.keep * weights, torch.where(rest, more, weights))
        return torch.where(chosen, changed, weights)

    def _sinks(self, here: Here, m: int) -> Tensor:
        """Which keys are sinks, (b m)."""
        x = here.tokens if here.context is None else here.context
        if x is None or x.ndim != 3 or x.shape[1] != m:
            raise ZooError(
                "AZ924",
                f"`{self.card.name}` cannot tell which keys of `{here.site}` are sinks",
                why="what came into the layer must be at hand for every key, as it is when whole sequences are read",
                help="ask for whole sequences, or leave this site out",
            )
        if strange := [d for d in self.dims if not 0 <= d < x.shape[2]]:
            raise ZooError(
                "AZ921",
                f"`{self.card.name}`: `dims` cannot be {strange[0]} at `{here.site}`",
                why=f"there are {x.shape[2]} channels, which count from 0",
                help="attnzoo.lab.calibration.sink_dims(subject) finds them",
            )
        # squares of what is large overflow in half precision
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        large = (x.abs()[..., list(self.dims)] if self.dims else x.abs()).amax(dim=-1)
        return (large > 0) & (large >= self.threshold * x.square().mean(dim=-1).sqrt())
