"""Reliability balancing: what a classifier is unsure of is corrected by anchors in the space of its features.

Wasi et al., "ARBEx: Attentive Feature Extraction with Reliability Balancing for Robust Facial Expression Learning",
2023, arXiv:2305.01486, §3.3.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.errors import OptionError
from attnzoo.functional import rearrange


def confidence(probabilities: Tensor) -> Tensor:
    """1 - H(p) / ln K, (b) of (b k): 0 for a uniform distribution, 1 for a certain one."""
    logs = torch.where(probabilities > 0, probabilities, 1.0).log()  # with a finite gradient at 0
    entropy = -(probabilities * logs).sum(dim=-1)
    return (1 - entropy / math.log(probabilities.shape[-1])).clamp(0, 1)


class ReliabilityBalance(nn.Module):
    """p̂ = c p + (1 - c) (g conf(g) + t conf(t)) / (conf(g) + conf(t)), c = conf(p), p = softmax(logits / τ).

    g_k = Σ_a softmax(-‖e - anchor_ka‖ / δ), t_k = Σ_a softmax(W_o W_v e), both over all K A anchors. Where neither g
    nor t is any sure they count alike. All of p, g, t and p̂ sum to 1.

    The authors hand their attention the batch as one sequence, so that images attend to each other; here an image
    attends to itself alone, where queries and keys have no say. `attention: batch` is theirs. They train with
    (1 - r) p + r p̂ and r times both losses, r being the part of the training that is done.

    Args:
        dim: Width of the features e, in channels.
        classes: K.
        anchors: A, how many for each class.
        temperature: τ.
        sharpness: δ, in the units of a distance between features.
        attention: `sample`, or `batch` for the authors' attention across the images of a batch.

    Raises:
        OptionError: AZ214, for fewer than two classes, or an attention that there is not.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        anchors: int = 1,
        temperature: float = 1.0,
        sharpness: float = 1.0,
        attention: Literal["sample", "batch"] = "sample",
    ):
        super().__init__()
        if classes < 2 or attention not in ("sample", "batch"):
            raise OptionError(
                f"reliability balancing with {classes} classes and attention `{attention}`",
                help="it takes two classes or more, and attention `sample` or `batch`",
            )
        self.temperature, self.sharpness = temperature, sharpness
        self.anchors = nn.Parameter(torch.empty(classes, anchors, dim))
        many = classes * anchors
        self.qk = nn.Linear(dim, 2 * many) if attention == "batch" else None
        self.v = nn.Linear(dim, many)
        self.proj = nn.Linear(many, many)
        nn.init.normal_(self.anchors, std=0.02)  # the authors' zeros are all alike for ever

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Corrected probabilities p̂ (b k).

        Args:
            features: e, (b c).
            logits: Of the classifier, (b k).
        """
        p = (logits / self.temperature).softmax(dim=-1)
        g, t = self.by_distance(features), self.by_attention(features)
        sure = torch.stack([confidence(g), confidence(t)], dim=-1) + 1e-9
        first, second = (sure / sure.sum(dim=-1, keepdim=True)).split(1, dim=-1)
        c = confidence(p)[:, None]
        return c * p + (1 - c) * (first * g + second * t)

    def by_distance(self, features: Tensor) -> Tensor:
        """g, (b k)."""
        return self._by_class(-self.distances(features).flatten(1) / self.sharpness)

    def by_attention(self, features: Tensor) -> Tensor:
        """t, (b k)."""
        v = self.v(features)
        if self.qk is not None:
            q, k = self.qk(features).chunk(2, dim=-1)
            v = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        return self._by_class(self.proj(v))

    def distances(self, features: Tensor) -> Tensor:
        """From each feature to each anchor, (b k a)."""
        wide = torch.promote_types(features.dtype, torch.float32)  # there is none in half precision
        e, anchors = features.to(wide), self.anchors.flatten(0, 1).to(wide)
        # not as ‖e‖² - 2 e·a + ‖a‖², where digits cancel, and which a batch of more than 25 would get and others not
        apart = torch.cdist(e, anchors, compute_mode="donot_use_mm_for_euclid_dist")
        return rearrange(apart.to(features.dtype), "b (k a) -> b k a", k=self.anchors.shape[0])

    def _by_class(self, scores: Tensor) -> Tensor:
        """Probabilities of the classes from scores of all anchors, (b k) of (b k·a)."""
        return scores.softmax(dim=-1).unflatten(-1, self.anchors.shape[:2]).sum(dim=-1)

    def anchor_loss(self) -> Tensor:
        """-Σ ‖anchor_i - anchor_j‖² / (√D A²) over ordered pairs: anchors move apart. It has no lower bound."""
        _, many, dim = self.anchors.shape
        flat = self.anchors.flatten(0, 1)
        apart = (flat[:, None] - flat[None]).square().sum()
        return -apart / (math.sqrt(dim) * many**2)

    def centre_loss(self, features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """mean(c min_a ‖e - anchor_ya‖ / √D): features that are sure of themselves come to an anchor of their class.

        Args:
            features: e, (b c).
            logits: Of the classifier, (b k).
            labels: y, (b).
        """
        nearest = self.distances(features).amin(dim=-1).gather(-1, labels[:, None])[:, 0]
        c = confidence((logits / self.temperature).softmax(dim=-1))
        return (c * nearest).mean() / math.sqrt(features.shape[-1])
