"""attnzoo: a zoo of attention mechanisms that compose into timm backbones.

    import timm, attnzoo                      # either order
    timm.create_model("ham_vit_b")

`import attnzoo` is light: torch and timm are imported when something needs them. As soon as timm is imported, before or
after, the models of all recipes are known to it.
"""

from importlib import import_module

from attnzoo.timm_hook import register_when_timm_is_imported
from attnzoo.zoo.hookspecs import hookimpl

_LAZY = {
    **dict.fromkeys(
        ["NO_MASK", "Card", "Family", "Fraction", "Fused", "FusedHeads", "Fusion", "FusionCard", "Head", "Law",
         "Layout", "Mask", "Mechanism", "MultiHead", "NonNegativeInt", "Paper", "PositiveFloat", "PositiveInt", "Site",
         "Start", "Tap", "find_taps", "watch"],
        "attnzoo.core",
    ),
    **dict.fromkeys(["compose", "compose_file"], "attnzoo.recipe"),
    "load_zoo": "attnzoo.zoo",
    "ZooError": "attnzoo.errors",
}  # fmt: skip

__all__ = ["hookimpl", *sorted(_LAZY)]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'attnzoo' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_timm_is_imported()
