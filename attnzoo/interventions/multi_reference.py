"""Images that look at reference images of the same batch.

Ding et al., "FreeCustom: Tuning-Free Customized Image Generation for Multi-Concept Composition", 2024,
arXiv:2405.13870, §3.2, multi-reference self-attention (MRSA).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnzoo.core import Here, InstrumentCard, Intervention, Paper
from attnzoo.errors import ZooError
from attnzoo.functional import masked_softmax
from attnzoo.functional.tokens import on_tokens


@dataclass(kw_only=True, eq=False)
class MultiReference(Intervention):
    """o = softmax([s, s_1, ..., s_R]) [v, v_1, ..., v_R] of each target, s_r = q k_rᵀ / √d + w where M_r = 1, else −∞.

    Targets attend to their own tokens and to those of R reference samples of the same batch, (b h n d); references
    attend to themselves as ever. w = 0 and M = 1 treat all tokens alike; a large w leaves the references alone. The
    paper applies it in late layers, `at`.

    Args:
        references: Places of the reference samples in the batch, from 0; none leaves everything as it is.
        masks: M, which tokens of each reference show the concept: (r y x) at any size, or (y x) for all references;
            the prefix is then left out. All tokens when None.
        weight: w; 2 to 3 in the paper.
        form: `code`: scores + w where M = 1, −∞ where M = 0, as the authors' code has it; `paper`: scores · w M, so
            that masked tokens have the score 0 and still receive weight.
        regions: Which reference each target token belongs to, counted from 1, 0 for the background: (y x) at any size.
            Then it sees of the targets its own region and the background, of the references its own, and the
            background sees all targets and no reference: isolation attention, He et al., 2024, arXiv:2411.19261.
    """

    card = InstrumentCard(
        "multi_reference",
        "Let samples attend to reference samples of the same batch (MRSA).",
        equation="o = softmax([q kᵀ/√d, q k_rᵀ/√d + w (M_r = 1), −∞ (M_r = 0)]) [v, v_r]",
        paper=Paper(
            "FreeCustom: Tuning-Free Customized Image Generation for Multi-Concept Composition",
            "Ding et al.",
            2024,
            "arXiv:2405.13870",
            "§3.2",
        ),
        notes="Works on softmax attention, whose maths it does itself; dropout of weights is left out.",
    )
    neutral = {"references": ()}
    own_keys = True
    mechanisms = frozenset({"softmax"})
    references: Sequence[int] = ()
    masks: Tensor | Sequence[Any] | None = None
    weight: float = 3.0
    form: Literal["code", "paper"] = "code"
    regions: Tensor | Sequence[Any] | None = None

    def edit_heads(self, out: Tensor, here: Here) -> Tensor:
        assert (
            here.q is not None and here.k is not None and here.v is not None
        )  # `heads`: where a head is called
        q, k, v, (b, _, n, d), m = here.q, here.k, here.v, here.q.shape, here.k.shape[2]
        if strange := [place for place in self.references if not 0 <= place < b]:
            raise ZooError(
                "AZ921",
                f"`{self.card.name}`: `references` cannot be {strange[0]}",
                why=f"the batch has {b} samples, which count from 0",
            )
        references = list(self.references)
        targets = [place for place in range(b) if place not in references]
        if not references or not targets:
            return out
        allowed = torch.ones(b, 1, n, m, dtype=torch.bool, device=q.device)
        mask = here.mask.dense(n, m, q.device)
        own = allowed if mask is None else allowed & mask
        there = allowed[:, :, :1] if here.mask.keys is None else here.mask.keys[:, None, None]  # (b 1 1 m)
        marked = self._marked(here, m, q.device)  # (r m)
        theirs = there[references, 0, 0]  # (r m)
        if self.form == "code":
            theirs = theirs & marked
        theirs = theirs.expand(len(targets), 1, n, *marked.shape)  # (t 1 n r m)
        if self.regions is not None:
            keys = on_tokens(self.regions, here.layout, device=q.device)[:, None, None]  # (1 1 1 m)
            queries = keys.mT[:, :, -n:]
            own = own & ((queries == keys) | (queries == 0) | (keys == 0))
            number = torch.arange(1, len(references) + 1, device=q.device)[:, None]
            theirs = theirs & (queries[..., None] == number)  # (1 1 n 1 1) with (r 1)
        q = q[targets] * d**-0.5
        scores = torch.einsum("thnd,rhmd->thnrm", q, k[references])
        scores = scores + self.weight if self.form == "code" else scores * (self.weight * marked.to(q.dtype))
        weights = masked_softmax(
            torch.cat([q @ k[targets].mT, scores.flatten(3)], dim=-1),
            torch.cat([own[targets].expand(-1, scores.shape[1], -1, -1), _per_head(theirs, scores)], dim=-1),
        )
        mixed = weights[..., :m] @ v[targets]
        mixed = mixed + torch.einsum(
            "thnrm,rhmd->thnd", weights[..., m:].unflatten(-1, marked.shape), v[references]
        )
        return out.index_copy(0, torch.tensor(targets, device=q.device), mixed.to(out.dtype))

    def _marked(self, here: Here, m: int, device: torch.device) -> Tensor:
        """M, (r m)."""
        count = len(self.references)
        if self.masks is None:
            return torch.ones(count, m, dtype=torch.bool, device=device)
        return (on_tokens(self.masks, here.layout, count, device) > 0.5).expand(count, -1)


def _per_head(theirs: Tensor, scores: Tensor) -> Tensor:
    """(t 1 n r m) as (t h n r·m)."""
    return theirs.expand(-1, scores.shape[1], -1, -1, -1).flatten(3)
