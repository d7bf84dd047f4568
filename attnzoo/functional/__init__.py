"""Maths of mechanisms that is no paper's own: what two or more share, what has a name by itself; einops' notation."""

from attnzoo.functional.additive import additive_scores
from attnzoo.functional.balance import balance_loss
from attnzoo.functional.causal import causal_sums
from attnzoo.functional.einops import einsum, rearrange, reduce, repeat
from attnzoo.functional.existing import existing, masked_group_norm, masked_max, masked_mean, mean_token
from attnzoo.functional.factors import nearest_factors
from attnzoo.functional.greatest import greatest
from attnzoo.functional.heads import MLPByHead, merge_heads, split_heads
from attnzoo.functional.neighbours import Windows, neighbours, tiled_attention, tiles_save
from attnzoo.functional.softmax import (
    attention_from_scores,
    dot_product_attention,
    gated_attention,
    masked_softmax,
    multi_head_attention,
)
from attnzoo.functional.windows import by_distance, relative_bias, surroundings, unwindows, windows

__all__ = [
    "MLPByHead", "Windows", "additive_scores", "attention_from_scores", "balance_loss", "by_distance",
    "causal_sums", "dot_product_attention", "einsum", "existing", "gated_attention", "greatest",
    "masked_group_norm", "masked_max", "masked_mean", "masked_softmax", "mean_token", "merge_heads",
    "multi_head_attention", "nearest_factors", "neighbours", "rearrange", "reduce", "relative_bias", "repeat",
    "split_heads", "surroundings", "tiled_attention", "tiles_save", "unwindows", "windows",
]  # fmt: skip
