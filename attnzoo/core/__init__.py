"""The nouns: everything a mechanism's file needs to import, besides `attnzoo.functional`."""

from attnzoo.core.auxiliary import AuxiliaryLosses, auxiliary_losses
from attnzoo.core.card import Card, Family, FusionCard, Law, Paper
from attnzoo.core.component import Component
from attnzoo.core.formula import evaluate
from attnzoo.core.fused import Fused, FusedHeads
from attnzoo.core.fusion import Fusion, Start
from attnzoo.core.head import Head
from attnzoo.core.instrument import InstrumentCard
from attnzoo.core.intervention import Here, Intervention
from attnzoo.core.kv_cache import KVCache
from attnzoo.core.layout import Layout
from attnzoo.core.mask import NO_MASK, Mask
from attnzoo.core.mechanism import Mechanism
from attnzoo.core.multi_group import MultiGroup
from attnzoo.core.multi_head import MultiHead
from attnzoo.core.options import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    option_texts,
    options_of,
)
from attnzoo.core.pool import Pool
from attnzoo.core.probe import Probe
from attnzoo.core.rotary import Rotation, rotate
from attnzoo.core.site import Site
from attnzoo.core.tap import Tap, find_taps, watch
from attnzoo.errors import OptionError

__all__ = [
    "NO_MASK", "AuxiliaryLosses", "Card", "Component", "Family", "Fraction", "Fused", "FusedHeads", "Fusion",
    "FusionCard", "Head", "Here", "InstrumentCard", "Intervention", "KVCache", "Law", "Layout", "Mask",
    "Mechanism", "MultiGroup", "MultiHead", "NonNegativeInt", "OptionError", "Paper", "Pool", "PositiveFloat",
    "PositiveInt", "Probe", "Rotation", "Site", "Start", "Tap", "auxiliary_losses", "evaluate", "find_taps",
    "option_texts", "options_of", "rotate", "watch",
]  # fmt: skip
