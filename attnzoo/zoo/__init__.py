"""The zoo: what the installed plugins offer. The built-ins are one of them.

Submodules are imported on demand: `attnzoo.zoo.hookspecs` must not wait for torch.
"""

from importlib import import_module

_LAZY = {
    **dict.fromkeys(["Problem", "Provider", "Zoo", "load_zoo", "when_loaded"], "attnzoo.zoo.manager"),
    **dict.fromkeys(["Entry", "Registry"], "attnzoo.zoo.registry"),
}
__all__ = sorted(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'attnzoo.zoo' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
