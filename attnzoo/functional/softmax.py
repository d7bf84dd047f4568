"""Softmax, or ReLU, over those who may be attended to; nothing to attend to gives zeros."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import Component, Mask
from attnzoo.functional.heads import merge_heads, split_heads


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
    # no row is all -inf when the softmax is taken
    return scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty | ~allowed, 0.0)


def masked_relu(scores: Tensor, allowed: Tensor | None = None) -> Tensor:
    """ReLU instead of a softmax, divided by how many may be attended to; entries that are not allowed get 0.

    Args:
        scores: (... m).
        allowed: Boolean that broadcasts to the scores and is as long along the last axis; None allows all.
    """
    if allowed is None:
        return scores.relu() / scores.shape[-1]
    number = allowed.sum(dim=-1, keepdim=True).clamp(min=1)
    return scores.relu().masked_fill(~allowed, 0.0) / number


def attention_from_scores(component: Component, scores: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """softmax(scores) v, seen through the component's taps `scores` and `weights`.

    Args:
        component: Whose taps look on.
        scores: (b h n m).
        v: Values (b h m d).
        allowed: Boolean that broadcasts to the scores; None allows all.
    """
    return component.weights(masked_softmax(component.scores(scores), allowed)) @ v


def gated_attention(
    component: Component, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Mask
) -> Tensor:
    """g ⊙ softmax(q kᵀ / √d) v; the tap `weights` shows the softmax times the gate.

    Args:
        component: Whose taps `scores` and `weights` look on, and whose dropout of weights holds.
        q, k, v: Queries (b h n d), keys and values (b h m d).
        gate: g, of each head for each query, (b h n).
        mask: Who may attend to whom; all kinds.
    """
    if not (component.scores.watched or component.weights.watched):
        return dot_product_attention(component, q, k, v, mask) * gate[..., None]
    scores = component.scores((q * q.shape[-1] ** -0.5) @ k.mT)
    weights = masked_softmax(scores, mask.dense(q.shape[2], k.shape[2], q.device))
    return component.weights(weights * gate[..., None]) @ v


def dot_product_attention(component: Component, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q kᵀ / √d) v: PyTorch's fused kernel while nobody watches the component's taps, explicit otherwise.

    Args:
        component: Whose taps `scores` and `weights` look on, and whose dropout of weights holds.
        q: Queries (b h n d).
        k: Keys (b h m d).
        v: Values (b h m d).
        mask: Who may attend to whom; all kinds.
    """
    if component.scores.watched or component.weights.watched:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        return attention_from_scores(component, scores, v, mask.dense(q.shape[2], k.shape[2], q.device))
    dropout = component.attn_drop if component.training else 0.0
    if mask.free:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    if mask.kinds == ("causal",) and q.shape[2] == k.shape[2]:
        # PyTorch aligns the first query with the first key
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    allowed = mask.dense(q.shape[2], k.shape[2], q.device)
    assert allowed is not None  # the mask is of some kind
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    return torch.where(allowed.any(dim=-1, keepdim=True), out, 0.0)  # some kernels give NaN for an empty row


def multi_head_attention(component: Component, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q kᵀ / √d) v in each head of tokens that hold them all, side by side, (b n c).

    Args:
        component: Whose heads they are, whose taps `scores` and `weights` look on, and whose dropout of weights holds.
        q: Queries (b n c).
        k: Keys (b m c).
        v: Values (b m c).
        mask: Who may attend to whom; all kinds.
    """
    q, k, v = (split_heads(t, component.heads) for t in (q, k, v))
    return merge_heads(dot_product_attention(component, q, k, v, mask))
