"""Softmax over those who may be attended to; nothing to attend to gives zeros."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import Mask, Tap


def masked_softmax(scores: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Softmax over the last axis; entries that are not allowed get 0, and so does a row without any that is.

    Args:
        scores: (... m).
        allowed: Boolean that broadcasts to the scores; None allows all.
    """
    if allowed is None:
        return scores.softmax(dim=-1)
    scores = scores.masked_fill(~allowed, float("-inf"))
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return (
        scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty | ~allowed, 0.0)
    )  # no row is all -inf


def attention_from_scores(
    scores: Tensor, v: Tensor, allowed: Tensor | None, tap_scores: Tap, tap_weights: Tap, dropout: float = 0.0
) -> Tensor:
    """softmax(scores) v, seen through both taps.

    Args:
        scores: (b h n m).
        v: Values (b h m d).
        allowed: Boolean that broadcasts to the scores; None allows all.
        tap_scores: Sees the scores.
        tap_weights: Sees the weights, before dropout.
        dropout: Probability with which a weight is dropped.
    """
    weights = tap_weights(masked_softmax(tap_scores(scores), allowed))
    return F.dropout(weights, dropout) @ v if dropout else weights @ v


def dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, tap_scores: Tap, tap_weights: Tap, dropout: float = 0.0
) -> Tensor:
    """softmax(q kᵀ / √d) v: PyTorch's fused kernel while nobody watches, explicit otherwise.

    Args:
        q: Queries (b h n d).
        k: Keys (b h m d).
        v: Values (b h m d).
        mask: Who may attend to whom; all kinds.
        tap_scores: Sees the scaled scores.
        tap_weights: Sees the weights, before dropout.
        dropout: Probability with which a weight is dropped.
    """
    if tap_scores.watched or tap_weights.watched:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        return attention_from_scores(scores, v, allowed, tap_scores, tap_weights, dropout)
    if not mask.kinds:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    if (
        mask.kinds == ("causal",) and q.shape[2] == k.shape[2]
    ):  # PyTorch aligns the first query with the first key
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    allowed = mask.dense(q.shape[2], k.shape[2], q.device)
    assert allowed is not None  # the mask is of some kind
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    return torch.where(allowed.any(dim=-1, keepdim=True), out, 0.0)  # some kernels give NaN for an empty row
