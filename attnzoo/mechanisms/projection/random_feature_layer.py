"""Random features: what compares queries and keys is drawn once and frozen; only what is made of values is learned.

Fu et al., "What can a Single Attention Layer Learn? A Study Through the Random Features Lens", 2023, arXiv:2307.11353.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import einsum, masked_softmax, merge_heads, split_heads
from attnzoo.functional.softmax import masked_relu

TITLE = "What can a Single Attention Layer Learn? A Study Through the Random Features Lens"
FEATURES = 16
"""Of so many it is as good as certain that one hears a pair of tokens: a ReLU is silent for half of them."""


class RandomFeatureLayer(Mechanism):
    """Σ_h V_h Σ_j a_hij s̃_j, a_hij = ReLU(x̃_iᵀ W_h s̃_j) / m, x̃ = [x, 1], s = x or the context; W_h is frozen.

    With `qk: frozen` it is multi-head attention with frozen W_Q and W_K: a_hij = softmax_j(q_i · k_j / √d).

    Args:
        site: Where the mechanism is put.
        qk: What is frozen: `random`, W_h with entries from N(0, 1/4); `biased`, diag(I, 0) + N(0, 1/4); `frozen`, W_Q
            and W_K of the site's heads, with entries from N(0, 1 / channels that come in).
        features: How many W_h there are; None takes 16. The paper's theory is about many, 1000 say.
        weights: `relu`, the paper's σ, as a mean over keys, or `softmax`; None: `softmax` for `frozen`, else `relu`.
        scaled: Whether x̃ and s̃ are brought to length √2, as the paper's, on the unit sphere, are: scores are N(0, 1).

    Raises:
        OptionError: AZ214, for `features` or `scaled` of the site's heads, and diag(I, 0) for tokens of two widths.
    """

    card = Card(
        name="random_feature_layer",
        family=Family.PROJECTION,
        summary="Queries and keys compared by frozen random matrices: only what is made of values is learned.",
        equation="Σ_h V_h Σ_j a_hij s̃_j\na_hij = relu(x̃_iᵀ W_h s̃_j) / m\n"
        "x̃ = √2 [x; 1] / ‖[x; 1]‖,  s̃ = √2 [s; 1] / ‖[s; 1]‖",
        paper=Paper(TITLE, "Fu et al.", 2023, "arXiv:2307.11353"),
        time="h n m c + h n c c",
        memory="h n m + h n c",
        params=f"(e + qkv_bias + c + proj_bias) * c if qk == 'frozen' else (features or {FEATURES}) * (e + 1) * c",
        flops="4 * (n * c + m * e + n * m) * c if qk == 'frozen' "
        f"else 2 * (features or {FEATURES}) * (e + 1) * (n * (c + 1) + 2 * n * m + n * c)",
        masks={"keys", "causal", "pairs"},
        one_head=True,
        context=True,
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.PERMUTATION_EQUIVARIANT},
        fidelity="adapted",
        notes="The paper's layer answers one query with one number; here every token is a query, and each of c "
        "channels has a v of its own. Keys are the context, as in the paper, or the tokens themselves; m counts those "
        "that may be attended to. In the taps h counts features. Layer norms give tokens of length √c, whose scores "
        "grow with c: hence `scaled`. What is frozen is a buffer: it is saved, and does not learn. With fewer features "
        "than 16, or ReLUs in heads, all may be silent for a query: then neither pairs nor a context is claimed.",
    )

    q: Tensor
    k: Tensor
    kernel: Tensor

    @classmethod
    def claims(cls, *, qk: str, features: int | None, weights: str | None, **options) -> Card:
        card, heads = cls.card, qk == "frozen"
        if heads:
            card = replace(card, time="n m c + n c c", one_head=False, honours={"qkv_bias", "proj_bias"})
        if (weights or ("softmax" if heads else "relu")) == "softmax":
            return replace(card, laws=card.laws | {Law.STOCHASTIC})
        if heads or (features or FEATURES) < FEATURES:
            return replace(card, masks={"keys", "causal"}, context=False)
        return card

    def __init__(
        self, site: Site, *, qk: Literal["random", "biased", "frozen"] = "random",
        features: PositiveInt | None = None, weights: Literal["relu", "softmax"] | None = None, scaled: bool = True,
    ):  # fmt: skip
        super().__init__(site)
        dim, wide = site.dim, site.context_dim or site.dim
        if qk == "frozen" and (features is not None or not scaled):
            raise OptionError(
                "`random_feature_layer`: with `qk: frozen` heads are the site's, and scores are divided by √d",
                help="leave out `features` and `scaled`, or choose `qk: random`",
            )
        if qk == "biased" and wide != dim:
            raise OptionError(
                f"`random_feature_layer`: diag(I, 0) cannot compare {dim} channels with {wide}",
                help="choose `qk: random`",
            )
        self.qk, self.scaled = qk, scaled
        self.softmax = (weights or ("softmax" if qk == "frozen" else "relu")) == "softmax"
        if qk == "frozen":
            self.register_buffer("q", torch.empty(dim, dim))
            self.register_buffer("k", torch.empty(dim, wide))
            self.v = nn.Linear(wide, dim, bias=site.qkv_bias)
            self.proj = nn.Linear(dim, dim, bias=site.proj_bias)
        else:
            features = features or FEATURES
            self.register_buffer("kernel", torch.empty(features, dim + 1, wide + 1))  # W_h
            self.proj = nn.Linear(features * (wide + 1), dim, bias=False)  # V_h, side by side
        self.init_weights()

    def init_weights(self) -> None:
        """Draws what is frozen."""
        if self.qk == "frozen":
            for matrix in (self.q, self.k):
                nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)
            return
        nn.init.normal_(self.kernel, std=0.5)
        if self.qk == "biased":
            self.kernel.diagonal(dim1=1, dim2=2)[:, :-1].add_(1.0)

    @property
    def tap_heads(self) -> int:
        return self.heads if self.qk == "frozen" else len(self.kernel)

    def mix(self, x, source, *, mask, layout):
        allowed = mask.dense(x.shape[1], source.shape[1], x.device)
        if self.qk == "frozen":
            q, k, v = F.linear(x, self.q), F.linear(source, self.k), self.v(source)
            q, k, v = (split_heads(t, self.heads) for t in (q * (q.shape[-1] // self.heads) ** -0.5, k, v))
            return self.proj(merge_heads(self._weigh(q @ k.mT, allowed) @ v))
        x, source = self._extended(x), self._extended(source)
        q = einsum(x, self.kernel, "b n c, h c e -> b h n e")
        weights = self._weigh(einsum(q, source, "b h n e, b m e -> b h n m"), allowed)
        return self.proj(einsum(weights, source, "b h n m, b m e -> b n h e").flatten(2))

    def _extended(self, x):
        """x̃, (b n c+1)."""
        x = F.pad(x, (0, 1), value=1.0)
        return F.normalize(x, dim=-1) * 2**0.5 if self.scaled else x

    def _weigh(self, scores, allowed):
        """a of the scores, (b h n m)."""
        return self.weights((masked_softmax if self.softmax else masked_relu)(self.scores(scores), allowed))
