"""What early layers found, told to late ones again.

Li et al., "Causal Tracing of Object Representations in Large Vision Language Models", 2025, arXiv:2511.05923, IRI.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.core import Here, InstrumentCard, Intervention, Layout, Paper, PositiveInt
from attnzoo.errors import ZooError
from attnzoo.functional.tokens import Tokens, chosen_tokens


@dataclass(kw_only=True, eq=False)
class Inject(Intervention):
    """ã^l = a^l + λ Σ_{k∈S, k<l} RR_k a^k for l in T, then ã^l ← ã^l ‖a^l‖ / ‖ã^l‖, for each chosen token (IRI).

    a^k is what the attention of layer k gives before it is added to the residual, as it was before any edit, (b n c);
    the same with a λ and RR of its own for MLPs. S are the sites with the k₁ greatest recovery rates RR, T those with
    the k₂ greatest: `causal_trace` measures them. The norm of each token stays as it was.

    Args:
        attention: RR of the attention of sites, by name; of others nothing is taken or changed.
        mlp: RR of the MLPs of the blocks of sites, by name.
        attention_strength: λ of attention: 0.26 for LLaVA-1.5, 0.20 and 0.15 for others.
        mlp_strength: λ of MLPs: 0.16 for LLaVA-1.5, 0.10 and 0.08 for others.
        sources: k₁, how many sites give.
        targets: k₂, how many sites receive.
        tokens: Which tokens are changed; the last in the paper. `answer` is the class token; without one all, since of
            a sequence that is read at once every token is the last in its turn.
    """

    card = InstrumentCard(
        "inject",
        "Add what causal early layers gave to what later layers give (IRI).",
        equation="ã^l = a^l + λ Σ_{k∈S, k<l} RR_k a^k;  ã^l ← ã^l ‖a^l‖ / ‖ã^l‖",
        paper=Paper(
            "Causal Tracing of Object Representations in Large Vision Language Models",
            "Li et al.",
            2025,
            "arXiv:2511.05923",
            "IRI",
        ),
        notes="The paper does not say whether a^k is taken before or after the edit of layer k; here it is before.",
    )
    neutral = {"attention_strength": 0.0, "mlp_strength": 0.0}
    enough = "any"
    attention: Mapping[str, float] | None = None
    mlp: Mapping[str, float] | None = None
    attention_strength: float = 0.26
    mlp_strength: float = 0.16
    sources: PositiveInt = 3
    targets: PositiveInt = 10
    tokens: Tokens = "answer"

    def names(self) -> tuple[str, ...]:
        return (*(self.attention or ()), *(self.mlp or ()))

    def edit_output(self, out: Tensor, here: Here) -> Tensor:
        return self._injected("attention", self.attention or {}, self.attention_strength, out, here)

    def edit_mlp(self, out: Tensor, here: Here) -> Tensor:
        return self._injected("mlp", self.mlp or {}, self.mlp_strength, out, here)

    def _injected(
        self, part: str, rates: Mapping[str, float], strength: float, a: Tensor, here: Here
    ) -> Tensor:
        """ã of one layer, a (b n c)."""
        best = sorted(rates, key=lambda site: -rates[site])
        if here.site in best[: self.sources]:
            here.shared[part, here.layer] = here.site, a
        before = [
            (rates[site], site, given)
            for (kind, layer), (site, given) in here.shared.items()
            if kind == part and layer < here.layer
        ]
        if not before or not strength or here.site not in best[: self.targets]:
            return a
        if strange := [site for _, site, given in before if given.shape != a.shape]:
            raise ZooError(
                "AZ924",
                f"what `{strange[0]}` gives cannot be added to what `{here.site}` gives",
                why="their tokens are not the same",
                help="name sites of one stack of layers alone, as `decoder.*.self`",
            )
        told = a + strength * torch.stack([rate * given for rate, _, given in before]).sum(dim=0)
        norm = torch.linalg.vector_norm(told, dim=-1, keepdim=True)
        kept = told * (torch.linalg.vector_norm(a, dim=-1, keepdim=True) / norm.masked_fill(norm == 0, 1.0))
        layout = here.layout if here.context is None else Layout((a.shape[1],))
        rows = chosen_tokens(self.tokens, layout, a.shape[1], a.device)[:, None]
        return torch.where(rows & (norm > 0), kept, a)
