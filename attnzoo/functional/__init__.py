"""Maths used unchanged by two or more mechanisms, or of no paper in particular, and einops' notation."""

from attnzoo.functional.additive import additive_scores
from attnzoo.functional.balance import balance_loss
from attnzoo.functional.causal import causal_sums
from attnzoo.functional.einops import einsum, rearrange, reduce, repeat
from attnzoo.functional.existing import existing, masked_group_norm, masked_mean, mean_token
from attnzoo.functional.factors import nearest_factors
from attnzoo.functional.heads import MLPByHead, merge_heads, split_heads
from attnzoo.functional.neighbours import Windows, neighbours, tiled_attention, tiles_save
from attnzoo.functional.softmax import (
    attention_from_scores,
    dot_product_attention,
    gated_attention,
    masked_softmax,
)
from attnzoo.functional.windows import by_distance, relative_bias, surroundings, unwindows, windows

__all__ = [
    "MLPByHead", "Windows", "additive_scores", "attention_from_scores", "balance_loss", "by_distance",
    "causal_sums", "dot_product_attention", "einsum", "existing", "gated_attention", "masked_group_norm",
    "masked_mean", "masked_softmax", "mean_token", "merge_heads", "nearest_factors", "neighbours", "rearrange",
    "reduce", "relative_bias", "repeat", "split_heads", "surroundings", "tiled_attention", "tiles_save",
    "unwindows", "windows",
]  # fmt: skip
