"""The nouns: everything a mechanism's file needs to import, besides `attnzoo.functional`."""

from attnzoo.core.card import Card, Family, FusionCard, Law, Paper
from attnzoo.core.fusion import Fusion, Start
from attnzoo.core.kv_cache import KVCache
from attnzoo.core.layout import Layout
from attnzoo.core.mask import NO_MASK, Mask
from attnzoo.core.mechanism import Fused, FusedHeads, Head, Mechanism, MultiHead
from attnzoo.core.options import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    option_texts,
    options_of,
)
from attnzoo.core.rotary import rotate
from attnzoo.core.site import Site
from attnzoo.core.tap import Tap, find_taps, watch

__all__ = [
    "NO_MASK", "Card", "Family", "Fraction", "Fused", "FusedHeads", "Fusion", "FusionCard", "Head", "Law", "Layout",
    "Mask", "Mechanism", "MultiHead", "NonNegativeInt", "Paper", "KVCache", "PositiveFloat", "PositiveInt", "Site",
    "Start", "Tap", "find_taps", "option_texts", "options_of", "rotate", "watch",
]  # fmt: skip
